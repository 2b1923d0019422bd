"""PPO's value function: what it is trained on, and its loss; per-token numbers (N,) in and out."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign_kernels.losses.policy_gradient import kl_estimate


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
