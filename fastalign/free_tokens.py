"""Tokens of a flat batch that need no gradient: each layer runs them without one, behind the tokens that need it.

They are the last tokens of the row. Where one of their segments continues a prefix, a layer has its queries, keys and
values from the tokens before, and runs the free ones without gradient on a row of prefixes and segments. So they cost
one forward of themselves and no backward, in the same forward of the model, with the same results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from fastalign_kernels.attention import Segments
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

from .data.batch import TokenBatch
from .flat_attention import FlatMask

EXTRAS = ("free_before", "free_bounds", "free_row", "free_at")


def set_free(batch: TokenBatch, segments: np.ndarray) -> TokenBatch:
    """`batch` (flat, on the host) with `segments` (S,) bool moved to its end as free tokens.

    `extras` gets `EXTRAS`: the bounds of the segments that need a gradient, each joined with the prefix right before
    it, and the row that free tokens attend in: its bounds, its tokens by place in the batch, and the free ones by
    place in the row.
    """
    assert not batch.is_padded
    prefix = np.full(len(segments), -1) if batch.prefix is None else batch.prefix.numpy()
    order = np.argsort(segments, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    old = batch.cu_seqlens.numpy().astype(np.int64)
    lengths = np.diff(old)[order]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = _spans(old[:-1][order], lengths)
    place = np.empty_like(tokens)
    place[tokens] = np.arange(len(tokens))
    prefix = prefix[order]
    prefix = np.where(prefix >= 0, number[prefix], -1)
    count = int(segments.sum())
    own, free = prefix[: len(order) - count], np.arange(len(order) - count, len(order))
    joined = (own >= 0) & (own == np.arange(len(own)) - 1)
    assert (joined | (own < 0)).all(), "a prefix must stand right before the segment that needs a gradient"
    pairs = np.stack([prefix[free], free], 1).ravel()
    in_pairs = np.where(pairs >= 0, lengths[pairs], 0)
    in_row = np.concatenate([[0], np.cumsum(in_pairs)])
    found = {
        "free_before": starts[: len(own) + 1][np.append(~joined, True)].astype(np.int32),
        "free_bounds": in_row[::2].astype(np.int32),
        "free_row": _spans(starts[pairs], in_pairs),
        "free_at": _spans(in_row[1::2], lengths[free]),
    }
    index = torch.from_numpy(tokens)
    return replace(
        batch,
        input_ids=batch.input_ids[index],
        position_ids=batch.position_ids[index],
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        source=torch.from_numpy(place)[batch.source],
        prefix=None if batch.prefix is None else torch.from_numpy(prefix.astype(np.int32)),
        extras=batch.extras | {name: torch.from_numpy(value) for name, value in found.items()},
    )


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers of [start, start + length) of every span, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) + np.repeat(starts - ends + lengths, lengths)


@dataclass(frozen=True, eq=False)
class FreeTokens:
    """The free tokens of a batch, for its layers."""

    count: int
    before: Segments  # of the tokens before them
    row: Segments  # of the row that they attend in
    tokens: Tensor  # the tokens of that row, by place in the batch
    at: Tensor  # (count,), the free ones by place in the row

    @classmethod
    def of(cls, batch: TokenBatch) -> FreeTokens | None:
        """Those that `set_free` has put into `batch`."""
        if "free_at" not in batch.extras:
            return None
        before, bounds, tokens, at = (batch.extras[name] for name in EXTRAS)
        longest = batch.max_seqlen
        return cls(at.numel(), Segments(before, longest), Segments(bounds, longest), tokens, at)


@dataclass(frozen=True, eq=False)
class _Recorded(FlatMask):
    """The mask of tokens whose queries, keys and values are kept for the free tokens."""

    kept: list[tuple[Tensor, ...]] = field(default_factory=list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        self.kept[:] = [(q.detach(), k.detach(), v.detach())]
        return attention(q, k, v, segments=self.segments)


@dataclass(frozen=True, eq=False)
class _Continuing(FlatMask):
    """The mask of free tokens, behind those that a `_Recorded` has seen."""

    kept: list[tuple[Tensor, ...]] = field(default_factory=list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        assert self.free is not None
        row = (torch.cat(pair)[self.free.tokens] for pair in zip(self.kept.pop(), (q, k, v), strict=True))
        return attention(*row, segments=self.free.row)[self.free.at]


def teach_layers(model: nn.Module) -> bool:
    """Make the layers of `model` run free tokens by themselves; whether it has layers that can. Idempotent."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        if not isinstance(layer.__dict__.get("forward"), _Layer):
            layer.forward = _Layer(layer, layer.__dict__.get("forward"))
    return bool(layers)


@dataclass
class _Layer:
    """The forward of a layer, in two parts where its mask says that there are free tokens."""

    layer: nn.Module
    own: Callable | None  # a forward of the instance, set by somebody else

    def __call__(self, hidden: Tensor, *args, **kwargs) -> Any:
        forward = self.own or functools.partial(type(self.layer).forward, self.layer)
        mask = next((x for x in (*args, *kwargs.values()) if isinstance(x, FlatMask)), None)
        if mask is None or mask.free is None:
            return forward(hidden, *args, **kwargs)
        free, total = mask.free, hidden.shape[1]
        kept: list = []
        basis = (mask.causal, mask.window)
        masks = _Recorded(free.before, *basis, None, kept), _Continuing(free.row, *basis, free, kept)
        parts = []
        spans = slice(0, total - free.count), slice(total - free.count, total)
        for span, part_mask in zip(spans, masks, strict=True):
            part = functools.partial(_part, span=span, total=total, mask=part_mask)
            given = [part(x) for x in (hidden, *args)], {name: part(x) for name, x in kwargs.items()}
            if not parts:
                parts.append(forward(*given[0], **given[1]))
            else:
                with torch.no_grad(), _nothing_captured():
                    parts.append(forward(*given[0], **given[1]))
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, 1)
        return (torch.cat([part[0] for part in parts], 1), *parts[0][1:])


def _part(value: Any, *, span: slice, total: int, mask: FlatMask) -> Any:
    """What of a layer's argument belongs to the tokens in `span` of `total`."""
    if isinstance(value, FlatMask):
        return mask
    if isinstance(value, (tuple, list)):
        return type(value)(_part(x, span=span, total=total, mask=mask) for x in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (1, total):
        return value[:, span]
    return value


@contextmanager
def _nothing_captured():
    """Router logits and the like are collected of the tokens with a gradient only."""
    token = output_capturing._active_collector.set(None)
    try:
        yield
    finally:
        output_capturing._active_collector.reset(token)
