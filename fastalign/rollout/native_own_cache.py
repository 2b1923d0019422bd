"""Rows of a model that keeps its own cache: recurrent states, images, attention that is not ours to give."""

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

    def __init__(self, model: nn.Module, base: Any, ids: Tensor, model_inputs: dict[str, Any]):
        """`ids` (rows, L) of the prompts; `model_inputs` of one prompt, which all rows then share."""
        self.ids = ids
        self._first = {name: _repeated(value, ids) for name, value in model_inputs.items()}
        accepted = inspect.signature(type(base).forward).parameters
        has_soft_prompt = bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))
        self._name = None if has_soft_prompt else next((name for name in CACHES if name in accepted), None)
        self._cache: Any = None
        self.num_tokens = ids.numel()

    def inputs(self, last: Tensor | None) -> dict[str, Any]:
        """What the model is called with, given the last token (rows,) of each row; None: for the prompts."""
        if last is not None:
            self.ids = torch.cat([self.ids, last[:, None]], 1)
            self.num_tokens = self.ids.numel()
        if self._cache is None or self._name is None:
            return {"input_ids": self.ids, "use_cache": self._name is not None, **self._first}
        return {"input_ids": self.ids[:, -1:], "use_cache": True, self._name: self._cache}

    def take(self, output: Any) -> None:
        """Keep what the model returned for the next token."""
        if self._name is not None:
            self._cache = output.get(self._name)

    def reserve(self, capacity: int) -> None:
        """Nothing: the model's cache grows by itself."""

    def drop(self, source: list[int], target: list[int], kept: int) -> None:
        """Move the rows at `source` to `target` and forget all after the first `kept`."""
        order = list(range(len(self.ids)))
        for a, b in zip(source, target, strict=True):
            order[b] = order[a]
        index = torch.tensor(order[:kept], device=self.ids.device)
        self._first = {name: _selected(value, index, len(self.ids)) for name, value in self._first.items()}
        self.ids = self.ids[index]
        self.num_tokens = self.ids.numel()
        if self._cache is not None and kept:
            self._cache.reorder_cache(index)


def _repeated(value: Any, ids: Tensor) -> Any:
    """A tensor of one prompt once for each row."""
    return torch.cat([value.to(ids.device)] * len(ids)) if isinstance(value, Tensor) else value


def _selected(value: Any, index: Tensor, num_rows: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.view(num_rows, -1, *value.shape[1:])[index].flatten(0, 1)
