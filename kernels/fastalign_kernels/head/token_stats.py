"""What a language-model head says about each scored token, and how its logits are formed."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

OUTPUTS = ("logp", "entropy", "top1", "mean_logp", "mean_logit", "log_sum_p2", "lse")


@dataclass
class TokenStats:
    """Per-token numbers of the head's distribution, each (N,) fp32 (`top1` bool); None where not asked for."""

    logp: Tensor  # natural log of the target's probability, nats
    entropy: Tensor | None = None  # nats
    top1: Tensor | None = None  # the target is the most probable token
    mean_logp: Tensor | None = None  # mean over the vocabulary of log p (label smoothing)
    mean_logit: Tensor | None = None  # mean over the vocabulary of the logits
    log_sum_p2: Tensor | None = None  # log of the sum of squared probabilities (WPO)
    lse: Tensor | None = None  # natural log of the normaliser, the sum of exp(logit) (z-loss)

    def slice(self, span: slice) -> TokenStats:
        """The same statistics of a span of tokens."""
        return TokenStats(**{f.name: v[span] for f in fields(self) if (v := getattr(self, f.name)) is not None})


@dataclass(frozen=True)
class LogitForm:
    """How logits follow from hidden states: softcap * tanh(scale * (W h + b) / softcap) / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0  # a scalar, or (N,) fp32
