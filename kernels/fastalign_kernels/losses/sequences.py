"""From tokens to sequences: sums of per-token numbers, and the weights of tokens and sequences in preference losses.

Tokens (N,) lie sequence by sequence; `lengths` (R,) int64 counts each sequence's tokens, 0 allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """(R,) sums of values (N,) over each sequence, in a fixed order; 0 for a sequence without tokens.

    They are added up in fp64 where there is any: one after the other in fp32, a thousand lose four digits.
    """
    if values.device.type == "cpu" and int(lengths.sum()) != values.shape[0]:  # elsewhere this would synchronise
        raise ValueError(f"lengths add up to {int(lengths.sum())}: give those of all {values.shape[0]} tokens")
    wide = values if values.device.type == "mps" else values.double()
    return torch.segment_reduce(wide, "sum", lengths=lengths, unsafe=True).to(values.dtype)


def ld_weights(position: Tensor, shared_length: Tensor, ld_alpha: float) -> Tensor:
    """LD-DPO, arXiv:2409.06411: weight (N,) fp32 of each token's logp in its sequence's.

    position (N,) of the token in its answer, from 0; shared_length (N,) tokens of the shorter answer of its pair:
    1 for what both answers reach, `ld_alpha` for the tail of the longer one.
    """
    return torch.where(position < shared_length, 1.0, ld_alpha)


def wpo_weights(logp: Tensor, log_sum_p2: Tensor, lengths: Tensor, counted: Tensor | None = None) -> Tensor:
    """WPO, arXiv:2406.11827 Eq. 2: weight (R,) of each sequence, exp of the mean of logp - log sum p^2.

    logp (N,) of the policy, log_sum_p2 (N,) log of its distributions' summed squares; the mean is over the tokens that
    `counted` (N,) marks with 1. A pair is weighted with the product of its answers' weights. Without gradient.
    """
    aligned, num_tokens = (logp - log_sum_p2).detach(), lengths
    if counted is not None:
        aligned, num_tokens = aligned * counted, row_sums(counted, lengths)
    return (row_sums(aligned, lengths) / num_tokens.clamp(min=1)).exp()
