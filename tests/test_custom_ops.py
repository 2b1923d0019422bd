"""The operators of torch.library: opcheck, and whole graphs whose results equal those of the plain functions."""

import fastalign_kernels as fk
import pytest
import torch
from fastalign_kernels import custom_ops
from head_oracle import relative_error
from tolerances import GRADIENTS
from torch.library import opcheck

B, L, D, V = 2, 7, 8, 29


def problem(dtype=torch.float64, needs=(True, True, True)):
    shapes = (B, L, D), (V, D), (V,)
    inputs = [torch.randn(s).to(dtype).requires_grad_(need) for s, need in zip(shapes, needs, strict=True)]
    targets = torch.randint(V, (B, L))
    targets[0, 2:4] = -100
    return *inputs, targets


@pytest.mark.parametrize(
    ("needs", "dtype"),
    [([True] * 3, torch.float32), ([True, False, False], torch.bfloat16), ([False] * 3, torch.float32)],
)
def test_opcheck_of_cross_entropy(needs, dtype):
    hidden, weight, bias, targets = problem(dtype, needs)
    plain = (-100, "mean", 0.0, 0.0, False, 1.0, None, 1.0, None, None)
    opcheck(torch.ops.fastalign.linear_cross_entropy.default, (hidden, weight, targets, bias, None, needs, *plain))
    rich = (-100, "sum", 0.1, 0.01, False, 0.5, None, 1.0, torch.rand(B, L) + 0.5, 4)
    arguments = (hidden, weight, targets, None, torch.rand(V), [*needs[:2], False], *rich)
    opcheck(torch.ops.fastalign.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize(
    ("needs", "entropy"), [([True] * 3, True), ([True, False, False], False), ([False] * 3, True)]
)
def test_opcheck_of_logprobs(needs, entropy):
    hidden, weight, bias, targets = problem(torch.float32, needs)
    settings = (entropy, -100, 0.7, 5.0, 1.0, torch.rand(B, L) + 0.5, 4)
    opcheck(torch.ops.fastalign.linear_logprobs.default, (hidden, weight, targets, bias, *settings))
    settings = (entropy, None, 1.0, None, 1.3, None, None)
    opcheck(torch.ops.fastalign.linear_logprobs.default, (hidden, weight, targets.clamp_min(0), None, *settings))
    _, entropies, lse = custom_ops._logprobs(hidden.detach(), weight.detach(), targets.clamp_min(0), None, *settings)
    arguments = (torch.randn(B, L), torch.randn(B, L) if entropy else None, hidden, weight, targets.clamp_min(0), None)
    arguments = (*arguments, entropies, lse, [*needs[:2], False], *settings[1:])
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    opcheck(torch.ops.fastalign.linear_logprobs_backward.default, detached)


def cross_entropy(h, w, b, targets):
    options = {"bias": b, "label_smoothing": 0.1, "z_loss": 0.02, "temperature": 1.4, "softcap": 9.0}
    return 2 * fk.linear_cross_entropy(torch.tanh(h), w * 1.5, targets, **options)


def weighted_cross_entropy(h, w, b, targets):
    weights, temperature = torch.linspace(0, 1, V, dtype=h.dtype), torch.linspace(0.5, 1.5, B * L).view(B, L)
    options = {"bias": b, "class_weights": weights, "label_smoothing": 0.2, "reduction": "sum"}
    return fk.linear_cross_entropy(h, w, targets, temperature=temperature, **options)


def dft(h, w, b, targets):
    return fk.linear_cross_entropy(h, w, targets, bias=b, dft=True)


def logprobs(h, w, b, targets):
    return (fk.linear_logprobs(torch.tanh(h), w, targets, bias=b, temperature=0.8).exp() * 3).sum()


def logprobs_and_entropy(h, w, b, targets):
    logp, entropy = fk.linear_logprobs(h, w, targets, bias=b, entropy=True, softcap=4.0, logit_scale=1.2)
    return (logp * entropy).sum() + entropy.square().sum()


def module(h, w, b, targets):
    return fk.LinearCrossEntropyLoss(label_smoothing=0.1)(h, w, targets, b)


@pytest.mark.parametrize(
    "step",
    [cross_entropy, weighted_cross_entropy, dft, logprobs, logprobs_and_entropy, module],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)])
def test_one_graph_gives_the_same(step, needs):
    *inputs, targets = problem(needs=needs)
    wanted = [t for t in inputs if t.requires_grad]
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected, found = step(*inputs, targets), compiled(*inputs, targets)
    assert float((found - expected).detach().abs()) < 1e-12
    grads = torch.autograd.grad(found * 0.3, wanted)
    for grad, reference in zip(grads, torch.autograd.grad(expected * 0.3, wanted), strict=True):
        assert relative_error(grad, reference) < 1e-12
    with torch.no_grad():
        assert float((compiled(*inputs, targets) - expected).abs()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_gradients_survive_16_bits(dtype):
    """Gradients of 1e-6 under a loss scale of 2^14: below the normal numbers of fp16 until they are scaled."""
    hidden, weight, _, targets = problem(dtype)
    compiled = torch.compile(
        lambda h, w: fk.linear_cross_entropy(h, w, targets, temperature=1e4), backend="aot_eager", fullgraph=True
    )
    grads = torch.autograd.grad(compiled(hidden, weight) * (2.0**14 / 3), (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logits = (exact[0] @ exact[1].t()).flatten(0, 1) / 1e4
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten()) * (2.0**14 / 3)
    for grad, reference in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        assert relative_error(grad, reference) < GRADIENTS[dtype]


def test_no_reduction_breaks_the_graph_and_gives_the_same():
    *inputs, targets = problem()

    def step(h, w):
        return fk.linear_cross_entropy(torch.tanh(h), w, targets, reduction="none").square().sum()

    torch._dynamo.reset()
    expected, found = step(*inputs[:2]), torch.compile(step, backend="aot_eager")(*inputs[:2])
    assert float((found - expected).detach().abs()) < 1e-12
    grads = torch.autograd.grad(found, inputs[:2])
    for grad, reference in zip(grads, torch.autograd.grad(expected, inputs[:2]), strict=True):
        assert relative_error(grad, reference) < 1e-12
