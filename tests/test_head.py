"""The head op against full logits in fp64: values and gradients of stats, fused and deferred."""

import fastalign_kernels as fk
import pytest
import torch
from fastalign_kernels import LogitForm
from head_oracle import DIFFERENTIABLE as NAMES
from head_oracle import leaves, oracle_stats, relative_error
from tolerances import GRADIENTS, STATISTICS

N, D, V = 45, 24, 173
FORMS = {
    "plain": {},
    "scale": {"scale": 0.6},
    "softcap": {"scale": 1.5, "softcap": 4.0},
    "temperature": {"temperature": 0.7},
    "all, temperature per token": {"scale": 1.3, "softcap": 6.0, "temperature": torch.linspace(0.5, 2.0, N)},
}


def problem(dtype=torch.float32, n=N, with_bias=True):
    hidden = torch.randn(n, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) * 0.5).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_() if with_bias else None
    targets = torch.randint(V, (n,))
    with torch.no_grad():  # some tokens are predicted right, so that top1 holds both values
        targets[: n // 3] = (hidden @ weight.t()).argmax(-1)[: n // 3]
    return hidden, weight, bias, targets


def coefficients(n=N):
    return {name: torch.randn(n) for name in NAMES}


def weighted(stats, coef, span=slice(None)):
    """A loss that is linear in each statistic and has second-order terms in some."""
    loss = sum((coef[name][span].to(v.dtype) * v).sum() for name in NAMES if (v := getattr(stats, name)) is not None)
    return loss + (stats.logp.exp() * coef["logp"][span].to(stats.logp.dtype)).sum()


def expected_gradients(hidden, weight, bias, targets, coef, form, outputs=fk.OUTPUTS):
    h, w, b = leaves(hidden, weight, bias)
    stats = oracle_stats(h, w, targets, b, **form)
    stats = fk.TokenStats(**{k: v for k, v in stats.items() if k in outputs or k == "logp"})
    loss = weighted(stats, coef)
    inputs = [t for t in (h, w, b) if t is not None]
    return loss.detach(), torch.autograd.grad(loss, inputs)


@pytest.fixture(params=["native", "reference"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("FASTALIGN_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_stats_match_oracle(kernels, name, dtype):
    hidden, weight, bias, targets = problem(dtype)
    with torch.no_grad():
        expected = oracle_stats(hidden.double(), weight.double(), targets, bias.double(), **FORMS[name])
    found = fk.stats(hidden, weight, targets, bias=bias, form=LogitForm(**FORMS[name]), outputs=fk.OUTPUTS, chunk=7)
    for key in NAMES:
        value = getattr(found, key)
        assert not value.requires_grad
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (value.double() - expected[key]).abs().max() < STATISTICS[dtype], key
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(found.top1, expected["top1"])
        assert 0 < found.top1.sum() < N
    else:  # rounding may exchange two logits of nearly the same size
        assert (found.top1 != expected["top1"]).sum() <= 2


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("mode", ["fused", "deferred"])
def test_gradients_match_oracle(kernels, mode, name, dtype):
    hidden, weight, bias, targets = problem(dtype)
    coef, form = coefficients(), LogitForm(**FORMS[name])
    expected_loss, expected = expected_gradients(hidden, weight, bias, targets, coef, FORMS[name])
    if mode == "fused":
        loss, stats = fk.fused(
            hidden,
            weight,
            targets,
            lambda stats, span: weighted(stats, coef, span),
            bias=bias,
            form=form,
            outputs=fk.OUTPUTS,
            chunk=16,
        )
        assert not stats.logp.requires_grad
    else:
        loss = weighted(fk.deferred(hidden, weight, targets, bias=bias, form=form, outputs=fk.OUTPUTS, chunk=16), coef)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(float(loss.detach()) - float(expected_loss)) < STATISTICS[dtype] * 40
    (loss * 0.37).backward()
    for value, reference in zip((hidden, weight, bias), expected, strict=True):
        assert value.grad.dtype == value.dtype
        assert relative_error(value.grad, 0.37 * reference) < GRADIENTS[dtype]


@pytest.mark.parametrize(
    "outputs", [("logp",), ("entropy",), ("mean_logp",), ("mean_logit", "log_sum_p2"), ("top1",), ("lse",)]
)
@pytest.mark.parametrize("mode", ["fused", "deferred"])
def test_each_output_alone(kernels, mode, outputs):
    hidden, weight, _, targets = problem(with_bias=False)
    coef = coefficients()
    _, expected = expected_gradients(hidden, weight, None, targets, coef, {}, outputs)
    if mode == "fused":
        loss, stats = fk.fused(hidden, weight, targets, lambda s, span: weighted(s, coef, span), outputs=outputs)
    else:
        stats = fk.deferred(hidden, weight, targets, outputs=outputs)
        loss = weighted(stats, coef)
    for name in (*NAMES, "top1"):
        assert (getattr(stats, name) is None) == (name != "logp" and name not in outputs)
    loss.backward()
    for value, reference in zip((hidden, weight), expected, strict=True):
        assert relative_error(value.grad, reference) < GRADIENTS[torch.float32]


@pytest.mark.parametrize("mode", ["fused", "deferred"])
def test_gradcheck(mode):
    hidden, weight, bias, targets = problem(torch.float64, n=5)
    inputs = leaves(hidden[:, :6], weight[:11, :6], bias[:11], torch.randn(5, 2), torch.randn(11, 2))
    targets, coef = targets % 11, coefficients(5)
    form = LogitForm(0.8, 3.0, torch.linspace(0.6, 1.4, 5, dtype=torch.float64))

    def op(h, w, b, *low):
        options = {"bias": b, "form": form, "outputs": fk.OUTPUTS, "chunk": 2, "low_rank": low}
        if mode == "fused":
            return fk.fused(h, w, targets, lambda s, span: weighted(s, coef, span), **options)[0]
        found = fk.deferred(h, w, targets, **options)
        return tuple(getattr(found, name) for name in NAMES)

    assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize("mode", ["fused", "deferred"])
def test_no_tokens(kernels, mode):
    hidden, weight, bias, targets = problem(n=0)

    def never(stats, span):
        raise AssertionError("loss_fn was called without tokens")

    if mode == "fused":
        loss, stats = fk.fused(hidden, weight, targets, never, bias=bias, outputs=fk.OUTPUTS)
    else:
        stats = fk.deferred(hidden, weight, targets, bias=bias, outputs=fk.OUTPUTS)
        loss = stats.logp.sum()
    assert loss.item() == 0 and stats.entropy.shape == (0,)
    loss.backward()
    assert hidden.grad.shape == (0, D)
    assert weight.grad.shape == (V, D) and not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("mode", ["fused", "deferred"])
def test_non_contiguous_inputs_and_gradients(kernels, mode):
    hidden, weight, bias, targets = problem()
    views = (
        hidden.detach().repeat_interleave(2, 0)[::2],
        weight.detach().t().contiguous().t(),
        torch.stack([bias.detach(), bias.detach()], 1)[:, 0],
    )
    h, w, b = (v.requires_grad_() for v in views)
    wide = torch.stack([targets, targets], 1)[:, 0]
    expected_h, expected_w, expected_b = leaves(hidden, weight, bias)
    oracle_stats(expected_h, expected_w, targets, expected_b)["logp"].sum().backward()
    if mode == "fused":
        fk.fused(h, w, wide, lambda s, span: s.logp.sum(), bias=b, chunk=13)[0].backward()
    else:  # the gradient of a sum is expanded: stride 0
        fk.deferred(h, w, wide, bias=b, chunk=13).logp.sum().backward()
    for value, reference in ((h, expected_h), (w, expected_w), (b, expected_b)):
        assert relative_error(value.grad, reference.grad) < GRADIENTS[torch.float32]


@pytest.mark.parametrize("mode", ["fused", "deferred"])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(kernels, mode, frozen):
    inputs = dict(zip(("hidden", "weight", "bias"), problem()[:3], strict=True))
    targets = torch.randint(V, (N,))
    inputs[frozen].requires_grad_(False)
    expected = dict(zip(inputs, leaves(*inputs.values()), strict=True))
    (oracle_stats(expected["hidden"], expected["weight"], targets, expected["bias"])["logp"] ** 2).sum().backward()
    if mode == "fused":
        fk.fused(targets=targets, loss_fn=lambda s, span: (s.logp**2).sum(), chunk=20, **inputs)[0].backward()
    else:
        (fk.deferred(targets=targets, chunk=20, **inputs).logp ** 2).sum().backward()
    for name, value in inputs.items():
        if name == frozen:
            assert value.grad is None
        else:
            assert relative_error(value.grad, expected[name].grad) < GRADIENTS[torch.float32]


def test_weight_in_another_dtype():
    """fp32 weight, bf16 hidden states: products in bf16, the weight's gradient in fp32, not rounded to bf16."""
    hidden, _, _, targets = problem(torch.bfloat16)
    weight = (torch.randn(V, D) * 0.5).requires_grad_()
    loss, _ = fk.fused(hidden, weight, targets, lambda s, _: -s.logp.sum(), chunk=9)
    loss.backward()
    h, w = leaves(hidden, weight.bfloat16())
    (-oracle_stats(h, w, targets)["logp"].sum()).backward()
    assert weight.grad.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    assert relative_error(weight.grad, w.grad) < GRADIENTS[torch.bfloat16]
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_autocast_does_not_change_the_products():
    hidden, weight, bias, targets = problem()
    plain = fk.stats(hidden, weight, targets, bias=bias).logp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, stats = fk.fused(hidden, weight, targets, lambda s, _: s.logp.sum(), bias=bias)
        later = fk.deferred(hidden, weight, targets, bias=bias).logp
        loss.backward()
    assert torch.equal(stats.logp, plain) and torch.equal(later, plain)
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(kernels, dtype):
    """Logits of +-200: confident, and certain of another token; finite and right where exp overflows."""
    z = torch.randn(4, V) * 3
    z[0, 5], z[1, 5], z[2], z[3, 5] = 200.0, -200.0, 200.0, 200.0
    targets = torch.tensor([5, 5, 5, 6])
    hidden, weight = torch.eye(4).to(dtype).requires_grad_(), z.t().contiguous().to(dtype).requires_grad_()
    h, w = leaves(hidden, weight)
    expected = oracle_stats(h, w, targets)
    loss = weighted(fk.TokenStats(**expected), coefficients(4))
    torch.manual_seed(0)
    coef = coefficients(4)
    loss = weighted(fk.TokenStats(**expected), coef)
    loss.backward()
    stats = fk.deferred(hidden, weight, targets, outputs=fk.OUTPUTS)
    weighted(stats, coef).backward()
    for name in NAMES:
        value = getattr(stats, name).double()
        assert ((value - expected[name]).abs() <= 2e-6 * expected[name].abs().clamp_min(200)).all(), name
    assert relative_error(weight.grad, w.grad) < max(GRADIENTS[torch.float32] * 2, GRADIENTS[dtype] / 2)


def test_chunks_and_groups_do_not_change_the_result(kernels):
    hidden, weight, bias, targets = problem()
    groups = torch.tensor([0] * 3 + [1] * 20 + [4] * 1 + [5] * 10 + [9] * 11)
    spans = []

    def loss_fn(stats, span):
        """The square of each group's sum: wrong unless whole groups arrive together."""
        spans.append(span)
        ids, index = groups[span].unique_consecutive(return_inverse=True)
        return stats.logp.new_zeros(len(ids)).index_add(0, index, stats.logp).square().sum()

    h, w, b = leaves(hidden, weight, bias)
    logp = oracle_stats(h, w, targets, b)["logp"]
    expected = sum(logp[groups == g].sum() ** 2 for g in groups.unique())
    expected.backward()
    loss, stats = fk.fused(hidden, weight, targets, loss_fn, bias=bias, groups=groups, chunk=12)
    loss.backward()
    assert [(s.start, s.stop) for s in spans] == [(0, 3), (3, 23), (23, 34), (34, 45)]
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert (stats.logp - logp).abs().max() < STATISTICS[torch.float32]
    assert relative_error(weight.grad, w.grad) < GRADIENTS[torch.float32]
    assert relative_error(hidden.grad, h.grad) < GRADIENTS[torch.float32]


def test_backward_twice():
    hidden, weight, _, targets = problem(torch.float64, with_bias=False)
    loss, _ = fk.fused(hidden, weight, targets, lambda s, _: s.logp.sum())
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 3, (hidden, weight))
    for one, three in zip(first, second, strict=True):
        assert torch.allclose(3 * one, three, rtol=1e-12)
    with pytest.raises(RuntimeError, match="ran before"):
        torch.autograd.grad(loss, (hidden, weight))


def test_scale_of_the_loss_keeps_fp16_gradients():
    """Coefficients of 1e-7 vanish in fp16; the fused pass carries their size outside the 16-bit numbers."""
    hidden, weight, bias, targets = problem(torch.float16)
    tiny = 1e-7
    loss, _ = fk.fused(hidden, weight, targets, lambda s, _: -tiny * s.logp.sum(), bias=bias, chunk=16)
    (loss * 2.0**20).backward()  # the loss scale
    h, w, b = leaves(hidden, weight, bias)
    (-tiny * 2.0**20 * oracle_stats(h, w, targets, b)["logp"].sum()).backward()
    for value, reference in ((hidden, h), (weight, w), (bias, b)):
        assert relative_error(value.grad, reference.grad) < GRADIENTS[torch.float16]


def test_loss_that_ignores_some_chunks():
    hidden, weight, _, targets = problem(torch.float64, with_bias=False)

    def loss_fn(stats, span):
        return stats.logp.sum() if span.start == 0 else torch.zeros(())

    loss, _ = fk.fused(hidden, weight, targets, loss_fn, outputs=fk.OUTPUTS, chunk=20)
    loss.backward()
    first = 20
    h, w = leaves(hidden, weight)
    oracle_stats(h[:first], w, targets[:first])["logp"].sum().backward()
    assert relative_error(weight.grad, w.grad) < 1e-12 and relative_error(hidden.grad, h.grad) < 1e-12


def test_without_gradient_loss_and_statistics_stay_the_same():
    hidden, weight, bias, targets = problem()
    expected, _ = fk.fused(hidden, weight, targets, lambda s, _: s.logp.mean(), bias=bias)
    with torch.no_grad():
        loss, _ = fk.fused(hidden, weight, targets, lambda s, _: s.logp.mean(), bias=bias)
    assert torch.equal(loss, expected) and not loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(fk.stats(hidden, weight, targets, bias=bias).logp.mean(), expected.detach())


def test_compiled_callers_get_the_same_gradients():
    hidden, weight, _, targets = problem(with_bias=False)

    def step(h, w):
        return 2 * fk.fused(torch.tanh(h), w, targets, lambda s, _: -s.logp.sum())[0]

    expected = torch.autograd.grad(step(hidden, weight), (hidden, weight))
    found = torch.autograd.grad(torch.compile(step, backend="eager")(hidden, weight), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(V, D + 1)}, "same D"),
        ({"targets": torch.zeros(N - 1, dtype=torch.int64)}, "one per row of hidden"),
        ({"targets": torch.full((N,), -100)}, "targets hold -100"),
        ({"targets": torch.full((N,), V)}, f"targets hold {V}"),
        ({"bias": torch.zeros(V + 1)}, "one per row of weight"),
        ({"outputs": ("logprob",)}, "logprob"),
        ({"form": LogitForm(softcap=0.0)}, "softcap"),
        ({"form": LogitForm(temperature=0.0)}, "temperature"),
        ({"form": LogitForm(temperature=torch.ones(N + 1))}, "temperature"),
        ({"chunk": 0}, "chunk=0"),
        ({"low_rank": (torch.zeros(N, 2), torch.zeros(V, 3))}, "with the same r"),
    ],
)
def test_errors_name_what_is_wrong(change, message):
    arguments = {
        "hidden": torch.zeros(N, D),
        "weight": torch.zeros(V, D),
        "targets": torch.zeros(N, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        fk.stats(**{**arguments, **change})


def test_loss_must_be_a_scalar():
    hidden, weight, _, targets = problem(with_bias=False)
    with pytest.raises(ValueError, match=r"returned 0\.0: return a scalar tensor"):
        fk.fused(hidden, weight, targets, lambda stats, span: 0.0)
    with pytest.raises(ValueError, match="return a scalar"):
        fk.fused(hidden, weight, targets, lambda s, _: s.logp)
