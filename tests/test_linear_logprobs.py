"""Log-probabilities from hidden states and from logits, against log_softmax in fp64, gradients included."""

import fastalign_kernels as fk
import pytest
import torch
from fastalign_kernels.head.logprobs import linear_logprobs_reference, selective_log_softmax_reference
from head_oracle import leaves, relative_error
from tolerances import GRADIENTS, STATISTICS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

B, L, D, V = 3, 9, 12, 41
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "reference"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("FASTALIGN_KERNELS", request.param)


def oracle(logits, targets, temperature, ignored=None):
    """logp and entropy (...) fp64 with a graph, 0 where ignored."""
    z = logits / (temperature[..., None].double() if isinstance(temperature, torch.Tensor) else temperature)
    logp = z.log_softmax(-1)
    keep = torch.ones_like(targets) if ignored is None else (~ignored).long()
    chosen = logp.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return chosen * keep, -(logp.exp() * logp).sum(-1) * keep


def agree(found, expected, inputs, exact, dtype):
    """Values, and gradients of a random function of both outputs."""
    a, b = torch.randn(2, *found[0].shape, dtype=torch.float64)
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (value.detach().double() - reference.detach()).abs().max() < STATISTICS[dtype]
    grads = torch.autograd.grad((found[0] * a + found[1] * b).sum(), inputs)
    references = torch.autograd.grad((expected[0] * a + expected[1] * b).sum(), exact)
    for grad, reference, given in zip(grads, references, inputs, strict=True):
        assert grad.dtype == given.dtype and relative_error(grad, reference) < GRADIENTS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [False, True])
def test_linear_logprobs(kernels, dtype, low):
    hidden = torch.randn(B, L, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) * 0.5).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_()
    inputs = [hidden, weight, bias]
    if low:
        inputs += [torch.randn(B, L, 2).to(dtype).requires_grad_(), torch.randn(V, 2).to(dtype).requires_grad_()]
    targets = torch.randint(V, (B, L))
    targets[1, 2:5] = targets[2, 0] = -100
    temperature = torch.linspace(0.5, 2.0, B * L).view(B, L)
    exact = leaves(*inputs)
    logits = exact[0] @ exact[1].t() + exact[2] + (exact[3] @ exact[4].t() if low else 0)
    expected = oracle(6 * torch.tanh(logits * 1.2 / 6), targets, temperature, targets == -100)
    settings = {"temperature": temperature, "softcap": 6.0, "logit_scale": 1.2}
    if not low:
        specified = linear_logprobs_reference(exact[0], exact[1], targets, bias=exact[2], **settings)
        assert all(torch.allclose(a, b) for a, b in zip(specified, expected, strict=True))
    settings |= {"bias": bias, "chunk": 8, "low_rank": tuple(inputs[3:]) or None}
    found = fk.linear_logprobs(hidden, weight, targets, entropy=True, **settings)
    assert not found[0][targets == -100].any() and not found[1][targets == -100].any()
    agree(found, expected, inputs, exact, dtype)
    with torch.no_grad():
        assert torch.equal(fk.linear_logprobs(hidden, weight, targets, **settings), found[0])


def test_only_what_needs_a_gradient_costs_one():
    """Nothing needs one: forward only, no graph. A lone adapter or the bias does: a graph."""
    hidden, weight, targets = torch.randn(B, L, D), torch.randn(V, D), torch.randint(V, (B, L))
    assert not fk.linear_logprobs(hidden, weight, targets).requires_grad
    assert fk.linear_logprobs(hidden, weight, targets, bias=torch.zeros(V, requires_grad=True)).requires_grad
    low_rank = torch.randn(B, L, 2), torch.randn(V, 2, requires_grad=True)
    assert fk.linear_logprobs(hidden, weight, targets, low_rank=low_rank).requires_grad
    with torch.no_grad():
        assert not fk.linear_logprobs(hidden.requires_grad_(), weight, targets).requires_grad


def test_ignore_index_none_scores_every_position():
    hidden, weight, targets = torch.randn(B, L, D), torch.randn(V, D), torch.randint(V, (B, L))
    expected = fk.linear_logprobs(hidden, weight, targets)
    assert torch.equal(fk.linear_logprobs(hidden, weight, targets, ignore_index=None), expected)
    targets[0, 0] = -100
    with pytest.raises(ValueError, match="targets hold -100"):
        fk.linear_logprobs(hidden, weight, targets, ignore_index=None)
    assert fk.linear_logprobs(hidden, weight, targets.fill_(-100)).count_nonzero() == 0


def shifted(logits):
    """As next-token losses cut them: strided, no view as a matrix."""
    return logits[:, :-1]


VIEWS = {
    "matrix": lambda logits: logits,
    "shifted": shifted,
    "transposed": lambda logits: logits.transpose(0, 1),
    "columns": lambda logits: logits.transpose(-1, -2).contiguous().transpose(-1, -2),
    "row": lambda logits: logits[0, 0],
    "none": lambda logits: logits[:0],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_selective_log_softmax(kernels, dtype, view):
    whole = (torch.randn(B, L, V) * 3).to(dtype).requires_grad_()
    logits = VIEWS[view](whole)
    (exact,) = leaves(whole)
    targets = torch.randint(V, logits.shape[:-1])
    for temperature in (0.7, torch.rand(logits.shape[:-1]) + 0.5, torch.tensor(1.3)):
        before = whole.detach().clone()
        found = fk.selective_log_softmax(logits, targets, temperature=temperature, entropy=True)
        if logits.numel():
            expected = oracle(VIEWS[view](exact), targets, temperature)
            agree(found, expected, [whole], [exact], dtype)
            specified = selective_log_softmax_reference(VIEWS[view](exact), targets, temperature=temperature)
            torch.testing.assert_close(specified, expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(whole.detach(), before)
        assert found[0].shape == found[1].shape == targets.shape
        alone = fk.selective_log_softmax(logits, targets, temperature=temperature)
        assert torch.equal(alone, found[0])


class Sizes(TorchDispatchMode):
    """dtype and elements of what operators make."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.made += [(t.dtype, t.numel()) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


def test_selective_log_softmax_keeps_no_fp32_logits(monkeypatch):
    monkeypatch.setenv("FASTALIGN_KERNELS", "native")
    logits = torch.randn(20, 3000).bfloat16().requires_grad_()
    with Sizes() as sizes:
        logp, entropy = fk.selective_log_softmax(logits, torch.randint(3000, (20,)), entropy=True)
        (logp.sum() + entropy.sum()).backward()
    assert not [n for dtype, n in sizes.made if dtype == torch.float32 and n >= 3000]


def test_selective_log_softmax_errors():
    logits = torch.randn(4, V)
    for targets, settings, message in (
        (torch.zeros(3, dtype=torch.int64), {}, "one per row"),
        (torch.zeros(4), {}, "int64"),
        (torch.full((4,), V), {}, f"targets hold {V}"),
        (torch.full((4,), -1), {}, "targets hold -1"),
        (torch.zeros(4, dtype=torch.int64), {"temperature": 0.0}, "positive"),
        (torch.zeros(4, dtype=torch.int64), {"temperature": torch.ones(3)}, r"give a number or \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fk.selective_log_softmax(logits, targets, **settings)
