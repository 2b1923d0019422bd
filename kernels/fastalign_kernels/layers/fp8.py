"""A linear layer that multiplies in fp8: e4m3 (arXiv:2209.05433) with a scale for each row of an operand.

    s_i = max(max_k |a_ik| / 448, 2^-126)        q_ik = e4m3(a_ik * (1 / s_i))        a b^T = (q_a q_b^T)_ij s_i s_j

    y = x W^T + bias:  rows of x and rows of W          dx = dy W:  rows of dy and columns of W
    dW = dy^T x:  in the dtype of x, since its error adds up over steps and it is the product most sensitive to fp8

A row of zeros gives zeros, a row that holds infinity or NaN gives NaN. e4m3 keeps 3 bits: an element is off by up to
1/16 of itself, and a product of independent ones by about 0.04 of its size, whatever its length. On cards from compute
capability 8.9 on, `torch._scaled_mm` multiplies and a Triton kernel quantises in one launch; elsewhere the same
definition is computed in fp32, which is slower than the plain product and there for tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign_kernels.dispatch import _say_once
from fastalign_kernels.launch import architecture
from fastalign_kernels.layers.choice import as_rows, takes_triton

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126  # keeps 1 / scale finite
ALIGNMENT = 16  # of the sizes that `torch._scaled_mm` takes

Quantised = tuple[Tensor, Tensor]  # (N, K) e4m3 and (N, 1) fp32


def has_fp8(device: torch.device) -> bool:
    """Whether `device` multiplies fp8 matrices with scales per row: CUDA, compute capability 8.9 and up."""
    return device.type == "cuda" and torch.version.hip is None and architecture(device) >= 89


def quantise_reference(matrix: Tensor, dim: int = 1) -> Quantised:
    """`quantise_rows` (dim 1) or `quantise_columns` (dim 0) in plain torch."""
    low, high = matrix.aminmax(dim=dim, keepdim=True) if matrix.numel() else (matrix.sum(dim, keepdim=True),) * 2
    scale = (torch.maximum(-low, high).float() / E4M3_MAX).clamp_min(SMALLEST_SCALE)
    values = (matrix.float() * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return (values.contiguous(), scale) if dim == 1 else (values.t().contiguous(), scale.t())


def _quantises(matrix: Tensor) -> bool:
    return matrix.numel() > 0 and takes_triton(matrix) and (has_fp8(matrix.device) or not matrix.is_cuda)


def quantise_rows(matrix: Tensor) -> Quantised:
    """e4m3 values (N, K) of a matrix (N, K) of any floating dtype, and the scales (N, 1) fp32 of its rows."""
    if not _quantises(matrix):
        return quantise_reference(matrix)
    from fastalign_kernels.layers.triton_fp8 import quantise_rows

    return quantise_rows(as_rows(matrix))


def quantise_columns(matrix: Tensor) -> Quantised:
    """`quantise_rows` of the transposed matrix, (K, N) and (K, 1), without a copy of it."""
    if not _quantises(matrix):
        return quantise_reference(matrix, dim=0)
    from fastalign_kernels.layers.triton_fp8 import quantise_columns

    return quantise_columns(as_rows(matrix))


def fp8_product(a: Quantised, b: Quantised, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias (N, V) in `dtype`, of a (N, K) and b (V, K); fp32 sums.

    Cards round the result to bf16 before it becomes fp16 or fp32 (fp32 leaves cuBLAS on Hopper alone).
    """
    (values_a, scale_a), (values_b, scale_b) = a, b
    if not has_fp8(values_a.device):
        if values_a.is_cuda:
            _say_once(f"fp8 is emulated on {torch.cuda.get_device_name(values_a.device)}, slower than bf16")
        out = (values_a.float() @ values_b.float().t()) * (scale_a * scale_b.t())
        return _in_dtype(out if bias is None else out + bias.float(), dtype)
    num_rows = values_b.shape[0]
    values_a, values_b = _padded(values_a, 1), _padded(_padded(values_b, 1), 0)
    wide = dtype == torch.float32 and bias is None and _writes_fp32(values_a.device)
    out = torch._scaled_mm(  # pyright: ignore[reportPrivateUsage]
        values_a,
        values_b.t(),
        scale_a=scale_a,
        scale_b=F.pad(scale_b, (0, 0, 0, values_b.shape[0] - num_rows)).t(),
        bias=None if bias is None else F.pad(bias.bfloat16(), (0, values_b.shape[0] - num_rows)),
        out_dtype=dtype if wide else torch.bfloat16,
        use_fast_accum=False,
    )
    return _in_dtype(out if out.shape[1] == num_rows else out[:, :num_rows], dtype)


def _in_dtype(out: Tensor, dtype: torch.dtype) -> Tensor:
    """TODO: `out.to(dtype)` with torch >= 2.12. Compiled by 2.11, a function of autograd whose result went through a
    `to` that does nothing has gradients of zero."""
    return out if out.dtype == dtype else out.to(dtype)


def _writes_fp32(device: torch.device) -> bool:
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return architecture(device) == 90 and cuda >= (12, 9)


def _padded(values: Tensor, dim: int) -> Tensor:
    """e4m3 values with zeros behind, up to a size that the product takes; as bytes, since padding knows no fp8."""
    missing = -values.shape[dim] % ALIGNMENT
    if not missing:
        return values
    padding = (0, missing) if dim == 1 else (0, 0, 0, missing)
    return F.pad(values.view(torch.uint8), padding).view(E4M3)


def fp8_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`fp8_linear` without gradient: quantised, dequantised, multiplied in fp64."""
    dequantised = [values.double() * scale for values, scale in (quantise_reference(m) for m in (x, weight))]
    return F.linear(dequantised[0], dequantised[1], None if bias is None else bias.double())


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias):
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return fp8_product(quantise_rows(rows), quantise_rows(weight), rows.dtype, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        rows, weight = ctx.saved_tensors
        grad, needs = grads[0], ctx.needs_input_grad
        return (
            fp8_product(quantise_rows(grad), quantise_columns(weight), grad.dtype) if needs[0] else None,
            (grad.t() @ rows).to(weight.dtype) if needs[1] else None,
            grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs[2] else None,
        )


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with e4m3 operands scaled per row; x (..., K), weight (V, K), bias (V,), any floating dtypes.

    The result has the dtype of x (autocast's inside autocast); dx is an fp8 product too, dW and dbias are not, and a
    frozen weight costs neither its gradient nor the memory of x. Sizes that are no multiples of 16 are padded. Where
    the card has no fp8 the numbers are the same, computed in fp32 and slower than F.linear. ValueError for fp64.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    if torch.float64 in (x.dtype, weight.dtype):
        raise ValueError("fp8_linear takes fp32, bf16 and fp16, found fp64: use F.linear")
    with torch.autocast(kind, enabled=False):
        out = _Fp8Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])  # pyright: ignore[reportAttributeAccessIssue]
