"""The divergence of two rows of logits and its gradient in Triton: the equations of head/divergence.py.

One program per row, fp32 inside. The first pass over both rows finds, per lane (16 bytes that a thread reads at a
time) and then for the row, maxima M and sums S relative to them; for the two Kullback-Leibler divergences also
c = sum_v e^(u_v - M_u) (u_v - M_u - z_v + M_z) (reverse: the roles exchanged), since KL(q, p) = c / S_u - log S_u
+ log S_z. Log-probabilities are z - M - log S, never z - lse: between confident rows p - q is small. The
Jensen-Shannon divergence needs both normalisers first: a second pass. The last pass writes the gradient over the
student's logits; head/triton_rows.py says why that is safe where the gradient is narrower than they are.
"""

# Kernels are Python for Triton's compiler: a type checker takes tensors for tuples, and launches for plain calls.
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels.head.triton_rows import LOWEST, NO_WEIGHT, VECTOR, _factors, _formed, _row_start
from fastalign_kernels.launch import on_its_card
from fastalign_kernels.numerics import LN_2, LOG2_E, rounded, tanh, wide

if TYPE_CHECKING:
    from fastalign_kernels.head.divergence import DivergenceStats
    from fastalign_kernels.head.token_stats import LogitForm

KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
FLOOR = tl.constexpr(-1e30)  # stands for the log of 0: finite, so that 0 times it is 0


@triton.jit
def _loaded(start, at, exists, inner, outer, CAPPED: tl.constexpr):
    """z of the logits at `at`; FLOOR for those that are less or do not exist; NaN stays."""
    z = _formed(wide(tl.load(start + at, mask=exists, other=float("-inf"))), inner, outer, CAPPED)
    return tl.where(exists, tl.where(z < FLOOR, FLOOR, z), FLOOR)


@triton.jit
def _shift(top, new_top):
    """Difference of the maxima and the factor by which sums change."""
    delta = tl.maximum(top - new_top, NO_WEIGHT)
    return delta, tl.exp2(delta * LOG2_E)


@triton.jit
def _log_sum(x, y):
    """log(e^x + e^y)."""
    return tl.maximum(x, y) + LN_2 * tl.log2(1 + tl.exp2(-tl.abs(x - y) * LOG2_E))


@triton.jit
def _normalisers(
    student, teacher, vocabulary, inner_s, outer_s, inner_t, outer_t,
    KIND: tl.constexpr, CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Largest logit and log of the sum relative to it, of student and teacher; entropy; divergence of KIND 0 and 1."""
    inside = (tl.arange(0, LANES) * K)[:, None] + tl.arange(0, K)[None, :]
    top_s = tl.full((LANES,), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    top_t, t, spread, c = top_s, s, s, s
    for begin in range(0, vocabulary, LANES * K):
        at = begin + inside
        exists = at < vocabulary
        z = _loaded(student, at, exists, inner_s, outer_s, CAPPED_S)
        u = _loaded(teacher, at, exists, inner_t, outer_t, CAPPED_T)
        new_s, new_t = tl.maximum(top_s, tl.max(z, axis=1)), tl.maximum(top_t, tl.max(u, axis=1))
        delta, f = _shift(top_s, new_s)
        _, g = _shift(top_t, new_t)
        apart = (top_t - new_t) - (top_s - new_s)
        d = z - new_s[:, None]
        k = u - new_t[:, None]
        e, h = tl.exp2(d * LOG2_E), tl.exp2(k * LOG2_E)
        if KIND == 0:
            c = (c + apart * t) * g + tl.sum(h * (k - d), axis=1)
        elif KIND == 1:
            c = (c - apart * s) * f + tl.sum(e * (d - k), axis=1)
        spread = (spread + delta * s) * f + tl.sum(e * d, axis=1)
        s = s * f + tl.sum(e, axis=1)
        t = t * g + tl.sum(h, axis=1)
        top_s, top_t = new_s, new_t
    row_s, row_t = tl.max(top_s, axis=0), tl.max(top_t, axis=0)
    delta, f = _shift(top_s, row_s)
    _, g = _shift(top_t, row_t)
    apart = (top_t - row_t) - (top_s - row_s)
    spread = tl.sum((spread + delta * s) * f, axis=0)
    c = tl.sum((c + apart * t) * g, axis=0) if KIND == 0 else tl.sum((c - apart * s) * f, axis=0)
    s, t = tl.sum(s * f, axis=0), tl.sum(t * g, axis=0)
    log_s, log_t = tl.log2(s) * LN_2, tl.log2(t) * LN_2
    value = c / t - log_t + log_s if KIND == 0 else c / s - log_s + log_t
    return row_s, log_s, row_t, log_t, log_s - spread / s, value


@triton.jit
def _mixture_sums(
    student, teacher, vocabulary, inner_s, outer_s, inner_t, outer_t, row_s, log_s, row_t, log_t, log_beta, log_rest,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """KL(p, m) and KL(q, m) of the mixture m."""
    inside = (tl.arange(0, LANES) * K)[:, None] + tl.arange(0, K)[None, :]
    from_student = tl.zeros((LANES,), tl.float32)
    from_teacher = from_student
    for begin in range(0, vocabulary, LANES * K):
        at = begin + inside
        exists = at < vocabulary
        log_p = _loaded(student, at, exists, inner_s, outer_s, CAPPED_S) - row_s - log_s
        log_q = _loaded(teacher, at, exists, inner_t, outer_t, CAPPED_T) - row_t - log_t
        log_m = _log_sum(log_p + log_rest, log_q + log_beta)
        from_student += tl.sum(tl.exp2(log_p * LOG2_E) * (log_p - log_m), axis=1)
        from_teacher += tl.sum(tl.exp2(log_q * LOG2_E) * (log_q - log_m), axis=1)
    return tl.sum(from_student, axis=0), tl.sum(from_teacher, axis=0)


@triton.jit
def _row_divergence_kernel(
    logits, stride, teacher_logits, teacher_stride, out, out_stride, vocabulary,
    temperatures, temperature_stride, temperature, scale, softcap, teacher_scale, teacher_softcap,
    weights, beta, divergence_out, entropy_out,
    KIND: tl.constexpr, CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Row `program_id(0)`: its divergence, the student's entropy and, where `out` is given, weight * gradient."""
    row = tl.program_id(0)
    inner_s, outer_s, slope = _factors(row, temperatures, temperature_stride, scale, softcap, temperature, CAPPED_S)
    inner_t, outer_t, _ = _factors(
        row, temperatures, temperature_stride, teacher_scale, teacher_softcap, temperature, CAPPED_T
    )
    student = _row_start(logits, row, stride, ALIGNED)
    teacher = _row_start(teacher_logits, row, teacher_stride, ALIGNED)
    row_s, log_s, row_t, log_t, entropy, value = _normalisers(
        student, teacher, vocabulary, inner_s, outer_s, inner_t, outer_t, KIND, CAPPED_S, CAPPED_T, LANES, K
    )
    log_beta = tl.log2(tl.cast(beta, tl.float32)) * LN_2
    log_rest = tl.log2(1 - tl.cast(beta, tl.float32)) * LN_2
    centre, share = value, tl.cast(1.0, tl.float32)
    if KIND == 2:
        share = 1 - tl.cast(beta, tl.float32)
        centre, from_teacher = _mixture_sums(
            student, teacher, vocabulary, inner_s, outer_s, inner_t, outer_t, row_s, log_s, row_t, log_t,
            log_beta, log_rest, CAPPED_S, CAPPED_T, LANES, K,
        )  # fmt: skip
        value = (1 - share) * from_teacher + share * centre
    tl.store(divergence_out + row, value)
    tl.store(entropy_out + row, entropy)
    if out is not None:
        NARROWER: tl.constexpr = out.dtype.element_ty != logits.dtype.element_ty
        sink = _row_start(out, row, out_stride, ALIGNED)
        by = wide(tl.load(weights + row)) * share
        inside = tl.arange(0, LANES * K)
        for begin in range(0, vocabulary, LANES * K):
            at = begin + inside
            exists = at < vocabulary
            log_p = _loaded(student, at, exists, inner_s, outer_s, CAPPED_S)
            factor = slope
            if CAPPED_S:
                capped = tanh(wide(tl.load(student + at, mask=exists, other=0.0)) * inner_s)
                factor = slope * (1 - capped * capped)
            log_p = log_p - row_s - log_s
            log_q = _loaded(teacher, at, exists, inner_t, outer_t, CAPPED_T) - row_t - log_t
            p = tl.exp2(log_p * LOG2_E)
            if KIND == 0:
                grad = p - tl.exp2(log_q * LOG2_E)
            elif KIND == 1:
                grad = p * (log_p - log_q - centre)
            else:
                grad = p * (log_p - _log_sum(log_p + log_rest, log_q + log_beta) - centre)
            if NARROWER:
                tl.debug_barrier()
            tl.store(sink + at, rounded(grad * by * factor, out.dtype.element_ty), mask=exists)


def _tile(vocabulary: int) -> tuple[int, int]:
    """(logits per block, warps): 8 of each row per thread."""
    block = min(max(triton.next_power_of_2(vocabulary), 512), 2048)
    return block, block // 256


@on_its_card
def row_divergence(
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
    """`head.divergence.row_divergence` in Triton; `grad`: memory of the student's logits, or None."""
    num_rows, vocabulary = student.shape
    if num_rows == 0:
        return
    assert all(v.stride(1) == 1 or vocabulary == 1 for v in (student, teacher))
    assert out.divergence.is_contiguous() and out.entropy.is_contiguous()
    block, warps = _tile(vocabulary)
    k = VECTOR // max(student.itemsize, teacher.itemsize)
    temperature, temperatures = student_form.temperature, None
    if isinstance(temperature, Tensor):
        temperature, temperatures = 1.0, temperature
    _row_divergence_kernel[(num_rows,)](
        logits=student,
        stride=student.stride(0),
        teacher_logits=teacher,
        teacher_stride=teacher.stride(0),
        out=grad,
        out_stride=0 if grad is None else grad.stride(0),
        vocabulary=vocabulary,
        temperatures=temperatures,
        temperature_stride=temperatures.stride(0) if temperatures is not None and temperatures.dim() else 0,
        temperature=float(temperature),
        scale=float(student_form.scale),
        softcap=float(student_form.softcap or 0.0),
        teacher_scale=float(teacher_form.scale),
        teacher_softcap=float(teacher_form.softcap or 0.0),
        weights=weights.contiguous(),
        beta=beta,
        divergence_out=out.divergence,
        entropy_out=out.entropy,
        KIND=KINDS[kind],
        CAPPED_S=student_form.softcap is not None,
        CAPPED_T=teacher_form.softcap is not None,
        ALIGNED=all(v.stride(0) * v.itemsize % VECTOR == 0 for v in (student, teacher)),
        LANES=block // k,
        K=k,
        num_warps=warps,
    )
