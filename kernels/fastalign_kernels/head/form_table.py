"""Which form of the head runs: "rows" (BLAS and a row kernel) or "offset" (a Triton product with a long epilogue)."""

from __future__ import annotations

import os

import torch

from fastalign_kernels.dispatch import backend
from fastalign_kernels.launch import table_architecture

FORMS = ("auto", "rows", "offset")

# (architecture, dtype) -> [(least D, least V, least N)]: sizes from which "offset" was measured to be faster. An entry
# needs a measurement: there is none yet.
OFFSET_FROM: dict[tuple[int, torch.dtype], list[tuple[int, int, int]]] = {}


def table_form(arch: int, dtype: torch.dtype, num_tokens: int, vocabulary: int, size: int) -> str:
    """The faster form for hidden (N, D) and weight (V, D) in `dtype` on an architecture of the tile tables."""
    entries = OFFSET_FROM.get((arch, dtype), [])
    return "offset" if any(size >= d and vocabulary >= v and num_tokens >= n for d, v, n in entries) else "rows"


def head_form(device: torch.device, dtype: torch.dtype, num_tokens: int, vocabulary: int, size: int) -> str:
    """ "rows" or "offset" for a head in `dtype` on `device`; FASTALIGN_HEAD=rows or offset forces it (default auto).

    The table holds measured entries alone, so "rows" runs wherever nothing was measured. "offset" needs Triton: where
    ops do not run in Triton (`dispatch.backend`), as on CPU and in fp64, "rows" runs whatever is asked for.
    """
    choice = os.environ.get("FASTALIGN_HEAD", "auto").lower()
    if choice not in FORMS:
        raise ValueError(f"FASTALIGN_HEAD={choice!r}: choose one of {', '.join(FORMS)}")
    if choice == "rows" or backend(device, dtype) != "triton":
        return "rows"
    return (
        choice if choice == "offset" else table_form(table_architecture(device), dtype, num_tokens, vocabulary, size)
    )
