"""The row kernels in Triton against the reference in fp64 on the same logits, every output and every coefficient."""

import pytest
import torch
from fastalign_kernels import LogitForm
from fastalign_kernels.head import rows
from fastalign_kernels.head.triton_rows import STATISTICS
from head_oracle import NAMES
from tolerances import ROW_GRADIENTS, ROW_STATISTICS
from triton_checks import DEVICE, assert_guards, guarded, relative_error, triton_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = {
    "plain": lambda count: LogitForm(),
    "scaled": lambda count: LogitForm(1.3, None, 0.7),
    "one temperature": lambda count: LogitForm(0.9, None, torch.tensor(1.7, device=DEVICE)),
    "softcap": lambda count: LogitForm(0.5, 30.0, torch.linspace(0.5, 2, count, device=DEVICE)),
}


def expected_of(logits, targets, form, coefficients=None):
    """Statistics and gradient of the reference in fp64."""
    temperature = form.temperature.double() if isinstance(form.temperature, torch.Tensor) else form.temperature
    form = LogitForm(form.scale, form.softcap, temperature)
    stats = rows.row_stats_reference(logits.double(), targets, form, STATISTICS)
    grad = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    given = (coefficients or rows.Coefficients()).map(lambda v: v.double())
    rows.row_gradient_reference(logits.double(), targets, form, stats, given, grad)
    return stats, grad


def found_of(logits, targets, form, outputs=STATISTICS):
    stats = rows.empty_stats(len(targets), outputs, torch.float32, logits.device)
    with triton_backend():
        rows.row_stats(logits, targets, form, outputs, stats)
    return stats


def gradient_of(logits, targets, form, stats, coefficients, dtype):
    with triton_backend():
        return rows.row_gradient(logits, targets, form, stats, coefficients, dtype)


def coefficients_of(num_rows, names=NAMES):
    return rows.Coefficients(**{name: torch.randn(num_rows, device=DEVICE) for name in names})


def draw(num_rows, vocabulary, dtype, spread=5.0):
    """Logits, and targets of which the first is the most probable token."""
    logits = (torch.randn(num_rows, vocabulary, device=DEVICE) * spread).to(dtype)
    targets = torch.randint(vocabulary, (num_rows,), device=DEVICE)
    targets[:1] = logits[:1].float().argmax(1)
    return logits, targets


def assert_statistics(found, expected, bound=ROW_STATISTICS):
    assert (found.lse.double() - expected.lse).abs().max() < bound
    for name in NAMES:
        error = getattr(found.stats, name).double() - getattr(expected.stats, name)
        assert error.abs().max() < bound, name
    assert torch.equal(found.stats.top1, expected.stats.top1)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 37, 2500])
def test_matches_the_reference(vocabulary, dtype, form):
    form = form(5)
    logits, targets = draw(5, vocabulary, dtype)
    coefficients = coefficients_of(5)
    expected, expected_grad = expected_of(logits, targets, form, coefficients)
    found = found_of(logits, targets, form)
    # softcap: tanh is exact to 1e-7 of a logit of 30 / 0.5
    assert_statistics(found, expected, ROW_STATISTICS * (2 if form.softcap else 1))
    for out_dtype in {dtype, torch.bfloat16, torch.float16} if dtype == torch.float32 else {dtype}:
        memory = logits.clone()
        grad = gradient_of(memory, targets, form, found, coefficients, out_dtype)
        assert grad.data_ptr() == memory.data_ptr() and grad.dtype == out_dtype and grad.shape == logits.shape
        size = max(1.0, float(expected_grad.norm()))
        bound = ROW_GRADIENTS[torch.bfloat16 if out_dtype == torch.float16 else out_dtype]
        assert (grad.double() - expected_grad).norm() < bound * size


@pytest.mark.parametrize("name", NAMES)
def test_each_coefficient_alone(name):
    """What the other coefficients need (entropy, log_sum_p2) may then be missing."""
    logits, targets = draw(4, 700, torch.float32)
    coefficients = coefficients_of(4, [name])
    _, expected = expected_of(logits, targets, LogitForm(), coefficients)
    found = found_of(logits, targets, LogitForm(), ("logp", name))
    assert [k for k, v in vars(found.stats).items() if v is not None] == [n for n in STATISTICS if n in ("logp", name)]
    grad = gradient_of(logits.clone(), targets, LogitForm(), found, coefficients, torch.float32)
    assert relative_error(grad, expected) < ROW_GRADIENTS[torch.float32]


@pytest.mark.parametrize("outputs", [("logp",), ("logp", "top1"), ("mean_logp",), ("log_sum_p2", "entropy")])
def test_outputs_not_asked_for_change_nothing(outputs):
    logits, targets = draw(3, 600, torch.float32)
    everything, some = found_of(logits, targets, LogitForm()), found_of(logits, targets, LogitForm(), outputs)
    assert torch.equal(some.lse, everything.lse)
    for name in {"logp", *outputs}:
        assert torch.equal(getattr(some.stats, name), getattr(everything.stats, name)), name


@pytest.mark.parametrize("gap", [0, 3, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_is_read_or_written(dtype, gap):
    """NaN all around the logits and between rows; gap 24 keeps rows on 16 bytes, the others do not."""
    logits, targets = draw(5, 616 if gap == 24 else 613, dtype)
    coefficients = coefficients_of(5)
    expected, expected_grad = expected_of(logits, targets, LogitForm(), coefficients)
    memory = guarded(logits, gap)
    found = rows.RowStats(rows.empty_stats(5, STATISTICS, torch.float32, logits.device).stats, torch.empty(0))
    lse = guarded(torch.zeros(5, device=DEVICE))
    logp, entropy = guarded(torch.zeros(5, device=DEVICE)), guarded(torch.zeros(5, device=DEVICE))
    found.lse, found.stats.logp, found.stats.entropy = lse, logp, entropy
    with triton_backend():
        rows.row_stats(memory, targets, LogitForm(), STATISTICS, found)
    assert_statistics(found, expected)
    for vector in (lse, logp, entropy):
        assert_guards(vector)
    assert_guards(memory, gap)
    grad = gradient_of(memory, targets, LogitForm(), found, coefficients, dtype)
    bound = ROW_GRADIENTS[torch.float32 if dtype == torch.float32 else torch.bfloat16]
    assert relative_error(grad, expected_grad) < bound
    assert_guards(memory, gap)


@pytest.mark.parametrize("vocabulary", [613, 2048, 4999])
def test_narrow_gradient_in_the_memory_of_wide_logits(vocabulary):
    """Each row lies at the start of its logits' row; rows have a gap, which stays as it is."""
    logits, targets = draw(3, vocabulary, torch.float32)
    coefficients = coefficients_of(3)
    _, expected = expected_of(logits, targets, LogitForm(), coefficients)
    found = found_of(logits, targets, LogitForm())
    memory = guarded(logits, 5)
    grad = gradient_of(memory, targets, LogitForm(), found, coefficients, torch.bfloat16)
    assert grad.data_ptr() == memory.data_ptr() and grad.stride() == (2 * (vocabulary + 5), 1)
    assert relative_error(grad, expected) < ROW_GRADIENTS[torch.bfloat16]
    assert_guards(memory, 5)


def test_no_rows():
    logits, targets = draw(0, 40, torch.float32)
    found = found_of(logits, targets, LogitForm())
    grad = gradient_of(logits, targets, LogitForm(), found, coefficients_of(0), torch.float32)
    assert found.stats.logp.shape == (0,) and grad.shape == (0, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [LogitForm(), LogitForm(1.0, 30.0)], ids=["plain", "softcap"])
def test_target_on_another_shard(form, dtype):
    """-1: logp is -inf, top1 false, the rest as ever; the gradient is that of a loss on the other columns alone."""
    logits, _ = draw(4, 900, dtype)
    here = torch.tensor([3, 4, 5, 6], device=DEVICE)
    targets = torch.where(torch.tensor([True, False, True, False], device=DEVICE), -1, here)
    coefficients = coefficients_of(4)
    expected, expected_grad = expected_of(logits, here, form, coefficients)
    slope = 1 - torch.tanh(logits.double() / 30).square() if form.softcap else torch.ones_like(expected_grad)
    index = torch.arange(4, device=DEVICE)[targets < 0], here[targets < 0]
    expected_grad[index] -= (coefficients.logp.double()[:, None] * slope)[index]
    found = found_of(logits, targets, form)
    assert found.stats.logp[::2].tolist() == [-torch.inf] * 2 and not found.stats.top1[::2].any()
    found.stats.logp[::2] = expected.stats.logp[::2].float()
    found.stats.top1[::2] = expected.stats.top1[::2]
    assert_statistics(found, expected)
    grad = gradient_of(logits.clone(), targets, form, found, coefficients, dtype)
    assert relative_error(grad, expected_grad) < ROW_GRADIENTS[dtype]


@pytest.mark.parametrize("size", [200.0, 1e4])
def test_extreme_logits(size):
    """One logit far above or below the others, first in one direction, then in the other, in late and early blocks."""
    logits = torch.randn(6, 5000, device=DEVICE)
    logits[0, 10], logits[1, 4990], logits[2, 10], logits[3, 4990] = size, size, -size, -size
    logits[4] -= size
    logits[5, 10], logits[5, 4990] = -size, size
    targets = torch.tensor([10, 7, 10, 7, 0, 10], device=DEVICE)
    coefficients = coefficients_of(6)
    expected, expected_grad = expected_of(logits, targets, LogitForm(), coefficients)
    found = found_of(logits, targets, LogitForm())
    for name in ("lse", *NAMES):
        one = found.lse if name == "lse" else getattr(found.stats, name)
        exact = expected.lse if name == "lse" else getattr(expected.stats, name)
        scale = (expected.lse if name == "mean_logp" else exact).abs().clamp_min(30)  # mean_logit - lse
        assert ((one - exact).abs() / scale).max() < 1e-6, name
    assert torch.equal(found.stats.top1, expected.stats.top1)
    grad = gradient_of(logits.clone(), targets, LogitForm(), found, coefficients, torch.float32)
    # log p is the difference of a logit and lse: fp32 holds 1e4 to 5e-4, in the reference too
    assert relative_error(grad, expected_grad) < max(ROW_GRADIENTS[torch.float32], size * 1e-7)


def test_minus_infinity_and_nan():
    """A forbidden token (-inf) has no probability and no gradient, whole blocks of them too; NaN is not swallowed."""
    logits = torch.randn(4, 5000, device=DEVICE)
    logits[:, :2300] = -torch.inf
    logits[:, 2400:4900] = -torch.inf
    logits[2, 4950] = logits[3, 2350] = torch.nan
    targets = torch.tensor([2301, 4901, 4902, 4903], device=DEVICE)
    coefficients = coefficients_of(4, ["logp", "entropy", "log_sum_p2"])
    found = found_of(logits, targets, LogitForm())
    grad = gradient_of(logits.clone(), targets, LogitForm(), found, coefficients, torch.float32)
    keep = torch.cat([logits[:2, 2300:2400], logits[:2, 4900:]], 1)
    two = coefficients.map(lambda v: v[:2])
    expected, expected_grad = expected_of(keep, torch.tensor([1, 101], device=DEVICE), LogitForm(), two)
    for name in ("logp", "entropy", "log_sum_p2"):
        assert (getattr(found.stats, name)[:2] - getattr(expected.stats, name)).abs().max() < ROW_STATISTICS, name
    assert not grad[:2, :2300].any() and not grad[:2, 2400:4900].any()
    kept = torch.cat([grad[:2, 2300:2400], grad[:2, 4900:]], 1)
    assert relative_error(kept, expected_grad) < ROW_GRADIENTS[torch.float32]
    for name in ("logp", "entropy", "log_sum_p2", "mean_logp"):
        assert getattr(found.stats, name)[2:].isnan().all(), name
    assert found.lse[2:].isnan().all() and grad[2:].isnan().any(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_top1_is_the_first_of_equal_logits(dtype):
    """The largest logit stands twice in one lane, in the next lane, and in the next block."""
    logits = torch.zeros(7, 5000, dtype=dtype, device=DEVICE)
    logits[:, [3000, 3001, 3020, 4500]] = 1.0
    logits[6] = -1.0
    targets = torch.tensor([3000, 3001, 3020, 4500, 2, 4999, 0], device=DEVICE)
    assert found_of(logits, targets, LogitForm()).stats.top1.tolist() == [True, *[False] * 5, True]


def test_confident_target_keeps_its_gradient_in_bf16():
    """1 - p is formed in fp32: p itself rounds to 1 in bf16, and 1 - p would be 0."""
    logits = torch.zeros(1, 100, device=DEVICE)
    logits[0, 3] = 12.0
    targets = torch.tensor([3], device=DEVICE)
    one = rows.Coefficients(logp=torch.ones(1, device=DEVICE))
    found = found_of(logits, targets, LogitForm(), ("logp",))
    grad = gradient_of(logits, targets, LogitForm(), found, one, torch.bfloat16)
    others = 99 * torch.tensor(-12.0, dtype=torch.float64).exp()
    assert float(grad[0, 3]) == pytest.approx(float(others / (1 + others)), rel=2**-7)


def test_strided_arguments():
    """Expanded coefficients, every second target and temperature, a slice of a larger set of statistics."""
    logits, targets = draw(4, 300, torch.float32)
    spread, temperatures = targets.repeat_interleave(2)[::2], torch.linspace(0.5, 2, 8, device=DEVICE)[::2]
    form = LogitForm(1.0, None, temperatures)
    coefficients = rows.Coefficients(logp=torch.tensor(0.3, device=DEVICE).expand(4))
    expected, expected_grad = expected_of(logits, targets, form, coefficients)
    larger = rows.empty_stats(9, STATISTICS, torch.float32, logits.device)
    part = larger.slice(slice(3, 7))
    with triton_backend():
        rows.row_stats(logits, spread, form, STATISTICS, part)
    assert_statistics(larger.slice(slice(3, 7)), expected)
    grad = gradient_of(logits, spread, form, part, coefficients, torch.float32)
    assert relative_error(grad, expected_grad) < ROW_GRADIENTS[torch.float32]
