"""Which implementation runs an op, native CPU kernels or the reference in plain torch: one decision for all ops."""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType

import torch

CHOICES = ("auto", "native", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)

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
def _say_once(message: str) -> None:
    logger.warning(message)


def backend(device: torch.device, dtype: torch.dtype) -> str:
    """`"native"` or `"reference"` for row kernels on `device` with logits of `dtype`.

    The environment variable FASTALIGN_KERNELS chooses: `auto` (default) takes the native kernel where it applies (CPU,
    fp32 and bf16), `reference` never does, `native` does and raises ImportError on CPU if the extension is missing.
    """
    choice = os.environ.get("FASTALIGN_KERNELS", "auto").lower()
    if choice not in CHOICES:
        raise ValueError(f"FASTALIGN_KERNELS={choice!r}: choose one of {', '.join(CHOICES)}")
    if choice == "reference" or device.type != "cpu" or dtype not in NATIVE_DTYPES:
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
