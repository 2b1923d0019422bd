"""How much of its memory a vLLM engine gives back between two rollouts, by version and by who else uses it."""

from __future__ import annotations

import inspect
from typing import Any


class Sleep:
    """Puts an engine to sleep and wakes it; with `enable_sleep_mode` only (a GPU), else every call does nothing.

    Weights that training uses too stay where they are: only the cache of keys and values goes (level 0 and
    `release_kv_cache_memory`, vLLM 0.32; older versions keep it). Weights that every `sync` brings anew are dropped
    (level 2), others wait in host memory (level 1).
    """

    def __init__(self, engine: Any, enabled: bool):
        self._engine = engine  # vLLM's LLMEngine
        self.enabled = enabled
        self._asleep: set[str] = set()
        self.weights_lost = False  # awake, but to be brought anew before anything is sampled

    def sleep(self, *, shared: bool, brought_anew: bool, pending: bool) -> None:
        """`shared`: weights are in use by training; `brought_anew`: the next `sync` writes all of them."""
        if not self.enabled or self._asleep:
            return
        keeps = "mode" in inspect.signature(self._engine.sleep).parameters
        if pending and not keeps:  # it would drop requests
            return
        mode = {"mode": "keep"} if keeps else {}
        if shared:
            if hasattr(self._engine, "release_kv_cache_memory"):
                self._engine.sleep(level=0, **mode)
                self._engine.release_kv_cache_memory()
                self._asleep = {"kv_cache"}
            return
        self._engine.sleep(level=2 if brought_anew else 1, **mode)
        self._asleep = {"weights", "kv_cache"}
        self.weights_lost = brought_anew

    def wake_weights(self) -> None:
        """Room for weights again, that of the cache still free: what copying them in needs."""
        self._wake("weights")

    def wake(self) -> None:
        """Everything back, requests go on."""
        self._wake("weights")
        self._wake("kv_cache")

    def _wake(self, tag: str) -> None:
        if tag in self._asleep:
            self._engine.wake_up(tags=[tag])
            self._asleep.remove(tag)
