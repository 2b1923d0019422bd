"""Losses on given targets: per-token numbers in, per-token losses out, both (N,) in nats."""

from __future__ import annotations

from torch import Tensor


def nll(logp: Tensor) -> Tensor:
    """Negative log-likelihood of each target; logp (N,)."""
    return -logp


def dft(logp: Tensor) -> Tensor:
    """Dynamic fine-tuning, arXiv:2508.05629 Eq. 9: -sg(p) log p, which takes the inverse-probability weight off."""
    return -logp.detach().exp() * logp


def smoothed_nll(logp: Tensor, mean_logp: Tensor, epsilon: float) -> Tensor:
    """Label smoothing, arXiv:1512.00567 Sec. 7: the target gets 1 - epsilon, epsilon is spread over the vocabulary.

    logp (N,) of the target, mean_logp (N,) mean of log p over the vocabulary; equal to transformers' `LabelSmoother`.
    """
    return -(1 - epsilon) * logp - epsilon * mean_logp
