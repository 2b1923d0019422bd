"""Everything with a vocabulary axis: statistics of a language-model head per token, and their gradients."""

from fastalign_kernels.head.cross_entropy import linear_cross_entropy
from fastalign_kernels.head.deferred import deferred
from fastalign_kernels.head.divergence import linear_divergence, linear_topk_divergence
from fastalign_kernels.head.fused import fused
from fastalign_kernels.head.logprobs import linear_logprobs, selective_log_softmax
from fastalign_kernels.head.policy import linear_policy_loss
from fastalign_kernels.head.preference import ReferenceHead, linear_preference_loss, linear_unpaired_loss
from fastalign_kernels.head.stats import stats
from fastalign_kernels.head.token_stats import OUTPUTS, LogitForm, TokenStats
from fastalign_kernels.head.vocabulary_parallel import VocabularyShard

__all__ = [
    "OUTPUTS",
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
