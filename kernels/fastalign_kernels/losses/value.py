"""PPO's value function: what it is trained on, and its loss; per-token numbers (N,) in and out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign_kernels.losses.advantages import generalised_advantages, whiten
from fastalign_kernels.losses.policy_gradient import kl_estimate


@dataclass
class EpisodeTargets:
    """What PPO learns from a batch of episodes; S states, of which N are followed by a token of the policy."""

    rewards: Tensor  # (S,)
    advantages: Tensor  # (N,), whitened
    returns: Tensor  # (S,)


def episode_targets(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    rows: Tensor,
    has_token: Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    whiten_rewards: bool = False,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> EpisodeTargets:
    """PPO's targets as TRL computes them, from values (S,) of the states, log-probabilities (N,) and scores (B,).

    rows (S,) are ids of runs in [0, B); has_token (S,) bool is False for a last state that no token follows: there
    the score is given, without a penalty. `whiten_rewards` leaves their mean. No gradient passes.
    """
    both = values.new_zeros(2, len(values))
    both[:, has_token] = torch.stack([logp.detach(), ref_logp.detach()]).to(values.dtype)
    rewards = penalised_rewards(both[0], both[1], scores, rows, kl_coef=kl_coef, kl_estimator=kl_estimator)
    if whiten_rewards:
        rewards = whiten(rewards, shift_mean=False)
    advantages, returns = generalised_advantages(rewards, values, rows, gamma=gamma, lam=lam)
    return EpisodeTargets(rewards, whiten(advantages[has_token]), returns)


def penalised_rewards(
    logp: Tensor,
    ref_logp: Tensor,
    scores: Tensor,
    rows: Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
) -> Tensor:
    """(N,) rewards -kl_coef * KL_t (nats), plus its row's score at each row's last token; without gradient.

    scores (B,), rows (N,) ids of runs in [0, B). RLHF as in arXiv:1909.08593 Eq. 2. Scores of rows without tokens are
    lost.
    """
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = rows[1:] != rows[:-1]
    penalty = kl_coef * kl_estimate(logp.detach(), ref_logp.detach(), kl_estimator)
    return torch.where(last, scores.to(penalty.dtype)[rows], 0) - penalty


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float = 0.2
) -> tuple[Tensor, Tensor]:
    """(N,) losses max((v - R)^2, (clip(v, v_old +- cliprange_value) - R)^2) / 2; (N,) bool: the clipped is larger.

    arXiv:2005.12729 Sec. 2 (it is not in PPO's paper); differentiable with respect to `values`.
    """
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    plain, bounded = (values - returns).square(), (clipped - returns).square()
    return torch.maximum(plain, bounded) / 2, (bounded > plain).detach()
