"""Rows of a model that keeps its own cache: recurrent states, attention that is not ours to give."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

CACHES = ("past_key_values", "cache_params")  # as models name them, in arguments and outputs


class OwnCache:
    """Rows of one length without padding, one forward of the model per token.

    A model without a cache that can be continued, or with a soft prompt of PEFT, reads each row again for each token.
    """

    def __init__(self, model: nn.Module, base: Any, ids: Tensor):
        """`ids` (rows, L) of the prompts."""
        self.ids = ids
        self.accepted = accepted = inspect.signature(type(base).forward).parameters
        has_soft_prompt = bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))
        self._name = None if has_soft_prompt else next((name for name in CACHES if name in accepted), None)
        self._cache: Any = None
        self.num_tokens = ids.numel()

    def inputs(self, last: Tensor | None) -> dict[str, Any]:
        """What the model is called with, given the last token (rows,) of each row; None: for the prompts."""
        self._append(last)
        if self._cache is None or self._name is None:
            return {"input_ids": self.ids, "use_cache": self._name is not None}
        return {"input_ids": self.ids[:, -1:], "use_cache": True, self._name: self._cache}

    def _append(self, last: Tensor | None) -> None:
        if last is not None:
            self.ids = torch.cat([self.ids, last[:, None]], 1)
            self.num_tokens = self.ids.numel()

    def take(self, output: Any) -> None:
        """Keep what the model returned for the next token."""
        if self._name is not None:
            self._cache = output.get(self._name)

    def reserve(self, capacity: int) -> None:
        """Nothing: the model's cache grows by itself."""

    def drop(self, source: list[int], target: list[int], kept: int) -> None:
        """Move the rows at `source` to `target` and forget all after the first `kept`."""
        index = self._kept(source, target, kept)
        self.ids = self.ids[index]
        self.num_tokens = self.ids.numel()
        if self._cache is not None and kept:
            self._cache.reorder_cache(index)

    def _kept(self, source: list[int], target: list[int], kept: int) -> Tensor:
        """(kept,) places of the rows that stay, in their new order."""
        order = list(range(len(self.ids)))
        for a, b in zip(source, target, strict=True):
            order[b] = order[a]
        return torch.tensor(order[:kept], device=self.ids.device)
