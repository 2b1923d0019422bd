"""What the layers share: whether Triton runs a call, and tensors seen as rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign_kernels.dispatch import TRITON_DTYPES, backend


def takes_triton(*tensors: Tensor | None) -> bool:
    """Whether Triton's kernels run on `tensors`, which must be plain ones in its dtypes.

    Under torch.compile the formula in torch is traced instead: Inductor fuses it, and the graph does not break.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or any(hasattr(tensor, "device_mesh") for tensor in given):
        return False
    if any(tensor.dtype not in TRITON_DTYPES for tensor in given):
        return False
    return backend(given[0].device, given[0].dtype, native=False) == "triton"


def has_kernels(device: torch.device) -> bool:
    """Whether layers on `device` run in Triton or C++, not as formulas in torch."""
    return backend(device, torch.float32) != "reference"


def as_rows(tensor: Tensor) -> Tensor:
    """(..., D) as (N, D) with contiguous rows; copies only where strides demand it."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.shape[-1] else tensor.reshape(0, 0)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a reference computes in: fp64 stays, all else is fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
