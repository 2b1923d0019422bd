"""Fused language-model heads, attention on packed tokens and losses; needs torch, uses triton where it is."""

from fastalign_kernels.head import OUTPUTS, LogitForm, TokenStats, deferred, fused, linear_cross_entropy, stats

__all__ = ["OUTPUTS", "LogitForm", "TokenStats", "deferred", "fused", "linear_cross_entropy", "stats"]
