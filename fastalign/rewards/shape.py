"""Rewards of an answer's shape: its format, its length, its repetitions; made as objects that can be pickled."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .texts import answer_text

THOUGHT = re.compile(r"<think>(?!.*<think>).*?</think>", re.DOTALL)


def think_format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """1.0 for an answer that begins with its only `<think>` and closes it with `</think>`, else 0.0."""
    return [1.0 if THOUGHT.match(answer_text(completion)) else 0.0 for completion in completions]


@dataclass
class RepetitionPenalty:
    """See `get_repetition_penalty_reward`."""

    ngram_size: int
    max_penalty: float
    __name__ = "repetition_penalty_reward"

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [self._penalty(ids) for ids in completion_ids]

    def _penalty(self, ids: list[int]) -> float:
        num_ngrams = len(ids) - self.ngram_size + 1
        if num_ngrams < 1:
            return 0.0
        different = len({tuple(ids[i : i + self.ngram_size]) for i in range(num_ngrams)})
        return (1 - different / num_ngrams) * self.max_penalty if different < num_ngrams else 0.0


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable:
    """A reward of `max_penalty` times the share of repeated n-grams of tokens (arXiv:2502.03373, C.2).

    Answers of fewer than `ngram_size` tokens get 0. ValueError for a penalty above 0.
    """
    if max_penalty > 0:
        raise ValueError(f"`max_penalty` is {max_penalty}; a penalty is 0 or below.")
    return RepetitionPenalty(ngram_size, max_penalty)


@dataclass
class SoftOverlongPunishment:
    """See `get_soft_overlong_punishment`."""

    max_completion_len: int
    soft_punish_cache: int
    __name__ = "soft_overlong_punishment_reward"

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [self._punishment(len(ids)) for ids in completion_ids]

    def _punishment(self, length: int) -> float:
        free = self.max_completion_len - self.soft_punish_cache
        if length <= free:
            return 0.0
        return (free - length) / self.soft_punish_cache if length <= self.max_completion_len else -1.0


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable:
    """0 up to `soft_punish_cache` tokens before `max_completion_len`, from there linearly to -1 (DAPO,
    arXiv:2503.14476 Eq. 13); lengths in tokens."""
    return SoftOverlongPunishment(max_completion_len, soft_punish_cache)
