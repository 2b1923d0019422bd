"""The C++ kernels of norms, SwiGLU and RoPE on CPUs (csrc/layers.cpp), called as those in Triton are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastalign_kernels.dispatch import NATIVE_DTYPES, backend, native_module

WIDTH = 16  # rows are multiples of it
ISA = ""  # the best of this machine, or "avx512", "avx2", "plain"


def takes_native(*tensors: Tensor | None) -> bool:
    """Whether the C++ kernels may run on `tensors`: plain CPU tensors in fp32 or bf16, outside of torch.compile."""
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in given):
        return False
    if any(tensor.dtype not in NATIVE_DTYPES or tensor.device.type != "cpu" for tensor in given):
        return False
    return backend(given[0].device, given[0].dtype) == "native" and hasattr(native_module(), "norm_forward")


def _module() -> Any:
    return native_module()


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _step(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


# RMSNorm


def takes_norm(*tensors: Tensor) -> bool:
    """fp32 throughout, and whole vectors."""
    whole = tensors[0].shape[-1] % WIDTH == 0
    return whole and all(tensor.dtype == torch.float32 for tensor in tensors) and takes_native(*tensors)


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(N, D) rows to (normed, sum or None, rstd (N,) fp32)."""
    out, rstd = x.new_empty(x.shape), x.new_empty(len(x))
    summed = None if residual is None else x.new_empty(x.shape)
    weight = weight.contiguous()
    _module().norm_forward(
        _at(x), _at(residual), _at(weight), _at(out), _at(summed), _at(rstd), *x.shape, _step(x), _step(residual),
        eps, offset, torch.get_num_threads(), ISA,
    )  # fmt: skip
    return out, summed, rstd


def norm_backward(
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
    grad_x, module, weight = x.new_empty(x.shape), _module(), weight.contiguous()
    partial = x.new_empty(module.norm_blocks(len(x)), x.shape[1]) if weight_gradient else None
    module.norm_backward(
        _at(grad), _at(grad_sum), _at(x), _at(weight), _at(rstd), _at(grad_x), _at(partial), *x.shape, _step(grad),
        _step(grad_sum), _step(x), offset, torch.get_num_threads(), ISA,
    )  # fmt: skip
    return grad_x, None if partial is None else partial.sum(0)


# SwiGLU


def takes_glu(activation: str, *tensors: Tensor) -> bool:
    """SiLU, and whole vectors."""
    width = tensors[0].shape[-1] // (1 if len(tensors) == 2 else 2)
    return activation == "silu" and width % WIDTH == 0 and takes_native(*tensors)


def glu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """(N, D) and (N, D) to (N, D)."""
    out = torch.empty(gate.shape, dtype=gate.dtype)
    _glu(None, gate, up, out, None)
    return out


def glu_backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, activation: str) -> None:
    """Writes the gradients of gate and up, which may be gate and up themselves; all (N, D)."""
    _glu(grad, gate, up, grad_gate, grad_up)


def _glu(grad: Tensor | None, gate: Tensor, up: Tensor, first: Tensor, second: Tensor | None) -> None:
    rows = grad, gate, up, first, second
    _module().glu(
        gate.dtype == torch.bfloat16, *map(_at, rows), *gate.shape, [*map(_step, rows)], torch.get_num_threads(), ISA
    )


# RoPE


def takes_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, half: int) -> bool:
    """Angles per token, and whole vectors of them."""
    return positions is None and half % WIDTH == 0 and takes_native(q, k, cos, sin)


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
    cos, sin = (x.float().contiguous() for x in (cos, sin))
    width = cos.shape[-1]
    step = cos.shape[-2] * width if cos.dim() == 3 and cos.shape[0] == q.shape[0] else 0
    outs = []
    for x in (q, k):
        x = x if x.stride(-1) == 1 else x.contiguous()
        out = x if in_place else torch.empty(x.shape, dtype=x.dtype)
        shape = [*x.shape[:3], half, x.shape[-1] - 2 * half]
        strides = [*x.stride()[:3], *out.stride()[:3], step, width]
        args = _at(x), _at(out), _at(cos), _at(sin), shape, strides, inverse, torch.get_num_threads(), ISA
        _module().rope(x.dtype == torch.bfloat16, *args)
        outs.append(out)
    return outs[0], outs[1]
