"""Triton kernels of layers/fp8.py: the scale of a row and its values in one launch; the values of a transposed weight.

Bytes moved for (N, K) elements of s bytes: rows N K (s + 1), the second reading coming from the cache; columns
N K (2 s + 1), the first reading for the largest element of each column.
"""
# launch options, such as num_warps, are no parameters of a kernel
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels.launch import on_its_card
from fastalign_kernels.layers.fp8 import E4M3, E4M3_MAX, SMALLEST_SCALE
from fastalign_kernels.numerics import INTERPRETED, wide

TILE_ROWS, TILE_COLUMNS = 64, 64  # of the transposing kernel: both sides move whole sectors


def tile(columns: int) -> tuple[int, int]:
    """Columns that a program of the row kernel reads at a time, and its warps: 8 elements of a thread."""
    block = min(max(triton.next_power_of_2(columns), 128), 2048)
    return block, max(block // 256, 1)


@triton.jit
def _e4m3(x):
    """fp32 x, at most 448 in size, rounded to the nearest even e4m3; the interpreter's own cast does not round."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
        subnormal = (x + 24576.0) - 24576.0  # 1.5 * 2^14: sums are multiples of 2^-9
        not_a_number = tl.full(x.shape, 0x7FF00000, tl.uint32).to(tl.float32, bitcast=True)
        x = tl.where(x != x, not_a_number, tl.where(tl.abs(x) < 0.015625, subnormal, nearest))
    return x.to(tl.float8e4nv)


@triton.jit
def _quantise_rows_kernel(
    in_ptr,
    values_ptr,
    scale_ptr,
    in_stride,
    K: tl.constexpr,
    MAX: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(in_ptr + row * in_stride + column, mask=column < K, other=0.0)
        size = tl.abs(wide(x))
        largest = tl.maximum(largest, tl.where(size == size, size, float("inf")))  # a NaN makes the row NaN as well
    scale = tl.maximum(tl.div_rn(tl.max(largest, 0), MAX), SMALLEST)
    inverse = tl.div_rn(1.0, scale)
    tl.store(scale_ptr + row, scale)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(in_ptr + row * in_stride + column, mask=column < K, other=0.0)
        tl.store(values_ptr + row * K + column, _e4m3(wide(x) * inverse), mask=column < K)


@triton.jit
def _quantise_columns_kernel(
    in_ptr,
    values_ptr,
    scale_ptr,
    in_stride,
    num_rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < K)[None, :]
    x = tl.load(in_ptr + row[:, None] * in_stride + column[None, :], mask=inside, other=0.0)
    scale = tl.load(scale_ptr + column, mask=column < K, other=1.0)
    values = wide(x) * tl.div_rn(1.0, scale)[None, :]
    inside = (column < K)[:, None] & (row < num_rows)[None, :]
    tl.store(values_ptr + column[:, None] * num_rows + row[None, :], _e4m3(tl.trans(values)), mask=inside)


@on_its_card
def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`fp8.quantise_rows` of (N, K), contiguous in its rows, N and K above 0."""
    num_rows, columns = matrix.shape
    values = torch.empty(num_rows, columns, dtype=E4M3, device=matrix.device)
    scale = torch.empty(num_rows, 1, dtype=torch.float32, device=matrix.device)
    block, warps = tile(columns)
    _quantise_rows_kernel[(num_rows,)](
        matrix, values, scale, matrix.stride(0), columns, E4M3_MAX, SMALLEST_SCALE, block, num_warps=warps
    )
    return values, scale


@on_its_card
def quantise_columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`fp8.quantise_columns` of (N, K), contiguous in its rows, N and K above 0."""
    num_rows, columns = matrix.shape
    low, high = matrix.aminmax(dim=0)
    scale = (torch.maximum(-low, high).float() / E4M3_MAX).clamp_min_(SMALLEST_SCALE)
    values = torch.empty(columns, num_rows, dtype=E4M3, device=matrix.device)
    grid = triton.cdiv(num_rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS)
    _quantise_columns_kernel[grid](
        matrix, values, scale, matrix.stride(0), num_rows, columns, TILE_ROWS, TILE_COLUMNS, num_warps=4
    )
    return values, scale.unsqueeze(1)
