"""Rows with images in the embedded engine: padded on the left, with the inputs that the model's `generate` makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.vision import TYPE_KEYS
from .image_inputs import join_inputs
from .native_own_cache import OwnCache

IMAGE_TOKENS = 32768  # of padded prompts that are read in one forward
ALIGNED = ("attention_mask", "position_ids", *TYPE_KEYS)  # (..., rows, L)


def within_limit(rows: list[Any]) -> list[list[Any]]:
    """`rows` of `native_cohort.Row`, where they have images in parts of `IMAGE_TOKENS` with padding."""
    if not rows[0].request.model_inputs:
        return [rows]
    size = max(IMAGE_TOKENS // max(len(row.history) for row in rows), 1)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


class ImageCache(OwnCache):
    """Rows of different lengths, one forward of the model per token; images are read with the prompts.

    Positions, types of tokens and masks follow from the model's hooks for generation, so each model has its own.
    ValueError for a model without a cache, or with a soft prompt of PEFT.
    """

    def __init__(self, model: nn.Module, base: Any, rows: Sequence[Sequence[int]], inputs: Sequence[dict[str, Any]]):
        """`rows` are the ids of each row, `inputs` its prompt's (see `Request.model_inputs`)."""
        lengths, device = [len(row) for row in rows], base.device
        width = max(lengths)
        padded = [[0] * (width - length) + list(row) for row, length in zip(rows, lengths, strict=True)]
        super().__init__(model, base, torch.tensor(padded, device=device))
        if self._name is None:
            raise ValueError(
                f"{type(base).__name__} keeps no cache that completions of prompts with images could go on from (soft "
                "prompts never do). Take another adapter or model, or drop the images."
            )
        self._base, self._is_first = base, True
        mask = [[0] * (width - length) + [1] * length for length in lengths]
        given = {name: value.to(device) for name, value in join_inputs(inputs, lengths, width, left=True).items()}
        self._inputs: dict[str, Any] = {"attention_mask": torch.tensor(mask, device=device), **given}
        if "position_ids" in self.accepted:
            self._inputs["position_ids"] = base._prepare_position_ids_for_generation(self.ids, self._inputs)
        self._inputs["use_cache"] = True

    def inputs(self, last: Tensor | None) -> dict[str, Any]:
        """See `OwnCache`."""
        self._append(last)
        step = {"next_sequence_length": None if self._is_first else 1, "is_first_iteration": self._is_first}
        return self._base.prepare_inputs_for_generation(self.ids, **step, **self._inputs)

    def take(self, output: Any) -> None:
        """See `OwnCache`."""
        kept = {name: value for name, value in self._inputs.items() if name in ("use_cache", *ALIGNED)}
        self._inputs = self._base._update_model_kwargs_for_generation(output, kept)
        assert self._name is not None
        self._cache, self._is_first = self._inputs[self._name], False

    def drop(self, source: list[int], target: list[int], kept: int) -> None:
        """See `OwnCache`."""
        index = self._kept(source, target, kept)
        self._inputs |= {name: self._inputs[name].index_select(-2, index) for name in ALIGNED if name in self._inputs}
        super().drop(source, target, kept)
