"""Losses on pairs of answers against a reference: DPO and its relatives, log-probabilities of B pairs in.

With rho = logp of the policy - logp of the reference for one answer, s = f'(exp(rho)) its score under the
f-divergence (rho itself for the reverse KL) and d = s_chosen - s_rejected, each loss below is a function of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_EXPONENT = 80.0  # exp(80) and its gradient still fit into fp32 and bf16
LARGEST_DISTANCE = 1e15  # its square, and gradients made of that, too


class PairLosses(NamedTuple):
    """Losses of B pairs and their detached implicit rewards, each (B,)."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """(B,) chosen minus rejected reward."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def accuracies(self) -> Tensor:
        """(B,) 1 where the chosen answer has the larger reward, else 0."""
        return (self.chosen_rewards > self.rejected_rewards).to(self.chosen_rewards.dtype)


def squared_distance(margin: Tensor, beta: float) -> Tensor:
    """IPO's (margin - 1 / (2 beta))^2, arXiv:2310.12036 Eq. 17; ValueError for beta = 0.

    The distance is held at 1e15: a score of exp(80) would be infinite when squared in fp32. Beyond, the loss is 1e30
    and has no gradient, as `bounded_exp` has none.
    """
    if beta == 0:
        raise ValueError("beta=0 with ipo, which aims at a margin of 1 / (2 beta): give another number")
    return (margin - 1 / (2 * beta)).clamp(-LARGEST_DISTANCE, LARGEST_DISTANCE) ** 2


def bounded_exp(x: Tensor) -> Tensor:
    """exp with the exponent held at 80: finite, and without gradient beyond."""
    return x.clamp(max=LARGEST_EXPONENT).exp()


def divergence_score(logratio: Tensor, f_divergence_type: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """f-DPO's f'(u) at u = exp(logratio) (B,), arXiv:2309.16240 Table 1, up to constants that cancel.

    reverse_kl: log u; forward_kl: 1 - 1/u; js_divergence: log(2u / (1 + u)); alpha_divergence: (u^(a-1) - 1)/(a - 1).
    """
    if f_divergence_type == "reverse_kl" or (f_divergence_type == "alpha_divergence" and abs(alpha - 1) < 1e-6):
        return logratio
    if f_divergence_type == "forward_kl":
        return 1 - bounded_exp(-logratio)
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(logratio)
    if f_divergence_type == "alpha_divergence":
        return (bounded_exp((alpha - 1) * logratio) - 1) / (alpha - 1)
    raise ValueError(
        f"f_divergence_type={f_divergence_type!r}: choose reverse_kl, forward_kl, js_divergence or alpha_divergence"
    )


def smoothed_logistic(x: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigma(x) - e log sigma(-x): logistic loss where a share e of the preferences is flipped."""
    loss = -F.logsigmoid(x)
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-x) if label_smoothing else loss


@dataclass(frozen=True)
class _Pairs:
    """What the losses read: (B,) tensors and settings."""

    chosen: Tensor  # log-ratio of the chosen answer
    rejected: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    policy_margin: Tensor  # logp of chosen - logp of rejected
    reference_margin: Tensor
    chosen_lengths: Tensor | None  # tokens
    rejected_lengths: Tensor | None
    chosen_nll: Tensor | None  # nats per token
    beta: float
    label_smoothing: float
    discopop_tau: float

    @property
    def logits(self) -> Tensor:
        return self.beta * (self.chosen_score - self.rejected_score)

    @property
    def mean_margin(self) -> Tensor:
        """Scores per token, chosen minus rejected."""
        assert self.chosen_lengths is not None and self.rejected_lengths is not None
        return self.chosen_score / self.chosen_lengths.clamp(min=1) - self.rejected_score / (
            self.rejected_lengths.clamp(min=1)
        )


def _sigmoid(p: _Pairs) -> Tensor:
    """DPO, arXiv:2305.18290 Eq. 7: -log sigma(beta d)."""
    return -F.logsigmoid(p.logits)


def _hinge(p: _Pairs) -> Tensor:
    """SLiC / RSO, arXiv:2309.06657: max(0, 1 - beta d)."""
    return torch.relu(1 - p.logits)


def _ipo(p: _Pairs) -> Tensor:
    """IPO, arXiv:2310.12036 Eq. 17, on per-token means: (d_mean - 1 / (2 beta))^2."""
    return squared_distance(p.mean_margin, p.beta)


def _exo_pair(p: _Pairs) -> Tensor:
    """EXO, arXiv:2402.00856 Eq. 16 with K = 2: KL of (sigma(x), sigma(-x)), x = beta d, from (1 - e, e)."""
    x, epsilon = p.logits, p.label_smoothing
    better, worse = F.logsigmoid(x), F.logsigmoid(-x)
    return better.exp() * (better - math.log1p(-epsilon)) + worse.exp() * (worse - math.log(epsilon))


def _nca_pair(p: _Pairs) -> Tensor:
    """NCA, arXiv:2402.05369, with two answers: -log sigma(c) - (log sigma(-c) + log sigma(-r)) / 2."""
    chosen, rejected = p.beta * p.chosen, p.beta * p.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(p: _Pairs) -> Tensor:
    """Robust DPO, arXiv:2403.00409: unbiased under a rate e of flipped preferences."""
    x, epsilon = p.logits, p.label_smoothing
    return (-(1 - epsilon) * F.logsigmoid(x) + epsilon * F.logsigmoid(-x)) / (1 - 2 * epsilon)


def _bco_pair(p: _Pairs) -> Tensor:
    """BCO on pairs, arXiv:2404.04656, without its shift: -log sigma(c) - log sigma(-r)."""
    return -F.logsigmoid(p.beta * p.chosen) - F.logsigmoid(-p.beta * p.rejected)


def _sppo_hard(p: _Pairs) -> Tensor:
    """SPPO, arXiv:2405.00675 Eq. 4.7 with preference probabilities 1 and 0."""
    return (p.chosen - 0.5 / p.beta) ** 2 + (p.rejected + 0.5 / p.beta) ** 2


def _aot(p: _Pairs) -> Tensor:
    """AOT, arXiv:2406.05882, paired: margins of policy and of reference compared in sorted order, over all pairs."""
    x = p.beta * (p.policy_margin.sort().values - p.reference_margin.sort().values)
    return smoothed_logistic(x, p.label_smoothing)


def _aot_unpaired(p: _Pairs) -> Tensor:
    """AOT, arXiv:2406.05882, unpaired: sorted log-ratios of chosen against those of rejected answers."""
    return smoothed_logistic(p.beta * (p.chosen.sort().values - p.rejected.sort().values), p.label_smoothing)


def _apo_zero(p: _Pairs) -> Tensor:
    """APO-zero, arXiv:2408.06266 Eq. 7, plus 1: 1 - sigma(c) + sigma(r); chosen up, rejected down."""
    return torch.sigmoid(-p.beta * p.chosen) + torch.sigmoid(p.beta * p.rejected)


def _apo_down(p: _Pairs) -> Tensor:
    """APO-down, arXiv:2408.06266 Eq. 8, plus 1: sigma(c) + 1 - sigma(c - r); both down, rejected further."""
    return torch.sigmoid(p.beta * p.chosen) + torch.sigmoid(-p.beta * (p.chosen - p.rejected))


def _discopop(p: _Pairs) -> Tensor:
    """DiscoPOP, arXiv:2406.08414 Eq. 5: (1 - g) (-log sigma(x)) + g exp(-x) with g = sigma(x / tau)."""
    x = p.logits
    gate = x / p.discopop_tau
    return -torch.sigmoid(-gate) * F.logsigmoid(x) + bounded_exp(F.logsigmoid(gate) - x)  # no 0 * inf at x << 0


def _sft(p: _Pairs) -> Tensor:
    """NLL of the chosen answer: the mean over pairs is the mean over all chosen tokens."""
    assert p.chosen_nll is not None
    return p.chosen_nll


def _sigmoid_norm(p: _Pairs) -> Tensor:
    """DPO on per-token means, as in Tulu 3, arXiv:2411.15124: -log sigma(beta d_mean)."""
    return -F.logsigmoid(p.beta * p.mean_margin)


def check_preference_loss(
    loss_types: Sequence[str], label_smoothing: float, f_divergence_type: str, weighted: bool
) -> None:
    """Raise ValueError for settings of `preference_loss` that contradict each other; `weighted`: WPO."""
    if unknown := [name for name in loss_types if name not in PREFERENCE_LOSSES]:
        raise ValueError(f"loss_type {unknown}: choose among {', '.join(PREFERENCE_LOSSES)}")
    if not 0 <= label_smoothing < (0.5 if "robust" in loss_types else 1):
        raise ValueError(f"label_smoothing={label_smoothing}: give a number from 0 to 1, below 0.5 for robust")
    if "exo_pair" in loss_types and label_smoothing == 0:
        raise ValueError(
            "label_smoothing=0 with exo_pair, which takes its logarithm: give a small number, such as 1e-3"
        )
    if f_divergence_type != "reverse_kl" and (wrong := [n for n in loss_types if n not in OF_THE_MARGIN]):
        raise ValueError(
            f"f_divergence_type={f_divergence_type!r} with {wrong}: the partition function cancels only in losses of "
            f"the margin ({', '.join(sorted(OF_THE_MARGIN))}); give reverse_kl"
        )
    if weighted and (wrong := [name for name in loss_types if name in COUPLE_PAIRS]):
        raise ValueError(f"weights with {wrong}: sorted losses belong to no single pair; leave the weights out")


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_nll: Tensor | None = None,
    weights: Tensor | None = None,
) -> PairLosses:
    """Losses of B pairs from summed log-probabilities (B,) in nats, with beta * log-ratios as rewards.

    Several `loss_type`s are added with `loss_weights` (default 1 each): MPO, arXiv:2411.10442. Lengths (B,) in
    tokens are needed by ipo and sigmoid_norm, and by sft, whose loss is `chosen_nll` (B,) where given (with LD-DPO the
    logps are not plain sums), else -chosen_logps over the mean chosen length. `weights` (B,) multiply the losses (WPO:
    `wpo_weights` of both answers). aot and aot_unpaired couple the pairs: give all at once. Raises ValueError.
    """
    types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    shares = [1.0] * len(types) if loss_weights is None else list(loss_weights)
    if not types or len(shares) != len(types):
        raise ValueError(f"loss_weights {shares} for loss_type {types}: give as many, at least one")
    check_preference_loss(types, label_smoothing, f_divergence_type, weights is not None)
    per_token = set(types) & {"ipo", "sigmoid_norm"}
    if (per_token and (chosen_lengths is None or rejected_lengths is None)) or (
        "sft" in types and chosen_lengths is None and chosen_nll is None
    ):
        raise ValueError(f"loss_type {types} without lengths: give chosen_lengths and rejected_lengths in tokens")
    if "sft" in types and chosen_nll is None:
        assert chosen_lengths is not None
        chosen_nll = -chosen_logps / chosen_lengths.to(chosen_logps.dtype).mean()
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    pairs = _Pairs(
        chosen=chosen,
        rejected=rejected,
        chosen_score=divergence_score(chosen, f_divergence_type, f_alpha_divergence_coef),
        rejected_score=divergence_score(rejected, f_divergence_type, f_alpha_divergence_coef),
        policy_margin=chosen_logps - rejected_logps,
        reference_margin=ref_chosen_logps - ref_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        chosen_nll=chosen_nll,
        beta=beta,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
    )
    losses = sum(share * PREFERENCE_LOSSES[name](pairs) for name, share in zip(types, shares, strict=True))
    assert isinstance(losses, Tensor)
    if weights is not None:
        losses = losses * weights
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


PREFERENCE_LOSSES: dict[str, Callable[[_Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
}
OF_THE_MARGIN = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
COUPLE_PAIRS = {"aot", "aot_unpaired"}
