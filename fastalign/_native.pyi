"""Types of the C++ extension; what the functions mean stands at their callers in fastalign/data and in csrc/."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

# collation.cpp
def first_invalid(values: NDArray[np.integer], limit: int, ignored_allowed: bool) -> int: ...
def collate(
    ids: NDArray[np.integer],
    bounds: NDArray[np.int64],
    labels: NDArray[np.integer] | None,
    weights: NDArray[np.float32] | None,
    width: int,
    padded: int,
    pad_id: int,
) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray, NDArray, NDArray, NDArray | None]: ...

# packing.cpp
def plan_packs(
    lengths: NDArray[np.int64], capacity: int, strategy: str, seed: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
def gather(
    chunks: list[NDArray], chunk: NDArray[np.int32], start: NDArray[np.int64], length: NDArray[np.int64], out: NDArray
) -> None: ...

# rows.cpp; addresses of CPU tensors, 0 where there is none
class RowLogits:
    def __init__(
        self,
        data: int,
        is_bfloat16: bool,
        num_rows: int,
        vocabulary: int,
        stride: int,
        targets: int,
        temperatures: int,
        scale: float,
        softcap: float,
        temperature: float,
    ) -> None: ...

def row_statistics(
    logits: RowLogits,
    logp: int,
    lse: int,
    entropy: int,
    top1: int,
    mean_logit: int,
    log_sum_p2: int,
    num_threads: int,
    isa: str = "",
) -> None: ...
def row_gradient(
    logits: RowLogits,
    on_logp: int,
    on_entropy: int,
    on_mean_logp: int,
    on_mean_logit: int,
    on_log_sum_p2: int,
    lse: int,
    entropy: int,
    log_sum_p2: int,
    num_threads: int,
    isa: str = "",
) -> None: ...
def row_instruction_set(wanted: str = "") -> str: ...

# words.cpp
class WordTable:
    def __init__(
        self,
        digits: int,
        lines: bool,
        by_case: bool,
        slashes: bool,
        cutting: list[tuple[str, int]],
        other: list[str],
        max_bytes: int,
    ) -> None: ...
    def encode(
        self,
        texts: list[str],
        ask: Callable[[list[str], bool], tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32] | None]],
        before: list[int],
        after: list[int],
        spans: Sequence[Sequence[tuple[int, int]]] | None,
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.uint8] | None]: ...
    def __len__(self) -> int: ...

# layers.cpp; addresses of CPU tensors, 0 where there is none, and strides in elements
def norm_blocks(num_rows: int) -> int: ...
def norm_forward(
    x: int,
    residual: int,
    weight: int,
    out: int,
    summed: int,
    rstd: int,
    num_rows: int,
    width: int,
    x_stride: int,
    residual_stride: int,
    eps: float,
    offset: float,
    num_threads: int,
    isa: str,
) -> None: ...
def norm_backward(
    grad: int,
    grad_sum: int,
    x: int,
    weight: int,
    rstd: int,
    grad_x: int,
    partial: int,
    num_rows: int,
    width: int,
    grad_stride: int,
    grad_sum_stride: int,
    x_stride: int,
    offset: float,
    num_threads: int,
    isa: str,
) -> None: ...
def glu(
    is_bfloat16: bool,
    grad: int,
    gate: int,
    up: int,
    first: int,
    second: int,
    num_rows: int,
    width: int,
    strides: Sequence[int],
    num_threads: int,
    isa: str,
) -> None: ...
def rope(
    is_bfloat16: bool,
    source: int,
    to: int,
    cos: int,
    sin: int,
    shape: Sequence[int],
    strides: Sequence[int],
    inverse: bool,
    num_threads: int,
    isa: str,
) -> None: ...
