"""What tests of Triton kernels share: a device that runs them, guarded memory, and bounds for each dtype.

Without a GPU the kernels run in Triton's interpreter on CPU tensors: keep N <= 128, V <= 1000, H <= 128.
"""

import contextlib
import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
GUARD = 64  # elements of NaN before and behind a guarded tensor


@contextlib.contextmanager
def triton_backend():
    """Inside, every op takes its Triton kernel, also on CPU tensors."""
    with mock.patch.dict(os.environ, {"FASTALIGN_KERNELS": "triton"}):
        yield


def guarded(tensor: torch.Tensor, row_gap: int = 0) -> torch.Tensor:
    """A copy of a vector or matrix (rows `row_gap` elements apart) with NaN (or the least integer) all around.

    A kernel that reads outside makes its result NaN; `assert_guards` tells whether it wrote there.
    """
    rows, columns = (1, tensor.numel()) if tensor.dim() < 2 else tensor.shape
    stride = columns + row_gap
    fill = float("nan") if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).min
    memory = torch.full((2 * GUARD + rows * stride,), fill, dtype=tensor.dtype, device=tensor.device)
    inside = memory[GUARD : GUARD + rows * stride].view(rows, stride)[:, :columns]
    inside.copy_(tensor.reshape(rows, columns))
    result = inside[0] if tensor.dim() < 2 else inside
    result.guards = memory  # type: ignore[attr-defined]
    return result


def assert_guards(tensor: torch.Tensor, row_gap: int = 0) -> None:
    """Nothing was written around a guarded tensor."""
    memory = tensor.guards  # type: ignore[attr-defined]
    rows, columns = (1, tensor.numel()) if tensor.dim() < 2 else tensor.shape
    inside = memory[GUARD:-GUARD].view(rows, columns + row_gap)
    for part in (memory[:GUARD], memory[-GUARD:], inside[:, columns:]):
        if part.dtype.is_floating_point:
            assert part.isnan().all(), "a kernel wrote outside of its tensor"
        else:
            assert (part == torch.iinfo(part.dtype).min).all(), "a kernel wrote outside of its tensor"


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of the exact fp64 result."""
    found, exact = found.double(), exact.double()
    assert torch.isfinite(found).all(), "NaN or infinity: a kernel read outside of its tensors, or overflowed"
    return ((found - exact).norm() / exact.norm().clamp_min(1e-30)).item()
