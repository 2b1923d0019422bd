"""The head in offset-exponential form against fp64: statistics, gradients of both paths, extreme logits, memory."""

import dataclasses
from unittest import mock

import pytest
import torch
from fastalign_kernels.head import deferred, form_table, fused, offset_rows, stats
from fastalign_kernels.head.offset_rows import OffsetEngine, RowScaled, ScoreConfig
from fastalign_kernels.head.rows import Coefficients, empty_stats
from fastalign_kernels.head.token_stats import LogitForm
from head_oracle import leaves, oracle_stats
from triton_checks import DEVICE, assert_guards, guarded, relative_error, triton_backend

ALL = ("logp", "entropy", "top1", "mean_logp", "mean_logit", "log_sum_p2")
GRADIENT_OF = OffsetEngine.gradient
SMOOTH = tuple(name for name in ALL if name != "top1")
# Relative error of gradients: fp32 that of exp2 and tanh; 16-bit E is rounded to 2^-9, and so are factors * hidden.
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 3e-3}


def problem(rows=37, vocabulary=300, size=72, dtype=torch.bfloat16, spread=1.0, bias=False):
    """hidden, weight, targets, bias with logits of standard deviation about `spread`; NaN around all."""
    hidden = guarded((torch.randn(rows, size) * spread).to(dtype).to(DEVICE), row_gap=8)
    weight = guarded((torch.randn(vocabulary, size) / size**0.5).to(dtype).to(DEVICE), row_gap=8)
    targets = torch.randint(vocabulary, (rows,)).to(DEVICE)
    return hidden, weight, targets, guarded(torch.randn(vocabulary).to(dtype).to(DEVICE)) if bias else None


def engine_of(hidden, weight, targets, bias, form, keep=True):
    return OffsetEngine(hidden, weight, bias, targets, form, hidden.shape[0], keep)


def found_stats(engine, outputs):
    rows = empty_stats(engine.hidden.shape[0], outputs, torch.float32, engine.hidden.device)
    span = slice(0, engine.hidden.shape[0])
    kept = engine.logits(span)
    engine.stats(kept, span, outputs, rows)
    return rows, kept, span


def matrix_gradients(grad, hidden, weight):
    """Gradients of hidden, weight, bias from what `gradient` returns, with exact products."""
    if isinstance(grad, RowScaled):
        dense = grad.matrix.double()
        return (
            (dense @ weight.double()) * grad.factors.double()[:, None],
            dense.t() @ grad.hidden.double(),
            dense.t() @ grad.factors.double(),
        )
    return grad.double() @ weight.double(), grad.double().t() @ hidden.double(), grad.double().sum(0)


def check(args, form, outputs, coefficients, again=False, tolerance=1.0):
    """Statistics of `outputs`, and gradients for random coefficients of `coefficients`, against fp64 autograd."""
    hidden, weight, targets, bias = args
    exact = leaves(hidden, weight, bias)
    expected = oracle_stats(exact[0], exact[1], targets, exact[2], **vars(form))
    with triton_backend():
        engine = engine_of(hidden, weight, targets, bias, form)
        rows, kept, span = found_stats(engine, outputs)
        for name in outputs:
            value, wanted = getattr(rows.stats, name), expected[name].detach()
            if name == "top1":
                assert torch.equal(value, wanted), name
            else:
                error = ((value.double() - wanted).abs() / (1 + wanted.abs() / 10)).max().item()
                assert error < 1e-5 * tolerance, (name, error)
            upstream = {name: torch.randn(len(targets)).to(DEVICE) for name in coefficients}
        if again:
            kept = engine.logits(span)
        grad = engine.gradient(kept, span, rows, Coefficients(**upstream))
    assert isinstance(grad, RowScaled) == (coefficients == ("logp",) and hidden.dtype != torch.float16)
    sum((expected[k] * v.double()).sum() for k, v in upstream.items()).backward()
    for found, leaf in zip(matrix_gradients(grad, hidden, weight), exact, strict=True):
        if leaf is not None:
            assert relative_error(found, leaf.grad) < GRADIENT[hidden.dtype] * tolerance
    assert_guards(hidden, 8)
    assert_guards(weight, 8)


FORMS = {
    "plain": LogitForm(),
    "scale": LogitForm(scale=0.7, temperature=1.3),
    "softcap": LogitForm(scale=1.5, softcap=4.0, temperature=0.8),
}


CASES = [
    ("plain", torch.bfloat16),
    ("plain", torch.float16),
    ("scale", torch.bfloat16),
    ("softcap", torch.float32),
    ("softcap", torch.bfloat16),
]


@pytest.mark.parametrize("form, dtype", CASES)
def test_statistics_and_gradients_from_logp_alone(form, dtype):
    check(problem(dtype=dtype, bias=form != "plain", spread=3.0), FORMS[form], ("logp", "top1"), ("logp",))


@pytest.mark.parametrize("form, dtype", CASES)
def test_all_statistics_and_their_gradients(form, dtype):
    check(problem(dtype=dtype, bias=form == "scale", spread=3.0), FORMS[form], ALL, SMOOTH)


@pytest.mark.parametrize("coefficients", [("logp",), SMOOTH])
def test_gradients_from_a_product_made_again(coefficients):
    check(problem(), FORMS["softcap"], ALL, coefficients, again=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temperature_of_each_token(dtype):
    args = problem(dtype=dtype)
    form = LogitForm(temperature=torch.rand(len(args[2])).to(DEVICE) + 0.5)
    check(args, form, ("logp", "entropy"), ("logp", "entropy"))


SMALL = ScoreConfig(32, 128, 32, 4, 2, flatten=False)


@pytest.mark.parametrize("tma, split", [(True, 1), (False, 1), (True, 2), (False, 4), (True, 4)])
def test_each_way_to_load_and_to_split_over_many_ragged_tiles(tma, split):
    hidden, weight, targets, _ = problem(rows=70, vocabulary=270, size=40)
    form, outputs = LogitForm(softcap=6.0), ALL
    z = 6 * torch.tanh(hidden.double() @ weight.double().t() / 6)
    with triton_backend():
        offsets = offset_rows.target_logits(hidden, weight, None, targets, form)
        energies = guarded(offset_rows.energy_buffer(70, 270, hidden), row_gap=2)
        operands = hidden, weight, None, targets, offsets, form, outputs
        partials = offset_rows.score_product(
            *operands, energies, config=dataclasses.replace(SMALL, split=split), tma=tma
        )
        rows = empty_stats(70, outputs, torch.float32, hidden.device)
        norms = offset_rows.finish_rows(partials, offsets, 270, outputs, rows)
    wanted = (z - z.gather(1, targets[:, None])).exp()
    assert relative_error(norms, wanted.sum(1)) < 1e-6
    assert relative_error(energies, wanted.scatter(1, targets[:, None], 0)) < 3e-3
    assert (rows.stats.logp + wanted.sum(1).log()).abs().max() < 1e-5
    assert torch.equal(rows.stats.top1, z.argmax(1) == targets)
    assert_guards(energies, 2)


@pytest.mark.parametrize("size, gap", [(64, 0), (37, 0), (40, 3)])
def test_shapes_and_strides_that_tma_does_not_take(size, gap):
    hidden, weight, targets, _ = problem(rows=5, vocabulary=131, size=size)
    hidden, weight = guarded(hidden, gap), guarded(weight, gap)
    exact = oracle_stats(hidden.double(), weight.double(), targets)["logp"]
    with triton_backend():
        rows, _, _ = found_stats(engine_of(hidden, weight, targets, None, LogitForm(), keep=False), ("logp",))
    assert (rows.stats.logp - exact).abs().max() < 1e-5
    assert_guards(hidden, gap)


@pytest.mark.parametrize("coefficients", [("logp",), SMOOTH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_two_hundred_with_forced_targets(dtype, coefficients):
    """Rows whose target has a probability down to e^-400 are made again; the others stay as they are."""
    hidden, weight, targets, bias = problem(rows=9, vocabulary=150, dtype=dtype, bias=True)
    bias[0], bias[1] = 200, -200
    targets[:4] = 1  # p = e^-400
    targets[4:6] = 0  # p = 1 - e^-190
    bias[2:4] = 190 if dtype == torch.float32 else 198
    check(
        (hidden, weight, targets, bias), LogitForm(), coefficients, coefficients, tolerance=4.0
    )  # the last bit of 200 log2(e) is 3e-5


def test_confident_tokens_keep_the_relative_precision_of_logp():
    hidden, weight, targets, bias = problem(rows=4, vocabulary=90, bias=True, dtype=torch.float32)
    targets[:], bias[5] = 5, 40.0
    exact = torch.log_softmax(hidden.double() @ weight.double().t() + bias.double(), 1)
    others = exact.masked_fill(torch.arange(90, device=DEVICE) == 5, -torch.inf).logsumexp(1).exp()
    with triton_backend():
        rows, _, _ = found_stats(engine_of(hidden, weight, targets, bias, LogitForm(), keep=False), ("logp",))
    assert (rows.stats.logp / -others - 1).abs().max() < 1e-4  # about -1e-15


def test_columns_of_minus_infinity_and_rows_of_nan():
    hidden, weight, targets, bias = problem(rows=6, vocabulary=90, bias=True)
    targets[:], bias[40:60] = 3, -torch.inf
    targets[4] = 45
    exact = torch.log_softmax(hidden.double() @ weight.double().t() + bias.double(), 1)
    hidden[5] = torch.nan
    with triton_backend():
        engine = engine_of(hidden, weight, targets, bias, LogitForm())
        rows, kept, span = found_stats(engine, ("logp", "entropy"))
        grad = engine.gradient(kept, span, rows, Coefficients(logp=torch.ones(6, device=DEVICE)))
    assert (rows.stats.logp[:4] - exact[:4, 3]).abs().max() < 1e-5
    assert (rows.stats.entropy[:4] + exact[:4].exp().mul(exact[:4].clamp_min(-1e9)).sum(1)).abs().max() < 1e-5
    assert rows.stats.logp[4] == -torch.inf and rows.stats.logp[5].isnan()
    assert torch.isfinite(grad.matrix[:5]).all() and torch.isfinite(grad.factors[:5]).all()


@pytest.mark.parametrize("outputs", [("logp",), ("logp", "entropy", "lse")])
@pytest.mark.parametrize("call", ["fused", "deferred"])
def test_public_functions_in_this_form(monkeypatch, call, outputs):
    monkeypatch.setenv("FASTALIGN_HEAD", "offset")
    hidden, weight, targets, _ = problem(rows=50)
    exact, found = leaves(hidden, weight), leaves(hidden, weight, dtype=torch.bfloat16)

    def loss(stats, span=slice(None)):
        return sum((getattr(stats, name) * slope[span]).sum() for name in outputs)

    slope = torch.randn(50).to(DEVICE)
    z = exact[0] @ exact[1].t()
    expected = oracle_stats(*exact, targets) | {"lse": z.logsumexp(1)}
    sum((expected[name] * slope.double()).sum() for name in outputs).backward()
    with triton_backend(), mock.patch.object(OffsetEngine, "gradient", autospec=True, side_effect=GRADIENT_OF) as used:
        if call == "fused":
            value, _ = fused(*found, targets, loss, outputs=outputs, chunk=32)
        else:
            value = loss(deferred(*found, targets, outputs=outputs, chunk=32))
        value.backward()
        assert used.call_count == 2
        scored = stats(hidden, weight, targets, outputs=outputs)
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a.grad, b.grad) < 6e-3
    for name in outputs:
        assert (getattr(scored, name) - expected[name]).abs().max() < 1e-5


@pytest.mark.parametrize("outputs", [("logp",), ALL])
def test_no_tokens(monkeypatch, outputs):
    monkeypatch.setenv("FASTALIGN_HEAD", "offset")
    hidden, weight = torch.randn(0, 16, device=DEVICE), torch.randn(20, 16, device=DEVICE, requires_grad=True)
    with triton_backend():
        found = deferred(hidden, weight, torch.zeros(0, dtype=torch.int64, device=DEVICE), outputs=outputs)
        found.logp.sum().backward()
    assert found.logp.shape == (0,) and (weight.grad == 0).all()


def test_the_form_is_forced_or_follows_the_table(monkeypatch):
    args = torch.device("cpu"), torch.bfloat16, 1000, 32000, 4096
    assert form_table.head_form(*args) == "rows"
    monkeypatch.setenv("FASTALIGN_HEAD", "offset")
    assert form_table.head_form(*args) == "rows"  # no Triton for CPU tensors
    with triton_backend():
        assert form_table.head_form(*args) == "offset"
        assert form_table.head_form(args[0], torch.float64, *args[2:]) == "rows"
        monkeypatch.setenv("FASTALIGN_HEAD", "auto")
        monkeypatch.setitem(form_table.OFFSET_FROM, (90, torch.bfloat16), [(2048, 32000, 512)])
        assert form_table.head_form(*args) == "offset"
        assert form_table.head_form(*args[:3], 31999, 4096) == "rows"
    monkeypatch.setenv("FASTALIGN_HEAD", "colums")
    with pytest.raises(ValueError, match="FASTALIGN_HEAD='colums'"):
        form_table.head_form(*args)
