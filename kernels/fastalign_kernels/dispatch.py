"""Which implementation runs an op, Triton, native CPU kernels or the reference in torch: one decision for all ops."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from types import ModuleType

import torch

CHOICES = ("auto", "triton", "native", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)


@functools.cache
def native_module() -> ModuleType | None:
    """The C++ extension, or None where it was not built (a wheel without it, these kernels installed alone)."""
    try:
        from fastalign import _native
    except ImportError:
        return None
    return _native if hasattr(_native, "row_statistics") else None


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def backend(device: torch.device, dtype: torch.dtype, *, native: bool = True) -> str:
    """`"triton"`, `"native"` or `"reference"` for an op on `device` in `dtype`; `native`: the op has a C++ kernel.

    The environment variable FASTALIGN_KERNELS chooses. `auto` (default): Triton on CUDA, the native kernel on CPU,
    where they apply (16-bit and fp32; native not fp16), else the reference. `reference`: always. `native`: as auto,
    but ImportError on CPU if the extension is missing. `triton`: as auto, and also on CPU tensors (for Triton's
    interpreter, or for compilation ahead of time).
    """
    choice = os.environ.get("FASTALIGN_KERNELS", "auto").lower()
    if choice not in CHOICES:
        raise ValueError(f"FASTALIGN_KERNELS={choice!r}: choose one of {', '.join(CHOICES)}")
    if choice == "reference":
        return "reference"
    if (device.type == "cuda" or choice == "triton") and dtype in TRITON_DTYPES:
        if has_triton():
            return "triton"
        if choice == "triton":
            raise ImportError("FASTALIGN_KERNELS=triton, but Triton is not installed: pip install triton")
        _say_once("Triton is not installed: kernels on the GPU run in plain torch")
    if device.type != "cpu" or not native or dtype not in NATIVE_DTYPES:
        return "reference"
    if native_module() is not None:
        return "native"
    if choice == "native":
        raise ImportError(
            "FASTALIGN_KERNELS=native, but the C++ extension fastalign._native is not importable: "
            "install fastalign with its extension, or unset the variable"
        )
    _say_once("fastalign._native is not importable: the CPU kernels run in plain torch")
    return "reference"
