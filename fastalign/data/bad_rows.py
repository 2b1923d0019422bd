"""Rows of preference data that cannot be learnt from, or hardly: what is wrong with them, and what is done."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value

from .cache import preparation_fingerprint
from .masks import Tokens, bounds

logger = logging.getLogger(__name__)

RULES = ("keep", "drop", "error")
NOTES = ("problems", "row")  # columns beside those of a result: the flags below, and numbers of the rows
MISSING, LONG_PROMPT, TOO_LONG, NO_TOKENS, OTHER_PROMPT, EMPTY, EQUAL, CUT = (1 << i for i in range(8))
UNEVEN, NO_LABEL, EMPTY_STEP = (1 << i for i in range(8, 11))
UNUSABLE = MISSING | LONG_PROMPT | TOO_LONG | NO_TOKENS | OTHER_PROMPT | UNEVEN | NO_LABEL  # never trained on
DOUBTFUL = EMPTY | EQUAL | EMPTY_STEP  # trained on unless told otherwise
REASONS = {
    MISSING: "a column holds no value, or one of another kind than the first row's",
    LONG_PROMPT: "the prompt alone fills max_length",
    TOO_LONG: "a sequence is longer than max_length",
    NO_TOKENS: "an answer has no tokens",
    OTHER_PROMPT: "the answers do not begin with one common prompt",
    EMPTY: "an answer says nothing",
    EQUAL: "its answers are equal, so none is preferred",
    UNEVEN: "`completions` and `labels` are not equally many",
    NO_LABEL: "no label of a step is left, as there is none or the limits on length cut it off",
    EMPTY_STEP: "a step says nothing",
}
_SHOWN = 5  # rows named per reason


class BadRows:
    """Collects the problems of rows, and says what is done: `rule` one of RULES.

    keep: as TRL, rows of DOUBTFUL problems are trained on and UNUSABLE ones dropped; drop: both are dropped; error:
    ValueError that names them. Rows of which max_length cuts an answer are counted, and always kept.
    """

    def __init__(self, rule: str, name: str, max_length: int | None):
        if rule not in RULES:
            raise ValueError(f"`bad_rows` is {rule!r}; allowed are {', '.join(RULES)}.")
        self.rule, self.name, self.max_length = rule, name, max_length
        self.dropped = UNUSABLE if rule == "keep" else UNUSABLE | DOUBTFUL

    def keep(self, problems: np.ndarray) -> np.ndarray:
        """(R,) bool: rows to train on."""
        return problems & self.dropped == 0

    def report(self, problems: np.ndarray, numbers: np.ndarray, note: str = "") -> None:
        """Log (or raise, with the rule "error") what is wrong with which of the rows `numbers`, (R,) from 0."""
        lines = []
        for reason in REASONS:
            found = np.unique(numbers[problems & reason != 0])
            if not found.size:
                continue
            named = ", ".join(map(str, found[:_SHOWN])) + (", ..." if found.size > _SHOWN else "")
            action = "dropped" if reason & self.dropped else "kept"
            lines.append(f"{found.size} {action}: {REASONS[reason]} (row {named})")
        if not lines:
            return
        text = f"{self.name} dataset, max_length={self.max_length}: {'; '.join(lines)}."
        if self.rule == "error":
            raise ValueError(f"{text} Mend these rows, or set bad_rows='drop' or 'keep'.")
        logger.warning("%s Rule: bad_rows=%r, rows count from 0%s.", text, self.rule, note)

    def report_cut(self, problems: np.ndarray) -> None:
        """Log how many rows have an answer that max_length cuts."""
        if cut := int((problems & CUT != 0).sum()):
            logger.info("%s dataset: max_length=%s cuts answers of %d rows.", self.name, self.max_length, cut)


def prepare_rows(dataset: Any, step: Any, features: dict[str, Any], num_proc: int | None, name: str, rule: str) -> Any:
    """The dataset or stream through `step`, without bad rows, which are reported by `rule`.

    `step` is a dataclass: of a batch and the numbers of its rows it makes a table of `features` and `NOTES`.
    The content of data and tokenizer and the fields of the step name the cached result. ValueError if no row is left.
    """
    report = BadRows(rule, name, step.max_length)
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
    result: Dataset = dataset.with_format("arrow").map(
        step,
        batched=True,
        with_indices=True,
        num_proc=num_proc,
        remove_columns=step.columns,
        features=Features(features | {"problems": Value("int32"), "row": Value("int64")}),
        new_fingerprint=preparation_fingerprint(dataset, step.encoder.processing_class, options),
        desc=f"Tokenizing {name} dataset",
    )
    notes: Any = result.with_format("numpy", columns=[*NOTES])[:]
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


def lists_at(tokens: Tokens, used: np.ndarray, rows: int) -> pa.ListArray:
    """A column of `rows` lists: those of `tokens` in the rows `used`, empty ones elsewhere."""
    lengths = np.zeros(rows, np.int64)
    lengths[used] = tokens.lengths
    return pa.ListArray.from_arrays(pa.array(bounds(lengths).astype(np.int32)), pa.array(tokens.ids))


@dataclass
class _Streamed:
    """Rows of a stream, without the bad ones; each reason is logged for the batch that has it first."""

    step: Any
    report: BadRows
    reported: int = 0

    def __call__(self, batch: Mapping[str, Any], indices: list[int]) -> dict[str, list]:
        table = self.step(batch, indices)
        problems = table["problems"].to_numpy()
        self.report.report(problems & ~self.reported, table["row"].to_numpy(), " so far; said once per reason")
        self.reported |= int(np.bitwise_or.reduce(problems, initial=0))
        return table.drop_columns([*NOTES]).filter(pa.array(self.report.keep(problems))).to_pydict()
