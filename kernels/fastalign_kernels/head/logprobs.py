"""Log-probabilities of targets: from hidden states, and from logits for somebody who has them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign_kernels.head.deferred import deferred
from fastalign_kernels.head.operands import check_constant, check_targets, check_temperature
from fastalign_kernels.head.positions import scored_positions
from fastalign_kernels.head.rows import (
    Coefficients,
    RowStats,
    _form_logits,
    empty_stats,
    row_gradient,
    row_stats,
    slice_form,
)
from fastalign_kernels.head.rows import stats_dtype as stats_dtype_of
from fastalign_kernels.head.stats import stats
from fastalign_kernels.head.token_stats import LogitForm, TokenStats
from fastalign_kernels.head.vocabulary_parallel import VocabularyShard


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
) -> tuple[Tensor, Tensor]:
    """The specification of `linear_logprobs` with `entropy`, from all logits in plain torch."""
    log_p = _form_logits(F.linear(hidden, weight, bias), LogitForm(logit_scale, softcap, temperature))[0].log_softmax(
        -1
    )
    ignored = torch.zeros_like(targets, dtype=torch.bool) if ignore_index is None else targets == ignore_index
    logp = log_p.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    return logp.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    ignore_index: int | None = -100,
    low_rank: tuple[Tensor, Tensor] | None = None,
    shard: VocabularyShard | None = None,
    chunk: int | None = None,
    fp8: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities (...) fp32 of targets (...) int64 under hidden (..., D) and weight (V, D), in nats.

    With `entropy`, (log-probabilities, entropies). The logits are softcap * tanh(logit_scale * (hidden @ weight.T +
    bias) / softcap) / temperature, temperature a number or (...), fp32. Where nothing needs a gradient: one product
    (`stats`); else `deferred`, differentiable once, also the entropy. Positions whose target is `ignore_index` give 0
    and cost nothing, but finding them reads the targets back from a GPU: None if there are none. `low_rank` u (..., r)
    and b (V, r), and `shard` as in `fused`. `fp8` is for monitoring (`stats` says what it costs): off by 0.06 nats on
    average, and without gradient. Raises ValueError for arguments that do not fit together.
    """
    check_constant("temperature", temperature)
    form = LogitForm(logit_scale, softcap, temperature)
    if torch.compiler.is_compiling() and low_rank is None and shard is None and not fp8:
        from fastalign_kernels import custom_ops

        return custom_ops.linear_logprobs(hidden, weight, targets, bias, form, entropy, ignore_index, chunk)
    scored = scored_positions(hidden, targets, form, low_rank, ignore_index)
    operands = hidden, weight, bias, *(low_rank or ())
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    if fp8 and needs_grad:
        raise ValueError("fp8=True has no gradient: call linear_logprobs under torch.no_grad(), or set it to False")
    found = (deferred if needs_grad else partial(stats, fp8=fp8))(
        scored.hidden,
        weight,
        scored.targets,
        bias=bias,
        form=scored.form,
        outputs=("logp", "entropy") if entropy else ("logp",),
        chunk=chunk,
        low_rank=scored.low_rank,
        shard=shard,
    )
    logp = scored.spread(found.logp)
    return logp if found.entropy is None else (logp, scored.spread(found.entropy))


def _matrices(logits: Tensor) -> Iterator[Tensor]:
    """`logits` (..., V) as views (C, V) in order: one where the strides allow, else one per leading index."""
    if logits.dim() == 2:
        yield logits
        return
    try:
        flat = logits.view(-1, logits.shape[-1])
    except RuntimeError:
        for part in logits:
            yield from _matrices(part)
        return
    yield flat


def _spans(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    begin = 0
    for matrix in _matrices(logits):
        yield slice(begin, begin + matrix.shape[0]), matrix
        begin += matrix.shape[0]


class _SelectiveLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, form, entropy):
        outputs = ("logp", "entropy") if entropy else ("logp",)
        rows = empty_stats(targets.numel(), outputs, stats_dtype_of(logits.dtype), logits.device)
        for span, matrix in _spans(logits):
            row_stats(matrix, targets[span], slice_form(form, span), outputs, rows.slice(span))
        kept = None if rows.stats.entropy is None else rows.stats.entropy.clone()
        ctx.save_for_backward(logits, targets, rows.lse, kept)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return rows.stats.logp, rows.stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        logits, targets, lse, entropy = ctx.saved_tensors
        given = Coefficients(logp=grad_logp, entropy=grad_entropy)
        if not given.given():
            return None, None, None, None
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device).copy_(logits)
        matrix = grad.view(-1, logits.shape[-1])
        rows = RowStats(TokenStats(lse, entropy=entropy), lse)
        row_gradient(matrix, targets, ctx.form, rows, given.map(lambda v: v.to(lse.dtype)), logits.dtype)
        return grad, None, None, None


def selective_log_softmax_reference(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """The specification of `selective_log_softmax` with `entropy`, in plain torch and the logits' dtype."""
    log_p = _form_logits(logits, LogitForm(temperature=temperature))[0].log_softmax(-1)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), torch.special.entr(log_p.exp()).sum(-1)


def selective_log_softmax(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """log_softmax(logits / temperature) at targets (...) int64, fp32 in nats; with `entropy`, also the entropies.

    logits (..., V) of any floating dtype and strides are read, never copied to fp32 and never changed; the gradient
    has their dtype and is made in the memory that it is returned in. temperature: a number or (...). Differentiable
    once. ValueError for shapes that do not fit and for targets outside 0 to V - 1 (on the CPU).
    """
    shape = logits.shape[:-1]
    if targets.shape != shape or targets.dtype.is_floating_point:
        raise ValueError(f"targets {tuple(targets.shape)} {targets.dtype}: give {tuple(shape)} int64, one per row")
    check_temperature(temperature, shape)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(stats_dtype_of(logits.dtype)).expand(shape).reshape(-1)
    check_targets(targets, logits.shape[-1])
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    form = LogitForm(temperature=temperature)
    logp, found = _selective(logits, targets.reshape(-1).to(torch.int64), form, entropy)
    return (logp.view(shape), found.view(shape)) if found is not None else logp.view(shape)


@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def _selective(logits: Tensor, targets: Tensor, form: LogitForm, entropy: bool) -> tuple[Tensor, Tensor | None]:
    return _SelectiveLogSoftmax.apply(logits, targets, form, entropy)  # pyright: ignore[reportReturnType]
