"""Columns of rows (Arrow lists, or lists of lists, arrays and tensors) as one run of values with row bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Rows:
    """Row r of a column holds `values[bounds[r] : bounds[r + 1]]`."""

    name: str
    values: np.ndarray  # (T,) int32, int64 or fp32
    bounds: np.ndarray  # (B + 1,) int64, from 0 to T

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> np.ndarray:  # (B,) int64, tokens
        return np.diff(self.bounds)

    def locate(self, index: int) -> tuple[int, int]:
        """Row and position in the row of `values[index]`."""
        row = int(np.searchsorted(self.bounds, index, side="right")) - 1
        return row, index - int(self.bounds[row])


def read_rows(name: str, column, *, floating: bool = False, booleans: bool = False) -> Rows:
    """Rows of an Arrow list column (any integer width, chunked, sliced, large) or of a list of rows.

    Arrow values of int32 and int64 (fp32 with `floating`) are not copied. Raises ValueError for another type of
    column or value, for a missing row and for a missing value, naming where it is. With `booleans` an Arrow column may
    hold those too.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(column, pa.Array):
        return _arrow_rows(name, column, floating, booleans)
    return _python_rows(name, column, floating)


def _arrow_rows(name: str, column: pa.Array, floating: bool, booleans: bool) -> Rows:
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.large_list(column.type.value_type))
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise ValueError(f"Column `{name}` must be a list of numbers per row, got type {column.type}.")
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise ValueError(f"Column `{name}` has no value in row {row}; give every row a list or drop the row.")
    offsets = column.offsets.to_numpy()
    start, end = int(offsets[0]), int(offsets[-1])
    bounds = offsets.astype(np.int64) - start
    values = column.values.slice(start, end - start)
    if values.null_count:
        row, position = Rows(name, np.empty(0), bounds).locate(values.is_null().index(True).as_py())
        raise ValueError(f"Column `{name}` has no value at row {row}, position {position}.")
    if booleans and pa.types.is_boolean(values.type):
        values = values.cast(pa.int32())
    return Rows(name, _numbers(name, values, floating), bounds)


def _numbers(name: str, values: pa.Array, floating: bool) -> np.ndarray:
    kind = values.type
    if floating:
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise ValueError(f"Column `{name}` must hold numbers, got {kind}.")
        return values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    if not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise ValueError(f"Column `{name}` must hold integers, got {kind}; cast the column to int32 or int64.")
    if kind not in (pa.int32(), pa.int64()):
        try:
            values = values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"Column `{name}` holds values that no int64 can hold: {error}") from error
    return values.to_numpy()


def _python_rows(name: str, column: Sequence, floating: bool) -> Rows:
    target, kinds, wanted = (np.float32, "fiu", "numbers") if floating else (np.int64, "iu", "integers")
    rows = [_python_row(name, r, row, kinds, wanted) for r, row in enumerate(column)]
    bounds = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=bounds[1:])
    return Rows(name, np.concatenate([row.astype(target) for row in rows] or [np.empty(0, target)]), bounds)


def _python_row(name: str, r: int, row, kinds: str, wanted: str) -> np.ndarray:
    if row is None:
        raise ValueError(f"Column `{name}` has no value in row {r}; give every row a list or drop the row.")
    if hasattr(row, "detach"):  # a tensor
        row = row.detach().cpu()
    try:
        array = np.asarray(row)
    except ValueError as error:
        raise ValueError(f"Column `{name}`, row {r}: must be a flat list of {wanted}, got a ragged one.") from error
    if array.ndim != 1:
        raise ValueError(f"Column `{name}`, row {r}: must be a flat list of {wanted}, got {array.ndim} dimensions.")
    if array.size and (array.dtype.kind not in kinds or (array.dtype == np.uint64 and int(array.max()) > INT64_MAX)):
        raise ValueError(f"Column `{name}`, row {r}: must hold {wanted}, got {array.dtype}.")
    return array
