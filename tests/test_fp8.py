"""fp8 products against their definition in fp64; zeros, infinities, odd sizes and frozen weights."""

import pytest
import torch
import torch.nn.functional as F
from fastalign_kernels import linear_logprobs
from fastalign_kernels.layers.fp8 import (
    E4M3,
    fp8_linear,
    fp8_linear_reference,
    fp8_product,
    quantise_columns,
    quantise_reference,
    quantise_rows,
)

DTYPES = [torch.float32, torch.bfloat16]
SIZES_OF_E4M3 = torch.arange(127, dtype=torch.uint8).view(E4M3).double()  # 0 to 448; even places are even numbers


def by_hand(matrix: torch.Tensor) -> torch.Tensor:
    """Quantised and dequantised: for each element the nearest of all e4m3 numbers, the even one of two; fp64."""
    scale = (matrix.float().abs().amax(1, keepdim=True) / 448).clamp_min(2.0**-126)
    scaled = (matrix.float() * (1 / scale)).double()
    place = torch.searchsorted(SIZES_OF_E4M3, scaled.abs().contiguous()).clamp(1, 126)
    below, above = (scaled.abs() - SIZES_OF_E4M3[place - 1], SIZES_OF_E4M3[place] - scaled.abs())
    place -= ((below < above) | ((below == above) & (place % 2 == 1))).long()
    return SIZES_OF_E4M3[place] * scaled.sign() * scale.double()


def wide_range(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of sizes 1e-6 to 1e6 with elements that span e4m3's subnormals."""
    spread = torch.randn(rows, columns) * torch.logspace(-4, 0, columns)[torch.randperm(columns)]
    return (spread * torch.logspace(-6, 6, rows)[:, None]).to(dtype)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_the_nearest_numbers(dtype):
    x = wide_range(37, 200, dtype)
    for (values, scale), exact in (
        (quantise_rows(x), by_hand(x)),
        (quantise_columns(x.t().contiguous()), by_hand(x)),
        (quantise_rows(x.t().contiguous().t()), by_hand(x)),  # strided
    ):
        assert values.dtype == E4M3 and values.is_contiguous() and scale.shape == (37, 1)
        found = values.double() * scale.double()
        assert torch.equal(found, exact)
        # half a step of 1/8, or of the subnormal numbers
        assert ((found - x.double()).abs() <= (x.double().abs() / 16 + scale.double() * 2.0**-10) * 1.0001).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of 0 times infinity
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_gives_the_numbers_of_the_definition(dtype):
    checks = pytest.importorskip("triton_checks")
    if checks.DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the card has no fp8")
    for rows, columns in ((5, 7), (33, 300), (70, 130), (3, 2500)):
        x = wide_range(rows, columns, dtype).to(checks.DEVICE)
        x[1] = 0
        x[2, 3] = float("inf")
        x[3 % rows, 1] = float("nan")
        inside = checks.guarded(x, row_gap=3)
        for dim, quantise in ((1, quantise_rows), (0, quantise_columns)):
            with checks.triton_backend():
                values, scale = quantise(inside)
            meant, meant_scale = quantise_reference(x, dim)
            products = values.float() * scale, meant.float() * meant_scale
            assert torch.equal(products[0].isnan(), products[1].isnan())
            assert torch.equal(products[0].nan_to_num(), products[1].nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 33, 19), (64, 96, 48), (1, 16, 16)])
def test_forward_and_backward_follow_the_definition(dtype, shape):
    n, k, v = shape
    x = torch.randn(n, k).to(dtype).requires_grad_()
    weight, bias = (t.to(dtype).requires_grad_() for t in (torch.randn(v, k), torch.randn(v)))
    grad = torch.randn(n, v).to(dtype)
    out = fp8_linear(x, weight, bias)
    out.backward(grad)
    last_bits = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert out.dtype == x.grad.dtype == weight.grad.dtype == dtype
    exact = by_hand(x.detach()) @ by_hand(weight.detach()).t() + bias.detach().double()
    assert relative(out.detach(), exact) < last_bits
    assert relative(fp8_linear_reference(x.detach(), weight.detach(), bias.detach()), exact) < 1e-12
    assert relative(x.grad, by_hand(grad) @ by_hand(weight.detach().t()).t()) < last_bits
    assert relative(weight.grad, grad.double().t() @ x.detach().double()) < last_bits
    assert relative(bias.grad, grad.double().sum(0)) < last_bits


def test_error_of_a_product_is_that_of_three_bits():
    for size in (64, 1024):
        x, weight = torch.randn(64, size), torch.randn(128, size)
        error = relative(fp8_linear(x, weight), F.linear(x.double(), weight.double()))
        assert 0.03 < error < 0.045


def test_zeros_infinities_and_no_rows():
    weight, x = torch.randn(32, 16), torch.randn(4, 16)
    x[0] = 0
    x[1, 3] = float("inf")
    x[2, 5] = float("nan")
    out = fp8_linear(x, weight)
    assert (out[0] == 0).all() and out[1:3].isnan().all() and out[3].isfinite().all()
    x, weight = torch.randn(4, 16), weight.clone()
    weight[5, 2] = float("-inf")
    assert fp8_linear(x, weight).isnan().nonzero()[:, 1].unique().tolist() == [5]
    assert (fp8_linear(x * 1e-44, torch.zeros(32, 16)) == 0).all()
    empty = torch.zeros(2, 0, 16, requires_grad=True)
    weight = torch.randn(32, 16, requires_grad=True)
    fp8_linear(empty, weight).sum().backward()
    assert empty.grad.shape == (2, 0, 16) and (weight.grad == 0).all()


def test_a_frozen_weight_keeps_no_input_and_gets_no_gradient():
    saved = []
    x, weight = torch.randn(3, 5, 48, requires_grad=True), torch.randn(32, 48)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        out = fp8_linear(x, weight)
    assert saved == [weight.shape] and out.shape == (3, 5, 32)
    out.sum().backward()
    assert weight.grad is None and x.grad.abs().sum() > 0
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        fp8_linear(x, weight.requires_grad_())
    assert saved == [(15, 48), weight.shape]


def test_autocast_gives_its_dtype_and_quantises_the_fp32_weight():
    x, weight = torch.randn(8, 32), torch.randn(16, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = fp8_linear(x, weight)
    assert out.dtype == torch.bfloat16
    meant = fp8_product(quantise_rows(x.bfloat16()), quantise_rows(weight.detach()), torch.bfloat16)
    assert torch.equal(out, meant)
    out.sum().backward()
    assert weight.grad.dtype == torch.float32
    with pytest.raises(ValueError, match="fp64"):
        fp8_linear(x.double(), weight)


def test_compiled_in_one_graph():
    def layer(x, weight, bias):
        return fp8_linear(x, weight, bias).relu().sum(-1)

    given = [torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 32), (48, 32), (48,))]
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        out = run(*given)
        results.append([out, *torch.autograd.grad(out.sum(), given)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_cards_product_pads_odd_sizes(monkeypatch):
    """What is handed to `torch._scaled_mm` has sizes that it takes, and its result is the emulation's."""
    from fastalign_kernels.layers import fp8

    seen = []

    def scaled_mm(a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        seen.append((*a.shape, b.shape[1]))
        assert a.is_contiguous() and b.t().is_contiguous() and not use_fast_accum
        assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
        out = (a.float() @ b.float()) * scale_a * scale_b
        return (out if bias is None else out + bias.float()).to(out_dtype)

    x, weight, bias = torch.randn(5, 33), torch.randn(19, 33), torch.randn(19).bfloat16()
    operands = quantise_rows(x), quantise_rows(weight)
    emulated = fp8_product(*operands, torch.bfloat16, bias)
    monkeypatch.setattr(fp8, "has_fp8", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    assert relative(fp8_product(*operands, torch.bfloat16, bias), emulated) < 4e-3
    assert seen == [(5, 48, 32)]


def test_fp8_head_has_the_error_that_keeps_it_off():
    """The figures of head/fp8_product.py: logits of standard deviation 2, one channel 30 times as large."""
    hidden, weight, targets = torch.randn(256, 512), torch.randn(4000, 512) * 2 / 512**0.5, torch.randint(4000, (256,))
    hidden[:, 7] *= 30
    weight[:, 7] /= 30
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact = torch.log_softmax(hidden.double() @ weight.double().t(), -1)
    entropy = -(exact.exp() * exact).sum(-1)
    exact = exact.gather(1, targets[:, None])[:, 0]
    errors = {}
    for fp8 in (False, True):
        logp, found = linear_logprobs(hidden, weight, targets, entropy=True, fp8=fp8)
        error = logp.double() - exact
        errors[fp8] = error.abs().mean().item(), error.abs().max().item(), (found.double() - entropy).mean().item()
    assert errors[False][0] < 0.005 and errors[False][1] < 0.02
    assert 0.05 < errors[True][0] < 0.07 and 0.18 < errors[True][1] < 0.3
    assert abs(errors[True][2]) < 0.02  # of the mean entropy


def test_fp8_head_is_the_quantised_product_with_all_that_follows():
    hidden, weight, bias = torch.randn(23, 40), torch.randn(101, 40) / 4, torch.randn(101)
    u, b, targets = torch.randn(23, 3), torch.randn(101, 3) / 4, torch.randint(101, (23,))
    targets[4] = -100
    temperature = torch.rand(23) + 0.5
    options = {"bias": bias, "low_rank": (u, b), "temperature": temperature, "softcap": 5.0, "chunk": 7}
    found = linear_logprobs(hidden, weight, targets, **options, fp8=True)
    product = (by_hand(hidden) @ by_hand(weight).t()) + bias.double() + u.double() @ b.double().t()
    exact = torch.log_softmax(5 * torch.tanh(product / 5) / temperature.double()[:, None], -1)
    exact = exact.gather(1, targets.clamp_min(0)[:, None])[:, 0].masked_fill(targets < 0, 0)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="fp8=True has no gradient"):
        linear_logprobs(hidden.requires_grad_(), weight, targets, fp8=True)
    with torch.no_grad():
        assert torch.equal(linear_logprobs(hidden, weight, targets, **options, fp8=True), found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_card_agrees_with_the_emulation():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the card has no fp8")
    for n, k, v in ((100, 33, 19), (512, 1024, 768)):
        x, weight, bias = (torch.randn(*shape, dtype=torch.bfloat16) for shape in ((n, k), (v, k), (v,)))
        given = [t.cuda().requires_grad_() for t in (x, weight, bias)]
        meant = [t.requires_grad_() for t in (x, weight, bias)]
        grad = torch.randn(n, v, dtype=torch.bfloat16)
        out, emulated = fp8_linear(*given), fp8_linear(*meant)
        out.backward(grad.cuda()), emulated.backward(grad)
        assert relative(out.cpu().detach(), emulated.detach()) < 4e-3
        for on_card, on_host in zip(given, meant, strict=True):
            assert relative(on_card.grad.cpu(), on_host.grad) < 6e-3
