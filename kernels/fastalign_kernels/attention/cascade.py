"""Attention where segments share a prefix, without a copy of its keys: parts of a softmax, merged by their logsumexp.

The queries of a segment behind a prefix see two sets of keys, the prefix and, causally, the segment. Attention over
each, out_1 with logsumexp l_1 and out_2 with l_2, gives attention over both:
    l = log(exp l_1 + exp l_2),  out = exp(l_1 - l) out_1 + exp(l_2 - l) out_2.
All segments behind one prefix form one call. A sink is a part whose value is 0. As p_ij = exp(s_ij - l), the backward
of each part, given the merged out and l, yields its exact share of the gradients (ring attention, arXiv:2310.01889):
they add up, and a sink gets -sum_i exp(sink - l_i) (out_i . d_out_i).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import device
from .segments import Segments

aten = torch.ops.aten


class Part(NamedTuple):
    """One call: the queries at `rows` against the keys at `keys`."""

    rows: slice | Tensor  # CUDA: a permutation (T,) of all tokens, of which the first ones take part
    keys: slice
    causal: bool
    mask: Tensor | None = None  # CPU: (queries, keys) added to the scores
    bounds: tuple[Tensor, Tensor, int, int] | None = None  # CUDA: of queries and keys, (S + 1,) int32, and the longest
    valid: Tensor | None = None  # CUDA: (T,) bool, which of `rows` take part


def fits_cascade(q: Tensor, v: Tensor, *, window: int | None, softcap: float | None, dropout: float) -> bool:
    """There are kernels here that return the logsumexp of such scores."""
    if window is not None or softcap is not None or dropout or q.shape[-1] != v.shape[-1]:
        return False
    return q.device.type == "cpu" or (q.is_cuda and device.is_flash_shape(q, v))


def cascade_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Causal attention (T, H, K) of segments with shared prefixes; q (T, H, K), k and v (T, H_kv, K), sinks (H,)."""
    return _Cascade.apply(q, k, v, sinks, segments, scale)  # pyright: ignore[reportReturnType]


def _parts(q: Tensor, segments: Segments) -> tuple[list[Part], list[Part]]:
    """Parts that hold each query once, its own segment, and parts that hold the prefixes of some."""
    make = (lambda: _varlen_parts(q.shape[0], segments)) if q.is_cuda else (lambda: _cpu_parts(q.dtype, segments))
    return segments.kept(("parts", q.dtype), make)


def _cpu_parts(dtype: torch.dtype, segments: Segments) -> tuple[list[Part], list[Part]]:
    own: list[Part] = []
    behind: dict[int, list[int]] = {}  # prefix -> segments that see it by another call than their own
    bounds = segments.cu_seqlens.tolist()
    for group in segments.groups(apart=False):
        rows = slice(bounds[group[0]], bounds[group[-1] + 1])
        if len(group) > 1:
            seen = segments.group_mask(group, True, None)
            mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
            own.append(Part(rows, rows, False, mask))
        else:
            own.append(Part(rows, rows, True))
        for s in group:
            if (p := segments.parents[s]) >= 0 and p not in group:
                behind.setdefault(p, []).append(s)
    shared = []
    for p, members in behind.items():
        start, stop = bounds[members[0]], bounds[members[-1] + 1]
        rows = slice(start, stop)
        if stop - start != sum(segments.lengths[s] for s in members):  # others stand between them
            rows = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in members])
        shared.append(Part(rows, slice(bounds[p], bounds[p + 1]), False))
    return own, shared


def _varlen_parts(num_tokens: int, segments: Segments) -> tuple[list[Part], list[Part]]:
    """Both in one call each, from the bounds alone: no synchronisation."""
    assert segments.prefix is not None
    cu, longest = segments.cu_seqlens, max(segments.max_seqlen, 2)  # for queries of 1 token they reshape their results
    everything = slice(None)
    own = Part(everything, everything, True, bounds=(cu, cu, longest, longest))
    parent, _ = segments.token_prefixes(num_tokens)
    empty = cu.diff()[parent] == 0
    family = torch.where((parent < 0) | empty, segments.prefix.shape[0], parent)  # the last: behind no prefix
    order = family.argsort(stable=True)
    counts = torch.zeros(segments.prefix.shape[0] + 1, dtype=torch.int32, device=cu.device)
    counts.index_add_(0, family, torch.ones_like(family, dtype=torch.int32))
    queries = torch.cat([counts.new_zeros(1), counts[:-1].cumsum(0, dtype=torch.int32)])
    valid = family[order] < segments.prefix.shape[0]
    shared = Part(
        order, everything, False, bounds=(queries, cu, segments.max_shared or num_tokens, longest), valid=valid
    )
    return [own], [shared]


def _forward(part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Any]:
    """Attention of one part (L, H, K), its logsumexp (L, H), and what its backward wants besides."""
    q, k, v = q[part.rows], k[part.keys], v[part.keys]
    if part.bounds is None:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, part.causal, attn_mask=part.mask, scale=scale
        )
        return out[0].transpose(0, 1), lse[0].transpose(0, 1), None
    out, lse, *state, _ = aten._flash_attention_forward(q, k, v, *part.bounds, 0.0, part.causal, False, scale=scale)
    lse = lse.transpose(0, 1)
    if part.valid is not None:  # nothing was written for the others
        out, lse = torch.where(part.valid[:, None, None], out, 0), torch.where(part.valid[:, None], lse, -torch.inf)
    return out, lse, state


def _backward(part: Part, d_out, q, k, v, out, lse, scale: float, state: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part's queries (L, H, K), keys and values, given the merged out (T, H, K) and lse (T, H)."""
    d_out, q, out, lse = (x[part.rows] for x in (d_out, q, out, lse))
    k, v = k[part.keys], v[part.keys]
    if part.bounds is None:
        d_out, q, k, v, out, lse = (x.transpose(0, 1)[None] for x in (d_out, q, k, v, out, lse))
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, part.causal, attn_mask=part.mask, scale=scale
        )
        dq, dk, dv = (g[0].transpose(0, 1) for g in grads)
        return dq, dk, dv
    lse = lse.transpose(0, 1).contiguous()
    dq, dk, dv = aten._flash_attention_backward(
        d_out, q, k, v, out, lse, *part.bounds, 0.0, part.causal, *state, scale=scale
    )
    if part.valid is not None:
        dq = torch.where(part.valid[:, None, None], dq, 0)
    return dq, dk, dv


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, segments: Segments, scale: float):
        own, shared = _parts(q, segments)
        kind = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2], dtype=kind)
        states = []
        for part in own:
            out[part.rows], lse[part.rows], state = _forward(part, q, k, v, scale)
            states.append(state)
        for part in shared:
            found, found_lse, state = _forward(part, q, k, v, scale)
            before = lse[part.rows]
            share = torch.sigmoid(found_lse - before)[..., None]
            out[part.rows] = torch.lerp(out[part.rows].to(kind), found.to(kind), share).to(q.dtype)
            lse[part.rows] = torch.logaddexp(before, found_lse)
            states.append(state)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.to(kind))
            out = (out * torch.exp(lse - total)[..., None]).to(q.dtype)
            lse = total
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.segments, ctx.scale, ctx.states = segments, scale, states
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, sinks, out, lse = ctx.saved_tensors
        own, shared = _parts(q, ctx.segments)
        d_out = d_out.contiguous()
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for index, (part, state) in enumerate(zip(own + shared, ctx.states, strict=True)):
            found = _backward(part, d_out, q, k, v, out, lse, ctx.scale, state)
            for total, where, grad in zip((dq, dk, dv), (part.rows, part.keys, part.keys), found, strict=True):
                if index < len(own):  # these hold each token once
                    total[where] = grad
                else:
                    total[where] += grad
        d_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            share = torch.exp(sinks.to(lse.dtype) - lse)
            d_sinks = -(share * (out * d_out).sum(-1, dtype=lse.dtype)).sum(0).to(sinks.dtype)
        return dq, dk, dv, d_sinks, None, None
