"""Ragged rows of token ids as flat arrays: labels, truncation, and dropping of rows that nothing is learnt from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from .columns import read_rows

IGNORED = -100  # label of a token that is not scored


@dataclass
class Tokens:
    """R rows of token ids back to back."""

    ids: np.ndarray  # (T,) int32
    lengths: np.ndarray  # (R,) int64, tokens per row

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Tokens:
        return cls(*flatten(rows))

    @classmethod
    def joined(cls, parts: Sequence[Tokens]) -> Tokens:
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "lengths")))

    def part(self, start: int, end: int) -> Tokens:
        """The rows from `start` to `end`, a view."""
        edges = bounds(self.lengths)
        return Tokens(self.ids[edges[start] : edges[end]], self.lengths[start:end])

    def lists(self) -> list[list[int]]:
        edges, ids = bounds(self.lengths).tolist(), self.ids.tolist()
        return [ids[start:end] for start, end in pairwise(edges)]


@dataclass
class Rows:
    """R rows of tokens back to back."""

    ids: np.ndarray  # (T,) int32
    labels: np.ndarray  # (T,) int32, IGNORED = not scored
    lengths: np.ndarray  # (R,) int64, tokens per row

    def table(self) -> pa.Table:
        """Columns `input_ids` and `labels`, lists of int32."""
        offsets = pa.array(bounds(self.lengths).astype(np.int32))
        columns = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (self.ids, self.labels)]
        return pa.table(columns, names=["input_ids", "labels"])

    def truncated(self, max_length: int, mode: str) -> Rows:
        """Every row cut to `max_length` tokens: its first (`keep_start`) or its last (`keep_end`) ones."""
        if not len(self.lengths) or self.lengths.max() <= max_length:
            return self
        from_start = np.arange(len(self.ids)) - np.repeat(bounds(self.lengths)[:-1], self.lengths)
        if mode == "keep_start":
            keep = from_start < max_length
        else:
            keep = from_start >= np.repeat(self.lengths - max_length, self.lengths)
        return Rows(self.ids[keep], self.labels[keep], np.minimum(self.lengths, max_length))

    def scored(self) -> np.ndarray:
        """(R,) bool: rows with at least one scored token."""
        return any_of_rows(self.labels != IGNORED, self.lengths)

    def take(self, keep: np.ndarray) -> Rows:
        """The rows where `keep`, (R,) bool, is true."""
        if keep.all():
            return self
        tokens = np.repeat(keep, self.lengths)
        return Rows(self.ids[tokens], self.labels[tokens], self.lengths[keep])


def bounds(lengths: np.ndarray) -> np.ndarray:
    """(R + 1,) int64: where each row starts, and the end of the last."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def flatten(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of token ids -> (T,) int32 and their lengths (R,) int64."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths


def flat_column(column: pa.ChunkedArray | pa.Array | list, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of integer or boolean lists -> (T,) int32 and the lengths (R,) int64. ValueError for other values."""
    rows = read_rows(name, pa.array(column) if isinstance(column, list) else column, booleans=True)
    values = rows.values.astype(np.int32)
    if (wrong := np.flatnonzero(values != rows.values)).size:
        row, position = rows.locate(int(wrong[0]))
        raise ValueError(f"Column `{name}`, row {row}, position {position}: {rows.values[wrong[0]]} is no token id.")
    return values, rows.lengths


def build_labels(ids: np.ndarray, masks: Iterable[np.ndarray]) -> np.ndarray:
    """(T,) int32: the id where every mask (T,) is non-zero, else IGNORED."""
    labels = ids.copy()
    for mask in masks:
        labels[mask == 0] = IGNORED
    return labels


def after_prompt(lengths: np.ndarray, prompt_lengths: np.ndarray) -> np.ndarray:
    """(T,) bool: true for the tokens behind the first `prompt_lengths`, (R,), of each row."""
    from_start = np.arange(lengths.sum()) - np.repeat(bounds(lengths)[:-1], lengths)
    return from_start >= np.repeat(prompt_lengths, lengths)


def assistant_mask(encoding: Any, spans: Sequence[tuple[int, int]]) -> list[int]:
    """0/1 per token of a `tokenizers.Encoding`: 1 where the token lies in one of the character spans.

    As transformers does it: a span that starts behind the last token ends the search, one whose last character has
    no token reaches to the end.
    """
    mask = [0] * len(encoding.ids)
    for start, end in spans:
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None:
            break
        stop = last + 1 if last else len(mask)
        mask[first:stop] = [1] * max(stop - first, 0)
    return mask


def any_of_rows(flags: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(R,) bool: whether one of the row's `flags`, (T,), is set."""
    before = np.concatenate(([0], np.cumsum(flags != 0)))
    edges = bounds(lengths)
    return before[edges[1:]] > before[edges[:-1]]


def common_prefix_lengths(tokens: Tokens, other: Tokens) -> np.ndarray:
    """(R,) int64: number of tokens that row r of both begins with."""
    edges, num_tokens = bounds(tokens.lengths), len(tokens.ids)
    from_start = np.arange(num_tokens) - np.repeat(edges[:-1], tokens.lengths)
    partner = from_start + np.repeat(bounds(other.lengths)[:-1], tokens.lengths)
    equal = from_start < np.repeat(other.lengths, tokens.lengths)
    equal[equal] = tokens.ids[equal] == other.ids[partner[equal]]
    parted = np.append(np.flatnonzero(~equal), num_tokens)  # the first of them at or behind each row's start
    return np.minimum(parted[np.searchsorted(parted, edges[:-1])], edges[1:]) - edges[:-1]
