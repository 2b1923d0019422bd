"""Losses of reward models: Bradley-Terry on whole answers, cross-entropy on the steps of an answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | None = None,
    center_rewards_coefficient: float | None = None,
) -> Tensor:
    """-log sigma(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2, (B,) of rewards (B,).

    Bradley-Terry with a margin per pair, arXiv:2307.09288 Eq. 2; centring, arXiv:2312.09244 Eq. 2.
    """
    difference = chosen_rewards - rejected_rewards
    losses = -F.logsigmoid(difference if margin is None else difference - margin)
    if center_rewards_coefficient is None:
        return losses
    return losses + center_rewards_coefficient * (chosen_rewards + rejected_rewards) ** 2


def step_labels(
    step_lengths: Sequence[int], labels: Sequence[bool | int], *, prompt_length: int = 0, last_step_only: bool = False
) -> Tensor:
    """Labels (T,) int64 of a process reward model: a step's label at its last token, -100 at all others.

    step_lengths in tokens, each with its separator; the prompt's tokens come first. With `last_step_only` only the
    last step is labelled. Raises ValueError for a step without tokens or another number of labels than of steps.
    """
    if len(step_lengths) != len(labels) or min(step_lengths, default=1) < 1:
        raise ValueError(
            f"{len(labels)} labels for steps of {list(step_lengths)} tokens: give one label per step, no empty step"
        )
    out = torch.full((prompt_length + sum(step_lengths),), -100, dtype=torch.int64)
    ends = torch.tensor(list(step_lengths), dtype=torch.int64).cumsum(0) + prompt_length - 1
    first = max(0, len(labels) - 1) if last_step_only else 0
    out[ends[first:]] = torch.tensor([int(label) for label in labels[first:]], dtype=torch.int64)
    return out


def process_reward_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (T,) of logits (T, C) at labels (T,) from `step_labels`, arXiv:2305.20050; 0 where -100."""
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
