"""Offset-exponential form of the head: one product that writes exp(logit - target's logit) and sums of each row.

For row i with logits z (`rows.py` has their form), target y and offset o, d_v = z_v - o and E_v = exp(d_v). The offset
is c = z_y, made first by a small kernel, so that a single pass over tiles of the product suffices. Over v != y,

    R = sum E_v    T = sum E_v d_v    Q = sum E_v^2    M = sum d_v    top = max d_v

are summed in fp32 per tile of columns and added up by `finish_rows` (no atomics: the same bits every time). The
target's own terms are exact, 1, 0, 1, 0, so with S = 1 + R

    logp = -log1p(R)    lse = c + log S    entropy = log S - T / S    log_sum_p2 = log1p(Q) - 2 log S
    mean_logit = c + M / V                 top1 = (top <= 0)

logp keeps its relative precision for confident tokens. E in bf16 or fp32 is as precise for any offset. exp2's argument
is clamped at 100; rows where R passes 69 nats (38 with log_sum_p2, whose squares overflow first) are flagged, and
`exact_rows` makes them again with the offset lse, one program a row; without flags it only looks. `top1` of a target
that ties with another token is true.
"""

# Kernels are not Python to a type checker.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fastalign_kernels.numerics import LN_2, LOG2_E, product, rounded, tanh, wide

CLAMP = tl.constexpr(100.0)  # of exp2's argument: 2^100 times any vocabulary is finite in fp32
ABSENT = tl.constexpr(-200.0)  # exp2 of it is 0, and 0 * it is 0
FLAG = tl.constexpr(2.0**99.5)  # R from which a row is made again: e^69
FLAG_SQUARES = tl.constexpr(2.0**55.0)  # the same where squares are summed: e^38


@triton.jit
def log1p(x):
    """log(1 + x) of fp32 x >= 0, relative error about 2e-7."""
    small = tl.minimum(x, 0.03)
    series = small * (1 - small * (0.5 - small * (0.33333334 - small * (0.25 - small * 0.2))))
    return tl.where(x < 0.03, series, tl.log(1 + x))


@triton.jit
def _logits2(m, inverse, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits in units of log 2 of a product, and the derivative of the soft-cap; `inverse`: 1 / temperature."""
    if SOFTCAP > 0:
        t = tanh(m * (SCALE / SOFTCAP))
        return t * (SOFTCAP * LOG2_E) * inverse, 1 - t * t
    return m * (SCALE * LOG2_E) * inverse, tl.full(m.shape, 1.0, tl.float32)


@triton.jit
def target_logits_kernel(
    hidden, weight, bias, inverse, targets, offsets, num_rows, size, stride_h, stride_w,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """offsets (N,) fp32 = the target's logit in units of log 2."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = rows < num_rows
    target = tl.load(targets + rows, mask=live, other=0)
    sums = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = live[:, None] & (k < size)[None, :]
        h = tl.load(hidden + rows[:, None] * stride_h + k[None, :], mask=inside, other=0.0)
        w = tl.load(weight + target[:, None] * stride_w + k[None, :], mask=inside, other=0.0)
        sums += wide(h) * wide(w)
    m = tl.sum(sums, axis=1)
    if bias is not None:
        m += wide(tl.load(bias + target, mask=live, other=0.0))
    by = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if inverse is not None:
        by = tl.load(inverse + rows, mask=live, other=1.0)
    z, _ = _logits2(m, by, SCALE, SOFTCAP)
    tl.store(offsets + rows, z, mask=live)


@triton.jit
def _halves(x):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _tile_sums(
    m, bias, by, offset, target, columns, vocabulary,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SLOPE: tl.constexpr,
    ENTROPY: tl.constexpr, TOP: tl.constexpr, MEAN: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Of a tile of products: what is stored, and R, T, top, M, Q of its rows (in units of log 2)."""
    if bias is not None:
        m += wide(tl.load(bias + columns, mask=columns < vocabulary, other=0.0))[None, :]
    z, slope = _logits2(m, by[:, None], SCALE, SOFTCAP)
    other = (columns < vocabulary)[None, :] & (columns[None, :] != target[:, None])
    d = z - offset[:, None]
    mean = by
    if MEAN:
        mean = tl.sum(tl.where(other, d, 0.0), axis=1)
    d = tl.where(other, tl.minimum(d, CLAMP), ABSENT)
    e = tl.exp2(d)
    rest = tl.sum(e, axis=1)
    expected, top, squares = by, by, by
    if ENTROPY:
        expected = tl.sum(e * tl.maximum(d, ABSENT), axis=1)
    if TOP:
        top = tl.max(d, axis=1)
    if SQUARES:
        squares = tl.sum(e * e, axis=1)
    if SLOPE:
        e *= slope
    return e, rest, expected, top, mean, squares


@triton.jit
def score_product_kernel(
    hidden, weight, bias, inverse, targets, offsets, energies, partials,
    num_rows, vocabulary, size, stride_h, stride_w, stride_e,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SLOPE: tl.constexpr,
    SUMS: tl.constexpr, ENTROPY: tl.constexpr, TOP: tl.constexpr, MEAN: tl.constexpr, SQUARES: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """hidden (N, D) weight (V, D)^T, tile by tile in a persistent loop; writes E (N, V) and partials (., tiles, N).

    hidden, weight and energies are host descriptors where TMA, else pointers; energies None: sums only. SLOPE: what is
    stored is E times the soft-cap's derivative. Partials: R, then those of T, top, M, Q that are asked for.
    """
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(vocabulary, BLOCK_N)
    WIDTH: tl.constexpr = BLOCK_N // SPLIT
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        # bands of GROUP tiles of rows sweep the vocabulary, so that tiles of the weight are met again in L2
        first = tile // (GROUP * tiles_n) * GROUP
        height = tl.minimum(tiles_m - first, GROUP)
        within = tile % (GROUP * tiles_n)
        row_start = (first + within % height) * BLOCK_M
        tile_n = within // height
        column_start = tile_n * BLOCK_N
        rows = row_start + tl.arange(0, BLOCK_M)
        live = rows < num_rows
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA:
            for k in tl.range(0, size, BLOCK_K, num_stages=STAGES):
                acc = product(hidden.load([row_start, k]), weight.load([column_start, k]).T, acc)
        else:
            ks = tl.arange(0, BLOCK_K)
            # rows outside read the last row: a clamped address needs no mask, and what they give is not used
            near = tl.minimum(rows, num_rows - 1).to(tl.int64)
            far = tl.minimum(column_start + tl.arange(0, BLOCK_N), vocabulary - 1).to(tl.int64)
            a_at = hidden + near[:, None] * stride_h + ks[None, :]
            b_at = weight + far[None, :] * stride_w + ks[:, None]
            for k in tl.range(0, size, BLOCK_K, num_stages=STAGES):
                inside = ks < size - k
                a = tl.load(a_at + k, mask=inside[None, :], other=0.0)
                b = tl.load(b_at + k, mask=inside[:, None], other=0.0)
                acc = product(a, b, acc)
        offset = tl.load(offsets + rows, mask=live, other=0.0)
        target = tl.load(targets + rows, mask=live, other=-1).to(tl.int32)
        by = tl.full((BLOCK_M,), 1.0, tl.float32)
        if inverse is not None:
            by = tl.load(inverse + rows, mask=live, other=1.0)
        rest = tl.zeros((BLOCK_M,), tl.float32)
        expected = tl.zeros((BLOCK_M,), tl.float32)
        mean = tl.zeros((BLOCK_M,), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        top = tl.full((BLOCK_M,), ABSENT, tl.float32)
        if SPLIT == 1:
            parts = (acc,)
        else:  # a part of the tile at a time needs fewer registers
            parts = _halves(acc)
            if SPLIT == 4:
                parts = _halves(parts[0]) + _halves(parts[1])
        for part in tl.static_range(SPLIT):
            begin = column_start + part * WIDTH
            columns = begin + tl.arange(0, WIDTH)
            e, rest_, expected_, top_, mean_, squares_ = _tile_sums(
                parts[part], bias, by, offset, target, columns, vocabulary,
                SCALE, SOFTCAP, SLOPE, ENTROPY, TOP, MEAN, SQUARES,
            )  # fmt: skip
            rest += rest_
            if ENTROPY:
                expected += expected_
            if TOP:
                top = tl.maximum(top, top_)
            if MEAN:
                mean += mean_
            if SQUARES:
                squares += squares_
            if energies is not None:
                if TMA:
                    energies.store([row_start, begin], rounded(e, energies.dtype))
                else:
                    to = energies + rows.to(tl.int64)[:, None] * stride_e + columns[None, :]
                    inside = live[:, None] & (columns < vocabulary)[None, :]
                    tl.store(to, rounded(e, energies.dtype.element_ty), mask=inside)
        if SUMS:
            step = tiles_n.to(tl.int64) * num_rows
            to = partials + tile_n.to(tl.int64) * num_rows + rows
            tl.store(to, rest, mask=live)
            if ENTROPY:
                tl.store(to + step, expected, mask=live)
            if TOP:
                tl.store(to + ENTROPY * step + step, top, mask=live)
            if MEAN:
                tl.store(to + (ENTROPY + TOP) * step + step, mean, mask=live)
            if SQUARES:
                tl.store(to + (ENTROPY + TOP + MEAN) * step + step, squares, mask=live)


@triton.jit
def _write_statistics(
    rows, live, c, o, rest, expected, top, mean, squares, vocabulary,
    logp_, lse_, entropy_, top1_, mean_logp_, mean_logit_, log_sum_p2_,
):  # fmt: skip
    """All statistics from sums over the other columns with offset o; c, o, expected, top, mean in units of log 2."""
    at_c = o == c
    d = tl.where(at_c, 0.0, tl.maximum(c - o, ABSENT))  # the target's own terms
    y = tl.exp2(d)
    total = y + rest
    log_total = tl.where(at_c, log1p(rest), tl.log(total))
    logp = tl.where(at_c, 0.0, (c - o) * LN_2) - log_total
    tl.store(logp_ + rows, logp, mask=live)
    tl.store(lse_ + rows, o * LN_2 + log_total, mask=live)
    if entropy_ is not None:
        tl.store(entropy_ + rows, log_total - (expected + y * d) * LN_2 / total, mask=live)
    if top1_ is not None:
        tl.store(top1_ + rows, (top <= c - o).to(tl.uint8), mask=live)
    if log_sum_p2_ is not None:
        log_squares = tl.where(at_c, log1p(squares), tl.log(squares + y * y))
        tl.store(log_sum_p2_ + rows, log_squares - 2 * log_total, mask=live)
    # the mean of all d: relative to the offset, where it is small
    mean_d = (mean + tl.where(at_c, 0.0, c - o)) * LN_2 / vocabulary
    if mean_logp_ is not None:
        tl.store(mean_logp_ + rows, mean_d - log_total, mask=live)
    if mean_logit_ is not None:
        tl.store(mean_logit_ + rows, o * LN_2 + mean_d, mask=live)


@triton.jit
def finish_rows_kernel(
    partials, offsets, norms, logp_, lse_, entropy_, top1_, mean_logp_, mean_logit_, log_sum_p2_,
    num_rows, tiles, vocabulary,
    ENTROPY: tl.constexpr, TOP: tl.constexpr, MEAN: tl.constexpr, SQUARES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Statistics of rows from their partials. norms (N,): S, or -1 in rows that are to be made again."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = rows < num_rows
    rest = tl.zeros((BLOCK_ROWS,), tl.float32)
    expected = tl.zeros((BLOCK_ROWS,), tl.float32)
    mean = tl.zeros((BLOCK_ROWS,), tl.float32)
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    top = tl.full((BLOCK_ROWS,), ABSENT, tl.float32)
    step = tl.cast(tiles, tl.int64) * num_rows
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES).to(tl.int64)
        at = partials + tile[:, None] * num_rows + rows[None, :]
        inside = (tile < tiles)[:, None] & live[None, :]
        rest += tl.sum(tl.load(at, mask=inside, other=0.0), axis=0)
        if ENTROPY:
            expected += tl.sum(tl.load(at + step, mask=inside, other=0.0), axis=0)
        if TOP:
            tops = tl.load(at + ENTROPY * step + step, mask=inside, other=ABSENT)
            top = tl.maximum(top, tl.max(tops, axis=0))
        if MEAN:
            mean += tl.sum(tl.load(at + (ENTROPY + TOP) * step + step, mask=inside, other=0.0), axis=0)
        if SQUARES:
            squares += tl.sum(tl.load(at + (ENTROPY + TOP + MEAN) * step + step, mask=inside, other=0.0), axis=0)
    c = tl.load(offsets + rows, mask=live, other=0.0)
    _write_statistics(
        rows, live, c, c, rest, expected, top, mean, squares, vocabulary,
        logp_, lse_, entropy_, top1_, mean_logp_, mean_logit_, log_sum_p2_,
    )  # fmt: skip
    LIMIT: tl.constexpr = FLAG_SQUARES if SQUARES else FLAG
    fine = (rest < LIMIT) & (tl.abs(c) < float("inf"))  # false also for NaN
    tl.store(norms + rows, tl.where(fine, 1 + rest, -1.0), mask=live)


@triton.jit
def _row_products(
    hidden, weight, bias, by, row, start, vocabulary, size, stride_h, stride_w,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits (BLOCK,) in units of log 2 of one row, and the derivative of the soft-cap."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    sums = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for k in range(0, size, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        h = wide(tl.load(hidden + row * stride_h + ks, mask=ks < size, other=0.0))
        at = columns.to(tl.int64)[:, None] * stride_w + ks[None, :]
        sums += wide(tl.load(weight + at, mask=inside[:, None] & (ks < size)[None, :], other=0.0)) * h[None, :]
    m = tl.sum(sums, axis=1)
    if bias is not None:
        m += wide(tl.load(bias + columns, mask=inside, other=0.0))
    return _logits2(m, by, SCALE, SOFTCAP)


@triton.jit
def exact_rows_kernel(
    hidden, weight, bias, inverse, targets, offsets, energies, norms,
    logp_, lse_, entropy_, top1_, mean_logp_, mean_logit_, log_sum_p2_,
    vocabulary, size, stride_h, stride_w, stride_e,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Makes a flagged row again, with the largest logit as offset for its sums and lse for its E: norm 1."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(norms + row) >= 0:
        return
    by = 1.0
    if inverse is not None:
        by = tl.load(inverse + row)
    target = tl.load(targets + row).to(tl.int32)
    c = tl.load(offsets + row)
    o = tl.maximum(c, -1e30)
    rest, expected, total, squares, top = 0.0, 0.0, 0.0, 0.0, -float("inf")
    for start in range(0, vocabulary, BLOCK):
        z, _ = _row_products(
            hidden, weight, bias, by, row, start, vocabulary, size, stride_h, stride_w, SCALE, SOFTCAP, BLOCK, BLOCK_K
        )
        columns = start + tl.arange(0, BLOCK)
        other = (columns < vocabulary) & (columns != target)
        z = tl.where(other, z, -float("inf"))
        highest = tl.max(z, axis=0)
        raised = tl.maximum(highest, o)
        down = o - raised
        factor = tl.exp2(down)
        d = z - raised
        e = tl.exp2(d)
        expected = factor * (expected + down * rest) + tl.sum(e * tl.maximum(d, ABSENT), axis=0)
        rest = factor * rest + tl.sum(e, axis=0)
        squares = factor * factor * squares + tl.sum(e * e, axis=0)
        total += tl.sum(tl.where(other, z, 0.0), axis=0)
        top = tl.maximum(top, highest)
        o = raised
    one = row + tl.arange(0, 1)
    live = one >= 0
    mean = total - (vocabulary - 1) * o
    _write_statistics(
        one, live, c + tl.zeros((1,), tl.float32), o + tl.zeros((1,), tl.float32), rest, expected, top - o, mean,
        squares, vocabulary, logp_, lse_, entropy_, top1_, mean_logp_, mean_logit_, log_sum_p2_,
    )  # fmt: skip
    tl.store(norms + row, 1.0)
    if energies is not None:
        lse = o + tl.log2(rest + tl.exp2(c - o))
        for start in range(0, vocabulary, BLOCK):
            z, slope = _row_products(
                hidden, weight, bias, by, row, start, vocabulary, size, stride_h, stride_w,
                SCALE, SOFTCAP, BLOCK, BLOCK_K,
            )  # fmt: skip
            columns = start + tl.arange(0, BLOCK)
            p = tl.exp2(z - lse)
            if SLOPE:
                p *= slope
            at = energies + row * stride_e + columns
            tl.store(at, rounded(p, energies.dtype.element_ty), mask=columns < vocabulary)
