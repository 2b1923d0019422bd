"""Gradients of the head from E = exp(z - o), the offset-exponential form (`offset_product.py`), in fp32 arithmetic.

With norm = exp(lse - o), p_v = E_v / norm, and the target's element, which the product left out, is

    (p_y - 1) norm = norm expm1(logp)          (-R where the offset is the target's logit)

Where only a = dL/dlogp is given, dL/dm = u G, u_i = -a_i scale / (temperature_i norm_i) and G is E (times the
soft-cap's derivative, if any) with that one element a row in its place. So dX = u (G W), dW = G^T (u X) and
dbias = G^T u: no pass over (N, V) besides the product's own write; `prepare_kernel` writes the element, u and u X.

Else one pass in place turns E into dL/dm (`elementwise_kernel`; equations in `rows.py`), with log p_v = log E_v -
log norm and the soft-cap's derivative from log E_v too: E is stored without it.
"""

# Kernels are not Python to a type checker.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fastalign_kernels.numerics import LN_2, rounded, wide

EMPTY = tl.constexpr(-130.0)  # log2 of an E that underflowed
LEAST = tl.constexpr(2.0**-126)  # a constant below it would make what it meets fp64


@triton.jit
def expm1(x):
    """exp(x) - 1 of fp32 x <= 0, relative error about 1e-6."""
    series = x * (1 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * 0.008333334))))
    return tl.where(x > -0.1, series, tl.exp(x) - 1)


@triton.jit
def prepare_kernel(
    energies, hidden, scaled, factors, targets, logp_, lse_, norms, coefficients, inverse,
    size, stride_e, stride_h, stride_s,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The target's element of a row of G, u (factors), and scaled (N, D) = u hidden where given."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logp = tl.load(logp_ + row)
    norm = tl.load(norms + row)
    by = SCALE
    if inverse is not None:
        by *= tl.load(inverse + row)
    element = norm * expm1(logp)
    if SOFTCAP > 0:
        t = (logp + tl.load(lse_ + row)) * (SCALE / SOFTCAP) / by
        element *= 1 - t * t
    tl.store(energies + row * stride_e + target, rounded(element, energies.dtype.element_ty))
    factor = -tl.load(coefficients + row) * by / norm
    tl.store(factors + row, factor)
    if scaled is not None:
        for start in range(0, size, BLOCK):
            k = start + tl.arange(0, BLOCK)
            h = wide(tl.load(hidden + row * stride_h + k, mask=k < size, other=0.0))
            tl.store(scaled + row * stride_s + k, rounded(h * factor, scaled.dtype.element_ty), mask=k < size)


@triton.jit
def elementwise_kernel(
    energies, out, targets, logp_, lse_, norms, entropy_, log_sum_p2_, inverse,
    by_logp, by_entropy, by_mean_logp, by_mean_logit, by_log_sum_p2,
    vocabulary, blocks, stride,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/dm of a block of columns of a row, from E; `out` may be the memory of E (elements of one size)."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    columns = (program % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    e = wide(tl.load(energies + row * stride + columns, mask=inside, other=0.0))
    hit = columns == tl.load(targets + row).to(tl.int32)
    logp = tl.load(logp_ + row)
    norm = tl.load(norms + row)
    lse = tl.load(lse_ + row)
    log_e = tl.where(e > 0, tl.log2(tl.maximum(e, LEAST)), EMPTY) * LN_2
    log_p = tl.where(hit, logp, log_e - tl.log(norm))
    p = tl.where(hit, tl.exp(logp), e / norm)
    grad = tl.zeros((BLOCK,), tl.float32)
    spread = 0.0  # what every column gets
    if by_logp is not None:
        grad -= tl.load(by_logp + row) * tl.where(hit, expm1(logp), p)
    if by_entropy is not None:
        grad -= tl.load(by_entropy + row) * p * (log_p + tl.load(entropy_ + row))
    if by_mean_logp is not None:
        c = tl.load(by_mean_logp + row)
        grad -= c * p
        spread += c
    if by_mean_logit is not None:
        spread += tl.load(by_mean_logit + row)
    if by_log_sum_p2 is not None:
        f = 2 * tl.load(by_log_sum_p2 + row)
        grad += f * p * (p * tl.exp(-tl.load(log_sum_p2_ + row)) - 1)
    grad += spread / vocabulary
    by = SCALE
    if inverse is not None:
        by *= tl.load(inverse + row)
    if SOFTCAP > 0:
        t = tl.maximum((log_p + lse) * (SCALE / SOFTCAP) / by, -1.0)
        grad *= 1 - t * t
    tl.store(out + row * stride + columns, rounded(grad * by, out.dtype.element_ty), mask=inside)
