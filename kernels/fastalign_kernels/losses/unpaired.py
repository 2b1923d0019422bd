"""Losses on single answers with a label, desirable or not: KTO, unpaired APO-zero and BCO."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RowLosses(NamedTuple):
    """Losses of R answers and their detached implicit rewards, each (R,)."""

    losses: Tensor
    rewards: Tensor


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    kl: Tensor | None = None,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> RowLosses:
    """KTO, arXiv:2402.01306 Eq. 7, of summed logps (R,) and labels (R,) bool, true for desirable answers.

    kto: 1 - sigma(beta (rho - z)) where desirable, else 1 - sigma(beta (z - rho)), rho = logps - ref_logps, z = `kl`
    (0-dim, see `kl_baseline`). apo_zero_unpaired: the same with z = 0, arXiv:2408.06266 Eq. 7.
    """
    if loss_type not in ("kto", "apo_zero_unpaired"):
        raise ValueError(f"loss_type={loss_type!r}: choose kto or apo_zero_unpaired")
    if loss_type == "kto" and kl is None:
        raise ValueError("kl=None with loss_type='kto': give the KL estimate, 0-dim, from kl_baseline")
    logratios = logps - ref_logps
    shifted = logratios - kl.detach() if kl is not None and loss_type == "kto" else logratios
    losses = torch.sigmoid(beta * torch.where(labels, -shifted, shifted))
    losses = torch.where(labels, desirable_weight * losses, undesirable_weight * losses)
    return RowLosses(losses, beta * logratios.detach())


def kl_baseline(kl_logps: Tensor, ref_kl_logps: Tensor) -> Tensor:
    """KTO's z, arXiv:2402.01306 Eq. 8: mean log-ratio of mismatched answers (R,), at least 0; 0-dim, detached.

    With several ranks, take the mean over ranks of `(kl_logps - ref_kl_logps).mean()` and clamp that.
    """
    return ((kl_logps - ref_kl_logps).detach().sum() / max(1, kl_logps.numel())).clamp(min=0)


def bco_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    delta: Tensor,
    *,
    beta: float = 0.1,
    undesirable_weights: Tensor | None = None,
) -> RowLosses:
    """BCO, arXiv:2404.04656, of summed logps (R,) and labels (R,) bool: -log sigma(+-(r - delta)).

    r = beta (logps - ref_logps); `delta` 0-dim is the running mean of rewards (`running_mean`), detached.
    `undesirable_weights` (R,) multiply the losses of undesirable answers (`density_ratio_weights`).
    """
    rewards = beta * (logps - ref_logps)
    shifted = rewards - delta.detach()
    losses = -F.logsigmoid(torch.where(labels, shifted, -shifted))
    if undesirable_weights is not None:
        losses = torch.where(labels, losses, undesirable_weights * losses)
    return RowLosses(losses, rewards.detach())


def running_mean(
    mean: Tensor, count: Tensor, values: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and count (0-dim) of all values so far, from those before `values` (R,): BCO's reward shift, detached.

    `reduce` sums a 1-D tensor over the ranks, each of which has values of its own.
    """
    excess = (values.detach() - mean).sum()
    added = torch.stack([excess, torch.full_like(excess, values.numel())])
    excess, number = added if reduce is None else reduce(added)
    total = count + number
    return mean + excess / total.clamp(min=1), total


def density_ratio_weights(
    prob_desirable: Tensor, *, min_density_ratio: float = 0.5, max_density_ratio: float = 10.0
) -> Tensor:
    """BCO's underlying-distribution matching, arXiv:2404.04656: p / (1 - p), clamped.

    prob_desirable (R,): a classifier's probability that the prompt comes from the desirable data.
    """
    return (prob_desirable / (1 - prob_desirable + 1e-8)).clamp(min_density_ratio, max_density_ratio)
