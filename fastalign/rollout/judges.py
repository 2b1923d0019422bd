"""Judges: which of two completions of a prompt is better, asked twice as often as it takes to cancel their bias.

A judge is anything with `judge(prompts, completions, shuffle_order)`, as in TRL. Its ready-made judges are not here:
those ask a service over the network (OpenAI, Hugging Face) or need a package of their own (PairRM); wrap them in
`FunctionJudge`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .reward_models import RewardModel, load_reward_model, tokenize
from .samples import Sample


class BasePairwiseJudge(ABC):
    """Compares the two completions of each prompt."""

    @abstractmethod
    def judge(self, prompts: list[Any], completions: list[list[Any]], shuffle_order: bool = True) -> list[int]:
        """The better of each pair: 0 the first, 1 the second, -1 where it cannot be told.

        `shuffle_order` shows some pairs in the other order, against a judge that prefers a place.
        """


class FunctionJudge(BasePairwiseJudge):
    """A judge made of a function `f(prompts, completions) -> list` of 0, 1, or None where it cannot be told.

    Half of the pairs, drawn with `seed`, are shown in the other order: the same of them for equal prompts and
    completions. ValueError for other answers, or for a wrong number of them.
    """

    def __init__(self, function: Callable[[list[Any], list[list[Any]]], Sequence[int | None]], seed: int = 0):
        self.function, self.seed = function, seed

    def judge(self, prompts: list[Any], completions: list[list[Any]], shuffle_order: bool = True) -> list[int]:
        drawn = random.Random(repr((self.seed, prompts, completions)))  # no state: resumed runs show the same
        turned = [shuffle_order and drawn.random() < 0.5 for _ in prompts]
        shown = [pair[::-1] if turn else pair for pair, turn in zip(completions, turned, strict=True)]
        found = list(self.function(prompts, shown))
        if len(found) != len(prompts):
            raise ValueError(
                f"The judge returned {len(found)} answers for {len(prompts)} pairs; it must return one each."
            )
        if unknown := [answer for answer in found if answer not in (0, 1, -1, None)]:
            raise ValueError(f"The judge returned {unknown[0]!r}; allowed are 0 and 1, and None or -1 for neither.")
        return [
            -1 if answer in (None, -1) else int(answer) ^ int(turn) for answer, turn in zip(found, turned, strict=True)
        ]


class RewardModelJudge(BasePairwiseJudge):
    """A judge that prefers what a reward model scores higher; equal scores and NaN cannot be told apart."""

    def __init__(
        self,
        model: Any,
        processing_class: Any = None,
        *,
        device: torch.device | str = "cpu",
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        model = load_reward_model(model) if isinstance(model, str) else model
        self.model = RewardModel(model, processing_class, device=device)
        self.template_kwargs = chat_template_kwargs or {}

    def judge(self, prompts: list[Any], completions: list[list[Any]], shuffle_order: bool = True) -> list[int]:
        """As above; the order has no effect, because each completion is scored alone."""
        texts = [
            Sample({"prompt": prompt}, [], [], None, "stop", completion)
            for prompt, pair in zip(prompts, completions, strict=True)
            for completion in pair
        ]
        first, second = (
            self.model.score(tokenize(texts, self.model.processing_class, self.template_kwargs)).view(-1, 2).T
        )
        return [1 if b > a else 0 if a > b else -1 for a, b in zip(first.tolist(), second.tolist(), strict=True)]
