"""Fused language-model heads, attention on packed tokens and losses; needs torch, uses triton where it is."""

from fastalign_kernels.head import (
    OUTPUTS,
    LogitForm,
    ReferenceHead,
    TokenStats,
    VocabularyShard,
    deferred,
    fused,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
    linear_preference_loss,
    linear_topk_divergence,
    linear_unpaired_loss,
    selective_log_softmax,
    stats,
)
from fastalign_kernels.modules import LinearCrossEntropyLoss

__all__ = [
    "OUTPUTS",
    "LinearCrossEntropyLoss",
    "LogitForm",
    "ReferenceHead",
    "TokenStats",
    "VocabularyShard",
    "deferred",
    "fused",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_topk_divergence",
    "linear_unpaired_loss",
    "selective_log_softmax",
    "stats",
]
