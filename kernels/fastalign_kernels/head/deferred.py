"""Differentiable per-token statistics for any loss: the gradients come in backward, from logits made a second time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign_kernels.head.gradients import HeadGradients, coefficients_of
from fastalign_kernels.head.operands import Operands, check_call, operands_of
from fastalign_kernels.head.products import Head, as_one_op
from fastalign_kernels.head.rows import Coefficients, RowStats
from fastalign_kernels.head.stats import rows_of_head
from fastalign_kernels.head.token_stats import OUTPUTS, LogitForm, TokenStats
from fastalign_kernels.head.vocabulary_parallel import VocabularyShard


@torch.no_grad()
def gradients_of_head(
    head: Head, rows: RowStats, coefficients: Coefficients, needs: tuple[bool, ...], main_grad: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients of the operands from those of the statistics, chunk by chunk."""
    sums = HeadGradients(head, needs, main_grad, direct=True)
    coefficients = coefficients.map(lambda v: v.to(rows.lse.dtype))
    for span in head.spans:
        part = coefficients.map(lambda v, span=span: v[span])
        sums.add(span, head.gradient(head.logits(span), span, rows.slice(span), part))
    return sums.finish().scaled()


class _DeferredStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, make_head, outputs, main_grad, *operands):
        rows = rows_of_head(make_head(Operands(*operands)), outputs)
        ctx.save_for_backward(*operands, rows.lse, rows.stats.entropy, rows.stats.log_sum_p2)
        ctx.make_head, ctx.main_grad = make_head, main_grad
        ctx.set_materialize_grads(False)
        if rows.stats.top1 is not None:
            ctx.mark_non_differentiable(rows.stats.top1)
        # saved statistics are outputs too; the caller may overwrite what it gets, so it gets its own
        return tuple(None if (v := getattr(rows.stats, name)) is None else v.clone() for name in OUTPUTS)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        *operands, lse, entropy, log_sum_p2 = ctx.saved_tensors
        coefficients = coefficients_of(dict(zip(OUTPUTS, grads, strict=True)))
        if not coefficients.given():
            return (None,) * (3 + len(operands))
        with torch.autocast(lse.device.type, enabled=False):
            head = ctx.make_head(Operands(*operands), keep=True)
            rows = RowStats(TokenStats(lse, entropy=entropy, log_sum_p2=log_sum_p2), lse)
            found = gradients_of_head(head, rows, coefficients, ctx.needs_input_grad[3:], ctx.main_grad)
            return None, None, None, *found


@as_one_op
def deferred(
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
) -> TokenStats:
    """`stats` with a graph: every output but top1 is differentiable with respect to hidden, weight, bias, low_rank.

    Costs four products (the logits are made again in backward) and one chunk of logits; any loss may follow, also one
    that couples all tokens. `fused` is cheaper where the loss is a sum over chunks; `low_rank`, `shard`, `main_grad`
    and DTensors as there. Differentiable once.
    """
    operands = operands_of(hidden, weight, bias, low_rank)
    check_call(operands, targets, form, outputs, shard)
    make_head = partial(Head, targets=targets, form=form, chunk=chunk, shard=shard)
    found = _DeferredStats.apply(make_head, outputs, getattr(weight, "main_grad", None), *operands)
    return TokenStats(**dict(zip(OUTPUTS, found, strict=True)))
