"""The row kernels in Triton: the equations of head/rows.py on one row per program, fp32 inside, one pass over the row.

Statistics are online: a thread keeps, for each 16 bytes that it reads at a time (a lane), the largest logit m so far
and sums relative to it, s = sum e^(z-m), t = sum e^(z-m) (z-m), q = sum e^(2(z-m)). A larger maximum m' rescales them
by f = e^(m-m'): s' = s f, t' = f (t + (m-m') s), q' = q f^2. Lanes meet once, after the loop, by the same rule.

Gradient, with what is constant in a row in k0 = a + b H + c + 2 e, k1 = b, k2 = 2 e / S2, k3 = (c + d) / V:

    dL/dz_v = p_v (k2 p_v - k1 log p_v - k0) + k3 + a 1[v=y]

It overwrites the logits. Where it is narrower than they are (bf16 in fp32 memory), block i of BLOCK elements is stored
over the logits from (i / 2) BLOCK to ((i + 1) / 2) BLOCK of its own row. Blocks go upward, with a barrier between the
load and the store of each: when any thread stores block i, all threads have read the blocks 0 to i, all logits below
(i + 1) BLOCK, so a store never meets a logit that is still to be read. Rows do not overlap and have one program each.
"""

# Kernels are Python for Triton's compiler: a type checker takes tensors for constants, and launches for plain calls.
# pyright: reportAssignmentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels.launch import on_its_card
from fastalign_kernels.numerics import LOG2_E, rounded, tanh, wide

if TYPE_CHECKING:
    from fastalign_kernels.head.rows import Coefficients, RowStats
    from fastalign_kernels.head.token_stats import LogitForm

STATISTICS = ("logp", "entropy", "top1", "mean_logp", "mean_logit", "log_sum_p2")
VECTOR = 16  # bytes of the widest load of a thread
LOWEST = tl.constexpr(-3.4028234663852886e38)
NO_WEIGHT = tl.constexpr(-1e4)  # e^x is 0 in fp32 from far above; finite, so that 0 times it is 0


@triton.jit
def _row_start(pointer, row, stride, ALIGNED: tl.constexpr):
    """Address of a row; ALIGNED: rows are a multiple of 16 bytes apart."""
    offset = row.to(tl.int64) * stride
    if ALIGNED:
        offset = tl.multiple_of(offset, 128 // pointer.dtype.element_ty.primitive_bitwidth)
    return pointer + offset


@triton.jit
def _factors(row, temperatures, temperature_stride, scale, softcap, temperature, CAPPED: tl.constexpr):
    """inner, outer and slope of z = outer tanh(inner m), or z = inner m; dz/dm = slope (1 - tanh^2)."""
    if temperatures is None:
        divisor = tl.cast(temperature, tl.float32)
    else:
        divisor = wide(tl.load(temperatures + row * temperature_stride))
    slope = tl.cast(scale, tl.float32) / divisor
    if CAPPED:
        cap = tl.cast(softcap, tl.float32)
        return tl.cast(scale, tl.float32) / cap, cap / divisor, slope
    return slope, slope, slope


@triton.jit
def _formed(m, inner, outer, CAPPED: tl.constexpr):
    """z of the products m."""
    if CAPPED:
        return tanh(m * inner) * outer
    return m * inner


@triton.jit
def _merged(top, s, t, q, new_top):
    """Sums relative to `top`, relative to the larger `new_top`."""
    delta = tl.maximum(top - new_top, NO_WEIGHT)
    f = tl.exp2(delta * LOG2_E)
    return s * f, (t + delta * s) * f, q * f * f


@triton.jit
def _folded(
    z, logit, before, z_target, top, s, t, q, total, beaten,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    """The lanes' state after a block z (lanes, K); `logit`: 0 where there is none; `before`: the target's lane."""
    best = tl.max(z, axis=1)
    new_top = tl.maximum(top, best)
    s, t, q = _merged(top, s, t, q, new_top)
    d = z - new_top[:, None]
    e = tl.exp2(d * LOG2_E)
    s += tl.sum(e, axis=1)
    if ENTROPY:
        t += tl.sum(e * tl.maximum(d, NO_WEIGHT), axis=1)
    if SQUARES:
        q += tl.sum(e * e, axis=1)
    if MEAN:
        total += tl.sum(logit, axis=1)
    if TOP1:
        beaten = beaten | (best > z_target) | (before & (best == z_target))
    return new_top, s, t, q, total, beaten


@triton.jit
def _row_stats_fwd_kernel(
    logits, stride, vocabulary, targets, temperatures, temperature_stride, scale, softcap, temperature,
    lse_out, logp_out, entropy_out, top1_out, mean_logp_out, mean_logit_out, log_sum_p2_out,
    CAPPED: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Statistics of row `program_id(0)` in blocks of LANES * K logits."""
    BLOCK: tl.constexpr = LANES * K
    ENTROPY: tl.constexpr = entropy_out is not None
    SQUARES: tl.constexpr = log_sum_p2_out is not None
    MEAN: tl.constexpr = (mean_logp_out is not None) or (mean_logit_out is not None)
    TOP1: tl.constexpr = top1_out is not None
    row = tl.program_id(0)
    inner, outer, _ = _factors(row, temperatures, temperature_stride, scale, softcap, temperature, CAPPED)
    start = _row_start(logits, row, stride, ALIGNED)
    target = tl.load(targets + row)
    is_here = (target >= 0) & (target < vocabulary)
    z_target = _formed(wide(tl.load(start + target, mask=is_here, other=0.0)), inner, outer, CAPPED)
    z_target = tl.where(is_here, z_target, float("-inf"))
    position = tl.where(is_here, target, 0)
    first = position // K * K  # of the target's lane

    lane = tl.arange(0, LANES) * K
    inside = lane[:, None] + tl.arange(0, K)[None, :]
    top = tl.full((LANES,), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    t, q, total, beaten = s, s, s, lane < 0
    whole = vocabulary // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        z = _formed(wide(tl.load(start + begin + inside)), inner, outer, CAPPED)
        top, s, t, q, total, beaten = _folded(
            z, z, begin + lane < first, z_target, top, s, t, q, total, beaten, ENTROPY, SQUARES, MEAN, TOP1
        )
    if whole < vocabulary:
        exists = whole + inside < vocabulary
        z = _formed(wide(tl.load(start + whole + inside, mask=exists, other=0.0)), inner, outer, CAPPED)
        padded = tl.where(exists, z, float("-inf"))
        logit = tl.where(exists, z, 0.0)
        top, s, t, q, total, beaten = _folded(
            padded, logit, whole + lane < first, z_target, top, s, t, q, total, beaten, ENTROPY, SQUARES, MEAN, TOP1
        )

    row_top = tl.max(top, axis=0)
    s, t, q = _merged(top, s, t, q, row_top)
    row_s = tl.sum(s, axis=0)
    log_s = tl.log(row_s)
    lse = row_top + log_s
    tl.store(lse_out + row, lse)
    tl.store(logp_out + row, z_target - row_top - log_s)
    if ENTROPY:
        tl.store(entropy_out + row, log_s - tl.sum(t, axis=0) / row_s)
    if SQUARES:
        tl.store(log_sum_p2_out + row, tl.log(tl.sum(q, axis=0)) - 2 * log_s)
    if MEAN:
        mean = tl.sum(total, axis=0) / vocabulary
        if mean_logit_out is not None:
            tl.store(mean_logit_out + row, mean)
        if mean_logp_out is not None:
            tl.store(mean_logp_out + row, mean - lse)
    if TOP1:  # a logit equal to the target's in its own lane beats it if it stands before it
        near = first + tl.arange(0, K)
        z = _formed(wide(tl.load(start + near, mask=near < position, other=0.0)), inner, outer, CAPPED)
        is_earlier = (near < position) & (z == z_target)
        times_beaten = tl.sum(beaten.to(tl.int32), axis=0) + tl.sum(is_earlier.to(tl.int32), axis=0)
        tl.store(top1_out + row, is_here & (times_beaten == 0))


@triton.jit
def _of_row(pointer, row):
    """A coefficient of the row; None is zero."""
    if pointer is None:
        return tl.cast(0.0, tl.float32)
    else:
        return wide(tl.load(pointer + row))


@triton.jit
def _gradient(
    m, a, k0, k1, k2, k3, lse, inner, outer, slope,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """dL/dm of products m; `a` is dL/dlogp at the target and 0 elsewhere."""
    z = m * inner
    if CAPPED:
        t = tanh(z)
        z = t * outer
    log_p = z - lse
    p = tl.exp2(log_p * LOG2_E)
    by_p = -k0
    if ENTROPY:
        by_p -= k1 * tl.where(log_p < NO_WEIGHT, NO_WEIGHT, log_p)  # keeps -inf out of 0 * log p, and NaN in
    if SQUARES:
        by_p += k2 * p
    g = (p * by_p + k3 + a) * slope
    if CAPPED:
        g *= 1 - t * t
    return g


@triton.jit
def _row_gradient_bwd_kernel(
    logits, stride, out, out_stride, vocabulary,
    targets, temperatures, temperature_stride, scale, softcap, temperature,
    lse_in, entropy_in, log_sum_p2_in, on_logp, on_entropy, on_mean_logp, on_mean_logit, on_log_sum_p2,
    CAPPED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dL/dm of row `program_id(0)`, over its logits."""
    ENTROPY: tl.constexpr = (on_entropy is not None) and (entropy_in is not None)
    SQUARES: tl.constexpr = (on_log_sum_p2 is not None) and (log_sum_p2_in is not None)
    NARROWER: tl.constexpr = out.dtype.element_ty != logits.dtype.element_ty
    row = tl.program_id(0)
    inner, outer, slope = _factors(row, temperatures, temperature_stride, scale, softcap, temperature, CAPPED)
    source = _row_start(logits, row, stride, ALIGNED)
    sink = _row_start(out, row, out_stride, ALIGNED)
    target = tl.load(targets + row)
    lse = tl.load(lse_in + row)
    a, c, e = _of_row(on_logp, row), _of_row(on_mean_logp, row), _of_row(on_log_sum_p2, row)
    k0 = a + c + 2 * e
    k1 = _of_row(on_entropy, row)
    k2 = 2 * e
    k3 = (c + _of_row(on_mean_logit, row)) / vocabulary
    if ENTROPY:
        k0 += k1 * tl.load(entropy_in + row)
    if SQUARES:
        k2 *= tl.exp2(-tl.load(log_sum_p2_in + row) * LOG2_E)

    inside = tl.arange(0, BLOCK)
    whole = vocabulary // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        m = wide(tl.load(source + begin + inside))
        at = tl.where(begin + inside == target, a, 0.0)
        g = _gradient(m, at, k0, k1, k2, k3, lse, inner, outer, slope, CAPPED, ENTROPY, SQUARES)
        if NARROWER:
            tl.debug_barrier()
        tl.store(sink + begin + inside, rounded(g, out.dtype.element_ty))
    if whole < vocabulary:
        exists = whole + inside < vocabulary
        m = wide(tl.load(source + whole + inside, mask=exists, other=float("-inf")))
        at = tl.where(whole + inside == target, a, 0.0)
        g = _gradient(m, at, k0, k1, k2, k3, lse, inner, outer, slope, CAPPED, ENTROPY, SQUARES)
        if NARROWER:
            tl.debug_barrier()
        tl.store(sink + whole + inside, rounded(g, out.dtype.element_ty), mask=exists)


def _tile(vocabulary: int) -> tuple[int, int]:
    """(logits per block, warps) for any dtype and card: 16 logits per thread, so that 64 KiB and more of each
    multiprocessor's loads are under way at once without a spill; fewer warps for rows that are shorter than a block.
    """
    block = min(max(triton.next_power_of_2(vocabulary), 512), 2048)
    return block, block // 512


def _common(logits: Tensor, targets: Tensor, form: LogitForm) -> dict:
    """Arguments of both kernels."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1
    temperature, temperatures = form.temperature, None
    if isinstance(temperature, Tensor):
        temperature, temperatures = 1.0, temperature
    return {
        "logits": logits,
        "stride": logits.stride(0),
        "vocabulary": logits.shape[1],
        "targets": targets.contiguous(),
        "temperatures": temperatures,
        "temperature_stride": temperatures.stride(0) if temperatures is not None and temperatures.dim() else 0,
        "scale": float(form.scale),
        "softcap": float(form.softcap or 0.0),
        "temperature": float(temperature),
        "CAPPED": form.softcap is not None,
        "ALIGNED": logits.stride(0) * logits.itemsize % VECTOR == 0,
    }


@on_its_card
def row_stats(logits: Tensor, targets: Tensor, form: LogitForm, out: RowStats) -> None:
    """`head.rows.row_stats` in Triton: the fields of `out` that are not None."""
    num_rows, vocabulary = logits.shape
    if num_rows == 0:
        return
    block, warps = _tile(vocabulary)
    common = _common(logits, targets, form)
    k = VECTOR // logits.itemsize
    if not common["ALIGNED"]:  # loads are of one logit: as many lanes, each with fewer logits in a block
        block, k = max(block // 2, 512), 1
    stats = {f"{name}_out": getattr(out.stats, name) for name in STATISTICS}
    assert all(v is None or v.is_contiguous() for v in stats.values()) and out.lse.is_contiguous()
    _row_stats_fwd_kernel[(num_rows,)](**common, lse_out=out.lse, **stats, LANES=block // k, K=k, num_warps=warps)


@on_its_card
def row_gradient(
    logits: Tensor, targets: Tensor, form: LogitForm, rows: RowStats, coefficients: Coefficients, out: Tensor
) -> None:
    """`head.rows.row_gradient` in Triton; `out` is the logits or their memory in a narrower dtype."""
    num_rows, vocabulary = logits.shape
    if num_rows == 0:
        return
    assert out.data_ptr() == logits.data_ptr() and out.itemsize <= logits.itemsize
    block, warps = _tile(vocabulary)
    on = {f"on_{name}": None if v is None else v.contiguous() for name, v in vars(coefficients).items()}
    _row_gradient_bwd_kernel[(num_rows,)](
        **_common(logits, targets, form),
        out=out,
        out_stride=out.stride(0),
        lse_in=rows.lse.contiguous(),
        entropy_in=rows.stats.entropy,
        log_sum_p2_in=rows.stats.log_sum_p2,
        **on,
        BLOCK=block,
        num_warps=warps,
    )
