"""A linear layer with a LoRA adapter, arXiv:2106.09685 Eq. 3: y = x W^T + b + s (x A^T) B^T, in three products.

The adapter is added in the epilogue of its second product, so no (N, V) temporary of it exists. The backward saves x
and x A^T (N, r) alone and computes no gradient of a frozen W. Bytes of activations moved besides the operands of the
products, for N rows of D inputs and V outputs of s bytes: forward 2 N V s, against 6 N V s when the adapter's output
is made, scaled and added; backward 2 N D s, against 3 N D s. cuBLAS runs it all: the formula is the implementation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale):
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ lora_a.t()
        ctx.save_for_backward(x, low, weight, lora_a, lora_b)
        ctx.scale = scale
        out = F.linear(rows, weight, bias)
        return torch.addmm(out, low, lora_b.t(), alpha=scale, out=out).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, low, weight, lora_a, lora_b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, weight.shape[0])
        grad_low = grad @ lora_b * ctx.scale if needs[0] or needs[3] else None  # (N, r)
        grad_x = None
        if needs[0]:
            grad_x = grad @ weight
            grad_x = torch.addmm(grad_x, grad_low, lora_a, out=grad_x).view(x.shape)  # pyright: ignore
        return (
            grad_x,
            grad.t() @ rows if needs[1] else None,
            grad.sum(0) if needs[2] else None,
            grad_low.t() @ rows if needs[3] else None,  # pyright: ignore
            grad.t() @ low * ctx.scale if needs[4] else None,
            None,
        )


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """x W^T + bias + scale (x A^T) B^T; x (..., D), weight (V, D), bias (V,), lora_a (r, D), lora_b (V, r).

    All are cast to autocast's dtype inside autocast, elsewhere to that of x.
    """
    if lora_a.shape != (lora_b.shape[1], weight.shape[1]) or lora_b.shape[0] != weight.shape[0]:
        raise ValueError(
            f"weight {tuple(weight.shape)}, lora_a {tuple(lora_a.shape)}, lora_b {tuple(lora_b.shape)}: give (V, D), "
            "(r, D) and (V, r)"
        )
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x, weight, lora_a, lora_b = (tensor.to(dtype) for tensor in (x, weight, lora_a, lora_b))
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scale)  # pyright: ignore
