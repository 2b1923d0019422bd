"""Calls of library code whose kernels are compiled ahead of time: every kernel, with every configuration of a table.

Shapes are those of real models in the dimensions that kernels are specialised on, and few in the others: operands
live on the CPU, and nothing is computed with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from fastalign_kernels.head import offset_rows, rows
from fastalign_kernels.head.divergence import linear_divergence
from fastalign_kernels.head.token_stats import OUTPUTS, LogitForm
from fastalign_kernels.layers import add_rms_norm, embedding, glu, glu_packed, rms_norm, rope

CASES: dict[str, Callable[[], None]] = {}
BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
ALL = tuple(name for name in OUTPUTS if name != "lse")
ROWS = 4


def case(name: str):
    """Registers a call under a name; the part before the first space is the op."""

    def register(fn: Callable[[], None]) -> Callable[[], None]:
        assert name not in CASES
        CASES[name] = fn
        return fn

    return register


def _matrix(n: int, d: int, dtype: torch.dtype = BF16, gradient: bool = False) -> torch.Tensor:
    return torch.zeros(n, d, dtype=dtype, requires_grad=gradient)


def _row_kernels(vocabulary: int, dtype: torch.dtype, outputs: tuple[str, ...], form: LogitForm) -> None:
    logits, targets = _matrix(ROWS, vocabulary, dtype), torch.zeros(ROWS, dtype=torch.int64)
    out = rows.empty_stats(ROWS, outputs, FP32, logits.device)
    rows.row_stats(logits, targets, form, outputs, out)
    given = {name: torch.ones(ROWS) for name in outputs if name != "top1"}
    rows.row_gradient(logits, targets, form, out, rows.Coefficients(**given), BF16)


for _vocabulary, _dtype, _outputs in (  # each size of a block, whole and partial blocks, rows without alignment
    *((32000, dtype, outputs) for dtype in (FP32, BF16) for outputs in (("logp",), ALL)),
    *((300, BF16, ALL), (1000, FP32, ALL), (1000, BF16, ("logp",))),
    *((151643, FP32, ("logp",)), (151643, FP32, ALL), (151643, BF16, ("logp",))),
):
    case(f"rows V={_vocabulary} {_dtype} {'all' if _outputs == ALL else 'logp'}")(
        lambda v=_vocabulary, d=_dtype, o=_outputs: _row_kernels(v, d, o, LogitForm())
    )
case("rows soft-cap, temperatures")(
    lambda: _row_kernels(32000, FP32, ("logp", "entropy"), LogitForm(1.0, 30.0, torch.ones(ROWS)))
)


def _offset(size: int, vocabulary: int, dtype: torch.dtype, outputs: tuple[str, ...], form: LogitForm, store: bool):
    hidden, weight = _matrix(ROWS, size, dtype), _matrix(vocabulary, size, dtype)
    targets = torch.zeros(ROWS, dtype=torch.int64)
    offsets = offset_rows.target_logits(hidden, weight, None, targets, form)
    energies = offset_rows.energy_buffer(ROWS, vocabulary, hidden) if store else None
    out = rows.empty_stats(ROWS, outputs, FP32, hidden.device)
    slope = store and set(outputs) <= {"logp", "top1"}  # elsewhere the elementwise pass has the soft-cap's derivative
    partials = offset_rows.score_product(hidden, weight, None, targets, offsets, form, outputs, energies, slope)
    assert partials is not None
    offset_rows.finish_rows(partials, offsets, vocabulary, outputs, out)


_FORMS = {"": LogitForm(), " soft-cap": LogitForm(softcap=30.0)}
_OUTPUTS = {"logp": ("logp",), "entropy": ("logp", "entropy", "top1"), "all": ALL}
for _name, _form_name, _store in (
    *(("logp", "", True), ("entropy", "", True), ("all", "", True), ("logp", "", False), ("all", "", False)),
    *(("logp", " soft-cap", True), ("all", " soft-cap", True), ("entropy", " soft-cap", False)),
):
    case(f"offset {_name}{_form_name}{'' if _store else ' forward only'}")(
        lambda o=_OUTPUTS[_name], f=_FORMS[_form_name], s=_store: _offset(256, 2048, BF16, o, f, s)
    )
case("offset-pointers rows without alignment")(lambda: _offset(251, 2047, BF16, ("logp",), LogitForm(), True))
case("offset-pointers fp32")(lambda: _offset(256, 2048, FP32, ("logp",), LogitForm(), True))


def _offset_head(outputs: tuple[str, ...], form: LogitForm, bias: bool, call: str = "fused") -> None:
    """The head in offset-exponential form: the rows that are made again and the gradients are kernels of their own.

    Sizes are those of `_offset`, so that products that are alike are compiled once.
    """
    from fastalign_kernels import deferred, fused, stats

    gradient = call != "stats"

    os.environ["FASTALIGN_HEAD"] = "offset"
    hidden, weight = _matrix(ROWS, 256, BF16, gradient), _matrix(2048, 256, BF16, gradient)
    targets, options = torch.zeros(ROWS, dtype=torch.int64), {"form": form, "outputs": outputs}
    options["bias"] = torch.zeros(2048, dtype=BF16, requires_grad=gradient) if bias else None
    names = [name for name in outputs if name != "top1"]
    if call == "deferred":  # the product is made again, without sums
        found = deferred(hidden, weight, targets, **options)
        sum(getattr(found, name).sum() for name in names).backward()
    elif gradient:
        total = lambda found, span: sum(getattr(found, name).sum() for name in names)  # noqa: E731
        fused(hidden, weight, targets, total, **options)[0].backward()
    else:
        stats(hidden, weight, targets, **options)
    del os.environ["FASTALIGN_HEAD"]


_OPTIONS = {
    "": (LogitForm(), False),
    " soft-cap": (_FORMS[" soft-cap"], False),
    " scale, soft-cap, temperatures, bias": (LogitForm(0.5, 30.0, torch.ones(ROWS)), True),
}
for _option, (_form, _bias) in _OPTIONS.items():
    for _name, _outputs in {"logp": ("logp",), "all": ALL}.items():
        case(f"offset-gradient {_name}{_option}")(lambda o=_outputs, f=_form, b=_bias: _offset_head(o, f, b))
case("offset-gradient logp deferred")(lambda: _offset_head(("logp",), LogitForm(), False, "deferred"))
case("offset-gradient all deferred")(lambda: _offset_head(ALL, *_OPTIONS[" soft-cap"], "deferred"))
case("offset-gradient all temperatures")(lambda: _offset_head(ALL, LogitForm(temperature=torch.ones(ROWS)), False))
case("offset-gradient forward only")(lambda: _offset_head(ALL, *_OPTIONS[_option], "stats"))


def _divergence(kind: str, dtype: torch.dtype, vocabulary: int) -> None:
    student, teacher = (_matrix(ROWS, 16, dtype, gradient) for gradient in (True, False))
    heads = [_matrix(vocabulary, 16, dtype, gradient) for gradient in (True, False)]
    linear_divergence(student, heads[0], teacher, heads[1], divergence=kind)[0].backward()


for _kind in ("forward_kl", "reverse_kl", "jsd"):
    for _dtype in (FP32, BF16):
        case(f"divergence {_kind} {_dtype}")(lambda k=_kind, d=_dtype: _divergence(k, d, 32000))
case("divergence V=300")(lambda: _divergence("jsd", BF16, 300))


def _norms(size: int, dtype: torch.dtype, offset: float) -> None:
    x, weight = _matrix(ROWS, size, dtype, True), torch.ones(size, dtype=dtype, requires_grad=True)
    rms_norm(x, weight, offset=offset, round_first=not offset).sum().backward()
    normed, carried = add_rms_norm(x, _matrix(ROWS, size, dtype), weight, offset=offset, round_first=not offset)
    (normed.sum() + carried.sum()).backward()


for _size in (128, 896, 4096, 8192, 16384, 4095):
    case(f"rms_norm D={_size}")(lambda d=_size: _norms(d, BF16, 0.0))
case("rms_norm Gemma fp32")(lambda: _norms(2304, FP32, 1.0))
for _size in (2048, 8192):
    case(f"rms_norm D={_size} fp32")(lambda d=_size: _norms(d, FP32, 0.0))


def _gated(size: int, activation: str, dtype: torch.dtype) -> None:
    gate, up = (_matrix(ROWS, size, dtype, True) for _ in range(2))
    glu(gate, up, activation).sum().backward()
    glu_packed(_matrix(ROWS, 2 * size, dtype, True), activation).sum().backward()


for _activation in ("silu", "gelu_tanh", "gelu"):
    case(f"glu {_activation}")(lambda a=_activation: _gated(14336, a, BF16))
case("glu odd fp32")(lambda: _gated(1001, "silu", FP32))


def _rotations(head_size: int, rotated: int, dtype: torch.dtype) -> None:
    q = torch.zeros(1, 8, ROWS, head_size, dtype=dtype, requires_grad=True)
    k = torch.zeros(1, 2, ROWS, head_size, dtype=dtype, requires_grad=True)
    angles = torch.zeros(1, ROWS, rotated, dtype=dtype)
    q_out, k_out = rope(q, k, angles, angles)
    (q_out.sum() + k_out.sum()).backward()


for _head_size, _rotated in ((64, 64), (128, 128), (96, 96), (256, 256), (128, 64)):
    case(f"rope K={_head_size} rotated={_rotated}")(lambda k=_head_size, r=_rotated: _rotations(k, r, BF16))


def _embedding(size: int, dtype: torch.dtype) -> None:
    weight = _matrix(1000, size, dtype, True)
    embedding(torch.zeros(ROWS, dtype=torch.int64), weight).sum().backward()


for _size in (64, 896, 4096):
    case(f"embedding D={_size}")(lambda d=_size: _embedding(d, BF16))


@case("fp8 K=4096")
def _fp8() -> None:
    from fastalign_kernels.layers.fp8 import quantise_columns, quantise_rows

    if os.environ["FASTALIGN_ARCH"] != "80":  # e4m3 came after Ampere
        quantise_rows(_matrix(ROWS, 4096))
        quantise_columns(_matrix(ROWS, 4096))


@case("launches of a cross-entropy with masked targets")
def _masked() -> None:
    from fastalign_kernels import linear_cross_entropy

    hidden, weight = _matrix(64, 16, BF16, True), _matrix(512, 16, BF16, True)
    targets = torch.arange(64)
    targets[::2] = -100
    linear_cross_entropy(hidden, weight, targets).backward()
