"""Transformers' continuous batching (paged keys and values, `ContinuousBatchingManager`) as an engine."""

from __future__ import annotations

import functools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import psutil
import torch
from fastalign_kernels.head.sampling import Distribution
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from ..flat_attention import original_of
from ..policy import policy_info, unwrap
from ..policy_check import is_whole, quiet
from .engine import Completion, Request, SyncReport
from .native_attention import configs_of
from .native_cache import bytes_per_token
from .native_forward import is_exact
from .native_sampling import Plan, plan_of

logger = logging.getLogger(__name__)

KNOWN = {field.name for field in fields(ContinuousBatchingConfig)}
PAGE = "page_size" if "page_size" in KNOWN else "block_size"  # TODO: drop with transformers < 5.17
OLD_NAMES = "auto_switch_to_flash" not in KNOWN  # TODO: drop with transformers < 5.19
HOST_DEFAULTS = {PAGE: 32, "max_batch_tokens": 2048, "max_requests_per_batch": 256}  # where there is no GPU


class ContinuousEngine:
    """Samples from the training model itself through Transformers' manager, whose thread works during `step` alone.

    Log-probabilities are those it returns: of the processed distribution, in fp32 from logits in the model's dtype.
    Differences from the other engines, all the manager's: it draws from one random stream, so that seeds of requests
    are not kept (said once in the log); it knows no repetition penalty; requests with other sampling settings wait
    until those before them are done; pending requests start anew after `sync`, since its caches cannot be told of new
    weights. Before Transformers 5.18 it cannot pause: `step` then returns when all that was submitted is finished.
    """

    name = "continuous"

    def __init__(
        self,
        model: Any,
        *,
        options: dict[str, Any] | None = None,
        autocast: Callable[[], AbstractContextManager],
        seed: int = 0,
    ):
        """`options` are those of `ContinuousBatchingConfig` (ValueError for one it does not have)."""
        self.model, self.base = model, unwrap(model)
        self.version = 0
        self.exact = is_exact(self.base, autocast)
        if unknown := sorted(set(options or {}) - KNOWN):
            raise ValueError(
                f"`transformers_continuous_batching_config` has {', '.join(unknown)}; ContinuousBatchingConfig knows "
                f"{', '.join(sorted(KNOWN))}."
            )
        if not is_whole(self.base) or getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "Continuous batching samples from whole weights and without soft prompts; the weights are spread over "
                "ranks or PEFT puts a soft prompt before each row. Leave `use_transformers_continuous_batching` unset."
            )
        policy_info(model)
        self._options = dict(options or {})
        self._seeds = random.Random(seed)
        self._random: list[Tensor] | None = None  # its own stream, once the manager has seeded it
        self._configs = configs_of(self.base)
        self._waiting: deque[tuple[Request, Plan]] = deque()
        self._running: dict[str, tuple[Request, Plan]] = {}
        self._manager: Any = None
        self._kind: Distribution | None = None
        self._paused = ExitStack()
        self._number = 0

    @property
    def pending(self) -> int:
        return len(self._waiting) + len(self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests. ValueError for a prompt that is empty, a key that is pending, or settings that the manager
        does not have."""
        taken = {request.key for request, _ in (*self._waiting, *self._running.values())}
        found = []
        for request in requests:
            plan = plan_of(request.sampling, self.name)
            if plan.distribution.repetition_penalty != 1.0:
                raise ValueError(
                    f"`repetition_penalty` is {plan.distribution.repetition_penalty}, which Transformers' continuous "
                    "batching leaves out. Set it to 1.0 or leave `use_transformers_continuous_batching` unset."
                )
            if not request.prompt_ids or request.model_inputs:
                what = "images, ..., which continuous batching cannot take" if request.model_inputs else "no tokens"
                raise ValueError(
                    f"The prompt of request {request.key!r} has {what}; give it text of at least one token."
                )
            if request.key in taken:
                raise ValueError(f"A request with key {request.key!r} is pending already; give each its own key.")
            taken.add(request.key)
            found.append((request, plan))
        if any(request.seed is not None for request in requests):
            _say_once("Seeds of requests are not kept: Transformers' continuous batching has one random stream.")
        self._waiting.extend(found)

    def step(self) -> list[Completion]:
        """Waits for the next completions. RuntimeError where the manager failed, with its error."""
        if not self.pending:
            return []
        with self._working():
            self._feed()
            found: list[Completion] = []
            while self._running:
                can_pause = hasattr(self._manager, "pause")
                result = self._manager.get_result(timeout=0.0 if found and can_pause else 1.0)
                if result is not None:
                    found += self._take(result)
                elif found and can_pause:
                    break
                elif not self._manager.is_running():
                    raise RuntimeError(f"Continuous batching ended with {len(self._running)} requests unfinished.")
            if not self._running:
                self._end()
        return found

    def abort(self) -> None:
        """Forget what is pending."""
        self._waiting.clear()
        self._running.clear()
        self._end()

    def sync(self, version: int) -> SyncReport:
        """The weights are the model's own; its caches go, and pending requests start anew."""
        self._waiting.extendleft(reversed(self._running.values()))
        self._running.clear()
        self._end()
        self.version = version
        return SyncReport("same model", 0.0)

    def sleep(self) -> None:
        """Give back the caches; pending requests start anew."""
        self.sync(self.version)

    def close(self) -> None:
        """Forget everything; the model stays as it is."""
        self.abort()

    def _take(self, result: Any) -> list[Completion]:
        if result.request_id not in self._running or (result.error is None and not result.is_finished()):
            return []
        request, plan = self._running.pop(result.request_id)
        if result.error is not None:
            raise RuntimeError(f"Continuous batching failed at request {request.key!r}: {result.error}")
        ids = list(result.generated_tokens)
        reason = "stop" if ids[-1] in plan.stop_ids else "length"
        return [Completion(request.key, ids, list(result.logprobs), reason, self.version, self.version)]

    def _feed(self) -> None:
        """Hand over the waiting requests that sample as those that run do."""
        if self._waiting and self._manager is None:
            self._kind = self._waiting[0][1].distribution
            self._begin()
        manager: Any = self._manager
        later: deque[tuple[Request, Plan]] = deque()
        while self._waiting:
            request, plan = self._waiting.popleft()
            if plan.distribution != self._kind:
                later.append((request, plan))
                continue
            self._number += 1
            name = f"fastalign_{self._number}"
            self._running[name] = request, plan
            stops: Any = list(plan.stop_ids) or -1
            manager.add_request(request.prompt_ids, name, plan.max_new_tokens, eos_token_id=stops)
        self._waiting = later

    def _begin(self) -> None:
        assert self._kind is not None
        greedy = self._kind.temperature == 0.0
        settings = {} if greedy else {n: getattr(self._kind, n) for n in ("temperature", "top_k", "top_p")}
        if not greedy and self._kind.min_p:
            settings["min_p"] = self._kind.min_p
        config = GenerationConfig(do_sample=not greedy, eos_token_id=-1, **settings)
        self._manager = self.base.init_continuous_batching(config, ContinuousBatchingConfig(**self._settings()))
        self._manager.start()

    def _settings(self) -> dict[str, Any]:
        """Options of the manager: the user's, else half of a GPU's memory, of a host's what is needed."""
        own: dict[str, Any] = {"return_logprobs": True, "seed": self._seeds.getrandbits(31)}
        if not OLD_NAMES:
            own["auto_switch_to_flash"] = False  # training and sampling attend alike
        if self.base.device.type != "cpu":
            return own | {"max_memory_percent": 0.5} | self._options
        own |= {name: value for name, value in HOST_DEFAULTS.items() if name in KNOWN} | self._options
        page = own[PAGE]
        needed = sum(-(-(len(r.prompt_ids) + plan.max_new_tokens) // page) + 1 for r, plan in self._waiting)
        most = psutil.virtual_memory().available // 4 // (page * bytes_per_token(self.base))
        own.setdefault("num_blocks", max(min(needed, most), 16))
        return own

    def _end(self) -> None:
        """Stop the manager's thread and free its caches."""
        if self._manager is None:
            return
        manager, self._manager = self._manager, None
        with self._swapped():
            self._paused.close()
            manager.stop(block=True, hard_stop=True)
            manager.destroy()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """The model as the manager needs it, and the manager at work; afterwards both as they were."""
        with quiet(self.model), self._swapped():
            self._paused.close()
            try:
                yield
            except BaseException:
                self.abort()
                raise
            finally:
                if self._manager is not None and hasattr(self._manager, "pause"):
                    self._paused.enter_context(self._manager.pause())

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        """The attention that the model was loaded with, and the engine's own random stream."""
        names = [(config, config._attn_implementation) for config in self._configs]
        outside = _random_state(self.base.device)
        if self._random is not None:
            _set_random_state(self._random, self.base.device)
        for config, name in names:
            plain = original_of(name or "sdpa")
            config._attn_implementation_internal = f"paged|{plain}" if OLD_NAMES or plain == "eager" else plain
        try:
            yield
        finally:
            for config, name in names:
                config._attn_implementation_internal = name
            self._random = _random_state(self.base.device)
            _set_random_state(outside, self.base.device)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
