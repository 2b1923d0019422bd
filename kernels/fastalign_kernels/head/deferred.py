"""Differentiable per-token statistics for any loss: the gradients come in backward, from logits made a second time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign_kernels.head.products import Head, HeadGradients, as_one_op, check_arguments
from fastalign_kernels.head.rows import Coefficients, RowStats
from fastalign_kernels.head.stats import rows_of_head
from fastalign_kernels.head.token_stats import OUTPUTS, LogitForm, TokenStats


class _DeferredStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, form, outputs, chunk):
        rows = rows_of_head(Head(hidden, weight, targets, bias, form, chunk), outputs)
        ctx.save_for_backward(hidden, weight, bias, targets, rows.lse, rows.stats.entropy, rows.stats.log_sum_p2)
        ctx.form, ctx.chunk = form, chunk
        ctx.set_materialize_grads(False)
        if rows.stats.top1 is not None:
            ctx.mark_non_differentiable(rows.stats.top1)
        # saved statistics are outputs too; the caller may overwrite what it gets, so it gets its own
        return tuple(None if (v := getattr(rows.stats, name)) is None else v.clone() for name in OUTPUTS)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        hidden, weight, bias, targets, lse, entropy, log_sum_p2 = ctx.saved_tensors
        by_name = dict(zip(OUTPUTS, grads, strict=True))
        by_name.pop("top1")
        coefficients = Coefficients(**by_name).map(lambda v: v.to(lse.dtype))
        none = (None,) * 4
        if not coefficients.given():
            return None, None, None, *none
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(hidden, weight, targets, bias, ctx.form, ctx.chunk)
            rows = RowStats(TokenStats(lse, entropy=entropy, log_sum_p2=log_sum_p2), lse)
            sums = HeadGradients(head, ctx.needs_input_grad[:3])
            for span in head.spans:
                part = coefficients.map(lambda v, span=span: v[span])
                sums.add(head, span, head.gradient(head.logits(span), span, rows.slice(span), part))
            return *sums.finish().scaled(), *none


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
) -> TokenStats:
    """`stats` with a graph: every output but top1 is differentiable with respect to hidden, weight and bias.

    Costs four products (the logits are made again in backward) and one chunk of logits; any loss may follow, also one
    that couples all tokens. `fused` is cheaper where the loss is a sum over chunks. Differentiable once.
    """
    check_arguments(hidden, weight, targets, bias, form, outputs)
    found = _DeferredStats.apply(hidden, weight, bias, targets, form, outputs, chunk)
    return TokenStats(**dict(zip(OUTPUTS, found, strict=True)))
