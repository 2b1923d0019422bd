"""The head's further operands and sinks: low-rank factors beside the weight, and a weight gradient that has a home."""

import fastalign_kernels as fk
import pytest
import torch
from fastalign_kernels import LogitForm
from head_oracle import leaves, oracle_stats, relative_error
from test_head import D, N, V, coefficients, problem, weighted
from test_head import kernels as kernels
from tolerances import GRADIENTS, STATISTICS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("mode", ["fused", "deferred"])
@pytest.mark.parametrize("frozen", [True, False])
def test_low_rank_operand(kernels, mode, dtype, frozen):
    """LoRA on the head: u b^T is added to the logits; each factor gets its gradient, a frozen weight none."""
    hidden, weight, bias, targets = problem(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # an adapter in fp32 on a head in bf16
    u, b = torch.randn(N, 3).to(dtype).requires_grad_(), (torch.randn(V, 3) * 0.3).to(wide).requires_grad_()
    weight.requires_grad_(not frozen)
    coef = coefficients()
    options = {"bias": bias, "form": LogitForm(1.2, 8.0), "outputs": fk.OUTPUTS, "chunk": 16, "low_rank": (u, b)}
    exact = leaves(hidden, weight, bias, u, b.to(dtype))
    factors = torch.cat([exact[0], exact[3]], 1), torch.cat([exact[1], exact[4]], 1)
    expected = oracle_stats(*factors, targets, exact[2], scale=1.2, softcap=8.0)
    weighted(fk.TokenStats(**expected), coef).backward()
    if mode == "fused":
        loss, stats = fk.fused(hidden, weight, targets, lambda s, span: weighted(s, coef, span), **options)
    else:
        stats = fk.deferred(hidden, weight, targets, **options)
        loss = weighted(stats, coef)
    assert (stats.logp.double() - expected["logp"]).abs().max() < STATISTICS[dtype]
    scored = fk.stats(hidden, weight, targets, **options)
    assert torch.equal(scored.logp, stats.logp.detach())
    loss.backward()
    for value, reference in zip((hidden, weight, bias, u, b), exact, strict=True):
        if value is weight and frozen:
            assert weight.grad is None
        else:
            assert value.grad.dtype == value.dtype
            assert relative_error(value.grad, reference.grad) < GRADIENTS[dtype]


@pytest.mark.parametrize("mode", ["fused", "deferred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.float64])
def test_weight_gradient_goes_to_main_grad(mode, dtype, main_dtype):
    """Added in fp32 to what is there, scaled by the loss's gradient; the parameter's own gradient stays None."""
    hidden, weight, _, targets = problem(dtype, with_bias=False)
    weight = torch.nn.Parameter(weight.detach())
    start = torch.randn(V, D)
    weight.main_grad = start.to(main_dtype, copy=True)
    h, w = leaves(hidden, weight)
    (-3 * oracle_stats(h, w, targets)["logp"].sum()).backward()
    for _ in range(2):
        if mode == "fused":
            loss = fk.fused(hidden, weight, targets, lambda s, _: -s.logp.sum(), chunk=9)[0]
        else:
            loss = -fk.deferred(hidden, weight, targets, chunk=9).logp.sum()
        (3 * loss).backward()
    assert weight.grad is None and weight.main_grad.dtype == main_dtype
    assert relative_error(weight.main_grad - start, 2 * w.grad) < GRADIENTS[dtype] + 1e-6
    assert relative_error(hidden.grad, 2 * h.grad) < GRADIENTS[dtype]
    fk.stats(hidden, weight, targets)
    weight.requires_grad_(False)  # frozen: nothing is added
    before = weight.main_grad.clone()
    fk.fused(hidden, weight, targets, lambda s, _: -s.logp.sum())[0].backward()
    assert torch.equal(weight.main_grad, before)
    weight.requires_grad_().main_grad = torch.zeros(V * D)
    with pytest.raises(ValueError, match=r"main_grad \(4152,\): give \(173, 24\)"):
        fk.fused(hidden, weight, targets, lambda s, _: -s.logp.sum())
