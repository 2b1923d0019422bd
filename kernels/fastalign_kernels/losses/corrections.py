"""Weights and masks that correct a policy gradient for tokens that another policy sampled: (N,) in, (N,) out.

With mu the policy that sampled (an inference engine), pi_old the training model at that time and pi the model now, all
natural logs of the sampled token's probability; rho = pi_old / mu. No function here passes a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastalign_kernels.losses.row_sums import Rows

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]
CORRECTION_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask")


@torch.no_grad()
def importance_weights(
    old_logp: Tensor,
    sampling_logp: Tensor,
    *,
    mode: CorrectionMode = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
    rows: Rows | None = None,
) -> Tensor:
    """(N,) factors of the policy term: TRL's `vllm_importance_sampling_mode` and `_clip_{min,max}`; 1 at NaN samples.

    token_*: rho_t; sequence_*: prod_t rho_t of the row; *_truncate: clamped to the bounds (token_truncate
    is TIS, usual clip_max 2); *_mask: 0 outside of them (token_mask with 0.5 and 5 is IcePop).
    geometric_mask: 1 where exp(mean_t log rho_t) of the row lies inside (usual bounds 0.99 and 1.01), else 0; times
    token_truncate it is the sequence-masked TIS. All but token_* need `rows`. Raises ValueError.
    """
    if mode not in CORRECTION_MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(CORRECTION_MODES)}")
    if clip_min is not None and clip_max is not None and clip_min > clip_max:
        raise ValueError(f"clip_min={clip_min} is above clip_max={clip_max}: give clip_min <= clip_max")
    log_ratio = torch.nan_to_num(old_logp - sampling_logp, nan=0.0)
    if not mode.startswith("token"):
        if rows is None:
            raise ValueError(f"mode={mode!r} works on whole rows: give rows=Rows(ids, num_rows)")
        log_ratio = rows.spread_means(log_ratio) if mode == "geometric_mask" else rows.spread_sums(log_ratio)
    ratio = log_ratio.exp()
    if mode.endswith("truncate"):
        return ratio if clip_min is None and clip_max is None else ratio.clamp(clip_min, clip_max)
    inside = torch.ones_like(ratio, dtype=torch.bool)
    if clip_min is not None:
        inside &= ratio >= clip_min
    if clip_max is not None:
        inside &= ratio <= clip_max
    return inside.to(ratio.dtype) if mode == "geometric_mask" else ratio.masked_fill(~inside, 0.0)


@torch.no_grad()
def off_policy_mask(
    logp: Tensor, sampling_logp: Tensor, advantages: Tensor, rows: Rows, off_policy_mask_threshold: float
) -> Tensor:
    """(N,) 1 or 0: off-policy sequence masking, DeepSeek-V3.2 (arXiv:2512.02556) Eq. 9.

    Drops tokens of negative advantage in rows whose mean of log mu - log pi exceeds the threshold (nats per token).
    """
    drift = rows.spread_means(torch.nan_to_num(sampling_logp - logp, nan=0.0))
    return ((advantages >= 0) | (drift <= off_policy_mask_threshold)).to(logp.dtype)


@torch.no_grad()
def divergence_mask(logp: Tensor, sampling_logp: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """(N,) 1 or 0: DPPO with the binary total variation |pi - mu|, arXiv:2602.04879.

    Drops a token whose probability rose by more than `high` at positive advantage, or fell by more than `low`
    otherwise.
    """
    moved = logp.exp() - sampling_logp.exp()
    return torch.where(advantages > 0, moved <= high, moved >= -low).to(logp.dtype)


@torch.no_grad()
def high_entropy_mask(entropy: Tensor, threshold: Tensor) -> Tensor:
    """(N,) 1 where the entropy (nats) reaches the 0-dim `threshold`, else 0 (80/20 rule, arXiv:2506.01939)."""
    return (entropy >= threshold).to(entropy.dtype)


@torch.no_grad()
def entropy_threshold(entropy: Tensor, top_entropy_quantile: float) -> Tensor:
    """0-dim: the entropy that the top share `top_entropy_quantile` of the tokens (N,) reaches."""
    if entropy.numel() == 0:
        return entropy.new_zeros(())
    # torch.quantile takes at most 2^24 values
    rank = (1 - top_entropy_quantile) * (entropy.numel() - 1)
    low, share = int(rank), rank - int(rank)
    ordered = entropy.sort().values
    return torch.lerp(ordered[low], ordered[min(low + 1, entropy.numel() - 1)], share)
