"""Rows of preference data that cannot be learnt from, or hardly: what is wrong with them, and what is done."""

from __future__ import annotations

import logging

import numpy as np

logger = logging.getLogger(__name__)

RULES = ("keep", "drop", "error")
MISSING, LONG_PROMPT, TOO_LONG, NO_TOKENS, OTHER_PROMPT, EMPTY, EQUAL, CUT = (1 << i for i in range(8))
UNUSABLE = MISSING | LONG_PROMPT | TOO_LONG | NO_TOKENS | OTHER_PROMPT  # never trained on
DOUBTFUL = EMPTY | EQUAL  # trained on unless told otherwise
REASONS = {
    MISSING: "a column holds no value, or one of another kind than the first row's",
    LONG_PROMPT: "the prompt alone fills max_length",
    TOO_LONG: "a sequence is longer than max_length",
    NO_TOKENS: "an answer has no tokens",
    OTHER_PROMPT: "the answers do not begin with one common prompt",
    EMPTY: "an answer says nothing",
    EQUAL: "its answers are equal, so none is preferred",
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
