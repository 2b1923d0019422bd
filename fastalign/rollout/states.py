"""Completions as the states that a critic values: one before each token, and one behind the last where it ended.

The last state is a learned token of its own in an `Experience`, so that every array has one entry per state;
`tokens["has_token"]` is 1 where the policy has drawn one there, else 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fastalign_kernels.losses.policy_gradient import kl_estimate
from fastalign_kernels.losses.value import episode_targets
from torch import Tensor

from .buffer import Experience
from .group_batches import GroupBatch
from .loader import Step
from .update import attach


def add_last_state(one: Experience, longest: int, filler: int) -> None:
    """Mark the states of `one`, with a last one (and the token id `filler`) where it is shorter than `longest`."""
    has_token = torch.ones(one.num_learned)
    if one.num_learned and len(one.completion_ids) < longest:
        one.learned_at = np.append(one.learned_at, len(one.completion_ids))
        one.completion_ids = np.append(one.completion_ids, filler)
        has_token = torch.cat([has_token, torch.zeros(1)])
        one.tokens = {name: torch.cat([value, value.new_zeros(1)]) for name, value in one.tokens.items()}
    one.tokens["has_token"] = has_token


def set_targets(experiences: list[Experience], scores: Tensor, device: Any, **options: Any) -> dict[str, Tensor]:
    """tokens["advantage"] and tokens["return"] of each experience from its score (n,), values and log-probabilities.

    `options` are those of `episode_targets`; without "ref_logp" there is no divergence. Sums over the tokens for the
    log come back: `entropy`, of old log-probabilities, `scores`, and with a reference `kl`, `non_score_reward` and
    `rlhf_reward`.
    """

    def known(name: str) -> Tensor:
        return torch.cat([one.tokens[name].to(device) for one in experiences])

    lengths = [one.num_learned for one in experiences]
    rows = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    has_token = known("has_token") > 0
    old, values = known("old_logp")[has_token], known("value")
    has_reference = all("ref_logp" in one.tokens for one in experiences)
    ref = known("ref_logp")[has_token] if has_reference else old
    found = episode_targets(old, ref, values, scores.to(device), rows, has_token, **options)
    advantages = torch.zeros_like(values)
    advantages[has_token] = found.advantages.to(values)
    attach("advantage", experiences, advantages.split(lengths))
    attach("return", experiences, found.returns.split(lengths))
    sums = {"entropy": -old.sum(), "scores": scores.sum().to(old)}
    if has_reference:
        sums["kl"] = kl_estimate(old, ref, options["kl_estimator"]).sum()
        sums["non_score_reward"] = -options["kl_coef"] * sums["kl"]
        sums["rlhf_reward"] = sums["non_score_reward"] + sums["scores"]
    return sums


def token_counts(step: Step) -> list[int]:
    """Tokens of the policy in each nominal micro-batch, last states not counted."""
    return [sum(int(one.tokens["has_token"].sum()) for one in part if one.num_learned) for part in step.parts]


def state_weights(batch: GroupBatch) -> Tensor:
    """(N,) weights of the mean over the states of a nominal micro-batch, averaged over those of the step."""
    states = [max(sum(one.num_learned for one in part), 1) for part in batch.step.parts]
    shares = [1 / (states[micro] * batch.step.num_micro) for micro in batch.micro]
    counts = [one.num_learned for one in batch.experiences]
    return torch.from_numpy(np.repeat(np.asarray(shares, np.float32), counts)).to(batch.weight.device)
