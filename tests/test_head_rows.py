"""The C++ row kernels, each instruction set, against the reference in plain torch on the same logits."""

import pytest
import torch
from fastalign_kernels import OUTPUTS, LogitForm, dispatch, fused
from fastalign_kernels.head import native_rows, rows
from head_oracle import NAMES, relative_error
from tolerances import ROW_GRADIENTS, ROW_STATISTICS

FORMS = [LogitForm(), LogitForm(1.3, None, 0.7), LogitForm(0.5, 30.0, torch.linspace(0.5, 2, 9))]


def reference(logits, targets, form, coefficients):
    """Statistics and gradient in fp64."""
    temperature = form.temperature.double() if isinstance(form.temperature, torch.Tensor) else form.temperature
    form = LogitForm(form.scale, form.softcap, temperature)
    stats = rows.row_stats_reference(logits.double(), targets, form, OUTPUTS)
    grad = torch.empty(logits.shape, dtype=torch.float64)
    rows.row_gradient_reference(
        logits.double(), targets, form, stats, coefficients.map(lambda v: v.double()), out=grad
    )
    return stats, grad


def native(logits, targets, form, coefficients, isa=""):
    stats = rows.empty_stats(len(targets), OUTPUTS, torch.float32, logits.device)
    native_rows.row_stats(logits, targets, form, stats, isa)
    grad = logits.clone()
    native_rows.row_gradient(grad, targets, form, stats, coefficients, isa)
    return stats, grad


def all_coefficients(num_rows):
    return rows.Coefficients(**{name: torch.randn(num_rows) for name in NAMES})


@pytest.mark.parametrize("isa", ["avx512", "avx2", "plain"])
@pytest.mark.parametrize("form", FORMS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 7, 16, 2048, 4999])
def test_native_matches_reference(isa, form, dtype, vocabulary):
    if dispatch.native_module().row_instruction_set(isa) != isa:
        pytest.skip(f"no {isa} on this machine")
    logits = (torch.randn(9, vocabulary) * 8).to(dtype)
    targets = torch.randint(vocabulary, (9,))
    targets[:4] = logits[:4].argmax(1)
    coefficients = all_coefficients(9)
    expected, expected_grad = reference(logits, targets, form, coefficients)
    found, grad = native(logits, targets, form, coefficients, isa)
    assert (found.lse.double() - expected.lse).abs().max() < ROW_STATISTICS
    for name in NAMES:
        error = (getattr(found.stats, name).double() - getattr(expected.stats, name)).abs().max()
        assert error < ROW_STATISTICS, name
    if form.softcap is None:  # the soft-cap may make two logits equal in fp32
        assert torch.equal(found.stats.top1, expected.stats.top1)
    assert (grad.double() - expected_grad).norm() < ROW_GRADIENTS[dtype] * max(1.0, float(expected_grad.norm()))


def test_ties_go_to_the_first_token_as_in_argmax():
    logits = torch.zeros(3, 5000)
    logits[:, [70, 4000]] = 2.0
    found, _ = native(logits, torch.tensor([70, 4000, 0]), LogitForm(), all_coefficients(3))
    assert found.stats.top1.tolist() == [True, False, False]


@pytest.mark.parametrize("kernel", ["avx512", "avx2", "plain", "reference"])
@pytest.mark.parametrize("form", [LogitForm(), LogitForm(0.5, 30.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_on_another_shard(kernel, form, dtype):
    """-1: logp is -inf, top1 false, the rest as ever; the gradient lacks the target's own term."""
    if kernel != "reference" and dispatch.native_module().row_instruction_set(kernel) != kernel:
        pytest.skip(f"no {kernel} on this machine")
    logits, here = torch.randn(4, 2500).to(dtype), torch.tensor([3, 2499, 5, 6])
    here[0] = logits[0].float().argmax()
    targets = torch.where(torch.tensor([True, True, False, True]), -1, here)
    coefficients = all_coefficients(4)
    expected, expected_grad = reference(logits, here, form, coefficients)
    slope = torch.full_like(expected_grad, form.scale)
    if form.softcap:
        slope *= 1 - torch.tanh(form.scale * logits.double() / form.softcap).square()
    index = torch.tensor([0, 1, 3]), here[[0, 1, 3]]
    expected_grad[index] -= (coefficients.logp.double()[:, None] * slope)[index]
    if kernel == "reference":
        found, grad = reference(logits, targets, form, coefficients)
    else:
        found, grad = native(logits, targets, form, coefficients, kernel)
    assert found.stats.logp[[0, 1, 3]].tolist() == [-torch.inf] * 3 and not found.stats.top1.any()
    assert (found.stats.logp[2] - expected.stats.logp[2]).abs() < ROW_STATISTICS
    assert (found.lse - expected.lse).abs().max() < ROW_STATISTICS
    for name in ("entropy", "mean_logp", "mean_logit", "log_sum_p2"):
        assert (getattr(found.stats, name) - getattr(expected.stats, name)).abs().max() < ROW_STATISTICS, name
    assert relative_error(grad, expected_grad) < ROW_GRADIENTS[dtype]


def test_minus_infinity_and_nan():
    """A forbidden token (-inf) has no probability and no gradient; NaN is not swallowed."""
    logits = torch.randn(3, 2500)
    logits[:, 1000:2400] = -torch.inf
    logits[2, 3] = torch.nan
    targets = torch.tensor([1, 2, 3])
    coefficients = rows.Coefficients(logp=torch.randn(3), entropy=torch.randn(3), log_sum_p2=torch.randn(3))
    found, grad = native(logits, targets, LogitForm(), coefficients)
    keep = torch.cat([logits[:2, :1000], logits[:2, 2400:]], 1)
    two = coefficients.map(lambda v: v[:2])
    expected, expected_grad = reference(keep, targets[:2], LogitForm(), two)
    for name in ("logp", "entropy", "log_sum_p2"):
        assert (getattr(found.stats, name)[:2] - getattr(expected.stats, name)).abs().max() < ROW_STATISTICS
    assert not grad[:2, 1000:2400].any()
    assert (
        relative_error(torch.cat([grad[:2, :1000], grad[:2, 2400:]], 1), expected_grad) < ROW_GRADIENTS[torch.float32]
    )
    assert found.stats.logp[2].isnan() and found.stats.entropy[2].isnan() and grad[2].isnan().any()


def test_confident_target_keeps_its_gradient_in_bf16():
    """1 - p is formed in fp32: p itself rounds to 1 in bf16, and 1 - p would be 0."""
    logits = torch.zeros(1, 100, dtype=torch.bfloat16)
    logits[0, 3] = 12.0
    _, grad = native(logits, torch.tensor([3]), LogitForm(), rows.Coefficients(logp=torch.ones(1)))
    others = 99 * torch.tensor(-12.0, dtype=torch.float64).exp()
    assert float(grad[0, 3]) == pytest.approx(float(others / (1 + others)), rel=2**-8)


def test_rows_with_a_stride_and_threads():
    """Columns beyond the vocabulary are not touched; the number of threads changes nothing."""
    storage = torch.randn(40, 9000)
    logits, targets, coefficients = storage[:, :8192], torch.randint(8192, (40,)), all_coefficients(40)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            stats = rows.empty_stats(40, OUTPUTS, torch.float32, logits.device)
            native_rows.row_stats(logits, targets, LogitForm(), stats)
            changed = storage.clone()
            native_rows.row_gradient(changed[:, :8192], targets, LogitForm(), stats, coefficients)
            results.append((stats.stats.logp, changed))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][1][:, 8192:], storage[:, 8192:])
    _, expected = reference(logits, targets, LogitForm(), coefficients)
    assert relative_error(results[0][1][:, :8192], expected) < ROW_GRADIENTS[torch.float32]


def test_gradient_narrower_than_its_logits():
    """fp32 logits of bf16 products: the gradient in bf16 lies in the logits' memory, at the start of each row."""
    logits, targets = torch.randn(50, 333), torch.randint(333, (50,))
    coefficients = all_coefficients(50)
    _, expected = reference(logits, targets, LogitForm(), coefficients)
    stats = rows.row_stats_reference(logits, targets, LogitForm(), OUTPUTS)
    out = logits.view(torch.bfloat16)[:, :333]
    rows.row_gradient_reference(logits, targets, LogitForm(), stats, coefficients, out)
    assert out.data_ptr() == logits.data_ptr() and out.stride(0) == 666
    assert relative_error(out, expected) < ROW_GRADIENTS[torch.bfloat16]


def test_choice_of_kernels(monkeypatch):
    cpu, meta = torch.device("cpu"), torch.device("meta")
    monkeypatch.setenv("FASTALIGN_KERNELS", "auto")
    assert dispatch.backend(cpu, torch.float32) == dispatch.backend(cpu, torch.bfloat16) == "native"
    assert dispatch.backend(cpu, torch.float64) == dispatch.backend(meta, torch.float32) == "reference"
    monkeypatch.setattr(dispatch, "native_module", lambda: None)
    assert dispatch.backend(cpu, torch.float32) == "reference"
    monkeypatch.setenv("FASTALIGN_KERNELS", "native")
    with pytest.raises(ImportError, match=r"fastalign\._native"):
        dispatch.backend(cpu, torch.float32)
    monkeypatch.setenv("FASTALIGN_KERNELS", "fast")
    with pytest.raises(ValueError, match="choose one of auto, triton, native, reference"):
        dispatch.backend(cpu, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top1_is_the_first_of_equal_logits(dtype):
    """The largest logit stands twice in one block of 2048 and again in the next one."""
    logits = torch.zeros(5, 5000, dtype=dtype)
    logits[:, [3000, 3001, 4500]] = 1.0
    logits[4] = 0.0
    targets = torch.tensor([3000, 3001, 4500, 7, 0])
    stats = rows.empty_stats(5, ("logp", "top1"), torch.float32, logits.device)
    native_rows.row_stats(logits, targets, LogitForm(), stats)
    assert stats.stats.top1.tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("vocabulary", [331, 332, 336])
def test_memory_between_rows_of_logits_does_not_show(vocabulary):
    """bf16 products on CPU read columns in pairs, behind an odd vocabulary one that belongs to no row."""
    hidden = torch.randn(59, 32).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, 32).bfloat16()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        loss, _ = fused(hidden, weight, torch.zeros(59, dtype=torch.int64), lambda stats, span: -stats.logp.sum())
        assert torch.autograd.grad(loss, hidden)[0].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
