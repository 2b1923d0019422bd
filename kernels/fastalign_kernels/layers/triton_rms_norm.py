"""Triton kernels of layers/rms_norm.py: a program normalises whole rows that lie in its registers."""
# launch options, such as num_warps, are no parameters of a kernel
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels.launch import multiprocessors, on_its_card
from fastalign_kernels.numerics import rounded, wide

PROGRAMS_PER_MULTIPROCESSOR = 4  # of the backward pass: each keeps one partial sum of the weight's gradient


def tile(columns: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps: 16 elements per thread, 32 in the longest rows."""
    block = max(triton.next_power_of_2(columns), 16)
    rows = max(2048 // block, 1)
    return rows, block, min(rows * block // 512, 16)


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    rstd_ptr,
    num_rows,
    x_stride,
    residual_stride,
    D: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < D)[None, :]
    to = row[:, None] * D + column[None, :]
    x = wide(tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0))
    dtype = x_ptr.dtype.element_ty
    if HAS_RESIDUAL:
        at = residual_ptr + row[:, None] * residual_stride + column[None, :]
        dtype = sum_ptr.dtype.element_ty
        stored = rounded(x + wide(tl.load(at, mask=inside, other=0.0)), dtype)
        tl.store(sum_ptr + to, stored, mask=inside)
        x = wide(stored)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    normed = x * rstd[:, None]
    if ROUND_FIRST:
        normed = wide(rounded(normed, dtype))
    weight = wide(tl.load(weight_ptr + column, mask=column < D, other=0.0)) + OFFSET
    tl.store(out_ptr + to, rounded(normed * weight[None, :], out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_bwd_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_ptr,
    num_rows,
    grad_stride,
    grad_sum_stride,
    x_stride,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    HAS_SUM: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    weight = wide(tl.load(weight_ptr + column, mask=column < D, other=0.0)) + OFFSET
    partial = tl.zeros((ROWS, BLOCK), tl.float32)
    # the longest rows leave no registers for the weight, nor for x over the sum: they are loaded again
    for tile_index in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile_index, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < D)[None, :]
        grad = wide(tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0))
        x = wide(tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0))
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        normed = x * rstd
        if WEIGHT_GRADIENT:
            scaled = normed
            if ROUND_FIRST:
                scaled = wide(rounded(normed, x_ptr.dtype.element_ty))
            partial += grad * scaled
        if WEIGHT_GRADIENT and BLOCK > 8192:
            weight = wide(tl.load(weight_ptr + column, mask=column < D, other=0.0)) + OFFSET
        grad *= weight[None, :]
        mean = (tl.sum(grad * normed, axis=1) / D)[:, None]
        if WEIGHT_GRADIENT and BLOCK > 8192:
            at = x_ptr + row[:, None] * x_stride + column[None, :]
            normed = wide(tl.load(at, mask=inside, other=0.0, volatile=True)) * rstd
        result = rstd * (grad - normed * mean)
        if HAS_SUM:
            at = grad_sum_ptr + row[:, None] * grad_sum_stride + column[None, :]
            result += wide(tl.load(at, mask=inside, other=0.0))
        to = grad_x_ptr + row[:, None] * D + column[None, :]
        tl.store(to, rounded(result, grad_x_ptr.dtype.element_ty), mask=inside)
    if WEIGHT_GRADIENT:
        to = partial_ptr + tl.program_id(0).to(tl.int64) * D + column
        tl.store(to, tl.sum(partial, axis=0), mask=column < D)


@on_its_card
def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(N, D) rows to (normed, sum or None, rstd (N,) fp32)."""
    num_rows, columns = x.shape
    summed = None
    if residual is not None:
        summed = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    dtype = x.dtype if summed is None else summed.dtype
    dtype = torch.promote_types(dtype, weight.dtype) if round_first else dtype
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rows, block, num_warps = tile(columns)
    if columns % 8:  # without 128-bit loads ptxas spills addresses at more warps
        num_warps = min(rows * block // 1024, 16)
    if num_rows:
        _rms_norm_fwd_kernel[(triton.cdiv(num_rows, rows),)](
            x,
            residual,
            weight.contiguous(),
            out,
            summed,
            rstd,
            num_rows,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            D=columns,
            EPS=eps,
            OFFSET=offset,
            ROUND_FIRST=round_first,
            HAS_RESIDUAL=residual is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=num_warps,
        )
    return out, summed, rstd


@on_its_card
def backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    round_first: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the rows (with that of the sum added) and of the weight."""
    num_rows, columns = x.shape
    rows, block, num_warps = tile(columns)
    if block == 2048 and x.element_size() == 4:
        num_warps = 8  # with 4 the compiler spills an address
    programs = min(triton.cdiv(num_rows, rows), PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device))
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = None
    if weight_gradient:
        partial = torch.empty((programs, columns), dtype=torch.float32, device=x.device)
    if num_rows:
        _rms_norm_bwd_kernel[(programs,)](
            grad,
            grad_sum,
            x,
            weight.contiguous(),
            rstd,
            grad_x,
            partial,
            num_rows,
            grad.stride(0),
            0 if grad_sum is None else grad_sum.stride(0),
            x.stride(0),
            D=columns,
            OFFSET=offset,
            ROUND_FIRST=round_first,
            HAS_SUM=grad_sum is not None,
            WEIGHT_GRADIENT=weight_gradient,
            ROWS=rows,
            BLOCK=block,
            num_warps=num_warps,
        )
    return grad_x, None if partial is None else partial.sum(0).to(weight.dtype)
