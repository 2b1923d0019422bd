"""Rewards of mathematical answers, compared with the solution by math-verify in processes of their own."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .texts import answer_text
from .workers import WorkerPool

SECONDS = 40.0  # for one comparison; math-verify's own limits come to 25
UNFINISHED = {"reward": 0.0, "gold": "[incomplete reasoning]", "answer": "[incomplete reasoning]"}
TOO_LONG = {"reward": 0.0, "gold": "[too long]", "answer": "[too long]"}

_pool = WorkerPool("fastalign.rewards.math_worker", min(4, os.cpu_count() or 1))


def accuracy_reward(
    completions: list[Any], solution: list[str], log_extra: Callable[[str, list], None] | None = None, **kwargs: Any
) -> list[float | None]:
    """1.0 where the answer, in LaTeX and best in a box, equals `solution`; else 0.0, None for no readable solution.

    ImportError without math-verify (`pip install fastalign[math]`).
    """
    return _compare("accuracy_reward", [answer_text(c) for c in completions], solution, log_extra)


def reasoning_accuracy_reward(
    completions: list[Any],
    solution: list[str],
    reasoning_delimiters: list[str] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """`accuracy_reward` of what follows the reasoning; 0.0 where that does not end.

    It ends with the last occurrence of the first of `reasoning_delimiters` (["</think>"]) that the answer has.
    """
    delimiters = ["</think>"] if reasoning_delimiters is None else reasoning_delimiters
    answers: list[str | None] = []
    for text in map(answer_text, completions):
        found = next((delimiter for delimiter in delimiters if delimiter in text), None)
        answers.append(None if found is None else text.rpartition(found)[2])
    return _compare("reasoning_accuracy_reward", answers, solution, log_extra)


def _compare(name: str, answers: list[str | None], solution: list[str], log_extra: Callable | None) -> list:
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError(f"`{name}` needs the package math-verify: pip install 'fastalign[math]'.")
    pairs = list(zip(answers, solution, strict=True))
    asked = [{"answer": answer, "solution": gold} for answer, gold in pairs if answer is not None]
    replies = iter(_pool.ask(asked, SECONDS))
    found = [UNFINISHED if answer is None else next(replies) or TOO_LONG for answer, _ in pairs]
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("gold_parsed", [entry["gold"] for entry in found])
        log_extra("answer_parsed", [entry["answer"] for entry in found])
    return [entry["reward"] for entry in found]


@dataclass
class CosineScaledReward:
    """See `get_cosine_scaled_reward`."""

    max_len: int
    min_value_wrong: float
    max_value_wrong: float
    min_value_correct: float
    max_value_correct: float
    __name__ = "cosine_scaled_reward"

    def __call__(
        self, completions: list[Any], solution: list[str], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float | None]:
        correct = accuracy_reward(completions, solution)
        return [self._scale(is_right, len(ids)) for is_right, ids in zip(correct, completion_ids, strict=True)]

    def _scale(self, is_right: float | None, length: int) -> float | None:
        if is_right is None:
            return None
        # the value at length 0 and the one at max_len; beyond, the cosine would rise again
        short, long = self.min_value_wrong, self.max_value_wrong
        if is_right:
            short, long = self.max_value_correct, self.min_value_correct
        return long + 0.5 * (short - long) * (1.0 + math.cos(min(length / self.max_len, 1.0) * math.pi))


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable:
    """`accuracy_reward` scaled by length along a cosine (arXiv:2502.03373, C.1): right answers are worth more when
    they are short, wrong ones cost less when they are long. `max_len` in tokens; None for no readable solution."""
    return CosineScaledReward(max_len, min_value_wrong, max_value_wrong, min_value_correct, max_value_correct)
