"""Answers in steps, each judged right or wrong, to token ids with a label at the end of every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset, List, Value
from fastalign_kernels.losses.reward import step_labels

from .bad_rows import CUT, EMPTY_STEP, MISSING, NO_LABEL, NO_TOKENS, UNEVEN, UNUSABLE, lists_at, prepare_rows
from .batch import TokenBatch, name_read
from .collate import collate_flat, collate_padded
from .columns import read_rows
from .encode import Encoder
from .formats import column_names, first_row
from .masks import IGNORED, Rows, Tokens, bounds
from .tokenize import values_of


def prepare_stepwise_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: Any,
    *,
    step_separator: str = "\n",
    max_length: int | None,
    max_completion_length: int | None = None,
    last_step_only: bool = False,
    num_proc: int | None = None,
    name: str = "train",
    bad_rows: str = "keep",
) -> Dataset | IterableDataset:
    """Tokenize `prompt` (text), `completions` (texts of steps) and `labels` (one per step): `input_ids` and `labels`.

    A sequence is the BOS token (where the tokenizer has one), the prompt, and each step with the separator behind it;
    its label stands at the separator's last token, all others are -100. Texts get no special tokens. Completions are
    cut to `max_completion_length`, then sequences to `max_length`, in tokens; rows without a label left are dropped.
    `bad_rows` is one of `bad_rows.RULES`. Rows that have `input_ids` are left as they are. ValueError for other data.
    """
    columns = column_names(dataset)
    if "input_ids" in columns:
        return dataset
    if missing := [column for column in ("prompt", "completions", "labels") if column not in columns]:
        raise ValueError(
            f"Stepwise supervision needs the columns prompt, completions and labels; {missing} missing from the "
            f"{name} dataset, found {sorted(columns)}."
        )
    if not isinstance(first_row(dataset, name)["prompt"], str):
        raise ValueError(f"The column `prompt` of the {name} dataset must hold texts; render conversations first.")
    encoder = Encoder(processing_class, None)
    separator = encoder.texts([step_separator], special_tokens=False).ids
    bos = getattr(processing_class, "tokenizer", processing_class).bos_token_id
    begin = [] if bos is None else [bos]
    step = StepTokenizer(encoder, begin, separator, last_step_only, max_length, max_completion_length, columns)
    features = {column: List(Value("int32")) for column in ("input_ids", "labels")}
    return prepare_rows(dataset, step, features, num_proc, name, bad_rows)


@dataclass
class StepTokenizer:
    """Turns a batch of raw rows into `input_ids`, `labels` and the notes of `bad_rows`; called by `Dataset.map`."""

    encoder: Encoder
    begin: list[int]  # the BOS token, where there is one
    separator: np.ndarray  # (n,) int32
    last_step_only: bool
    max_length: int | None  # tokens
    max_completion_length: int | None  # tokens
    columns: list[str]

    def __call__(self, batch: Mapping[str, Any] | pa.Table, indices: list[int]) -> pa.Table:
        """Arrow table with as many rows as the batch."""
        given = zip(*(values_of(batch, name) for name in ("prompt", "completions", "labels")), strict=True)
        raw = [(row, self._problem(*row)) for row in given]
        problems = np.array([problem for _, problem in raw], np.int32)
        used = np.flatnonzero(problems & UNUSABLE == 0)
        kept = [row for row, problem in raw if not problem & UNUSABLE]
        prompts = self._texts([prompt for prompt, _, _ in kept])
        steps = iter(self._texts([*chain.from_iterable(steps for _, steps, _ in kept)]))
        made = [
            self._sequence(prompt, list(islice(steps, len(judged))), judged)
            for prompt, (_, _, judged) in zip(prompts, kept, strict=True)
        ]
        ids, marks = (np.concatenate([np.zeros(0, np.int32), *(pair[i] for pair in made)]) for i in range(2))
        rows = Rows(ids, marks.astype(np.int32), np.array([len(sequence) for sequence, _ in made], np.int64))
        if self.max_length is not None:
            problems[used] |= CUT * (rows.lengths > self.max_length)
            rows = rows.truncated(self.max_length, "keep_start")
        problems[used] |= NO_LABEL * ~rows.scored()
        columns = {"input_ids": rows.ids, "labels": rows.labels}
        table = {name: lists_at(Tokens(v, rows.lengths), used, len(problems)) for name, v in columns.items()}
        return pa.table(table | {"problems": pa.array(problems), "row": pa.array(indices, pa.int64())})

    def _problem(self, prompt: Any, steps: Any, judged: Any) -> int:
        """Flags of a raw row."""
        lists = isinstance(steps, list) and isinstance(judged, list)
        if not isinstance(prompt, str) or not lists or None in judged or not all(isinstance(s, str) for s in steps):
            return MISSING
        if len(steps) != len(judged):
            return UNEVEN
        return 0 if all(steps) else EMPTY_STEP if len(self.separator) else NO_TOKENS

    def _texts(self, texts: list[str]) -> list[np.ndarray]:
        tokens = self.encoder.texts(texts, special_tokens=False) if texts else Tokens.of([])
        return np.split(tokens.ids, bounds(tokens.lengths)[1:-1]) if texts else []

    def _sequence(self, prompt: np.ndarray, steps: list[np.ndarray], judged: list) -> tuple[np.ndarray, np.ndarray]:
        ids = [np.asarray(self.begin, np.int32), prompt]
        for step in steps:
            ids += [step, self.separator]
        start = len(self.begin) + len(prompt)
        ends = [len(step) + len(self.separator) for step in steps]
        labels = step_labels(ends, judged, prompt_length=start, last_step_only=self.last_step_only).numpy()
        limit = None if self.max_completion_length is None else start + self.max_completion_length
        return np.concatenate(ids)[:limit], labels[:limit]


class StepCollator:
    """Rows `input_ids` and `labels` -> TokenBatch that reads the positions with a label, which is their target.

    Raises ValueError as `collate_flat`, and for labels of no class.
    """

    reads_arrow = True
    columns = ("input_ids", "labels")

    def __init__(self, *, pad_token_id: int, num_labels: int, flat: bool, vocab_size: int, pad_to_multiple_of=None):
        self.pad_token_id, self.num_labels, self.flat = pad_token_id, num_labels, flat
        self.options = {"vocab_size": vocab_size, "pad_to_multiple_of": pad_to_multiple_of}

    def __call__(self, rows: pa.Table | list[dict]) -> TokenBatch:
        if not isinstance(rows, pa.Table) and isinstance(rows[0], pa.Table):
            rows = pa.concat_tables(rows)
        table: Any = rows
        as_arrow = isinstance(rows, pa.Table)
        ids, labels = (table.column(n) if as_arrow else [row[n] for row in table] for n in self.columns)
        collate = collate_flat if self.flat else collate_padded
        batch = collate(ids, pad_token_id=self.pad_token_id, **self.options)
        found = read_rows("labels", labels)
        if not np.array_equal(found.lengths, read_rows("input_ids", ids).lengths):
            raise ValueError("Columns `input_ids` and `labels` must be equally long in every row.")
        scored = np.flatnonzero(found.values != IGNORED)
        classes = found.values[scored].astype(np.int64)
        if (wrong := np.flatnonzero((classes < 0) | (classes >= self.num_labels))).size:
            row, position = found.locate(int(scored[wrong[0]]))
            raise ValueError(
                f"Column `labels`, row {row}, position {position}: {classes[wrong[0]]} is no class; labels must be "
                f"-100 or from 0 to {self.num_labels - 1}."
            )
        row = np.searchsorted(found.bounds, scored, side="right") - 1
        source = scored if self.flat else row * batch.input_ids.shape[1] + scored - found.bounds[row]
        batch = replace(
            batch,
            source=torch.from_numpy(source),
            targets=torch.from_numpy(classes),
            row=torch.from_numpy(row),
            weight=torch.ones(len(scored)),
        )
        return name_read(batch)
