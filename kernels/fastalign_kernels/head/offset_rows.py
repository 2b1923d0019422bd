"""The head in offset-exponential form: launches of its kernels, and the engine that `products.Head` hands its work to.

`offset_product.py` and `offset_gradient.py` have the maths and the kernels.
"""

# Launches of kernels are not Python to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastalign_kernels.head.rows import Coefficients, RowStats, slice_form
from fastalign_kernels.head.token_stats import LogitForm
from fastalign_kernels.launch import multiprocessors, on_its_card, table_architecture

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class ScoreConfig:
    """Tiles of the product and how it runs."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int = 1  # 2: the epilogue handles half of the tile at a time
    flatten: bool = True
    group: int = 8


# architecture -> configs for 16-bit operands: for logp (and lse) alone, and for every longer epilogue. All compile
# without spills for their architecture; 256 columns leave too few registers for a longer epilogue.
_AMPERE = ScoreConfig(128, 128, 32, 8, 4, flatten=False)
_NARROW = ScoreConfig(128, 128, 64, 8, 4)
SCORE_CONFIGS = {
    80: (_AMPERE, _AMPERE),
    90: (ScoreConfig(128, 256, 64, 8, 3), _NARROW),
    100: (ScoreConfig(128, 256, 64, 8, 3, split=4), _NARROW),
}
_FULL_PRECISION = ScoreConfig(64, 64, 32, 4, 3, flatten=False)  # fp32 has no tensor cores: "rows" is its form


def score_config(arch: int, dtype: torch.dtype, form: LogitForm, outputs: tuple[str, ...], bias: bool) -> ScoreConfig:
    """The tiles of the product on an architecture of the tile tables."""
    if dtype == torch.float32:
        return _FULL_PRECISION
    plain = not bias and form.softcap is None and not isinstance(form.temperature, Tensor) and form.temperature == 1.0
    return SCORE_CONFIGS[arch][0 if plain and set(outputs) <= {"logp", "lse"} else 1]


def _inverse(form: LogitForm, num_rows: int, device: torch.device) -> Tensor | None:
    """1 / temperature (C,) fp32, or None for 1."""
    if not isinstance(form.temperature, Tensor):
        if form.temperature == 1.0:
            return None
        return torch.full((num_rows,), 1.0 / form.temperature, dtype=torch.float32, device=device)
    return form.temperature.float().reciprocal().expand(num_rows).contiguous()


def _aligned(tensor: Tensor) -> bool:
    """Whether TMA takes the matrix: rows 16 bytes apart, from a base at 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


@on_its_card
def target_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: LogitForm) -> Tensor:
    """Logits of the targets, (C,) fp32 in units of log 2: hidden (C, D), weight (V, D), last dimension contiguous."""
    from fastalign_kernels.head.offset_product import target_logits_kernel

    (num_rows, size), block = hidden.shape, 256
    offsets = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    if num_rows:
        target_logits_kernel[(-(-num_rows // 8),)](
            hidden, weight, bias, _inverse(form, num_rows, hidden.device), targets, offsets,
            num_rows, size, hidden.stride(0), weight.stride(0),
            SCALE=float(form.scale), SOFTCAP=float(form.softcap or 0), BLOCK_ROWS=8, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return offsets


@on_its_card
def score_product(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, offsets: Tensor, form: LogitForm,
    outputs: tuple[str, ...], energies: Tensor | None = None, slope: bool = False, sums: bool = True,
    config: ScoreConfig | None = None, tma: bool | None = None,
) -> Tensor | None:  # fmt: skip
    """Writes E into `energies` (C, V), times the soft-cap's derivative if `slope`; returns partial sums (., tiles, C).

    hidden (C, D), weight (V, D) of one dtype and last dimension contiguous, offsets (C,) fp32 in units of log 2.
    `tma` and `config` default to what the card takes.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    from fastalign_kernels.head.offset_product import score_product_kernel

    (num_rows, size), vocabulary, arch = hidden.shape, weight.shape[0], table_architecture(hidden.device)
    matrices = [hidden, weight] + ([] if energies is None else [energies])
    if tma is None:
        tma = arch >= 90 and hidden.element_size() == 2 and all(map(_aligned, matrices))
    # loads through pointers need registers: Ampere's tiles, whatever the card
    config = config or score_config(arch if tma else 80, hidden.dtype, form, outputs, bias is not None)
    tiles_n = -(-vocabulary // config.block_n)
    wants = _wants(outputs)
    partials = None
    if sums:
        shape = (1 + sum(wants.values()), tiles_n, num_rows)
        partials = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    strides = (hidden.stride(0), weight.stride(0), 0 if energies is None else energies.stride(0))
    operands: list = [hidden, weight, energies]
    if tma:
        m, n, k = config.block_m, config.block_n, config.block_k
        operands = [
            None if matrix is None else TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
            for matrix, block in zip(operands, ([m, k], [n, k], [m, n // config.split]), strict=True)
        ]
    programs = min(multiprocessors(hidden.device), -(-num_rows // config.block_m) * tiles_n)
    score_product_kernel[(programs,)](
        operands[0], operands[1], bias, _inverse(form, num_rows, hidden.device), targets, offsets, operands[2],
        partials, num_rows, vocabulary, size, *strides,
        SCALE=float(form.scale), SOFTCAP=float(form.softcap or 0), SLOPE=slope and form.softcap is not None, SUMS=sums,
        **wants, TMA=tma, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLIT=config.split,
        GROUP=config.group, PROGRAMS=programs, FLATTEN=config.flatten, STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partials


def _wants(outputs: tuple[str, ...]) -> dict[str, int]:
    """Which sums the kernels make besides R."""
    return {
        "ENTROPY": int("entropy" in outputs),
        "TOP": int("top1" in outputs),
        "MEAN": int("mean_logp" in outputs or "mean_logit" in outputs),
        "SQUARES": int("log_sum_p2" in outputs),
    }


@on_its_card
def finish_rows(partials: Tensor, offsets: Tensor, vocabulary: int, outputs: tuple[str, ...], out: RowStats) -> Tensor:
    """Statistics of rows from their partial sums, written to `out`. Returns norms (C,): S, -1 in flagged rows."""
    from fastalign_kernels.head.offset_product import finish_rows_kernel

    _, tiles, num_rows = partials.shape
    norms = torch.empty(num_rows, dtype=torch.float32, device=partials.device)
    finish_rows_kernel[(-(-num_rows // 32),)](
        partials, offsets, norms, *_fields(out), num_rows, tiles, vocabulary,
        **_wants(outputs), BLOCK_ROWS=32, BLOCK_TILES=64, num_warps=4,
    )  # fmt: skip
    return norms


def _fields(out: RowStats) -> tuple[Tensor | None, ...]:
    """What the kernels write, in their order."""
    s = out.stats
    top1 = None if s.top1 is None else s.top1.view(torch.uint8)
    return s.logp, out.lse, s.entropy, top1, s.mean_logp, s.mean_logit, s.log_sum_p2


@on_its_card
def exact_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, offsets: Tensor, form: LogitForm,
    norms: Tensor, out: RowStats, energies: Tensor | None, slope: bool,
) -> None:  # fmt: skip
    """Makes the rows with a negative norm again, whatever their logits: statistics, E, norm."""
    from fastalign_kernels.head.offset_product import exact_rows_kernel

    (num_rows, size), vocabulary = hidden.shape, weight.shape[0]
    exact_rows_kernel[(num_rows,)](
        hidden, weight, bias, _inverse(form, num_rows, hidden.device), targets, offsets, energies, norms,
        *_fields(out), vocabulary, size, hidden.stride(0), weight.stride(0),
        0 if energies is None else energies.stride(0),
        SCALE=float(form.scale), SOFTCAP=float(form.softcap or 0), SLOPE=slope and form.softcap is not None,
        BLOCK=64, BLOCK_K=32, num_warps=4, maxnreg=80,  # left alone, Triton 3.6 spills to save registers
    )  # fmt: skip


@on_its_card
def offset_gradient(
    energies: Tensor, norms: Tensor, hidden: Tensor, targets: Tensor, form: LogitForm, rows: RowStats,
    coefficients: Coefficients, sloped: bool,
) -> Tensor | RowScaled:  # fmt: skip
    """dL/dm of a chunk from its E (C, V), in E's memory: as factors where only dL/dlogp is given, else elementwise.

    `sloped`: E has the soft-cap's derivative in it; then no coefficient but logp's may be given. fp16 hidden
    states, whose range is too small for E, have E in bf16 and take the second form: its result is fp16.
    """
    from fastalign_kernels.head.offset_gradient import elementwise_kernel, prepare_kernel

    num_rows, vocabulary = energies.shape
    inverse = _inverse(form, num_rows, hidden.device)
    constants = {"SCALE": float(form.scale), "SOFTCAP": float(form.softcap or 0)}
    coefficients = coefficients.map(lambda v: v.float().contiguous())
    if is_fast(coefficients, hidden.dtype) and (sloped or form.softcap is None):
        scaled = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        factors = torch.empty_like(norms)
        prepare_kernel[(num_rows,)](
            energies, hidden, scaled, factors, targets, rows.stats.logp, rows.lse, norms, coefficients.logp, inverse,
            hidden.shape[1], energies.stride(0), hidden.stride(0), scaled.stride(0), **constants, BLOCK=1024,
        )  # fmt: skip
        return RowScaled(energies, factors, scaled)
    out = energies.view(hidden.dtype)
    blocks = -(-vocabulary // 2048)
    elementwise_kernel[(num_rows * blocks,)](
        energies, out, targets, rows.stats.logp, rows.lse, norms, rows.stats.entropy, rows.stats.log_sum_p2, inverse,
        coefficients.logp, coefficients.entropy, coefficients.mean_logp, coefficients.mean_logit,
        coefficients.log_sum_p2, vocabulary, blocks, energies.stride(0), **constants, BLOCK=2048,
    )  # fmt: skip
    return out


def is_fast(coefficients: Coefficients, dtype: torch.dtype) -> bool:
    """Whether dL/dm is E with factors: only dL/dlogp is given, in a dtype with fp32's range."""
    others = coefficients.entropy, coefficients.mean_logp, coefficients.mean_logit, coefficients.log_sum_p2
    return coefficients.logp is not None and all(v is None for v in others) and dtype != torch.float16


@dataclass
class RowScaled:
    """A gradient dL/dm = factors * matrix (C, V) whose products take the factors, so that it is never formed."""

    matrix: Tensor  # (C, V)
    factors: Tensor  # (C,) fp32
    hidden: Tensor  # (C, D), factors * hidden: dW = matrix^T hidden

    def hidden_gradient(self, weight: Tensor) -> Tensor:
        """dL/dhidden (C, D), fp32 on a GPU, to be rounded once."""
        return _wide_mm(self.matrix, weight).mul_(self.factors.unsqueeze(1))

    def bias_gradient(self) -> Tensor:
        """dL/dbias (V,)."""
        return _wide_mm(self.matrix.t(), self.factors.to(self.matrix.dtype).unsqueeze(1)).squeeze(1)


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """The product of 16-bit matrices in fp32 where the GPU writes that."""
    wide = a.is_cuda and torch.version.hip is None and a.element_size() == 2
    return torch.mm(a, b, out_dtype=torch.float32) if wide else torch.mm(a, b).float()


@dataclass
class Kept:
    """A span of which `stats` has made E and its norms, if it ran."""

    energies: Tensor | None = None  # (C, V)
    norms: Tensor | None = None  # (C,) fp32, exp(lse - offset)
    sloped: bool = False  # E is stored with the soft-cap's derivative


class OffsetEngine:
    """`logits`, `stats` and `gradient` of `products.Head` in offset-exponential form, on its operands.

    Product, statistics and E come from one kernel, so `logits` does nothing: `stats` runs it, and `gradient` does
    where `stats` did not (`deferred`), with the rows' lse as offset: of its `rows` it then reads lse, entropy and
    log_sum_p2 alone. E lies in a buffer (`rows`, V) that the next span overwrites: bf16 for 16-bit hidden states.
    `keep=False`: no gradient follows, so there is no buffer.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: LogitForm,
        rows: int, keep: bool,
    ):  # fmt: skip
        self.hidden, self.weight = (m if m.stride(1) == 1 else m.contiguous() for m in (hidden, weight))
        self.bias = None if bias is None else bias.contiguous()
        self.targets, self.form = targets.contiguous(), form
        self._buffer = energy_buffer(rows, weight.shape[0], hidden) if keep else None

    def logits(self, span: slice) -> Kept:
        """What `stats` and `gradient` pass on about the span."""
        return Kept(None if self._buffer is None else self._buffer[: span.stop - span.start])

    def stats(self, kept: Kept, span: slice, outputs: tuple[str, ...], out: RowStats) -> None:
        """Statistics of the span, written to `out`, and E where there is a buffer."""
        if span.stop == span.start:
            return
        hidden, targets, form = self.hidden[span], self.targets[span], slice_form(self.form, span)
        kept.sloped = set(outputs) <= {"logp", "top1"} and hidden.dtype != torch.float16
        operands = hidden, self.weight, self.bias, targets
        offsets = target_logits(*operands, form)
        partials = score_product(*operands, offsets, form, outputs, kept.energies, kept.sloped)
        assert partials is not None
        kept.norms = finish_rows(partials, offsets, self.weight.shape[0], outputs, out)
        exact_rows(*operands, offsets, form, kept.norms, out, kept.energies, kept.sloped)

    def gradient(self, kept: Kept, span: slice, rows: RowStats, coefficients: Coefficients) -> Tensor | RowScaled:
        """dL/d(W h + bias) of the span; `rows` and `coefficients` are of the span."""
        hidden, targets, form = self.hidden[span], self.targets[span], slice_form(self.form, span)
        assert kept.energies is not None, "an engine made with keep=False has no gradients"
        if span.stop == span.start:
            return kept.energies.to(hidden.dtype)
        if kept.norms is None:
            kept.sloped = is_fast(coefficients, hidden.dtype)
            kept.norms = torch.ones_like(rows.lse)
            operands = hidden, self.weight, self.bias, targets
            logp = target_logits(*operands, form) / LOG2_E - rows.lse
            rows = RowStats(replace(rows.stats, logp=logp.clamp_max_(0)), rows.lse)
            score_product(*operands, rows.lse * LOG2_E, form, (), kept.energies, kept.sloped, sums=False)
        sloped = kept.sloped and form.softcap is not None
        return offset_gradient(kept.energies, kept.norms, hidden, targets, form, rows, coefficients, sloped)


def energy_buffer(num_rows: int, vocabulary: int, hidden: Tensor) -> Tensor:
    """Room for E (C, V) of hidden states, rows 64 bytes apart so that TMA and wide loads take them."""
    dtype = torch.float32 if hidden.dtype == torch.float32 else torch.bfloat16
    step = 64 // dtype.itemsize
    wide = -(-vocabulary // step) * step
    memory = torch.empty(num_rows, wide, dtype=dtype, device=hidden.device)
    memory[:, vocabulary:] = 0  # oneDNN multiplies what stands there with zeros, which would carry a NaN along
    return memory[:, :vocabulary]
