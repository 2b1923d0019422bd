"""One batched pass from raw rows of preferences to the token ids of prompts and their answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import ProcessorMixin

from .answers import NOTES, PASSED, AnswerTokenizer, ids_column
from .bad_rows import BadRows
from .cache import preparation_fingerprint
from .formats import column_names, first_row, has_images


def prepare_preference_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: Any,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    answers: tuple[str, ...] = ("chosen", "rejected"),
    bos_and_eos: bool = False,
    num_proc: int | None = None,
    name: str = "train",
    chat_template: str | None = None,
    bad_rows: str = "keep",
) -> Dataset | IterableDataset:
    """Tokenize pairs (or triples) of answers: int32 lists `prompt_ids` and `<answer>_ids`, and the columns `PASSED`.

    Takes texts or messages, with or without `prompt` (then it is what the answers begin with), and ids: columns named
    as the result, or `<answer>_input_ids`. The end token ends every text, never a conversation; with `bos_and_eos`
    (the rule of CPO and ORPO) every prompt starts with the BOS token and every answer ends with the EOS token, and
    the tokenizer adds none. A prompt is what its tokens alone share with all its answers' sequences.

    `max_length` is in tokens: "keep_start" cuts answers here and drops rows whose prompt leaves no room for them;
    "keep_end" is left to the collator, as it may cut the prompts of a row's answers differently. `bad_rows` is one of
    `bad_rows.RULES`. Results are cached by content beside the dataset's files. ValueError for unusable data.
    """
    _check_dataset(dataset, processing_class, name)
    row = _sample(dataset, answers, name)
    step = AnswerTokenizer.of(dataset, row, processing_class, answers, chat_template, name)
    step.max_length, step.truncation_mode, step.bos_and_eos = max_length, truncation_mode, bos_and_eos
    return _run(dataset, step, num_proc, name, bad_rows)


def prepare_unpaired_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: Any,
    *,
    max_length: int | None,
    num_proc: int | None = None,
    name: str = "train",
    chat_template: str | None = None,
    bad_rows: str = "keep",
) -> Dataset | IterableDataset:
    """Tokenize judged completions: int32 lists `prompt_ids` and `completion_ids`, bool `label`, the columns `PASSED`.

    Paired data give two rows each, per thousand the chosen ones (True) before the rejected ones. Otherwise as
    `prepare_preference_dataset`, except that completions are not cut: the collator does it, as `rotate_completions`
    gives them to other prompts. Rows whose prompt has `max_length` tokens or more are dropped.
    """
    _check_dataset(dataset, processing_class, name)
    found = set(column_names(dataset))
    paired = {"chosen", "rejected"} <= found or {"chosen_ids", "rejected_ids"} <= found
    answers = ("chosen", "rejected") if paired else ("completion",)
    row = _sample(dataset, answers, name)
    if not paired and "label" not in row:
        raise ValueError(f"The {name} dataset needs a column `label` (true: a good completion), found {sorted(row)}.")
    step = AnswerTokenizer.of(dataset, row, processing_class, answers, chat_template, name)
    step.max_length, step.unpaired = max_length, True
    return _run(dataset, step, num_proc, name, bad_rows)


def prepare_reward_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: Any,
    *,
    max_length: int | None,
    num_proc: int | None = None,
    name: str = "train",
    chat_template: str | None = None,
    bad_rows: str = "keep",
) -> Dataset | IterableDataset:
    """Tokenize pairs of whole sequences: `prompt_ids` is what both begin with, `chosen_ids`, `rejected_ids` the rest.

    The rest has at least one token. Rows with a sequence longer than `max_length` tokens are dropped, never cut. Given
    `chosen_ids` without `prompt_ids` are whole sequences. Otherwise as `prepare_preference_dataset`.
    """
    _check_dataset(dataset, processing_class, name)
    row = _sample(dataset, ("chosen", "rejected"), name)
    step = AnswerTokenizer.of(dataset, row, processing_class, ("chosen", "rejected"), chat_template, name)
    step.max_length, step.whole = max_length, True
    return _run(dataset, step, num_proc, name, bad_rows)


def rotate_completions(dataset: Dataset | IterableDataset, batch_size: int) -> Dataset | IterableDataset:
    """Add `kl_completion_ids`: of every `batch_size` rows in order, each gets the completion of the one before it.

    The first gets that of the last. These mismatched pairs estimate KTO's KL term, arXiv:2402.01306 Sec. 4.1.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    rows = max(1000 // batch_size, 1) * batch_size

    def rotate(table: pa.Table) -> pa.Table:
        index = np.arange(len(table)) - 1
        starts = np.arange(0, len(table), batch_size)
        index[starts] = np.minimum(starts + batch_size, len(table)) - 1
        column = table["completion_ids"].take(pa.array(index))
        return table.append_column("kl_completion_ids", column)

    features = dataset.features and Features(dataset.features | {"kl_completion_ids": List(Value("int32"))})
    options: Any = {"desc": "Pairing prompts with other completions"} if isinstance(dataset, Dataset) else {}
    result = dataset.with_format("arrow").map(rotate, batched=True, batch_size=rows, features=features, **options)
    return result.with_format(None)


def _run(dataset, step: AnswerTokenizer, num_proc: int | None, name: str, bad_rows: str):
    report = BadRows(bad_rows, name, step.max_length)
    names = ("completion",) if step.unpaired else step.answers
    features = {f"{column}_ids": List(Value("int32")) for column in ("prompt", *names)}
    features |= {"label": Value("bool")} if step.unpaired else {}
    features |= {column: Value("float32") for column in PASSED if column in step.columns}
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None).map(
            _Streamed(step, report),
            batched=True,
            with_indices=True,
            remove_columns=step.columns,
            features=Features(features),
        )
    options = {k: v for k, v in vars(step).items() if k not in ("encoder", "columns")}
    options["chat_template"] = step.encoder.chat_template
    result = dataset.with_format("arrow").map(
        step,
        batched=True,
        with_indices=True,
        num_proc=num_proc,
        remove_columns=step.columns,
        features=Features(features | {"problems": Value("int32"), "row": Value("int64")}),
        new_fingerprint=preparation_fingerprint(dataset, step.encoder.processing_class, options),
        desc=f"Tokenizing {name} dataset",
    )
    notes = result.with_format("numpy", columns=[*NOTES])[:]
    problems, numbers = notes["problems"], notes["row"]
    report.report(problems, numbers)
    report.report_cut(problems)
    keep = report.keep(problems)
    if not keep.any():
        raise ValueError(
            f"No row of the {name} dataset can be used ({len(dataset)} rows; what is wrong with them is in the log)."
        )
    result = result.with_format(None).remove_columns([*NOTES])
    return result if keep.all() else result.select(np.flatnonzero(keep))


@dataclass
class _Streamed:
    """Rows of a stream, without the bad ones; each reason is logged for the batch that has it first."""

    step: AnswerTokenizer
    report: BadRows
    reported: int = 0

    def __call__(self, batch: Mapping[str, Any], indices: list[int]) -> dict[str, list]:
        table = self.step(batch, indices)
        problems = table["problems"].to_numpy()
        self.report.report(problems & ~self.reported, table["row"].to_numpy(), " so far; said once per reason")
        self.reported |= int(np.bitwise_or.reduce(problems, initial=0))
        return table.drop_columns([*NOTES]).filter(pa.array(self.report.keep(problems))).to_pydict()


# Datasets and rows


def _check_dataset(dataset: Any, processing_class: Any, name: str) -> None:
    """ValueError for what no row of can be used."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            "The dataset uses `with_transform`, which preparing it would apply once and freeze. Apply it with "
            "`dataset.map` first."
        )
    if not has_images(columns := column_names(dataset)):
        return
    found = f"The {name} dataset has images (columns {columns}), but "
    remedy = "To train on the text alone, remove the column `image` or `images`."
    if not isinstance(processing_class, ProcessorMixin):
        raise ValueError(f"{found}the model's processing class is a plain tokenizer, which reads none. {remedy}")
    raise ValueError(
        f"{found}these are read batch by batch, by `DPOTrainer`, `KTOTrainer` and `SFTTrainer`, where the training "
        f"dataset has images too. {remedy}"
    )


def check_image_dataset(dataset: Dataset | IterableDataset, answers: tuple[str, ...], name: str) -> None:
    """ValueError where rows with images lack one of the columns `answers`, or the prompt of a judged completion."""
    row = first_row(dataset, name)
    needed = answers if "chosen" in answers else ("prompt", *answers)
    if missing := [column for column in needed if column not in row]:
        raise ValueError(
            f"The {name} dataset has the columns {sorted(row)}; {missing} missing. With images it needs "
            f"{', '.join(needed)} as texts or lists of messages, not as tokens."
        )


def _sample(dataset: Any, answers: tuple[str, ...], name: str) -> dict[str, Any]:
    """A row that has the answers. ValueError where the columns are missing or hold nothing."""
    row, columns = first_row(dataset, name), column_names(dataset)
    needed = [ids_column(columns, answer) or answer for answer in answers]
    if missing := [column for column in needed if column not in columns]:
        raise ValueError(
            f"The {name} dataset has the columns {sorted(row)}; {missing} missing. Needed are {', '.join(answers)} "
            f"(texts or lists of messages), mostly with `prompt`, or tokens: {', '.join(a + '_ids' for a in answers)}."
        )
    if all(row[column] for column in needed):
        return row
    rows = islice(iter(dataset.with_format(None)), 1000)
    return next((r for r in rows if all(r[column] for column in needed)), row)
