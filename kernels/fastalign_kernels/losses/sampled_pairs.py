"""Losses on two completions that were sampled for one prompt and judged against each other.

Log-probabilities are sums over a completion, in nats, of B pairs; `better` says which of the two is preferred.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign_kernels.losses.preference import PairLosses

PAIR_LOSSES = ("sigmoid", "ipo")


def sampled_pair_loss(
    first: Tensor,
    second: Tensor,
    ref_first: Tensor,
    ref_second: Tensor,
    *,
    better: Tensor,
    pair_weight: Tensor,
    beta: float,
    loss_type: str = "sigmoid",
    alpha: float = 0.0,
) -> PairLosses:
    """(B,) weighted losses of log-probabilities (B,) under policy and reference; `better` is 1 (first) or -1 (second).

    With h the log-ratio of the better completion minus that of the worse one: -log sigmoid(beta h) (online DPO,
    arXiv:2402.04792), or (h - 1 / (2 beta))^2 (IPO, arXiv:2310.12036 Eq. 17, on sums as in TRL, where
    `preference_loss` has token means). `alpha` adds XPO's bonus alpha log pi(second), second being the reference's own
    completion (arXiv:2405.21046 Algorithm 1). Raises ValueError for another loss.
    """
    if loss_type not in PAIR_LOSSES:
        raise ValueError(f"loss_type={loss_type!r}: choose {' or '.join(PAIR_LOSSES)}")
    ratio_first, ratio_second = first - ref_first, second - ref_second
    h = better * (ratio_first - ratio_second)
    losses = -F.logsigmoid(beta * h) if loss_type == "sigmoid" else (h - 1 / (2 * beta)).square()
    if alpha:
        losses = losses + alpha * second
    rewards = (beta * ratio_first).detach(), (beta * ratio_second).detach()
    is_first = better > 0
    return PairLosses(losses * pair_weight, torch.where(is_first, *rewards), torch.where(is_first, *rewards[::-1]))


def nash_md_loss(logp: Tensor, ref_logp: Tensor, preference: Tensor, beta: float) -> Tensor:
    """(N,) losses of tokens with log-probabilities (N,) under policy and reference: Nash-MD, arXiv:2312.00886.

    `preference` (N,) is the probability that the token's completion beats its opponent's, with 1/2 as baseline. The
    gradient is that of REINFORCE with the reward preference - beta log-ratio, which has none itself.
    """
    return (beta * (logp.detach() - ref_logp) - (preference - 0.5)) * logp
