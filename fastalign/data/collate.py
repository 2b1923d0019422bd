"""Rows of token ids to the batch that is trained on, in C++ straight from Arrow buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from fastalign import _native

from .batch import TokenBatch
from .columns import INT64_MAX, Rows, read_rows

COLUMNS = ("input_ids", "labels", "seq_lengths", "weight")
MASKS = ("completion_mask", "assistant_masks")


def collate_flat(
    input_ids,
    labels=None,
    seq_lengths=None,
    weight=None,
    *,
    vocab_size: int | None = None,
    pad_to_multiple_of: int | None = None,
    pad_token_id: int = 0,
) -> TokenBatch:
    """A flat batch: rows back to back, no padding; every argument is a column with one list of numbers per row.

    labels: unshifted, as long as input_ids, -100 where a token is not scored; None scores every token. The first
    token of a segment is never a target. seq_lengths: lengths in tokens of the segments of a packed row; None: a row
    is one segment. weight: per token, as long as input_ids, of that token as a target (default 1.0). With
    `pad_to_multiple_of` the tail is filled with unscored segments of one `pad_token_id` each. Raises ValueError,
    naming row, position and value, for ids or labels that are negative or not below `vocab_size`, for values that are
    not integers, for missing or empty rows and for lengths that do not fit.
    """
    ids, label_values, weights = _read(input_ids, labels, weight, vocab_size)
    bounds = ids.bounds if seq_lengths is None else _segment_bounds(ids, read_rows("seq_lengths", seq_lengths))
    num_tokens = len(ids.values)
    padded = round_up(num_tokens, pad_to_multiple_of)
    arrays = _native.collate(ids.values, bounds, label_values, weights, 0, padded, pad_token_id)
    return _token_batch(arrays, bounds, num_tokens, None)


def collate_padded(
    input_ids,
    labels=None,
    *,
    pad_token_id: int,
    vocab_size: int | None = None,
    pad_to_multiple_of: int | None = None,
    weight=None,
) -> TokenBatch:
    """A batch of rows padded on the right to the longest one (to a multiple of `pad_to_multiple_of`).

    For models that cannot take sequences back to back. Arguments and errors as in `collate_flat`.
    """
    ids, label_values, weights = _read(input_ids, labels, weight, vocab_size)
    width = max(1, round_up(int(ids.lengths.max(initial=0)), pad_to_multiple_of))
    arrays = _native.collate(ids.values, ids.bounds, label_values, weights, width, 0, pad_token_id)
    return _token_batch(arrays, ids.bounds, len(ids.values), width)


class TokenCollator:
    """Collator of a training loop: an Arrow table (or a list of rows) to a flat or a padded TokenBatch.

    Reads the columns `input_ids`, `labels`, `seq_lengths` and `weight`, of which the last three may be missing; other
    columns are left alone, except that mask columns without `labels` raise, because every token would be scored.
    """

    def __init__(
        self,
        *,
        pad_token_id: int,
        flat: bool = True,
        vocab_size: int | None = None,
        pad_to_multiple_of: int | None = None,
    ):
        self.pad_token_id = pad_token_id
        self.flat = flat
        self.vocab_size = vocab_size
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: pa.Table | list[dict]) -> TokenBatch:
        """Raises ValueError as `collate_flat`, and for packed rows (`seq_lengths`) where the batch must be padded."""
        columns = _columns(rows)
        options = {
            "pad_token_id": self.pad_token_id,
            "vocab_size": self.vocab_size,
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }
        if self.flat:
            return collate_flat(**columns, **options)
        if "seq_lengths" in columns:
            raise ValueError(
                "Packed rows (column `seq_lengths`) need flat batches, but this model takes padded ones, in which the "
                "sequences of a row would see each other. Train it with `packing=False`."
            )
        return collate_padded(**columns, **options)


def _columns(rows: pa.Table | list[dict]) -> dict:
    """The columns of COLUMNS that `rows` has."""
    table: Any = rows if isinstance(rows, pa.Table) else None
    if table is None and rows and isinstance(rows[0], pa.Table):
        table = pa.concat_tables(rows)
    if table is not None:
        names = list(table.column_names)
        found: dict = {name: table.column(name) for name in COLUMNS if name in names}
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        found = {name: [row.get(name) for row in rows] for name in COLUMNS if name in names}
    if "input_ids" not in found:
        raise ValueError(f"Rows to collate need a column `input_ids`, found {sorted(names)}.")
    masks = [name for name in MASKS if name in names]
    if masks and "labels" not in found:
        raise ValueError(
            f"Rows have {masks} but no `labels`, so every token would be scored; add `labels` (-100 where not scored)."
        )
    return found


def _read(input_ids, labels, weight, vocab_size: int | None) -> tuple[Rows, np.ndarray | None, np.ndarray | None]:
    """Checked ids, and the values of labels and weights where given."""
    ids = read_rows("input_ids", input_ids)
    if (empty := np.flatnonzero(ids.lengths == 0)).size:
        raise ValueError(f"Column `input_ids` is empty in row {empty[0]}; drop rows without tokens.")
    check_ids(ids, vocab_size, ignored_allowed=False)
    label_rows = None if labels is None else read_rows("labels", labels)
    weight_rows = None if weight is None else read_rows("weight", weight, floating=True)
    for rows in (label_rows, weight_rows):
        if rows is not None:
            _check_same_lengths(ids, rows)
    if label_rows is not None:
        check_ids(label_rows, vocab_size, ignored_allowed=True)
    if weight_rows is not None and not np.isfinite(weight_rows.values).all():
        row, position = weight_rows.locate(int(np.flatnonzero(~np.isfinite(weight_rows.values))[0]))
        raise ValueError(f"Column `weight` is not finite at row {row}, position {position}.")
    return ids, None if label_rows is None else label_rows.values, None if weight_rows is None else weight_rows.values


def check_ids(rows: Rows, vocab_size: int | None, *, ignored_allowed: bool) -> None:
    index = _native.first_invalid(rows.values, INT64_MAX if vocab_size is None else vocab_size, ignored_allowed)
    if index < 0:
        return
    row, position = rows.locate(index)
    allowed = "not negative" if vocab_size is None else f"in [0, {vocab_size})"
    raise ValueError(
        f"Column `{rows.name}`, row {row}, position {position}: {rows.values[index]} is no token id; ids must be "
        f"{allowed}{' or -100 (not scored)' if ignored_allowed else ''}. Was the data made with another tokenizer?"
    )


def _check_same_lengths(ids: Rows, other: Rows) -> None:
    if len(ids) != len(other):
        raise ValueError(f"Column `{other.name}` has {len(other)} rows, `input_ids` has {len(ids)}.")
    different = np.flatnonzero(ids.lengths != other.lengths)
    if different.size:
        row = different[0]
        raise ValueError(
            f"Column `{other.name}` has {other.lengths[row]} values in row {row}, `input_ids` has {ids.lengths[row]}; "
            "they must be equally many."
        )


def _segment_bounds(ids: Rows, segments: Rows) -> np.ndarray:
    """Bounds (S + 1,) int64 of the segments of packed rows."""
    if len(ids) != len(segments):
        raise ValueError(f"Column `seq_lengths` has {len(segments)} rows, `input_ids` has {len(ids)}.")
    if (segments.values <= 0).any():
        row, position = segments.locate(int(np.flatnonzero(segments.values <= 0)[0]))
        raise ValueError(f"Column `seq_lengths`, row {row}, position {position}: lengths must be positive.")
    bounds = np.zeros(len(segments.values) + 1, np.int64)
    np.cumsum(segments.values, out=bounds[1:])
    sums = np.diff(bounds[segments.bounds])
    if (different := np.flatnonzero(sums != ids.lengths)).size:
        row = different[0]
        raise ValueError(
            f"Column `seq_lengths` adds up to {sums[row]} in row {row}, but the row has {ids.lengths[row]} tokens."
        )
    return bounds


def round_up(size: int, multiple: int | None) -> int:
    if multiple is None:
        return size
    if multiple < 1:
        raise ValueError(f"`pad_to_multiple_of` must be at least 1 or None, got {multiple}.")
    return -(-size // multiple) * multiple


def _token_batch(arrays, bounds: np.ndarray, num_tokens: int, width: int | None) -> TokenBatch:
    ids, positions, cu_seqlens, source, targets, row, weight, mask = arrays
    shape = (-1,) if width is None else (len(bounds) - 1, width)
    return TokenBatch(
        input_ids=torch.from_numpy(ids).view(shape),
        position_ids=torch.from_numpy(positions).view(shape),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        source=torch.from_numpy(source),
        targets=torch.from_numpy(targets),
        row=torch.from_numpy(row),
        weight=torch.from_numpy(weight),
        max_seqlen=max(int(np.diff(bounds).max(initial=0)), int(len(ids) > num_tokens and width is None)),
        num_tokens=num_tokens,
        attention_mask=None if mask is None else torch.from_numpy(mask).view(shape),
    )
