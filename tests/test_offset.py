"""The head in offset-exponential form against fp64: statistics, gradients of both paths, extreme logits, odd memory."""

import dataclasses

import pytest
import torch
from head_oracle import leaves, oracle_stats
from triton_checks import DEVICE, assert_guards, guarded, relative_error, triton_backend

from fastalign_kernels.head import form_table, offset_rows
from fastalign_kernels.head.offset_rows import OffsetEngine, RowScaled, ScoreConfig
from fastalign_kernels.head.rows import Coefficients, empty_stats
from fastalign_kernels.head.token_stats import LogitForm

ALL = ("logp", "entropy", "top1", "mean_logp", "mean_logit", "log_sum_p2")
SMOOTH = tuple(name for name in ALL if name != "top1")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
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


def check(args, form, outputs, coefficients=None, again=False, tolerance=1.0):
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
        if coefficients is None:
            return
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_statistics_and_gradients_from_logp_alone(form, dtype):
    check(problem(dtype=dtype, bias=form != "plain", spread=3.0), FORMS[form], ("logp", "top1"), ("logp",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_all_statistics_and_their_gradients(form, dtype):
    check(problem(dtype=dtype, bias=form == "scale", spread=3.0), FORMS[form], ALL, SMOOTH)


@pytest.mark.parametrize("coefficients", [("logp",), SMOOTH])
@pytest.mark.parametrize("form", ["plain", "softcap"])
def test_gradients_from_a_product_made_again(form, coefficients):
    check(problem(), FORMS[form], ALL, coefficients, again=True)
