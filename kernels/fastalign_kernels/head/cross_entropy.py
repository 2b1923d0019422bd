"""Cross-entropy of a linear head without its logits in memory."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastalign_kernels.head.fused import fused
from fastalign_kernels.head.token_stats import LogitForm, TokenStats
from fastalign_kernels.losses.supervised import nll, smoothed_nll


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Cross-entropy of softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), 0-dim fp32, in nats.

    hidden (..., D), weight (V, D), targets (...) int64. As `torch.nn.functional.cross_entropy`, but the mean over no
    target is 0, not NaN. Targets equal to `ignore_index` are dropped before the first product and cost nothing; to
    find them, the targets are read back from a GPU once: `fused` on listed positions does without. Raises ValueError.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: choose 'mean' or 'sum'; per-token values come from `deferred`")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing}: give a number from 0 to 1")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)}: give {tuple(hidden.shape[:-1])}, one per hidden state")
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    kept = (targets != ignore_index).nonzero().squeeze(1)
    if kept.numel() < targets.numel():
        hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
    divisor = max(1, targets.numel()) if reduction == "mean" else 1

    def loss_fn(stats: TokenStats, span: slice) -> Tensor:
        if stats.mean_logp is None:
            return nll(stats.logp).sum() / divisor
        return smoothed_nll(stats.logp, stats.mean_logp, label_smoothing).sum() / divisor

    outputs = ("logp", "mean_logp") if label_smoothing else ("logp",)
    form = LogitForm(scale=logit_scale, softcap=softcap)
    return fused(hidden, weight, targets, loss_fn, bias=bias, form=form, outputs=outputs)[0]
