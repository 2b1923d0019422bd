"""The head as operators of `torch.library`: whole graphs for torch.compile, with fake kernels and autograd.

`fastalign::linear_cross_entropy` makes its gradients in the same pass (three products), hence the list of what needs
one; `fastalign::linear_logprobs` makes them in `fastalign::linear_logprobs_backward`. Importing this module registers
them; the public functions import it when torch.compile traces them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fastalign_kernels.head import cross_entropy
from fastalign_kernels.head.deferred import gradients_of_head
from fastalign_kernels.head.operands import Operands
from fastalign_kernels.head.positions import Scored, scored_positions
from fastalign_kernels.head.products import Head
from fastalign_kernels.head.rows import Coefficients, RowStats, stats_dtype
from fastalign_kernels.head.stats import stats
from fastalign_kernels.head.token_stats import LogitForm, TokenStats

_op = partial(torch.library.custom_op, mutates_args=())


@contextmanager
def _autograd() -> Iterator[None]:
    """Inside, autograd records again: an operator's kernel runs below it, where it cannot be switched on."""
    found: Any = torch._C  # pyright: ignore[reportAttributeAccessIssue]
    excluded = found._dispatch_tls_local_exclude_set()
    for name in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        excluded = excluded - found.DispatchKeySet(getattr(found.DispatchKey, name))
    with found._ForceDispatchKeyGuard(found._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _form(logit_scale: float, softcap: float | None, temperature: float, temperatures: Tensor | None) -> LogitForm:
    return LogitForm(logit_scale, softcap, temperature if temperatures is None else temperatures)


def _split(form: LogitForm) -> tuple[float, float | None, float, Tensor | None]:
    """The form as arguments of an operator."""
    if isinstance(form.temperature, Tensor):
        return form.scale, form.softcap, 1.0, form.temperature
    return form.scale, form.softcap, form.temperature, None


def _like(tensors: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    """Room for gradients of hidden, weight and bias; nothing where none is needed."""
    nothing = cast(Tensor, tensors[0]).new_empty(0)
    pairs = zip(tensors, needs, strict=True)
    return tuple(t.new_empty(t.shape) if t is not None and needed else nothing.clone() for t, needed in pairs)


def _needs(*tensors: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]


# ---- cross-entropy


def _gradient_scale(hidden: Tensor, reduction: str) -> float:
    """What the gradients between forward and backward are multiplied by: a mean's would vanish in fp16."""
    return 1024.0 if hidden.dtype == torch.float16 and reduction == "mean" else 1.0


@_op("fastalign::linear_cross_entropy")
def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    needs: list[bool],
    ignore_index: int | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    dft: bool,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    temperatures: Tensor | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients by hidden, weight and bias times `_gradient_scale`, as far as `needs` says."""
    with _autograd():
        inputs = [None if t is None else t.detach() for t in (hidden, weight, bias)]
        leaves = [t.requires_grad_() for t, needed in zip(inputs, needs, strict=True) if t is not None and needed]
        h, w, b = inputs
        loss = cross_entropy.linear_cross_entropy(
            cast(Tensor, h),
            cast(Tensor, w),
            targets,
            bias=b,
            class_weights=class_weights,
            ignore_index=ignore_index,
            reduction=reduction,  # pyright: ignore[reportArgumentType]
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            dft=dft,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature if temperatures is None else temperatures,
            chunk=chunk,
        )
        scale = torch.full_like(loss, _gradient_scale(hidden, reduction))
        grads = iter(torch.autograd.grad(loss, leaves, scale) if leaves else ())
    return loss.detach(), *(next(grads).contiguous() if needed else hidden.new_empty(0) for needed in needs)  # pyright: ignore


@_cross_entropy.register_fake
def _(hidden, weight, targets, bias, class_weights, needs, *_args):
    loss = hidden.new_empty((), dtype=stats_dtype(hidden.dtype))
    return loss, *_like((hidden, weight, bias), needs)


def _keep_gradients(ctx, inputs, output):
    ctx.needs, ctx.scale = inputs[5], _gradient_scale(inputs[0], inputs[7])
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _scale_gradients(ctx, grad_loss, *_):
    factor = grad_loss / ctx.scale  # not rounded to the dtype of 16-bit gradients
    pairs = zip(ctx.saved_tensors, ctx.needs, strict=True)
    grads = [(g.to(factor.dtype) * factor).to(g.dtype) if needed else None for g, needed in pairs]
    return *grads[:2], None, grads[2], *(None,) * 12


_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    class_weights: Tensor | None,
    form: LogitForm,
    settings: tuple[int | None, str, float, float, bool],
    bias: Tensor | None,
    chunk: int | None,
) -> Tensor:
    """`head.linear_cross_entropy` as an operator; settings: ignore_index, reduction, label_smoothing, z_loss, dft."""
    needs = _needs(hidden, weight, bias)
    return _cross_entropy(hidden, weight, targets, bias, class_weights, needs, *settings, *_split(form), chunk)[0]


# ---- log-probabilities


def _scored(hidden: Tensor, targets: Tensor, form: LogitForm, ignore_index: int | None) -> Scored:
    return scored_positions(hidden, targets, form, None, ignore_index)


@_op("fastalign::linear_logprobs")
def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    entropy: bool,
    ignore_index: int | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    temperatures: Tensor | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies (empty unless asked for) and log-normalisers at all positions, 0 where ignored."""
    scored = _scored(hidden, targets, _form(logit_scale, softcap, temperature, temperatures), ignore_index)
    outputs = ("logp", "entropy", "lse") if entropy else ("logp", "lse")
    found = stats(scored.hidden, weight, scored.targets, bias=bias, form=scored.form, outputs=outputs, chunk=chunk)
    parts = (found.logp, found.entropy, found.lse)
    return tuple(hidden.new_empty(0) if v is None else scored.spread(v).clone() for v in parts)  # pyright: ignore


@_logprobs.register_fake
def _(hidden, weight, targets, bias, entropy, *_args):
    logp = hidden.new_empty(targets.shape, dtype=stats_dtype(hidden.dtype))
    return logp, torch.empty_like(logp) if entropy else hidden.new_empty(0), torch.empty_like(logp)


@_op("fastalign::linear_logprobs_backward")
def _logprobs_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    needs: list[bool],
    ignore_index: int | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    temperatures: Tensor | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, as far as `needs` says."""
    scored = _scored(hidden, targets, _form(logit_scale, softcap, temperature, temperatures), ignore_index)
    kept = slice(None) if scored.kept is None else scored.kept

    def rows(value: Tensor | None) -> Tensor | None:
        return None if value is None or not value.numel() else value.reshape(-1)[kept]

    normalisers = cast(Tensor, lse.reshape(-1)[kept])
    head = Head(Operands(scored.hidden, weight, bias), scored.targets, scored.form, chunk, keep=True)
    found = RowStats(TokenStats(normalisers, entropy=rows(entropy)), normalisers)
    coefficients = Coefficients(logp=rows(grad_logp), entropy=rows(grad_entropy))
    if coefficients.logp is None and coefficients.entropy is None:
        coefficients.logp = torch.zeros_like(normalisers)
    grads = gradients_of_head(head, found, coefficients, (*needs, False, False))
    result = [hidden.new_empty(0) if g is None else g for g in grads[:3]]
    if needs[0]:
        result[0] = _at_positions(result[0], scored.kept, hidden)
    return tuple(result)  # pyright: ignore[reportReturnType]


def _at_positions(grad: Tensor, kept: Tensor | None, hidden: Tensor) -> Tensor:
    """The gradient of the scored rows at their positions of `hidden`."""
    if kept is not None:
        grad = grad.new_zeros(hidden.shape[:-1].numel(), grad.shape[1]).index_copy_(0, kept, grad)
    return grad.view(hidden.shape)


@_logprobs_backward.register_fake
def _(grad_logp, grad_entropy, hidden, weight, targets, bias, entropy, lse, needs, *_args):
    return _like((hidden, weight, bias), needs)


def _keep_operands(ctx, inputs, output):
    hidden, weight, targets, bias, _, *rest, temperatures, chunk = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, *output[1:], temperatures)
    ctx.rest, ctx.chunk = rest, chunk
    ctx.needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_logp, grad_entropy, _):
    *operands, temperatures = ctx.saved_tensors
    found = _logprobs_backward(grad_logp, grad_entropy, *operands, ctx.needs, *ctx.rest, temperatures, ctx.chunk)
    grads = [g if needed else None for g, needed in zip(found, ctx.needs, strict=True)]
    return *grads[:2], None, grads[2], *(None,) * 7


_logprobs.register_autograd(_gradients, setup_context=_keep_operands)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    form: LogitForm,
    entropy: bool,
    ignore_index: int | None,
    chunk: int | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`head.linear_logprobs` as an operator."""
    logp, entropies, _ = _logprobs(hidden, weight, targets, bias, entropy, ignore_index, *_split(form), chunk)
    return (logp, entropies) if entropy else logp
