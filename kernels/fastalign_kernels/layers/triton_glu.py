"""Triton kernels of layers/glu.py: elementwise, over blocks of rows, or of one long row where memory is dense."""
# launch options, such as num_warps, are no parameters of a kernel
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels.launch import on_its_card
from fastalign_kernels.numerics import rounded, wide

BLOCK, NUM_WARPS = 2048, 4  # 16 elements of a thread: two 128-bit loads of each operand in 16 bits


@triton.jit
def _activation(x, NAME: tl.constexpr):
    """act(x) and act'(x)."""
    if NAME == "silu":
        share = tl.sigmoid(x)
        return x * share, share * (1 + x * (1 - share))
    if NAME == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        share = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        return x * share, share + x * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x * share, share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _glu_fwd_kernel(
    gate_ptr, up_ptr, out_ptr, columns, blocks, gate_stride, up_stride, NAME: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = wide(tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0))
    up = wide(tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0))
    value, _slope = _activation(gate, NAME)
    tl.store(out_ptr + row * columns + column, rounded(value * up, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _glu_bwd_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    columns,
    blocks,
    grad_stride,
    gate_stride,
    up_stride,
    grad_gate_stride,
    grad_up_stride,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    grad = wide(tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0))
    gate = wide(tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0))
    up = wide(tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0))
    value, slope = _activation(gate, NAME)
    to_gate, to_up = grad_gate_ptr + row * grad_gate_stride + column, grad_up_ptr + row * grad_up_stride + column
    tl.store(to_gate, rounded(grad * up * slope, grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(to_up, rounded(grad * value, grad_up_ptr.dtype.element_ty), mask=inside)


def _merged(*rows: Tensor) -> tuple[Tensor, ...]:
    """All of (N, D) as one row (1, N D) where all are dense: no ragged end of a row, aligned for any D."""
    dense = all(tensor.is_contiguous() for tensor in rows)
    return tuple(tensor.view(1, -1) for tensor in rows) if dense else rows


@on_its_card
def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """(N, D) and (N, D) to (N, D)."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up, flat = _merged(gate, up, out)
    rows, columns = gate.shape
    blocks = triton.cdiv(columns, BLOCK)
    if gate.numel():
        _glu_fwd_kernel[(rows * blocks,)](
            gate,
            up,
            flat,
            columns,
            blocks,
            gate.stride(0),
            up.stride(0),
            NAME=activation,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS if columns % 8 == 0 else 2 * NUM_WARPS,
        )
    return out


@on_its_card
def backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, activation: str) -> None:
    """Writes the gradients of gate and up, which may be gate and up themselves; all (N, D)."""
    grad, gate, up, grad_gate, grad_up = _merged(grad, gate, up, grad_gate, grad_up)
    rows, columns = gate.shape
    blocks = triton.cdiv(columns, BLOCK)
    if gate.numel():
        _glu_bwd_kernel[(rows * blocks,)](
            grad,
            gate,
            up,
            grad_gate,
            grad_up,
            columns,
            blocks,
            grad.stride(0),
            gate.stride(0),
            up.stride(0),
            grad_gate.stride(0),
            grad_up.stride(0),
            NAME=activation,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS if columns % 8 == 0 else 2 * NUM_WARPS,
        )
