"""Losses on given targets against worked values, transformers and torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from fastalign_kernels import linear_cross_entropy
from fastalign_kernels.losses.supervised import dft, nll, smoothed_nll
from head_oracle import leaves, relative_error
from tolerances import GRADIENTS
from transformers.trainer_pt_utils import LabelSmoother

N, D, V = 50, 16, 211


def test_nll_and_dft_by_hand():
    logp = torch.tensor([math.log(0.5), math.log(0.25)], dtype=torch.float64, requires_grad=True)
    assert nll(logp).tolist() == pytest.approx([0.6931471805599453, 1.3862943611198906])
    assert dft(logp).tolist() == pytest.approx([0.34657359027997264, 0.34657359027997264])
    dft(logp).sum().backward()  # p is held: d(-p log p)/dlog p = -p
    assert logp.grad.tolist() == pytest.approx([-0.5, -0.25])


def test_dft_gradient_in_the_logits_is_nll_times_p():
    z = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (N,))
    logp = torch.log_softmax(z, -1)[torch.arange(N), targets]
    (weighted,) = torch.autograd.grad(dft(logp).sum(), z, retain_graph=True)
    (plain,) = torch.autograd.grad(nll(logp).sum(), z)
    assert torch.allclose(weighted, plain * logp.detach().exp()[:, None], atol=1e-14)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_label_smoothing_equals_transformers(epsilon):
    z, targets = torch.randn(1, N, V, dtype=torch.float64), torch.randint(V, (1, N))
    targets[0, ::3] = -100
    expected = LabelSmoother(epsilon)({"logits": z}, targets)
    keep = targets[0] != -100
    logp_all = torch.log_softmax(z[0][keep], -1)
    logp = logp_all.gather(1, targets[0][keep, None]).squeeze(1)
    assert float(smoothed_nll(logp, logp_all.mean(-1), epsilon).mean()) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_linear_cross_entropy_equals_torch(reduction, label_smoothing, softcap):
    hidden = torch.randn(5, 10, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    bias = torch.randn(V, requires_grad=True)
    targets = torch.randint(V, (5, 10))
    targets[:, ::4] = -100
    arguments = {"reduction": reduction, "label_smoothing": label_smoothing}
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, softcap=softcap, logit_scale=0.5, **arguments)
    loss.backward()
    h, w, b = leaves(hidden, weight, bias)
    z = 0.5 * (h @ w.t() + b)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = F.cross_entropy(z.flatten(0, 1), targets.flatten(), **arguments)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for value, reference in ((hidden, h), (weight, w), (bias, b)):
        assert relative_error(value.grad, reference.grad) < GRADIENTS[torch.float32]
    assert not hidden.grad[:, ::4].any()


def test_linear_cross_entropy_without_targets_is_zero():
    hidden, weight = torch.randn(4, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "median"}, "reduction='median'"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "one per hidden state"),
    ],
)
def test_linear_cross_entropy_errors(change, message):
    arguments = {
        "hidden": torch.zeros(4, D),
        "weight": torch.zeros(V, D),
        "targets": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **change})
