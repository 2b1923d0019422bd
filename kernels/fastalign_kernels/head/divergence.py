"""Divergence of a student's head from a teacher's: both logits once, gradients of the student in the same pass.

With p = softmax(z) of the student, q of the teacher, D of `losses.divergence` and w dL/dD of the row:

    forward_kl  dD/dz_v = p_v - q_v
    reverse_kl  dD/dz_v = p_v (log p_v - log q_v - D)
    jsd         dD/dz_v = (1 - beta) p_v (log p_v - log m_v - KL(p, m))

and through the form of the logits as in head/rows.py. The teacher never has a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign_kernels.dispatch import backend
from fastalign_kernels.head.chunks import chunk_size
from fastalign_kernels.head.fused import _FromGradients, _power_of_two_above
from fastalign_kernels.head.gradients import HeadGradients
from fastalign_kernels.head.operands import Operands, check_devices, check_temperature, operands_of
from fastalign_kernels.head.products import Head, as_one_op
from fastalign_kernels.head.rows import Coefficients, RowStats, _blocks, _column, _form_logits, slice_form
from fastalign_kernels.head.rows import stats_dtype as stats_dtype_of
from fastalign_kernels.head.token_stats import LogitForm, TokenStats
from fastalign_kernels.losses.divergence import FLOOR, resolved, support_divergence, topk_divergence


@dataclass
class DivergenceStats:
    """Per-token numbers (N,) in nats, without gradient."""

    divergence: Tensor
    entropy: Tensor  # of the student


def _slope(tanh: Tensor | None, form: LogitForm) -> Tensor | float:
    """dz/dm of the logits' form."""
    slope = form.scale / _column(form.temperature)
    return slope if tanh is None else (1 - tanh.square()) * slope


def row_divergence_reference(
    student: Tensor,
    teacher: Tensor,
    student_form: LogitForm,
    teacher_form: LogitForm,
    kind: str,
    beta: float,
    weights: Tensor,
    out: DivergenceStats,
    grad: Tensor | None,
) -> None:
    """Divergences of rows (C, V) into `out`; weights (C,) times their gradients into `grad`, if not None."""
    z, tanh = _form_logits(student, student_form)
    u, _ = _form_logits(teacher, teacher_form)
    log_p = torch.log_softmax(z, dim=1).clamp_min_(FLOOR)
    log_q = torch.log_softmax(u.to(z.dtype), dim=1).clamp_min_(FLOOR)
    p = log_p.exp()
    out.entropy.copy_(-(p * log_p).sum(1))
    if kind == "forward_kl":
        q = log_q.exp()
        out.divergence.copy_((q * (log_q - log_p)).sum(1))
        slope = p - q
    else:
        log_m, share = log_q, 1.0
        if kind == "jsd":
            log_m, share = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta)), 1 - beta
        gap = log_p - log_m
        from_student = (p * gap).sum(1)
        out.divergence.copy_(share * from_student)
        if kind == "jsd":
            out.divergence.add_((log_q.exp() * (log_q - log_m)).sum(1), alpha=beta)
        slope = p * (gap - from_student.unsqueeze(1)) * share
    if grad is not None:
        grad.copy_(slope * (weights.unsqueeze(1) * _slope(tanh, student_form)))


def row_divergence(
    student: Tensor,
    teacher: Tensor,
    student_form: LogitForm,
    teacher_form: LogitForm,
    kind: str,
    beta: float,
    weights: Tensor,
    out: DivergenceStats,
    dtype: torch.dtype | None,
) -> Tensor | None:
    """`row_divergence_reference`; the gradient in `dtype` (None: none) lies in the memory of the student's logits.

    Where `dtype` is narrower than the logits, each row of the result lies at the start of its logits' row.
    """
    grad = None
    if dtype is not None:
        grad = student if dtype == student.dtype else student.view(dtype)[:, : student.shape[1]]
    if backend(student.device, student.dtype, native=False) == "triton" and teacher.dtype != torch.float64:
        from fastalign_kernels.head import triton_divergence

        triton_divergence.row_divergence(student, teacher, student_form, teacher_form, kind, beta, weights, out, grad)
        return grad
    for block in _blocks(student):
        row_divergence_reference(
            student[block],
            teacher[block],
            slice_form(student_form, block),
            slice_form(teacher_form, block),
            kind,
            beta,
            weights[block],
            DivergenceStats(out.divergence[block], out.entropy[block]),
            None if grad is None else grad[block],
        )
    return grad


class _Student:
    """The student's side of a call: its head, room for statistics, and the sums of its gradients."""

    def __init__(
        self,
        operands: Operands,
        main_grad: Tensor | None,
        form: LogitForm,
        weights: Tensor | None,
        chunk: int,
        targets: Tensor | None = None,
    ):
        num_tokens, device = operands.hidden.shape[0], operands.hidden.device
        if targets is None:
            targets = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.operands = operands
        self.head = Head(operands, targets, form, chunk, plain=True)
        dtype = self.head.stats_dtype
        if weights is None:
            weights = torch.full((num_tokens,), 1 / max(1, num_tokens), dtype=dtype, device=device)
        self.weights = weights.detach().to(dtype)
        wanted = torch.is_grad_enabled() and any(operands.needs)
        self.sums = HeadGradients(self.head, operands.needs, main_grad) if wanted else None
        self.stats = DivergenceStats(*(torch.empty(num_tokens, dtype=dtype, device=device) for _ in range(2)))

    def scaled_weights(self, span: slice) -> tuple[Tensor, Tensor | None]:
        """The span's weights, and the scale taken out of them for fp16 gradients."""
        weights = self.weights[span]
        if self.sums is None or self.head.hidden.dtype != torch.float16:
            return weights, None
        scale = _power_of_two_above(Coefficients(logp=weights))
        return weights / scale, scale

    def part(self, span: slice) -> DivergenceStats:
        return DivergenceStats(self.stats.divergence[span], self.stats.entropy[span])

    def result(self) -> tuple[Tensor, DivergenceStats]:
        # a token of weight 0 does not count, whatever its divergence
        loss = torch.where(self.weights != 0, self.weights * self.stats.divergence, 0).sum()
        if self.sums is None:
            return loss, self.stats
        return _FromGradients.apply(loss, self.sums.finish(), *self.operands), self.stats


def _check(weights: Tensor | None, temperature: float | Tensor, num_tokens: int) -> None:
    if weights is not None and weights.shape != (num_tokens,):
        raise ValueError(f"weights {tuple(weights.shape)}: give ({num_tokens},), one per token")
    check_temperature(temperature, (num_tokens,))


def linear_divergence_reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
    teacher_form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
) -> Tensor:
    """The specification of `linear_divergence`: each token's divergence (N,), from all logits in plain torch."""
    student, teacher = (
        _form_logits(F.linear(hidden, weight, bias), replace(form, temperature=temperature))[0].log_softmax(-1)
        for hidden, weight, bias, form in (
            (student_hidden, student_weight, student_bias, student_form),
            (teacher_hidden, teacher_weight, teacher_bias, teacher_form),
        )
    )
    return support_divergence(student, teacher.detach().to(student.dtype), divergence, beta)


@as_one_op
def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    student_low_rank: tuple[Tensor, Tensor] | None = None,
    teacher_bias: Tensor | None = None,
    student_form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
    teacher_form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
    chunk: int | None = None,
) -> tuple[Tensor, DivergenceStats]:
    """Loss (0-dim fp32) sum_n weights_n * D_n of a student's distributions from a teacher's, and each D_n.

    student_hidden (N, D), student_weight (V, D), teacher_hidden (N, E), teacher_weight (V, E); weights (N,), default
    1 / N. `divergence`: forward_kl, reverse_kl or jsd, the latter with GKD's `beta` (`losses.divergence`).
    `temperature`, a number or (N,), divides both logits and stands in for that of the forms. Differentiable with
    respect to the student's hidden states, weight and bias; the gradients are made in the same pass: four products,
    two chunks of logits. Raises ValueError.
    """
    kind = resolved(divergence, beta)
    operands = operands_of(student_hidden, student_weight, student_bias, student_low_rank)
    with torch.no_grad():
        teacher_operands = operands_of(teacher_hidden, teacher_weight, teacher_bias, None)
    num_tokens, vocabulary = student_hidden.shape[0], operands.weight.shape[0]
    _check(weights, temperature, num_tokens)
    check_devices(student_hidden=student_hidden, teacher_hidden=teacher_hidden, weights=weights)
    if teacher_hidden.shape[0] != num_tokens:
        raise ValueError(f"teacher_hidden has {teacher_hidden.shape[0]} rows: give {num_tokens}, one per student's")
    if teacher_operands.weight.shape[0] != vocabulary:
        raise ValueError(
            f"teacher_weight has {teacher_operands.weight.shape[0]} rows, student_weight {vocabulary}: both need "
            "one tokenizer; where only padding differs, cut the longer weight (and bias) to the shorter"
        )
    student_form, teacher_form = (replace(form, temperature=temperature) for form in (student_form, teacher_form))
    if chunk is None:
        itemsize = max(student_hidden.element_size(), teacher_hidden.element_size())
        chunk = chunk_size(
            2 * vocabulary, itemsize if student_hidden.device.type == "cpu" else 4, student_hidden.device
        )
    main_grad = getattr(student_weight, "main_grad", None)
    student = _Student(operands, main_grad, student_form, weights, chunk)
    teacher = Head(teacher_operands, student.head.targets, teacher_form, chunk, plain=True)
    dtype = None if student.sums is None else student_hidden.dtype
    with torch.no_grad():
        for span in student.head.spans:
            by, scale = student.scaled_weights(span)
            forms = slice_form(student.head.form, span), slice_form(teacher.form, span)
            logits = student.head.logits(span), teacher.logits(span)
            grad = row_divergence(*logits, *forms, kind, beta, by, student.part(span), dtype)
            if student.sums is not None and grad is not None:
                student.sums.add(span, grad, scale)
    return student.result()


def _topk_gradient(
    m: Tensor, form: LogitForm, rows: RowStats, by_logp: Tensor, valid: Tensor, total: Tensor
) -> Tensor:
    """dL/dm (C, k) at the support, formed in fp32 so that a confident token's c - p is not lost to rounding."""
    z, tanh = _form_logits(m, form)
    p = (z - rows.lse.unsqueeze(1)).exp()
    grad = (by_logp - total.unsqueeze(1) * p) * _slope(tanh, form)
    return torch.where(valid, grad, grad[:, :1])  # what does not count points at the first entry, and repeats it


def linear_topk_divergence_reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_logp: Tensor,
    teacher_indices: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    add_tail: bool = True,
    temperature: float | Tensor = 1.0,
    student_bias: Tensor | None = None,
    student_form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
) -> Tensor:
    """The specification: (N,) divergences at the teacher's entries of the log-probabilities of all logits."""
    form = replace(student_form, temperature=temperature)
    log_p = _form_logits(F.linear(student_hidden, student_weight, student_bias), form)[0].log_softmax(-1)
    indices = teacher_indices.masked_fill(teacher_logp == -torch.inf, 0)
    return topk_divergence(log_p.gather(1, indices), teacher_logp, divergence, beta, add_tail=add_tail)


@as_one_op
def linear_topk_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_logp: Tensor,
    teacher_indices: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    add_tail: bool = True,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    student_low_rank: tuple[Tensor, Tensor] | None = None,
    student_form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
    chunk: int | None = None,
) -> tuple[Tensor, DivergenceStats]:
    """`linear_divergence` for a teacher known by its k most probable tokens: three products.

    teacher_logp (N, k) natural logs over the whole vocabulary at this temperature, teacher_indices (N, k) int64, no
    index twice in a row, the first always valid; entries of -inf do not count and may hold any index. `add_tail`: see
    `losses.divergence.topk_divergence`. Raises ValueError.
    """
    resolved(divergence, beta)
    operands = operands_of(student_hidden, student_weight, student_bias, student_low_rank)
    num_tokens = student_hidden.shape[0]
    _check(weights, temperature, num_tokens)
    if teacher_logp.dim() != 2 or teacher_logp.shape[0] != num_tokens or teacher_indices.shape != teacher_logp.shape:
        raise ValueError(
            f"teacher_logp {tuple(teacher_logp.shape)} and teacher_indices {tuple(teacher_indices.shape)}: "
            f"give both as ({num_tokens}, k)"
        )
    check_devices(student_hidden=student_hidden, teacher_logp=teacher_logp, teacher_indices=teacher_indices)
    chunk = chunk or chunk_size(student_weight.shape[0], 4, student_hidden.device)
    teacher_logp = teacher_logp.detach().to(stats_dtype_of(student_hidden.dtype))
    valid = teacher_logp > -torch.inf
    indices = torch.where(valid, teacher_indices, teacher_indices[:, :1])
    form = replace(student_form, temperature=temperature)
    # what the row kernels say of the first entry as target is overwritten with the support's
    student = _Student(
        operands, getattr(student_weight, "main_grad", None), form, weights, chunk, indices[:, 0].contiguous()
    )
    head, outputs = student.head, ("logp", "entropy")
    rows = head.empty_stats(outputs)
    for span in head.spans:
        by, scale = student.scaled_weights(span)
        with torch.no_grad():
            logits = head.logits(span)
            head.stats(logits, span, outputs, rows)
            part, span_form = rows.slice(span), slice_form(head.form, span)
            m = logits.gather(1, indices[span])
            logp = _form_logits(m, span_form)[0] - part.lse.unsqueeze(1)
        with torch.enable_grad():
            logp.requires_grad_(student.sums is not None)
            values = topk_divergence(logp, teacher_logp[span], divergence, beta, add_tail=add_tail)
        student.part(span).divergence.copy_(values.detach())
        if student.sums is None:
            continue
        (by_logp,) = torch.autograd.grad(values, logp, by)
        with torch.no_grad():
            total = by_logp.sum(1)
            exact = _topk_gradient(m, span_form, part, by_logp, valid[span], total)
            only_logp = RowStats(TokenStats(part.stats.logp), part.lse)
            grad = head.gradient(logits, span, only_logp, Coefficients(logp=total))
            assert isinstance(grad, Tensor)
            grad.scatter_(1, indices[span], exact.to(grad.dtype))
            student.sums.add(span, grad, scale)
    assert rows.stats.entropy is not None
    student.stats.entropy = rows.stats.entropy
    return student.result()
