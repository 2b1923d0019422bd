"""Attention on sequences that lie back to back: each token sees its own segment and nothing else.

For query i and key j of one segment, s_ij = scale q_i.k_j, soft-capped where asked for as c tanh(s_ij / c), and
    out_i = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + exp(sink))
over the j that i sees: j <= i if causal, i - j < window if there is a window; a sink is one number per head (GPT-OSS).
Segments may share a prefix: i sees all of it too, as far as the window reaches, as if it stood right before them.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from . import device
from .cascade import cascade_attention, fits_cascade
from .segments import Segments

logger = logging.getLogger(__name__)
_said: set[str] = set()


def packed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale,
    causal=True,
    window=None,
    softcap=None,
    sinks=None,
    prefix: Tensor | None = None,  # (S,), see `Segments`
) -> Tensor:
    """The same in plain torch with one mask over the whole row (T x T memory): the oracle of the tests."""
    num_tokens, repeats = q.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    position = torch.arange(num_tokens, device=q.device)
    number = torch.bucketize(position, cu_seqlens[1:], right=True)
    seen = number[:, None] == number[None, :]
    if causal:
        seen &= position[:, None] >= position[None, :]
    if prefix is not None:
        parent = prefix.long()[number]
        seen |= parent[:, None] == number[None, :]
        position = position - cu_seqlens[number] + torch.where(parent >= 0, cu_seqlens.diff()[parent], 0)
    if window is not None:
        distance = position[:, None] - position[None, :]
        seen &= distance < window
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(-1, num_tokens, 1)
        scores = torch.cat([scores, sink], dim=-1)
    shares = scores.softmax(-1)[..., :num_tokens]
    return torch.einsum("hqk,khd->qhd", shares, v)


def _attend_explicit(q, k, v, mask, *, scale, softcap, sinks, dropout) -> Tensor:
    """Scores written out, for what SDPA cannot do. q (H, Lq, K), k and v (H_kv, Lk, K), mask (Lq, Lk) or None."""
    num_heads, num_queries, head_size = q.shape
    q = q.reshape(k.shape[0], -1, num_queries, head_size)  # (H_kv, G, Lq, K)
    scores = (q @ k[:, None].transpose(-1, -2) * scale).to(torch.promote_types(q.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(k.shape[0], -1, 1, 1).expand(-1, -1, num_queries, 1)
        scores = torch.cat([scores, sink], dim=-1)
    shares = scores.softmax(-1)[..., : k.shape[1]].to(v.dtype)
    shares = F.dropout(shares, dropout) if dropout else shares
    return (shares @ v[:, None]).reshape(num_heads, num_queries, v.shape[-1])


def _attend(q, k, v, mask, *, causal, scale, softcap, sinks, dropout) -> Tensor:
    """One tile: q (H, Lq, K), k and v (H_kv, Lk, K) -> (H, Lq, K_v)."""
    if softcap is not None or sinks is not None:
        if mask is None and causal:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        return _attend_explicit(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout)
    grouped = q.shape[0] != k.shape[0]
    if (
        grouped and q.is_cuda and mask is not None
    ):  # CUDA's masked kernels know no groups and would fall to plain maths
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
        grouped = False
    is_causal = causal and mask is None
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], mask, dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )[0]


def segment_attention(q, k, v, segments: Segments, *, scale, causal, window, softcap, sinks, dropout) -> Tensor:
    """Segment by segment through SDPA on any device; the cost is the sum of squared lengths, less with a window."""
    explicit = softcap is not None or sinks is not None
    pieces = segments.pieces(causal=causal, window=window, explicit=explicit)
    how = {"causal": causal, "scale": scale, "softcap": softcap, "sinks": sinks, "dropout": dropout}
    lengths = [piece.length for piece in pieces]
    outs = []
    # split and cat, not slices: the backward of a slice writes the whole row once per segment
    qs_of, ks_of, vs_of = (x.split(lengths) for x in (q, k, v))
    for piece, *qkv in zip(pieces, qs_of, ks_of, vs_of, strict=True):
        if piece.before is not None:
            number, start, stop = piece.before
            qkv[1:] = (torch.cat([of[number][start:stop], x]) for of, x in zip((ks_of, vs_of), qkv[1:], strict=True))
        qs, ks, vs = (x.transpose(0, 1) for x in qkv)  # (H, L, K)
        if len(piece.tiles) == 1:
            outs.append(_attend(qs, ks, vs, piece.tiles[0].mask, **how).transpose(0, 1))
            continue
        for tile in piece.tiles:
            rows, keys = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
            outs.append(_attend(qs[:, rows], ks[:, keys], vs[:, keys], tile.mask, **how).transpose(0, 1))
    return torch.cat(outs) if outs else q.new_zeros(0, q.shape[1], v.shape[-1])


def choose_backend(
    q: Tensor, k: Tensor, v: Tensor, *, window=None, softcap=None, sinks=None, dropout=0.0, shared: bool = False
) -> str:
    """The back end for these inputs: "flash_attn", "varlen" or "flex" on CUDA where they fit, else "segments".

    `shared`: segments have prefixes; then "cascade" wherever it fits, and windows must be those of `Segments.reach`.
    """
    if shared and fits_cascade(q, v, window=window, softcap=softcap, dropout=dropout):
        return "cascade"
    if not q.is_cuda:
        return "segments"
    fits = device.fitting_backends(
        q, k, v, window=window, softcap=softcap, sinks=sinks is not None, dropout=dropout
    )  # fmt: skip
    if fits:
        return fits[0]
    reason = f"{q.dtype}, head size {q.shape[-1]}, softcap={softcap}, dropout={dropout}"
    if reason not in _said:
        _said.add(reason)
        logger.warning("No fused CUDA attention for flat tokens fits %s: attending segment by segment.", reason)
    return "segments"


def packed_attention(
    q: Tensor,  # (T, H, K)
    k: Tensor,  # (T, H_kv, K), H a multiple of H_kv
    v: Tensor,  # (T, H_kv, K_v)
    cu_seqlens: Tensor | None,  # (S + 1,) int32, from 0 to T
    max_seqlen: int | None,  # longest segment, tokens
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
    dropout: float = 0.0,
    segments: Segments | None = None,
) -> Tensor:
    """Attention within each segment, (T, H, K_v). A query sees `window` tokens back, itself included.

    `segments` keeps what follows from the bounds between layers; it replaces `cu_seqlens` and `max_seqlen`.
    Raises ValueError on shapes that do not fit, on bounds that do not end at T, on a window or a shared prefix without
    `causal`.
    """
    if segments is None:
        if cu_seqlens is None:
            raise ValueError("packed_attention needs cu_seqlens and max_seqlen, or segments; found neither.")
        segments = Segments(cu_seqlens, int(max_seqlen or q.shape[0]))
    if q.shape[0] != k.shape[0] or k.shape[:2] != v.shape[:2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q, k, v must be (T, H, K), (T, H_kv, K), (T, H_kv, K_v) with H a multiple of H_kv; found "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be at least 1 and needs causal=True; found window={window}, causal={causal}.")
    shared = segments.prefix is not None
    if shared and not causal:
        raise ValueError("segments that share a prefix need causal=True: a prefix cannot see what follows it.")
    window = segments.reach(window)
    dtype = v.dtype
    if q.device.type == "cpu" and dtype in device.HALF:
        # torch compiles a kernel for each length there, 0.1 s and up to a megabyte, and keeps all of them
        q, k, v = q.float(), k.float(), v.float()
    backend = choose_backend(q, k, v, window=window, softcap=softcap, sinks=sinks, dropout=dropout, shared=shared)
    if not q.is_cuda and sum(segments.lengths) != q.shape[0]:
        raise ValueError(f"cu_seqlens must end at the {q.shape[0]} tokens of q; found {sum(segments.lengths)}.")
    if backend == "cascade":
        return cascade_attention(q, k, v, segments, scale=scale, sinks=sinks).to(dtype)
    if backend == "flash_attn":
        return device.flash_attn_attention(
            q, k, v, segments, scale=scale, causal=causal, window=window, softcap=softcap, dropout=dropout
        )
    if backend == "varlen":
        return device.varlen_attention(q, k, v, segments, scale=scale, causal=causal, window=window)
    if backend == "flex":
        return device.flex_attention(
            q, k, v, segments, scale=scale, causal=causal, window=window, softcap=softcap, sinks=sinks
        )
    return segment_attention(
        q, k, v, segments, scale=scale, causal=causal, window=window, softcap=softcap, sinks=sinks, dropout=dropout
    ).to(dtype)
