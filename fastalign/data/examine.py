"""Flaws of a prepared dataset that no single row shows: repeated and contradictory rows, answers cut in bulk."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from .columns import Rows, read_rows

ROWS = 4096  # read at once
SHARES = {"truncation": 0.05, "duplicate_pairs": 0.01, "contradictory_pairs": 0.001}  # of the rows: found from here on


def examine(dataset, max_length: int | None = None) -> dict[str, float]:
    """Finding -> share of the rows, of a dataset with `prompt_ids` and pairs, or judged completions; {} for others.

    truncation: rows that fill `max_length` tokens. duplicate_pairs: rows that have prompt, answers and judgement of an
    earlier one. contradictory_pairs: rows whose opposite is there too, the same answers judged the other way round.
    """
    names = set(dataset.column_names) if isinstance(dataset, Dataset) else set()
    pairs, judged = {"prompt_ids", "chosen_ids", "rejected_ids"}, {"prompt_ids", "completion_ids", "label"}
    if not (pairs <= names or judged <= names) or not len(dataset):
        return {}
    keys, opposites, num_cut = [], [], 0
    arrow = dataset.select_columns(sorted(pairs if pairs <= names else judged)).with_format("arrow")
    table: Any  # pa.Table
    for table in arrow.iter(ROWS):
        rows = {name: read_rows(name, table[name]) for name in table.column_names if name != "label"}
        hashes = {name: _hashes(column) for name, column in rows.items()}
        prompt = rows.pop("prompt_ids").lengths
        if max_length is not None:
            num_cut += int((prompt + np.maximum.reduce([r.lengths for r in rows.values()]) >= max_length).sum())
        if pairs <= names:
            sides = [hashes["chosen_ids"], hashes["rejected_ids"]]
        else:
            good = table["label"].to_numpy().astype(bool)
            sides = [np.where(good == side, hashes["completion_ids"], np.uint64(0)) for side in (True, False)]
        keys.append(_mixed(hashes["prompt_ids"] + _mixed(sides[0] + _mixed(sides[1]))))
        opposites.append(_mixed(hashes["prompt_ids"] + _mixed(sides[1] + _mixed(sides[0]))))
    key, opposite = np.concatenate(keys), np.concatenate(opposites)
    repeated = len(key) - len(np.unique(key))
    against = int((np.isin(key, opposite) & (key != opposite)).sum())
    numbers = {"truncation": num_cut, "duplicate_pairs": repeated, "contradictory_pairs": against}
    return {name: n / len(key) for name, n in numbers.items() if n / len(key) >= SHARES[name]}


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: a bijection of 64-bit numbers that changes half of the bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hashes(rows: Rows) -> np.ndarray:
    """(B,) uint64: a polynomial of each row's mixed ids, modulo 2^64."""
    powers = np.cumprod(np.full(int(rows.lengths.max(initial=0)) + 1, 0xD6E8FEB86659FD93, np.uint64))
    place = np.arange(len(rows.values)) - np.repeat(rows.bounds[:-1], rows.lengths)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mixed(rows.values.astype(np.uint64)) * powers[place])])
    return _mixed(sums[rows.bounds[1:]] - sums[rows.bounds[:-1]] + powers[rows.lengths])
