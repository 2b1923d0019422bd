"""Tokens of a flat batch of which a layer may compute less, in the same forward of the model, with the same results.

Free tokens need no gradient. They are the last tokens of the row. Where one of their segments continues a prefix, a
layer has its queries, keys and values from the tokens before, and runs the free ones without gradient on a row of
prefixes and segments. So they cost one forward of themselves and no backward.

Unread tokens have hidden states that nobody reads behind the last layer (most of a prompt, or all of a sequence but
its last token). That layer attends for all tokens and computes everything behind its attention for those that are
read; the others come out as zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from fastalign_kernels.attention import Segments
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

from .data.batch import TokenBatch
from .flat_attention import FlatMask, free_tokens

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
        extras={k: v for k, v in batch.extras.items() if k != "read"}
        | {name: torch.from_numpy(value) for name, value in found.items()},
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

    def run(self, layer: Layer, forward: Callable, mask: FlatMask, hidden: Tensor, args: tuple, kwargs: dict) -> Any:
        """What `layer` gives for `hidden` (1, T, D): of the tokens before, then without gradient of the free ones."""
        total = hidden.shape[1]
        kept: list = []
        basis = (mask.causal, mask.window)
        masks = _Recorded(self.before, *basis, None, kept), _Continuing(self.row, *basis, self, kept)
        parts = []
        spans = slice(0, total - self.count), slice(total - self.count, total)
        for span, part_mask in zip(spans, masks, strict=True):
            part = functools.partial(_part, take=lambda x, span=span: x[:, span], total=total, mask=part_mask)
            given = [part(x) for x in (hidden, *args)], {name: part(x) for name, x in kwargs.items()}
            if not parts:
                parts.append(forward(*given[0], **given[1]))
            else:
                with torch.no_grad(), _nothing_captured():
                    parts.append(forward(*given[0], **given[1]))
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, 1)
        return (torch.cat([part[0] for part in parts], 1), *parts[0][1:])


@dataclass(frozen=True, eq=False)
class ReadTokens:
    """The tokens of a batch whose hidden states are read, for its last layer."""

    at: Tensor  # (M,) int64, increasing

    def run(self, layer: Layer, forward: Callable, mask: FlatMask, hidden: Tensor, args: tuple, kwargs: dict) -> Any:
        """What `layer` gives for `hidden` (1, T, D); of the last layer zeros for the tokens that are not read."""
        if not layer.is_last or torch.compiler.is_compiling():
            return forward(hidden, *args, **kwargs)
        kept: list[Tensor] = []
        basis = (mask.segments, mask.causal, mask.window, None, kept)
        part = functools.partial(_part, take=lambda x: x, total=hidden.shape[1], mask=_UntilAttention(*basis))
        try:
            return forward(*map(part, (hidden, *args)), **{name: part(x) for name, x in kwargs.items()})
        except _AttendedError:
            pass
        part = functools.partial(part, take=lambda x: x.index_select(1, self.at), mask=_Attended(*basis, self.at))
        found = forward(*map(part, (hidden, *args)), **{name: part(x) for name, x in kwargs.items()})
        rows, *rest = (found,) if isinstance(found, Tensor) else found
        rows = torch.zeros_like(hidden, dtype=rows.dtype).index_copy(1, self.at, rows)
        return rows if isinstance(found, Tensor) else (rows, *rest)


def reading(batch: TokenBatch) -> AbstractContextManager[None]:
    """Inside, the last layer of a taught model computes what `batch.extras["read"]` names, if it is there."""
    return free_tokens(ReadTokens(batch.extras["read"]) if "read" in batch.extras else None)


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


class _AttendedError(Exception):
    """Leaves a layer behind its attention."""


@dataclass(frozen=True, eq=False)
class _UntilAttention(FlatMask):
    """The mask of all tokens: their attention is kept, and the layer is left."""

    kept: list[Tensor] = field(default_factory=list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        self.kept[:] = [attention(q, k, v, segments=self.segments)]
        raise _AttendedError


@dataclass(frozen=True, eq=False)
class _Attended(FlatMask):
    """The mask of tokens `at`, for which an `_UntilAttention` has attended."""

    kept: list[Tensor] = field(default_factory=list)
    at: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        assert self.at is not None
        return self.kept.pop().index_select(0, self.at)


def teach_layers(model: nn.Module) -> bool:
    """Make the layers of `model` know free and unread tokens; whether it has layers that can. Idempotent."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        if not isinstance(layer.__dict__.get("forward"), Layer):
            layer.forward = Layer(layer, layer.__dict__.get("forward"), layer is layers[-1])
    return bool(layers)


@dataclass
class Layer:
    """The forward of a layer, in two parts where its mask says that there are free or unread tokens."""

    layer: nn.Module
    own: Callable | None  # a forward of the instance, set by somebody else
    is_last: bool

    def __call__(self, hidden: Tensor, *args, **kwargs) -> Any:
        forward = self.own or functools.partial(type(self.layer).forward, self.layer)
        mask = next((x for x in (*args, *kwargs.values()) if isinstance(x, FlatMask)), None)
        if mask is None or mask.free is None:
            return forward(hidden, *args, **kwargs)
        return mask.free.run(self, forward, mask, hidden, args, kwargs)


def _part(value: Any, *, take: Callable[[Tensor], Tensor], total: int, mask: FlatMask) -> Any:
    """What of a layer's argument belongs to the tokens that `take` takes of `total`."""
    if isinstance(value, FlatMask):
        return mask
    if isinstance(value, (tuple, list)):
        return type(value)(_part(x, take=take, total=total, mask=mask) for x in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (1, total):
        return take(value)
    return value


@contextmanager
def _nothing_captured():
    """Router logits and the like are collected of the tokens with a gradient only."""
    token = output_capturing._active_collector.set(None)
    try:
        yield
    finally:
        output_capturing._active_collector.reset(token)
