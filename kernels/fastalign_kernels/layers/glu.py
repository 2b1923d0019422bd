"""Gated activations, arXiv:2002.05202: act(gate) * up with SiLU (SwiGLU), GELU by tanh (GeGLU) or by erf.

    d gate = dy * up * act'(gate),  d up = dy * act(gate)

fp32 inside, one rounding per result. The backward recomputes act from gate and up: nothing else is saved. Bytes moved
for N rows of D elements of s bytes: forward 3 N D s, backward 5 N D s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from fastalign_kernels.layers import native
from fastalign_kernels.layers.choice import as_rows, takes_triton, wide_dtype

ACTIVATIONS = {  # name -> formula
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


def glu_reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`glu` in plain torch."""
    return (ACTIVATIONS[activation](gate.to(wide_dtype(gate))) * up).to(gate.dtype)


def _kernels(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if name == "native":
        return native.glu_forward, native.glu_backward
    from fastalign_kernels.layers import triton_glu

    return triton_glu.forward, triton_glu.backward


def _implementation(activation: str, *tensors: Tensor) -> str:
    """ "triton", "native", or "" for the reference; one tensor: both halves."""
    if takes_triton(*tensors):
        return "triton"
    return "native" if native.takes_glu(activation, *tensors) else ""


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, gate, up, activation, overwrite):
        forward, ctx.kernel = _kernels(name)
        ctx.save_for_backward(gate, up)
        ctx.options = activation, overwrite
        first, second = _halves(gate, up)
        return forward(as_rows(first), as_rows(second), activation).view(first.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        gate, up = ctx.saved_tensors
        activation, overwrite = ctx.options
        given = [tensor.detach() for tensor in (gate, up) if tensor is not None]
        results = given if overwrite and all(_in_rows(tensor) for tensor in given) else None
        if results is None:
            results = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in given]
        else:
            increment_version(given)  # whoever needs the overwritten values later gets autograd's error
        first, second = map(as_rows, _halves(gate, up))
        to_first, to_second = map(as_rows, _halves(results[0], None if up is None else results[1]))
        ctx.kernel(as_rows(grads[0]), first, second, to_first, to_second, activation)
        return None, results[0], None if up is None else results[1], None, None


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, dim=-1)
    return first, second


def _in_rows(tensor: Tensor) -> bool:
    """Whether the rows of `tensor` can be written through a view."""
    return tensor.is_contiguous()


def glu(gate: Tensor, up: Tensor, activation: str = "silu", *, overwrite: bool = False) -> Tensor:
    """act(gate) * up; gate and up (..., D) of one dtype, `activation` "silu", "gelu_tanh" or "gelu".

    `overwrite`: the backward pass writes its results over gate and up where these are contiguous, which must be of no
    further use, as products of linear layers are; a second backward pass then raises RuntimeError.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}: give one shape and dtype"
        )
    _check_activation(activation)
    if not (name := _implementation(activation, gate, up)):
        return glu_reference(gate, up, activation)
    return _GLU.apply(name, gate, up, activation, overwrite)  # pyright: ignore


def glu_packed(gate_up: Tensor, activation: str = "silu", *, overwrite: bool = False) -> Tensor:
    """`glu` of the first and the second half of (..., 2 D), the product of one fused linear layer."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up {tuple(gate_up.shape)}: the last dimension holds gate and up, so it must be even")
    _check_activation(activation)
    if not (name := _implementation(activation, gate_up)):
        return glu_reference(*_halves(gate_up, None), activation)
    return _GLU.apply(name, gate_up, None, activation, overwrite)  # pyright: ignore


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: choose one of {', '.join(ACTIVATIONS)}")
