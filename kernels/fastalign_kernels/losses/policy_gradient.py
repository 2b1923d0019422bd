"""Policy-gradient losses per token: from log-probabilities, advantages and masks to a sum of weighted terms.

With pi the policy, pi_old the policy that made the batch, A the advantage and w the importance ratio of a token:

    token level     w_t = pi(t) / pi_old(t)
    sequence level  w_t = exp(mean over the row of log pi - log pi_old), GSPO, arXiv:2507.18071 Eq. 7

    loss = sum_t weight_t * (L_t * masks_t * importance_t + beta * KL_t)  -  entropy_coef * mean_t H_t

L_t by `loss_type` (`POLICY_LOSSES`), weight_t by `token_weights`. Weights are known before the model runs, so the loss
is a plain sum over tokens: any cut of the batch gives it exactly, unless L_t itself looks at its whole row
(`PolicyObjective.needs_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign_kernels.losses.corrections import (
    CORRECTION_MODES,
    divergence_mask,
    importance_weights,
    off_policy_mask,
)
from fastalign_kernels.losses.row_sums import Rows

LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class PolicyObjective:
    """Which policy loss, with the names and defaults of TRL's GRPOConfig."""

    loss_type: str = "dapo"  # a key of POLICY_LOSSES
    importance_sampling_level: str = "token"  # or "sequence" (GSPO)
    epsilon: float = 0.2  # gmpo: in log space, 0.4 in its paper; dppo: a difference of probabilities
    epsilon_high: float | None = None  # None: epsilon; cispo: the largest ratio itself
    delta: float | None = None  # largest ratio for negative advantages (two-sided clip), above 1 + epsilon_high
    beta: float = 0.0  # of the KL to the reference in the loss
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = True  # KL times the ratio (not in gmpo)
    sapo_temperature_neg: float = 1.05
    sapo_temperature_pos: float = 1.0
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    clip_ratio_c: float = 20.0  # dppo: the largest ratio
    off_policy_mask_threshold: float | None = None  # nats per token
    correction_mode: str | None = None  # of `corrections.importance_weights`, for engines that differ; None: none
    correction_max: float | None = 3.0
    correction_min: float | None = None
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("loss_type", tuple(POLICY_LOSSES)),
            ("importance_sampling_level", LEVELS),
            ("kl_estimator", KL_ESTIMATORS),
            ("correction_mode", (None, *CORRECTION_MODES)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, allowed))}")
        if not 0.0 < self.top_entropy_quantile <= 1.0:
            raise ValueError(f"top_entropy_quantile={self.top_entropy_quantile}: give a number above 0, at most 1")

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def needs_rows(self) -> bool:
        """A token's loss depends on the other tokens of its row."""
        return (
            self.importance_sampling_level == "sequence"
            or self.loss_type in ROW_LOSSES
            or self.off_policy_mask_threshold is not None
            or not (self.correction_mode or "token").startswith("token")
        )


@dataclass
class PolicyTokens:
    """What is known of the scored tokens before the policy runs; each (N,), fp32 but for the ids."""

    advantages: Tensor  # a row's advantage at each of its tokens, or per token
    weights: Tensor  # of each token's term in the sum: `token_weights`
    rows: Tensor | None = None  # int64 non-decreasing; needed where `PolicyObjective.needs_rows`
    old_logp: Tensor | None = None  # None, or NaN: the policy itself made the batch (w = 1, with gradient)
    ref_logp: Tensor | None = None  # of the reference, where beta is not 0
    sampling_logp: Tensor | None = None  # as sampled (NaN: unknown); None: old_logp. For OPSM and dppo
    importance_weights: Tensor | None = None  # None: made from `sampling_logp` where `correction_mode` is set
    entropy_weights: Tensor | None = None  # of the entropy bonus; None: their mean
    entropy_mask: Tensor | None = None  # 1 or 0: `corrections.high_entropy_mask`

    def slice(self, span: slice) -> PolicyTokens:
        """The same of a span of tokens."""
        return PolicyTokens(**{f.name: v[span] for f in fields(self) if (v := getattr(self, f.name)) is not None})


@dataclass
class PolicyTerms:
    """Losses of tokens, differentiable, and what metrics need, detached; each (N,), None where it has no meaning.

    Where the ratio is of a row, ratio and flags repeat at each of its tokens; TRL averages such over rows.
    """

    loss: Tensor  # before weights, entropy bonus left out
    ratio: Tensor
    kl: Tensor | None = None  # nats, times the ratio under use_bias_correction_kl
    clip_low: Tensor | None = None  # bool: below the lower bound at negative advantage
    clip_high: Tensor | None = None  # bool: above the upper bound at positive advantage (cispo: above epsilon_high)
    phi: Tensor | None = None  # vespo's weight of the row
    importance: Tensor | None = None  # weights that `correction_mode` has made

    def detached(self) -> PolicyTerms:
        return replace(self, loss=self.loss.detach())


class _Case(NamedTuple):
    """What a loss is computed from."""

    logp: Tensor
    log_ratio: Tensor  # per token
    ratio: Tensor  # at the level asked for
    tokens: PolicyTokens
    rows: Rows | None
    o: PolicyObjective


class _Surrogate(NamedTuple):
    loss: Tensor
    ratio: Tensor  # as clip flags see it
    low: Tensor | None = None
    high: Tensor | None = None
    phi: Tensor | None = None


def _outside(value: Tensor, low: float, high: float, advantages: Tensor) -> tuple[Tensor, Tensor]:
    return (value < low) & (advantages < 0), (value > high) & (advantages > 0)


def _clipped(case: _Case) -> _Surrogate:
    """PPO's clip, arXiv:1707.06347 Eq. 7; bounded above by delta as in INTELLECT-2, arXiv:2505.07291 Sec. 3.4."""
    o, advantages = case.o, case.tokens.advantages
    bounded = case.ratio.clamp(1 - o.epsilon, 1 + o.high)
    ratio = case.ratio if o.delta is None else case.ratio.clamp(max=o.delta)
    loss = -torch.min(ratio * advantages, bounded * advantages)
    return _Surrogate(loss, ratio, *_outside(ratio, 1 - o.epsilon, 1 + o.high, advantages))


def _row_clipped(case: _Case) -> _Surrogate:
    """RLOO, arXiv:2402.14740: the clip of the whole completion's ratio, the product over its tokens."""
    assert case.rows is not None
    return _clipped(case._replace(ratio=case.rows.spread_sums(case.log_ratio).exp()))


def _reinforce(case: _Case) -> _Surrogate:
    """-A log pi, Williams 1992."""
    return _Surrogate(-case.tokens.advantages * case.logp, case.ratio)


def _cispo(case: _Case) -> _Surrogate:
    """CISPO, arXiv:2506.13585 Eq. 4: every token keeps its gradient, its ratio is cut."""
    advantages = case.tokens.advantages
    loss = -case.ratio.detach().clamp(max=case.o.high) * advantages * case.logp
    return _Surrogate(loss, case.ratio, high=(case.ratio > case.o.high) & (advantages > 0))


def _sapo(case: _Case) -> _Surrogate:
    """SAPO, arXiv:2511.20347: a sigmoid gate in place of the clip, its temperature by the sign of A."""
    o, advantages = case.o, case.tokens.advantages
    tau = torch.where(advantages > 0, o.sapo_temperature_pos, o.sapo_temperature_neg)
    return _Surrogate(-torch.sigmoid(tau * (case.ratio - 1)) * 4 / tau * advantages, case.ratio)


def _vespo(case: _Case) -> _Surrogate:
    """VESPO, arXiv:2602.10693: -phi(W) A log pi with phi(W) = e^lambda W^k e^(-lambda W), W of the whole row.

    Importance weights enter W, not the loss. Bounds of the logs: those of the paper's code, as in TRL.
    """
    assert case.rows is not None
    o, advantages = case.o, case.tokens.advantages
    lowest = -18.420680743952367  # log 1e-8
    log_w = case.log_ratio.detach().clamp(-20.0, 20.0)
    if case.tokens.importance_weights is not None:
        log_w = log_w + case.tokens.importance_weights.log().clamp(lowest, 20.0)
    log_w = case.rows.spread_sums(log_w).clamp(lowest, 20.0)
    k = torch.where(advantages >= 0, o.vespo_k_pos, o.vespo_k_neg)
    lam = torch.where(advantages >= 0, o.vespo_lambda_pos, o.vespo_lambda_neg).clamp(min=1e-4)
    phi = torch.exp(lam + k * log_w - lam * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return _Surrogate(-phi * advantages * case.logp, case.ratio, phi=phi)


def _gmpo(case: _Case) -> _Surrogate:
    """GMPO, arXiv:2507.20673 Eq. 3: the geometric mean of the row's ratios, each clipped in log space before."""
    assert case.rows is not None
    o, advantages, mask = case.o, case.tokens.advantages, case.tokens.entropy_mask
    bounded = case.log_ratio.clamp(-o.epsilon, o.high)
    one_sided = torch.where(
        advantages > 0, torch.minimum(case.log_ratio, bounded), torch.maximum(case.log_ratio, bounded)
    )
    if mask is None:
        ratio = case.rows.spread_means(one_sided).exp()
    else:
        ratio = (case.rows.spread_sums(one_sided * mask) / case.rows.spread_sums(mask).clamp(min=1.0)).exp()
    return _Surrogate(-ratio * advantages, ratio, *_outside(case.log_ratio, -o.epsilon, o.high, advantages))


def _dppo(case: _Case) -> _Surrogate:
    """DPPO, arXiv:2602.04879, binary total variation: tokens that moved too far away are dropped, not clipped."""
    o, advantages = case.o, case.tokens.advantages
    sampled = case.tokens.old_logp if case.tokens.sampling_logp is None else case.tokens.sampling_logp
    kept = divergence_mask(case.logp, case.logp if sampled is None else sampled, advantages, o.epsilon, o.high)
    ratio = case.ratio.detach().clamp(max=o.clip_ratio_c)
    dropped = kept == 0
    low, high = dropped & (advantages < 0), dropped & (advantages > 0)
    return _Surrogate(-ratio * kept * advantages * case.logp, case.ratio, low, high)


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: str = "k3") -> Tensor:
    """Schulman's per-token estimates of KL(policy, reference) in nats; d = log ref - log policy (N,).

    k1 -d: unbiased, but its gradient in a loss vanishes in the mean (use it in rewards). k2 d^2 / 2. k3 e^d - d - 1.
    """
    d = ref_logp - logp
    if estimator == "k1":
        return -d
    return d.square() / 2 if estimator == "k2" else d.exp() - d - 1


def policy_terms(logp: Tensor, tokens: PolicyTokens, objective: PolicyObjective, num_rows: int = 0) -> PolicyTerms:
    """The loss of each token, to be summed with `tokens.weights`, and its metrics; logp (N,) with gradient, nats.

    Where `objective.needs_rows`, the tokens are whole rows with ids below `num_rows`.
    """
    o = objective
    rows = Rows(tokens.rows, num_rows) if o.needs_rows and tokens.rows is not None else None
    old = logp.detach() if tokens.old_logp is None else tokens.old_logp
    if tokens.old_logp is not None:
        old = torch.where(old.isnan(), logp.detach(), old)
    if o.correction_mode is not None and tokens.sampling_logp is not None and tokens.importance_weights is None:
        made = importance_weights(
            old,
            tokens.sampling_logp,
            mode=o.correction_mode,  # pyright: ignore[reportArgumentType] (checked by PolicyObjective)
            clip_max=o.correction_max,
            clip_min=o.correction_min,
            rows=rows,
        )
        tokens = replace(tokens, importance_weights=made)
    log_ratio = logp - old
    ratio = log_ratio.exp()
    if rows is not None and o.importance_sampling_level == "sequence":
        ratio = rows.spread_means(log_ratio).exp()
    found = POLICY_LOSSES[o.loss_type](_Case(logp, log_ratio, ratio, tokens, rows, o))
    loss, kl = found.loss, None
    if o.off_policy_mask_threshold is not None:
        assert rows is not None
        sampled = old if tokens.sampling_logp is None else tokens.sampling_logp
        loss = loss * off_policy_mask(logp, sampled, tokens.advantages, rows, o.off_policy_mask_threshold)
    if tokens.entropy_mask is not None and o.loss_type != "gmpo":
        loss = loss * tokens.entropy_mask
    if tokens.importance_weights is not None and o.loss_type != "vespo":
        loss = loss * tokens.importance_weights
    if o.beta != 0.0:
        assert tokens.ref_logp is not None
        kl = kl_estimate(logp, tokens.ref_logp, o.kl_estimator)
        if o.use_bias_correction_kl and o.loss_type != "gmpo":
            kl = kl * ratio
        loss = loss + o.beta * kl
    detached = None if kl is None else kl.detach()
    importance = tokens.importance_weights if o.correction_mode is not None else None
    return PolicyTerms(loss, found.ratio.detach(), detached, found.low, found.high, found.phi, importance)


def token_weights(
    rows: Tensor,
    num_rows: int,
    loss_type: str,
    *,
    num_tokens: Tensor | float | None = None,
    max_completion_length: int | None = None,
) -> Tensor:
    """(N,) fp32 weight of each token's term, rows (N,) ids of runs in [0, num_rows); rows without tokens count.

    By `WEIGHTINGS`: row_mean 1 / (length of the row * num_rows); row_sum 1 / num_rows; token_mean 1 / N;
    batch_tokens 1 / num_tokens, where `num_tokens` counts the tokens of all micro-batches and devices of the step over
    the number of devices (default N); max_length 1 / (num_rows * max_completion_length). Gradient accumulation divides
    all but batch_tokens by its steps. Raises ValueError.
    """
    weighting = WEIGHTINGS.get(loss_type)
    ones = torch.ones(rows.shape[0], dtype=torch.float32, device=rows.device)
    if weighting == "row_mean":
        return ones / (Rows(rows, num_rows).token_lengths() * num_rows)
    if weighting == "row_sum":
        return ones / num_rows
    if weighting == "token_mean":
        return ones / max(1, rows.shape[0])
    if weighting == "batch_tokens":
        return ones / (max(1, rows.shape[0]) if num_tokens is None else num_tokens)
    if weighting != "max_length":
        raise ValueError(f"loss_type={loss_type!r}: choose one of {', '.join(WEIGHTINGS)}")
    if max_completion_length is None:
        raise ValueError("max_completion_length is not given: loss_type='dr_grpo' divides by it, in tokens")
    return ones / (num_rows * max_completion_length)


ROW_LOSSES = ("rloo", "vespo", "gmpo")
POLICY_LOSSES = {
    "grpo": _clipped,  # arXiv:2402.03300 Eq. 3
    "bnpo": _clipped,  # arXiv:2506.02864
    "dr_grpo": _clipped,  # arXiv:2503.20783
    "dapo": _clipped,  # arXiv:2503.14476 Eq. 8
    "luspo": _clipped,  # arXiv:2602.05261
    "ppo": _clipped,
    "cispo": _cispo,
    "sapo": _sapo,
    "vespo": _vespo,
    "gmpo": _gmpo,
    "dppo": _dppo,
    "rloo": _row_clipped,
    "reinforce": _reinforce,
}
WEIGHTINGS = {
    **dict.fromkeys(("grpo", "sapo", "gmpo", "rloo"), "row_mean"),
    **dict.fromkeys(("luspo", "reinforce"), "row_sum"),
    **dict.fromkeys(("bnpo", "ppo"), "token_mean"),
    **dict.fromkeys(("dapo", "cispo", "vespo", "dppo"), "batch_tokens"),
    "dr_grpo": "max_length",
}
