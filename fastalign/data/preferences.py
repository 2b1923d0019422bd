"""One batched pass from raw rows of preferences to the token ids of prompts and their answers."""

from __future__ import annotations

import logging
from itertools import count, islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import ProcessorMixin

from .answers import KL_IDS, PASSED, AnswerTokenizer, ids_column, judgements
from .bad_rows import prepare_rows
from .formats import column_names, first_row, has_images

logger = logging.getLogger(__name__)
_STALE = (
    "`ref_kl_logps` are of other mismatched answers than those of `per_device_train_batch_size={}` and this order of "
    "the rows (the column `kl_completion_ids` says of which)."
)


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

    The first gets that of the last. These mismatched pairs estimate KTO's KL term, arXiv:2402.01306 Sec. 4.1. A column
    `ref_kl_logps` stays where the dataset has the same `kl_completion_ids` already; else it is removed, with a warning
    (of a stream: ValueError at the batch that has others).
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    rows = max(1000 // batch_size, 1) * batch_size
    scored, given = (name in column_names(dataset) for name in ("ref_kl_logps", KL_IDS))
    checked = scored and given and isinstance(dataset, IterableDataset)

    def rotate(table: pa.Table) -> pa.Table:
        index = np.arange(len(table)) - 1
        starts = np.arange(0, len(table), batch_size)
        index[starts] = np.minimum(starts + batch_size, len(table)) - 1
        column = table["completion_ids"].take(pa.array(index))
        if checked and not column.equals(table[KL_IDS]):
            raise ValueError(f"The stream's {_STALE.format(batch_size)} Remove the column `ref_kl_logps`.")
        return (table.drop_columns([KL_IDS]) if given else table).append_column(KL_IDS, column)

    features = dataset.features and Features(dataset.features | {KL_IDS: List(Value("int32"))})
    options: Any = {"desc": "Pairing prompts with other completions"} if isinstance(dataset, Dataset) else {}
    result = dataset.with_format("arrow").map(rotate, batched=True, batch_size=rows, features=features, **options)
    result = result.with_format(None)
    if not scored or checked or (given and _alike(dataset, result)):
        return result
    logger.warning("%s It is left out.", _STALE.format(batch_size))
    return result.remove_columns(["ref_kl_logps"])


def _alike(dataset: Any, other: Any) -> bool:
    """Whether two datasets of as many rows have the same `kl_completion_ids`."""
    parts = (part.select_columns([KL_IDS]).with_format("arrow").iter(1000) for part in (dataset, other))
    return all(first[KL_IDS].equals(second[KL_IDS]) for first, second in zip(*parts, strict=True))


def _run(dataset, step: AnswerTokenizer, num_proc: int | None, name: str, bad_rows: str):
    names = ("completion",) if step.unpaired else step.answers
    lists = [f"{column}_ids" for column in ("prompt", *names)] + [KL_IDS] * step.keeps_mismatched
    features = {column: List(Value("int32")) for column in lists}
    features |= {"label": Value("bool")} if step.unpaired else {}
    features |= {column: Value("float32") for column in PASSED if column in step.columns}
    return prepare_rows(dataset, step, features, num_proc, name, bad_rows)


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
    """ValueError where rows with images lack one of the columns `answers`, or the prompt of a judged completion.

    Of a dataset also for a row without a value in one of them, whose number it names, and for labels that are none.
    """
    row = first_row(dataset, name)
    needed = answers if "chosen" in answers else ("prompt", *answers)
    if missing := [column for column in needed if column not in row]:
        raise ValueError(
            f"The {name} dataset has the columns {sorted(row)}; {missing} missing. With images it needs "
            f"{', '.join(needed)} as texts or lists of messages, not as tokens."
        )
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    names = [column for column in dict.fromkeys(("prompt", *needed)) if column in row]
    tables: Any = dataset.select_columns(names).with_format("arrow").iter(1000)
    start = 0
    for table in tables:
        for column in table.column_names:
            if (missing := np.flatnonzero(table[column].is_null().to_numpy())).size:
                raise ValueError(
                    f"Row {start + missing[0]} of the {name} dataset has no value in `{column}`. Leave such rows out: "
                    f"`dataset.filter(lambda value: value is not None, input_columns={column!r})`."
                )
        if "label" in needed:
            judgements(table["label"].to_pylist(), count(start))
        start += len(table)


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
