"""linear_cross_entropy against torch.nn.functional.cross_entropy on full logits in fp64, gradients included."""

import itertools

import fastalign_kernels as fk
import pytest
import torch
import torch.nn.functional as F
from fastalign_kernels.head.cross_entropy import linear_cross_entropy_reference
from head_oracle import leaves, relative_error
from tolerances import GRADIENTS, STATISTICS

B, L, D, V = 3, 9, 12, 41


def problem(dtype=torch.float64):
    hidden = torch.randn(B, L, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) * 0.6).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_()
    targets = torch.randint(V, (B, L))
    targets[0, :4] = targets[2, 8] = -100
    return hidden, weight, bias, targets


def full_logits(hidden, weight, bias, scale=1.0, softcap=None, temperature=1.0):
    z = (hidden @ weight.t() + bias) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / (temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature)


def specified(exact, targets, settings):
    """What the library's own specification says."""
    hidden, weight, bias = exact
    return linear_cross_entropy_reference(hidden, weight, targets, bias=bias, **settings)


def assert_equal(found, expected, inputs, exact, dtype=torch.float64):
    """Values, and gradients for a random gradient of the loss."""
    assert found.shape == expected.shape
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found.detach().double() - expected.detach()).abs().max() < STATISTICS[dtype] * 4
    upstream = torch.randn(found.shape, dtype=torch.float64)
    grads = torch.autograd.grad(found, inputs, upstream.to(found.dtype))
    for grad, reference in zip(grads, torch.autograd.grad(expected, exact, upstream), strict=True):
        assert relative_error(grad, reference) < GRADIENTS[dtype]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_torch(reduction, smoothing, weighted, dtype):
    hidden, weight, bias, targets = problem(dtype)
    class_weights = torch.rand(V) if weighted else None
    temperature = torch.linspace(0.6, 1.5, B * L).view(B, L)
    exact = leaves(hidden, weight, bias)
    logits = full_logits(*exact, scale=0.8, temperature=temperature.double())
    expected = F.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        class_weights.double() if weighted else None,
        label_smoothing=smoothing,
        reduction=reduction,
    )
    expected = expected.view(B, L) if reduction == "none" else expected
    settings = {"reduction": reduction, "label_smoothing": smoothing, "class_weights": class_weights}
    settings |= {"logit_scale": 0.8, "temperature": temperature}
    found = fk.linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=7, **settings)
    assert_equal(found, expected, (hidden, weight, bias), exact, dtype)
    assert torch.allclose(specified(exact, targets, settings), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("softcap", "smoothing", "weighted"), [(None, 0.1, True), (3.0, 0.1, False), (3.0, 0, True)])
def test_z_loss_and_softcap(reduction, softcap, smoothing, weighted):
    hidden, weight, bias, targets = problem()
    class_weights = torch.rand(V, dtype=torch.float64) if weighted else None
    exact = leaves(hidden, weight, bias)
    logits = full_logits(*exact, softcap=softcap, temperature=0.7).flatten(0, 1)
    flat = targets.flatten()
    expected = F.cross_entropy(logits, flat, class_weights, label_smoothing=smoothing, reduction=reduction)
    squares = logits.logsumexp(-1).square() * (flat != -100)
    by = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / (flat != -100).sum()}[reduction]
    expected = expected + 0.05 * by
    settings = {"softcap": softcap, "label_smoothing": smoothing, "class_weights": class_weights, "z_loss": 0.05}
    settings |= {"reduction": reduction, "temperature": 0.7}
    expected = expected.view(B, L) if reduction == "none" else expected
    found = fk.linear_cross_entropy(hidden, weight, targets, bias=bias, chunk=5, **settings)
    assert_equal(found, expected, (hidden, weight, bias), exact)
    assert torch.allclose(specified(exact, targets, settings), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_dft_weights_each_token_by_its_probability(weighted):
    hidden, weight, bias, targets = problem()
    class_weights = torch.rand(V, dtype=torch.float64) if weighted else torch.ones(V, dtype=torch.float64)
    exact = leaves(hidden, weight, bias)
    keep = targets != -100
    logp = full_logits(*exact).log_softmax(-1)[keep].gather(1, targets[keep][:, None])[:, 0]
    by = class_weights[targets[keep]]
    expected = -(by * logp.detach().exp() * logp).sum() / by.sum()
    settings = {"dft": True, "class_weights": class_weights if weighted else None}
    found = fk.linear_cross_entropy(hidden, weight, targets, bias=bias, **settings)
    assert_equal(found, expected, (hidden, weight, bias), exact)
    assert torch.allclose(specified(exact, targets, settings), expected)


def test_low_rank_with_all_settings():
    hidden, weight, bias, targets = problem()
    u, b = torch.randn(B, L, 2, dtype=torch.float64), torch.randn(V, 2, dtype=torch.float64)
    inputs = (hidden, weight, bias, u.requires_grad_(), b.requires_grad_())
    exact = leaves(*inputs)
    class_weights = torch.rand(V, dtype=torch.float64)
    logits = full_logits(torch.cat([exact[0], exact[3]], -1), torch.cat([exact[1], exact[4]], -1), exact[2])
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), class_weights, label_smoothing=0.3)
    found = fk.linear_cross_entropy(
        hidden, weight, targets, bias=bias, low_rank=(u, b), class_weights=class_weights, label_smoothing=0.3
    )
    assert_equal(found, expected, inputs, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weighted_sum_of_many_logits_fits_into_16_bits(dtype):
    """The sum over the vocabulary is 1e5 and more, beyond fp16; rounded to bf16 it would be off by hundreds."""
    vocabulary = 20000
    weight = (torch.randn(vocabulary, D) * 0.1 - torch.eye(1, D) * 8).to(dtype)
    hidden = (torch.randn(6, D) * 0.1 + torch.eye(1, D)).to(dtype)
    targets, class_weights = torch.randint(vocabulary, (6,)), torch.rand(vocabulary)
    options = {"label_smoothing": 1.0, "reduction": "none"}
    expected = F.cross_entropy(hidden.double() @ weight.double().t(), targets, class_weights.double(), **options)
    found = fk.linear_cross_entropy(hidden, weight, targets, class_weights=class_weights, **options)
    assert (found - expected).abs().max() < STATISTICS[dtype] / 4  # errors of single logits average out


def test_weighted_smoothing_under_autocast_and_with_main_grad():
    """Autocast does not round the logits' sum; no part of the weight's gradient goes past `main_grad`."""
    hidden, weight, bias, targets = problem(torch.float32)
    settings = {"class_weights": torch.rand(V), "label_smoothing": 0.4}
    plain = fk.linear_cross_entropy(hidden, weight, targets, bias=bias, **settings)
    (expected,) = torch.autograd.grad(plain, weight)
    weight.main_grad = torch.zeros(V, D)
    with torch.autocast("cpu", torch.bfloat16):
        found = fk.linear_cross_entropy(hidden, weight, targets, bias=bias, **settings)
    found.backward()
    assert torch.equal(found, plain) and weight.grad is None
    assert relative_error(weight.main_grad, expected.double()) < GRADIENTS[torch.float32]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    hidden, weight, bias, targets = problem()
    inputs = leaves(hidden[:, :3, :5], weight[:7, :5], bias[:7])
    targets = torch.where(targets < 0, targets, targets % 7)[:, :3]
    options = {"label_smoothing": 0.1, "class_weights": torch.rand(7, dtype=torch.float64), "z_loss": 0.1}

    def op(h, w, b):
        return fk.linear_cross_entropy(h, w, targets, bias=b, temperature=1.3, reduction=reduction, **options)

    assert torch.autograd.gradcheck(op, inputs)


def test_nothing_scored():
    hidden, weight, bias, targets = problem()
    all_scored = fk.linear_cross_entropy(hidden, weight, targets.clamp_min(0), bias=bias, ignore_index=None)
    assert torch.equal(all_scored, fk.linear_cross_entropy(hidden, weight, targets.clamp_min(0), bias=bias))
    for reduction, weighted in itertools.product(("mean", "sum", "none"), (False, True)):
        settings = {"class_weights": torch.rand(V), "label_smoothing": 0.1} if weighted else {}
        loss = fk.linear_cross_entropy(
            hidden, weight, targets.fill_(-100), bias=bias, reduction=reduction, z_loss=0.1, **settings
        )
        grads = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
        assert not loss.any() and not any(grad.any() for grad in grads)
    zero = torch.zeros(V)
    assert fk.linear_cross_entropy(hidden, weight, targets.fill_(3), class_weights=zero) == 0


def test_module_holds_the_settings():
    hidden, weight, bias, targets = problem()
    class_weights = torch.rand(V, dtype=torch.float64)
    module = fk.LinearCrossEntropyLoss(class_weights, label_smoothing=0.1, z_loss=0.01, ignore_index=3)
    targets[targets == -100] = 3
    expected = fk.linear_cross_entropy(
        hidden,
        weight,
        targets,
        bias=bias,
        class_weights=class_weights,
        label_smoothing=0.1,
        z_loss=0.01,
        ignore_index=3,
    )
    assert torch.equal(module(hidden, weight, targets, bias), expected)
    assert torch.equal(module(hidden, weight, targets, bias=bias, z_loss=0.01), expected)  # given again
    plain = fk.linear_cross_entropy(hidden, weight, targets, temperature=0.7, class_weights=class_weights)
    found = module(hidden, weight, targets, temperature=0.7, label_smoothing=0.0, z_loss=0.0, ignore_index=-100)
    assert torch.equal(found, plain)
    assert "z_loss=0.01" in repr(module) and list(module.state_dict()) == ["class_weights"]
    h, t = hidden.flatten(0, 1), targets.flatten()
    modules = {
        fk.linear_logprobs: (fk.LinearLogprobs(temperature=0.7, ignore_index=3), (h, weight, t), {"bias": bias}),
        fk.linear_divergence: (fk.LinearDivergence(divergence="jsd", beta=0.2), (h, weight, 2 * h, weight), {}),
        fk.linear_policy_loss: (fk.LinearPolicyLoss(loss_type="dapo"), (h, weight, t, torch.randn(len(t))), {}),
        fk.linear_preference_loss: (
            fk.LinearPreferenceLoss(loss="cpo", beta=0.3), (h, weight, t, torch.arange(len(t)) * 4 // len(t)),
            {"num_pairs": 2},
        ),
    }  # fmt: skip
    for op, (module, operands, more) in modules.items():
        found, expected = module(*operands, **more), op(*operands, **module.settings, **more)
        value, other = (getattr(x, "loss", x[0] if isinstance(x, tuple) else x) for x in (found, expected))
        assert torch.equal(value, other) and value.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": "batchmean"}, "choose 'mean', 'sum' or 'none'"),
        ({"label_smoothing": 1.5}, "from 0 to 1"),
        ({"label_smoothing": 0.1, "dft": True}, "choose one"),
        ({"class_weights": torch.ones(V - 1)}, r"give \(41,\), one per row"),
        ({"class_weights": torch.ones(V), "label_smoothing": 0.1, "softcap": 9.0}, "leave one of the three out"),
        ({"temperature": torch.ones(B)}, r"give a number or \(3, 9\)"),
        ({"temperature": torch.tensor(1.0, requires_grad=True)}, r"gets none here: pass temperature.detach\(\)"),
        ({"temperature": torch.tensor(-1.0)}, "temperature holds -1.0: give positive numbers"),
        ({"class_weights": torch.ones(V, requires_grad=True)}, "class_weights requires a gradient"),
        ({"class_weights": torch.ones(V, device="meta")}, "class_weights is on meta, hidden on cpu: move one"),
        ({"low_rank": (torch.ones(B * L, 2), torch.ones(V, 2))}, r"low_rank\[0\]"),
    ],
)
def test_errors_name_what_is_wrong(settings, message):
    hidden, weight, _, targets = problem()
    with pytest.raises(ValueError, match=message):
        fk.linear_cross_entropy(hidden, weight, targets, **settings)
    with pytest.raises(ValueError, match="one per hidden state"):
        fk.linear_cross_entropy(hidden, weight, targets[:2])


def test_a_module_names_the_setting_that_it_does_not_have():
    for make, message in (
        (
            lambda: fk.LinearCrossEntropyLoss(lable_smoothing=0.1),
            "no setting 'lable_smoothing': did you mean 'label_sm",
        ),
        (lambda: fk.LinearPreferenceLoss(betta=1), "no setting 'betta': did you mean 'beta'"),
        (lambda: fk.LinearPreferenceLoss(loss="orpo", simpo_gamma=1.0), "no setting 'simpo_gamma'; it takes average"),
        (lambda: fk.LinearPolicyLoss(epsilon_hi=1.0), "did you mean 'epsilon_high'"),
    ):
        with pytest.raises(TypeError, match=message):
            make()
    with pytest.raises(ValueError, match="loss='dppo': choose among dpo, cpo, orpo, tpo"):
        fk.LinearPreferenceLoss(loss="dppo")
    assert fk.LinearPreferenceLoss(loss=lambda c, r, scale: c - r, scale=2.0).settings["scale"] == 2.0


def test_a_constant_and_another_device_are_named_by_every_op():
    hidden, weight, _, targets = problem()
    hidden, targets = hidden.flatten(0, 1), targets.flatten().clamp(min=0)
    wanted = torch.ones((), requires_grad=True)
    for op in (
        fk.linear_logprobs,
        lambda h, w, t, temperature: fk.selective_log_softmax(h @ w.t(), t, temperature=temperature),
    ):
        with pytest.raises(ValueError, match=r"pass temperature.detach\(\)"):
            op(hidden, weight, targets, temperature=wanted)
        with torch.no_grad():
            assert torch.equal(
                op(hidden, weight, targets, temperature=wanted), op(hidden, weight, targets, temperature=1.0)
            )
    with pytest.raises(ValueError, match=r"form\.temperature requires a gradient"):
        fk.deferred(hidden, weight, targets, form=fk.LogitForm(temperature=wanted))
    with pytest.raises(ValueError, match=r"form\.temperature holds -2\.0"):
        fk.stats(hidden, weight, targets, form=fk.LogitForm(temperature=-2 * wanted))
    for op in (fk.linear_logprobs, fk.linear_cross_entropy, fk.stats):
        with pytest.raises(ValueError, match="weight is on meta, hidden on cpu: move one of them"):
            op(hidden, weight.to("meta"), targets)
        with pytest.raises(ValueError, match="targets is on meta, hidden on cpu"):
            op(hidden, weight, targets.to("meta"))
