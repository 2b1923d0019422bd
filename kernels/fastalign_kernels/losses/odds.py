"""Losses on pairs of answers without a reference: CPO, SimPO, AlphaPO, TPO and ORPO."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign_kernels.losses.preference import PairLosses, bounded_exp, smoothed_logistic, squared_distance


def _margin_loss(margin: Tensor, loss_type: str, beta: float, label_smoothing: float, gamma: float) -> Tensor:
    """sigmoid, hinge, ipo, or sigmoid with a target margin `gamma` (simpo, tpo-l), of margins (B,)."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing}: give a number from 0 to 1")
    if loss_type == "hinge":
        return torch.relu(1 - beta * margin)
    if loss_type == "ipo":
        return squared_distance(margin, beta)
    return smoothed_logistic(
        beta * margin - gamma if loss_type in ("simpo", "tpo-l") else beta * margin, label_smoothing
    )


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
) -> PairLosses:
    """CPO, arXiv:2401.08417 Eq. 3 without its NLL term, of logps (B,): sums for sigmoid and hinge, else token means.

    sigmoid, hinge and ipo of the margin m of logps; simpo: -log sigma(beta m - gamma), arXiv:2405.14734 Eq. 6;
    alphapo: simpo on rewards (1 - p^-alpha) / alpha, arXiv:2501.03884. `alpha` other than 0 does so in any type.
    """
    if loss_type not in (known := ("sigmoid", "hinge", "ipo", "simpo", "alphapo")):
        raise ValueError(f"loss_type={loss_type!r}: choose among {', '.join(known)}")
    loss_type = "simpo" if loss_type == "alphapo" else loss_type
    chosen, rejected = chosen_logps, rejected_logps
    if alpha:
        chosen, rejected = (1 - bounded_exp(-alpha * chosen)) / alpha, (1 - bounded_exp(-alpha * rejected)) / alpha
    losses = _margin_loss(chosen - rejected, loss_type, beta, label_smoothing, simpo_gamma)
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def tpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.01,
    label_smoothing: float = 0.0,
    tpo_l_gamma: float = 0.5,
) -> PairLosses:
    """TPO, arXiv:2405.16681, without the NLL of the gold answer: sigmoid, hinge, ipo or tpo-l of logps (B,).

    Sums for sigmoid and hinge, token means for ipo and tpo-l: -log sigma(beta m - gamma).
    """
    if loss_type not in (known := ("sigmoid", "hinge", "ipo", "tpo-l")):
        raise ValueError(f"loss_type={loss_type!r}: choose among {', '.join(known)}")
    losses = _margin_loss(chosen_logps - rejected_logps, loss_type, beta, label_smoothing, tpo_l_gamma)
    return PairLosses(losses, beta * chosen_logps.detach(), beta * rejected_logps.detach())


def log_odds_ratio(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """(B,) log of odds(chosen) / odds(rejected), odds = p / (1 - p), of token means, arXiv:2403.07691 Eq. 4.

    A mean above -2^-24, half the last bit of 1 in fp32, counts as that, so that certainty has finite odds.
    """

    def log_odds(logp: Tensor) -> Tensor:
        logp = logp.clamp(max=-(2.0**-24))
        return logp - torch.log(-torch.expm1(logp))

    return log_odds(chosen_logps) - log_odds(rejected_logps)


def orpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float = 0.1) -> PairLosses:
    """ORPO, arXiv:2403.07691 Eq. 6-7 without its NLL term: -beta log sigma(log odds ratio) of token means (B,)."""
    losses = -beta * F.logsigmoid(log_odds_ratio(chosen_logps, rejected_logps))
    return PairLosses(losses, beta * chosen_logps.detach(), beta * rejected_logps.detach())
