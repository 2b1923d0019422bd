"""RMSNorm, arXiv:1910.07467, alone or fused with the addition of a residual.

    y = (offset + w) * x * rstd,  rstd = 1 / sqrt(mean(x^2) + eps)
    dx = rstd * (g - n * mean(g * n)),  dw = sum over rows of dy * n,  with n = x * rstd, g = (offset + w) * dy

Statistics and sums are fp32. Bytes moved for N rows of D elements of s bytes: forward 2 N D s, with the residual
4 N D s; backward 3 N D s, with the gradient of the sum 4 N D s, and 4 D bytes per program for dw, which is skipped
where the weight is frozen. dw is summed in an order that depends on the shape and the card alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastalign_kernels.layers import native
from fastalign_kernels.layers.choice import as_rows, takes_triton, wide_dtype

MAX_BYTES = 32768  # of a row, which lies in the registers of one program; longer ones take the reference


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, round_first: bool = True
) -> Tensor:
    """`rms_norm` in plain torch."""
    wide = wide_dtype(x)
    normed = x.to(wide)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    scale = weight if not offset else weight.to(wide) + offset
    if not round_first:
        return (normed * scale).to(x.dtype)
    return (normed.to(x.dtype) * scale).to(torch.promote_types(x.dtype, weight.dtype))


def _kernels(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if name == "native":
        return native.norm_forward, native.norm_backward
    from fastalign_kernels.layers import triton_rms_norm

    return triton_rms_norm.forward, triton_rms_norm.backward


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, x, residual, weight, eps, offset, round_first):
        forward, ctx.kernel = _kernels(name)
        ctx.set_materialize_grads(False)
        rows = None if residual is None else as_rows(residual)
        out, summed, rstd = forward(as_rows(x), rows, weight, eps, offset, round_first)
        ctx.save_for_backward(x if residual is None else summed, weight, rstd)
        ctx.options = offset, round_first
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        return out.view(x.shape), None if summed is None else summed.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        grad, grad_sum = grads
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = grad_sum, None
        if grad is not None:
            rows, (offset, round_first) = None if grad_sum is None else as_rows(grad_sum), ctx.options
            grad_x, grad_weight = ctx.kernel(
                as_rows(grad), rows, as_rows(x), weight, rstd, offset, round_first, ctx.needs_input_grad[3]
            )
            grad_x = grad_x.view(grad.shape)
        own, others = ctx.dtypes
        for_residual = None if others is None or grad_x is None else grad_x.to(others)
        return None, None if grad_x is None else grad_x.to(own), for_residual, grad_weight, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, round_first: bool = True) -> Tensor:
    """(offset + weight) * x / rms(x) over the last dimension; x (..., D), weight (D,), any floating dtypes.

    `round_first` (Llama): x / rms(x) is rounded to the dtype of x before the product, whose dtype is the wider one of
    both. Without (OLMo 2, GPT-OSS; Gemma, with offset 1): one rounding, to the dtype of x.
    """
    _check(x, weight)
    if not (name := _implementation(x, weight)):
        return rms_norm_reference(x, weight, eps, offset=offset, round_first=round_first)
    result: Tensor = _RMSNorm.apply(name, x, None, weight, eps, offset, round_first)[0]  # pyright: ignore
    return result


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    round_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): the sum, rounded to its dtype, is what is normalised and carried on."""
    _check(x, weight)
    if residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)}: give the shape of x, {tuple(x.shape)}")
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and residual.dtype == torch.float32:
        x = x.float()  # what is left of the branch under autocast, which its addition widens anyway
    if not (name := _implementation(x, residual, weight)):
        summed = x + residual
        return rms_norm_reference(summed, weight, eps, offset=offset, round_first=round_first), summed
    result: tuple[Tensor, Tensor] = _RMSNorm.apply(  # pyright: ignore
        name, x, residual, weight, eps, offset, round_first
    )
    return result


def _implementation(*tensors: Tensor) -> str:
    """ "triton", "native", or "" for the reference."""
    widest = max(tensor.element_size() for tensor in tensors)
    if tensors[0].shape[-1] * widest <= MAX_BYTES and takes_triton(*tensors):
        return "triton"
    return "native" if native.takes_norm(*tensors) else ""


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 1 or x.shape[-1:] != weight.shape or not weight.numel():
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: give (..., D) and (D,), D > 0")
