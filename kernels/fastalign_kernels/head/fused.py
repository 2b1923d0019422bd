"""Loss and gradients of the head in one pass of three products, for a loss that is a sum over chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign_kernels.head.gradients import HeadGradients, coefficients_of
from fastalign_kernels.head.operands import check_call, operands_of
from fastalign_kernels.head.products import Head, as_one_op
from fastalign_kernels.head.rows import Coefficients
from fastalign_kernels.head.token_stats import LogitForm, TokenStats
from fastalign_kernels.head.vocabulary_parallel import VocabularyShard

LossFunction = Callable[[TokenStats, slice], Tensor]


class _FromGradients(torch.autograd.Function):
    """Hands a loss its gradients, made before: backward scales them by the gradient of the loss, on the device."""

    @staticmethod
    def forward(ctx, loss, sums, *operands):
        ctx.sums = sums
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.sums is None:
            raise RuntimeError(
                "backward through this fused head loss ran before and its gradients were used up: "
                "pass retain_graph=True to the first backward, or use deferred"
            )
        keep = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore  # may backward come again?
        grads = ctx.sums.scaled(grad_loss, keep=keep)
        if not keep:
            ctx.sums = None
        return None, None, *grads


def _chunk_loss(
    stats: TokenStats, span: slice, loss_fn: LossFunction, needs_grad: bool
) -> tuple[Tensor, Coefficients]:
    """The loss of a chunk and its derivatives by each statistic; None for those that it does not depend on."""
    leaves = {name: v.detach() for name, v in vars(stats).items() if v is not None}
    smooth = [name for name in leaves if name != "top1"] if needs_grad else []
    for name in smooth:
        leaves[name].requires_grad_()
    with torch.set_grad_enabled(needs_grad):
        loss = loss_fn(TokenStats(**leaves), span)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
        raise ValueError(f"loss_fn returned {found}: return a scalar tensor, such as a sum")
    if not loss.requires_grad:
        return loss, Coefficients()
    grads = torch.autograd.grad(loss, [leaves[name] for name in smooth], allow_unused=True)
    return loss.detach(), coefficients_of(dict(zip(smooth, grads, strict=True)))


def _power_of_two_above(coefficients: Coefficients) -> Tensor:
    """0-dim fp32: scale that brings the chunk's coefficients to at most 1, so that fp16 gradients do not underflow."""
    largest = torch.stack([v.abs().max() for v in coefficients.given()]).max()
    return torch.exp2(torch.ceil(torch.log2(largest.clamp(2.0**-100, 2.0**100))))


@torch.no_grad()
def _one_pass(
    head: Head, loss_fn: LossFunction, outputs: tuple[str, ...], sums: HeadGradients | None
) -> tuple[Tensor, TokenStats]:
    """Total loss and statistics; gradients go to `sums` where given."""
    rows = head.empty_stats(outputs)
    total = torch.zeros((), dtype=head.stats_dtype, device=head.hidden.device)
    for span in head.spans:
        logits = head.logits(span)
        head.stats(logits, span, outputs, rows)
        part = rows.slice(span)
        loss, coefficients = _chunk_loss(part.stats, span, loss_fn, sums is not None)
        total += loss
        if sums is None:
            continue
        if not coefficients.given():
            sums.skip(span)
            continue
        scale = None
        if head.hidden.dtype == torch.float16:
            scale = _power_of_two_above(coefficients)
            coefficients = coefficients.map(lambda v, scale=scale: v / scale)
        sums.add(span, head.gradient(logits, span, part, coefficients), scale)
    return total, rows.stats


@as_one_op
def fused(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: LossFunction,
    *,
    bias: Tensor | None = None,
    form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
    outputs: tuple[str, ...] = ("logp",),
    groups: Tensor | None = None,
    chunk: int | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, TokenStats]:
    """Loss (0-dim fp32, differentiable) and detached statistics of hidden (N, D) under weight (V, D), bias (V,).

    `loss_fn(stats, span)` gets the statistics of the tokens `span` and returns a scalar; the loss is the sum over
    spans. It may use every output but top1 differentiably; tensors that it captures get no gradient. Spans end at the
    borders of `groups` (N,) non-decreasing ids (pairs, sequences) where given, else after `chunk` tokens.
    Gradients of hidden, weight and bias are made in the same pass and scaled by the loss's gradient in backward: three
    products, one chunk of logits in memory. An input that needs no gradient costs nothing; N = 0 gives loss 0 and zero
    gradients without calling `loss_fn`. Raises ValueError for arguments that do not fit together.

    `low_rank`: u (N, r) and b (V, r) add u b^T to the logits (LoRA on the head, without a weight of its own).
    `shard`: weight, bias and b hold this rank's part of the vocabulary. A weight with an attribute `main_grad` (fp32,
    Megatron's) gets its gradient added there in backward, in fp32, and none in `grad`. DTensors: `whole_weights`.
    """
    operands = operands_of(hidden, weight, bias, low_rank)
    check_call(operands, targets, form, outputs, shard)
    if groups is not None and groups.shape != targets.shape:
        raise ValueError(f"groups {tuple(groups.shape)}: give ({targets.shape[0]},), one id per target")
    needs_grad = torch.is_grad_enabled() and any(operands.needs)
    head = Head(operands, targets, form, chunk, groups, shard, keep=needs_grad)
    if not needs_grad:
        return _one_pass(head, loss_fn, outputs, None)
    sums = HeadGradients(head, operands.needs, getattr(weight, "main_grad", None))
    loss, stats = _one_pass(head, loss_fn, outputs, sums)
    return _FromGradients.apply(loss, sums.finish(), *operands), stats
