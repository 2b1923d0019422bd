"""Everything with a vocabulary axis: statistics of a language-model head per token, and their gradients."""

from fastalign_kernels.head.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from fastalign_kernels.head.deferred import deferred
from fastalign_kernels.head.divergence import (
    linear_divergence,
    linear_divergence_reference,
    linear_topk_divergence,
    linear_topk_divergence_reference,
)
from fastalign_kernels.head.fused import fused
from fastalign_kernels.head.logprobs import (
    linear_logprobs,
    linear_logprobs_reference,
    selective_log_softmax,
    selective_log_softmax_reference,
)
from fastalign_kernels.head.policy import linear_policy_loss, linear_policy_loss_reference
from fastalign_kernels.head.preference import (
    ReferenceHead,
    linear_preference_loss,
    linear_preference_loss_reference,
    linear_unpaired_loss,
    linear_unpaired_loss_reference,
)
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
    "linear_cross_entropy_reference",
    "linear_divergence",
    "linear_divergence_reference",
    "linear_logprobs",
    "linear_logprobs_reference",
    "linear_policy_loss",
    "linear_policy_loss_reference",
    "linear_preference_loss",
    "linear_preference_loss_reference",
    "linear_topk_divergence",
    "linear_topk_divergence_reference",
    "linear_unpaired_loss",
    "linear_unpaired_loss_reference",
    "selective_log_softmax",
    "selective_log_softmax_reference",
    "stats",
]
