"""Arithmetic that means the same on a GPU and in Triton's interpreter, which has no bf16 and truncates to it."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def wide(x):
    """fp32 of a value just loaded: every kernel computes in fp32."""
    return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 `x` in `dtype`, rounded to the nearest even. Use it on everything that is stored."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        quiet = tl.where(x != x, bits | 0x00400000, nearest)  # adding to a NaN could make it an infinity
        return (quiet >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(a, b, sums):
    """sums (M, N) fp32 + a (M, K) b (K, N); 16-bit operands on tensor cores, fp32 ones in full precision."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh of fp32, absolute error about 1e-7, without libdevice."""
    return 2 * tl.sigmoid(2 * x) - 1
