"""Triton kernel of layers/rope.py: a program rotates all heads of one token, so each angle is loaded once."""
# launch options, such as num_warps, are no parameters of a kernel
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels.launch import on_its_card
from fastalign_kernels.numerics import rounded, wide

ELEMENTS = 2048  # of one half of some heads, which a program holds at a time


@triton.jit
def _rotate_heads(
    from_ptr,
    to_ptr,
    from_stride,
    to_stride,
    cos,
    sin,
    NUM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    dtype = to_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    for start in tl.static_range(0, NUM, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        inside = (head < NUM) & (column < HALF)
        source, target = from_ptr + head * from_stride + column, to_ptr + head * to_stride + column
        first = wide(tl.load(source, mask=inside, other=0.0))
        second = wide(tl.load(source + HALF, mask=inside, other=0.0))
        if REST > 0:
            behind = tl.arange(0, REST_BLOCK)[None, :]
            kept = (head < NUM) & (behind < REST)
            at = from_ptr + head * from_stride + 2 * HALF + behind
            tl.store(to_ptr + head * to_stride + 2 * HALF + behind, tl.load(at, mask=kept, other=0.0), mask=kept)
        tl.store(target, rounded(first * cos - second * sin, dtype), mask=inside)
        tl.store(target + HALF, rounded(second * cos + first * sin, dtype), mask=inside)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    length,
    q_row_stride,
    q_stride,
    q_head_stride,
    k_row_stride,
    k_stride,
    k_head_stride,
    q_out_row_stride,
    q_out_stride,
    q_out_head_stride,
    k_out_row_stride,
    k_out_stride,
    k_out_head_stride,
    angle_row_stride,
    angle_stride,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    INVERSE: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    row, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
    angle = row * angle_row_stride + place * angle_stride
    if HAS_POSITIONS:  # the strides are those of the positions
        angle = tl.load(positions_ptr + angle).to(tl.int64) * (2 * HALF if HAS_POSITIONS == 2 else HALF)
    column = tl.arange(0, BLOCK)
    cos = wide(tl.load(cos_ptr + angle + column, mask=column < HALF, other=0.0))[None, :]
    sin = wide(tl.load(sin_ptr + angle + column, mask=column < HALF, other=0.0))[None, :]
    if INVERSE:
        sin = -sin
    q, q_out = q_ptr + row * q_row_stride + place * q_stride, q_out_ptr + row * q_out_row_stride + place * q_out_stride
    k, k_out = k_ptr + row * k_row_stride + place * k_stride, k_out_ptr + row * k_out_row_stride + place * k_out_stride
    _rotate_heads(
        q, q_out, q_head_stride, q_out_head_stride, cos, sin, Q_HEADS, HALF, REST, Q_BLOCK, BLOCK, REST_BLOCK
    )
    _rotate_heads(
        k, k_out, k_head_stride, k_out_head_stride, cos, sin, K_HEADS, HALF, REST, K_BLOCK, BLOCK, REST_BLOCK
    )


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@on_its_card
def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    half: int,
    *,
    inverse: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """(B, L, H, K) queries and keys rotated; in place, or into new memory of that order."""
    rows, length, q_heads, size = q.shape
    k_heads = k.shape[2]
    q, k = _dense(q), _dense(k)
    outs = (q, k) if in_place else tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    width, tokens = cos.shape[-1], cos if positions is None else positions.contiguous()
    num_rows = tokens.shape[0] if tokens.dim() == (3 if positions is None else 2) else 1
    step = width if positions is None else 1
    block = max(triton.next_power_of_2(half), 8)
    most = max(ELEMENTS // block, 1)
    if q.numel() + k.numel():
        _rope_kernel[(rows * length,)](
            q,
            k,
            *outs,
            cos,
            sin,
            None if positions is None else tokens,
            length,
            *q.stride()[:3],
            *k.stride()[:3],
            *outs[0].stride()[:3],
            *outs[1].stride()[:3],
            length * step if num_rows == rows else 0,
            step,
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            HALF=half,
            REST=size - 2 * half,
            HAS_POSITIONS=0 if positions is None else width // half,
            INVERSE=inverse,
            Q_BLOCK=min(triton.next_power_of_2(q_heads), most),
            K_BLOCK=min(triton.next_power_of_2(k_heads), most),
            BLOCK=block,
            REST_BLOCK=triton.next_power_of_2(max(size - 2 * half, 1)),
            num_warps=4,
        )
    return outs  # pyright: ignore
