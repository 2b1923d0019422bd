"""Groups that taught much, kept to stand in for groups that teach nothing."""

from __future__ import annotations

import copy
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .buffer import Experience
from .generation import GenerationBatch


class ReplayBuffer:
    """The `size` groups of this rank with the largest sum of |advantage| times the deviation of their rewards.

    A group without deviation is replaced by one of them, drawn by that score, whose log-probabilities as sampled are
    the old ones of the ratio.
    """

    def __init__(self, size: int):
        self.size = size
        self.groups: list[tuple[float, list[Experience]]] = []  # best first

    def renew(self, batch: GenerationBatch, deviations: Tensor, seed: int) -> int:
        """Replace groups of `batch` whose `deviations` (n,) are 0, then keep its best; returns how many were replaced.

        Only groups that are whole on this rank take part.
        """
        rng = np.random.default_rng(seed)
        fresh, empty, place = [], [], 0
        for _, found in groupby(list(batch.experiences), key=lambda one: one.group):
            group = list(found)
            score = sum(abs(one.advantage) * float(deviations[place + i]) for i, one in enumerate(group))
            if len(group) == batch.num_generations:
                (fresh if score > 0 else empty).append((score, place, group))
            place += len(group)
        count = min(len(empty), len(self.groups))
        if count:
            scores = np.array([score for score, _ in self.groups])
            chosen = rng.choice(len(scores), count, replace=False, p=scores / scores.sum())
            for (_, place, _), number in zip(empty, chosen, strict=False):
                batch.experiences[place : place + batch.num_generations] = [_again(e) for e in self.groups[number][1]]
        kept = self.groups + [(score, group) for score, _, group in fresh]
        self.groups = sorted(kept, key=lambda entry: -entry[0])[: self.size]
        return count

    def state_dict(self) -> list[Any]:
        """The same as tensors and numbers."""
        return [(score, [one.state_dict() for one in group]) for score, group in self.groups]

    def load_state_dict(self, state: list[Any]) -> None:
        """Continue with a checkpoint's."""
        self.groups = [(score, [Experience.from_state(one) for one in group]) for score, group in state]


def _again(experience: Experience) -> Experience:
    """A copy that is learned from off policy. ValueError where it is not known how likely its tokens were."""
    sampled = experience.tokens.get("sampling_logp")
    if sampled is None:
        raise ValueError(
            "`replay_buffer_size` needs the log-probabilities of completions as sampled, and `rollout_func` returned "
            "None. Return them, or set it to 0."
        )
    made = copy.copy(experience)
    made.tokens = {"old_logp": torch.nan_to_num(sampled, nan=0.0)} | experience.tokens
    return made
