"""What the head says about each token, without gradient: one product, one chunk of logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign_kernels.head.fp8_product import Fp8Head
from fastalign_kernels.head.operands import check_call, operands_of
from fastalign_kernels.head.products import Head, as_one_op
from fastalign_kernels.head.rows import RowStats
from fastalign_kernels.head.token_stats import LogitForm, TokenStats
from fastalign_kernels.head.vocabulary_parallel import VocabularyShard


@torch.no_grad()
def rows_of_head(head: Head, outputs: tuple[str, ...]) -> RowStats:
    """Statistics of all tokens, chunk by chunk."""
    out = head.empty_stats(outputs)
    for span in head.spans:
        head.stats(head.logits(span), span, outputs, out)
    return out


@as_one_op
def stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
    outputs: tuple[str, ...] = ("logp",),
    chunk: int | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    shard: VocabularyShard | None = None,
    fp8: bool = False,
) -> TokenStats:
    """Statistics of hidden (N, D) under the head weight (V, D), bias (V,) at targets (N,) int64, without gradient.

    Products run in hidden's dtype, statistics are fp32 (fp64 for fp64). `chunk` is in tokens (default:
    `chunk_size`); `low_rank` and `shard` as in `fused`. `fp8`: hidden and weight multiply in e4m3, at up to
    twice the rate of bf16 on cards that have it. Off by default: log-probabilities are then off by 0.06 nats on
    average (`fp8_product`), too much for an importance ratio or a reward. Raises ValueError for arguments that do not
    fit together.
    """
    with torch.no_grad():
        operands = operands_of(hidden, weight, bias, low_rank)
        check_call(operands, targets, form, outputs, shard)
    return rows_of_head((Fp8Head if fp8 else Head)(operands, targets, form, chunk, shard=shard), outputs).stats
