"""Divergence from a teacher's head against autograd in fp64, TRL's losses and worked cases; the Triton kernel too."""

import os
from unittest import mock

import pytest
import torch
from fastalign_kernels.head.divergence import (
    DivergenceStats,
    linear_divergence,
    linear_divergence_reference,
    linear_topk_divergence,
    linear_topk_divergence_reference,
    row_divergence,
)
from fastalign_kernels.head.token_stats import LogitForm
from fastalign_kernels.losses.divergence import DIVERGENCES, support_divergence, topk_divergence
from head_oracle import leaves, relative_error
from tolerances import GRADIENTS, STATISTICS

N, D, E, V = 21, 8, 12, 97
PLAIN = (LogitForm(), LogitForm())
BOUNDS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def operands(dtype=torch.float64, scale=1.0):
    """Student hidden, weight, bias; teacher hidden, weight; weights, one of them 0."""
    shapes = (N, D), (V, D), (V,), (N, E), (V, E)
    found = [(torch.randn(*shape, dtype=torch.float64) * scale).to(dtype) for shape in shapes]
    weights = torch.rand(N, dtype=torch.float64)
    weights[3] = 0.0
    return [v.requires_grad_() for v in found], weights


def oracle(inputs, divergence, beta, *, temperature=1.0, forms=PLAIN):
    """Per-token divergence of fp64 inputs from full logits."""
    h, w, b, th, tw = inputs
    logp = []
    for m, form in zip((h @ w.t() + b, th @ tw.t()), forms, strict=True):
        z = m * form.scale
        z = z if form.softcap is None else form.softcap * torch.tanh(z / form.softcap)
        logp.append(
            torch.log_softmax(z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature), -1)
        )
    return support_divergence(*logp, divergence, beta), torch.distributions.Categorical(logits=logp[0]).entropy()


@pytest.mark.parametrize("form", ["plain", "formed"])
@pytest.mark.parametrize(
    ("divergence", "beta"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_equals_autograd(dtype, divergence, beta, form):
    dtype = BOUNDS[dtype]
    inputs, weights = operands(dtype, 0.7)
    h, w, b, th, tw = inputs
    settings = {}
    forms = PLAIN
    if form == "formed":
        forms = (LogitForm(0.5, 6.0), LogitForm(1.5))
        settings["temperature"] = torch.rand(N, dtype=torch.float64) + 0.5
    loss, stats = linear_divergence(
        h, w, th, tw, divergence=divergence, beta=beta, weights=weights, student_bias=b, chunk=8,
        student_form=forms[0], teacher_form=forms[1], **settings,
    )  # fmt: skip
    (3 * loss).backward()
    exact = leaves(*inputs)
    values, entropy = oracle(exact, divergence, beta, forms=forms, **settings)
    (3 * (values * weights).sum()).backward()
    bound = STATISTICS[dtype] * (1 if dtype.itemsize > 2 else 2)  # two heads are rounded
    assert torch.allclose(stats.divergence.double(), values, atol=bound, rtol=1e-3 if dtype.itemsize == 2 else 1e-7)
    assert torch.allclose(stats.entropy.double(), entropy, atol=bound)
    assert loss.item() == pytest.approx((values * weights).sum().item(), rel=1e-7 if dtype.itemsize == 8 else 1e-2)
    for ours, theirs in zip(inputs[:3], exact, strict=False):
        assert relative_error(ours.grad, theirs.grad) < GRADIENTS[dtype] * (1 if dtype.itemsize > 2 else 2)
    assert th.grad is None and tw.grad is None
    assert not h.grad[3].any()
    specified = linear_divergence_reference(
        exact[0], exact[1], exact[3], exact[4], divergence=divergence, beta=beta, student_bias=exact[2],
        student_form=forms[0], teacher_form=forms[1], **settings,
    )  # fmt: skip
    assert torch.allclose(specified, values)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence):
    h, w = torch.randn(3, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    th, tw = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    logp = torch.log_softmax(th @ tw.t(), -1).topk(3)
    inputs = (h.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: linear_divergence(h, w, th, tw, divergence=divergence, beta=0.3, temperature=0.8)[0], inputs
    )
    for add_tail in (True, False):
        options = {"divergence": divergence, "beta": 0.3, "add_tail": add_tail, "temperature": 0.8}
        assert torch.autograd.gradcheck(
            lambda h, w, o=options: linear_topk_divergence(h, w, logp.values, logp.indices, **o)[0], inputs
        )


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_equals_gkd_of_trl(beta):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    (h, w, b, th, tw), _ = operands()
    loss, _ = linear_divergence(h, w, th, tw, divergence="jsd", beta=beta, temperature=0.7, student_bias=b)
    ours = torch.autograd.grad(loss, (h, w, b))
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        (h @ w.t() + b)[None], (th @ tw.t()).detach()[None], labels=torch.zeros(1, N), beta=beta, temperature=0.7
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for found, theirs in zip(ours, torch.autograd.grad(expected, (h, w, b)), strict=True):
        assert torch.allclose(found, theirs, atol=1e-12)


@pytest.mark.parametrize("add_tail", [True, False])
def test_topk_equals_trl(add_tail):
    """Forward KL: its beta-0 path over the teacher's support; and every divergence against autograd."""
    module = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    (h, w, b, th, tw), weights = operands()
    top = torch.log_softmax(th @ tw.t(), -1).detach().topk(6)
    values, indices = top.values.clone(), top.indices.clone()
    values[::2, 4:] = -torch.inf  # missing entries, which may name any token
    indices[::2, 4:] = 0
    trainer = module.ServerDistillationTrainer.__new__(module.ServerDistillationTrainer)
    trainer.loss_add_tail = add_tail
    logp = torch.log_softmax(h @ w.t() + b, -1)
    expected = trainer._compute_server_forward_kl_loss(
        {"topk_logprobs": values[None], "topk_token_ids": indices[None]}, logp[None], torch.zeros(1, N)
    )
    loss, _ = linear_topk_divergence(h, w, values, indices, add_tail=add_tail, student_bias=b, chunk=8)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for found, theirs in zip(
        torch.autograd.grad(loss, (h, w, b)), torch.autograd.grad(expected, (h, w, b)), strict=True
    ):
        assert torch.allclose(found, theirs, atol=1e-11)
    for divergence in DIVERGENCES:
        options = {"divergence": divergence, "beta": 0.3, "add_tail": add_tail}
        loss, stats = linear_topk_divergence(h, w, values, indices, weights=weights, chunk=8, **options)
        exact = topk_divergence(
            torch.log_softmax(h @ w.t(), -1).gather(1, indices), values, divergence, 0.3, add_tail=add_tail
        )
        assert torch.equal(linear_topk_divergence_reference(h, w, values, indices, **options), exact)
        assert torch.allclose(stats.divergence, exact.detach(), atol=1e-12)
        found, theirs = torch.autograd.grad(loss, (h, w)), torch.autograd.grad((exact * weights).sum(), (h, w))
        assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(found, theirs, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_topk_precision_and_form(dtype):
    dtype = BOUNDS[dtype]
    inputs, weights = operands(dtype, 0.7)
    top = torch.log_softmax((inputs[3].double() @ inputs[4].double().t()) / 1.3, -1).detach().topk(5)
    form = LogitForm(0.5, 6.0)
    loss, stats = linear_topk_divergence(
        *inputs[:2], top.values, top.indices, weights=weights, temperature=1.3, student_form=form, divergence="jsd"
    )
    loss.backward()
    h, w = leaves(*inputs[:2])
    z = 6.0 * torch.tanh(0.5 * (h @ w.t()) / 6.0) / 1.3
    values = topk_divergence(torch.log_softmax(z, -1).gather(1, top.indices), top.values, "jsd")
    (values * weights).sum().backward()
    assert torch.allclose(stats.divergence.double(), values, atol=STATISTICS[dtype])
    assert relative_error(inputs[0].grad, h.grad) < GRADIENTS[dtype]
    assert relative_error(inputs[1].grad, w.grad) < GRADIENTS[dtype]


def test_whole_vocabulary_as_support_is_the_full_divergence():
    (h, w, b, th, tw), _ = operands()
    teacher = torch.log_softmax(th @ tw.t(), -1).detach().topk(V)
    full = linear_divergence(h, w, th, tw, student_bias=b)[0]
    support = linear_topk_divergence(h, w, teacher.values, teacher.indices, student_bias=b, add_tail=False)[0]
    assert support.item() == pytest.approx(full.item(), rel=1e-10)


def test_equal_heads_have_no_divergence_and_no_gradient():
    (h, w, *_), _ = operands()
    for divergence in DIVERGENCES:
        loss, _ = linear_divergence(h, w, h, w, divergence=divergence)
        grads = torch.autograd.grad(loss, (h, w))
        assert abs(loss.item()) < 1e-14 and all(g.abs().max() < 1e-14 for g in grads)


def test_low_rank_adds_to_the_student():
    (h, w, b, th, tw), weights = operands()
    u, v = torch.randn(N, 3, dtype=torch.float64), torch.randn(V, 3, dtype=torch.float64).requires_grad_()
    loss, _ = linear_divergence(h, w, th, tw, weights=weights, student_bias=b, student_low_rank=(u, v), chunk=8)
    found = torch.autograd.grad(loss, (h, v))
    logp = torch.log_softmax(h @ w.t() + b + u @ v.t(), -1)
    exact = (support_divergence(logp, torch.log_softmax(th @ tw.t(), -1).detach(), "forward_kl") * weights).sum()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-10)
    assert all(
        torch.allclose(x, y, atol=1e-12) for x, y in zip(found, torch.autograd.grad(exact, (h, v)), strict=True)
    )


def test_no_tokens_and_no_gradient():
    (h, w, _, th, tw), _ = operands(torch.float32)
    loss, stats = linear_divergence(h[:0], w, th[:0], tw)
    loss.backward()
    assert loss.item() == 0 and not w.grad.any() and stats.divergence.numel() == 0
    loss, _ = linear_topk_divergence(h[:0], w, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    assert loss.item() == 0
    with torch.no_grad():
        loss, stats = linear_divergence(h, w, th, tw)
    assert not loss.requires_grad and loss.item() == pytest.approx(stats.divergence.mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_weight": torch.zeros(V + 3, E)}, f"teacher_weight has {V + 3} rows, student_weight {V}"),
        ({"teacher_hidden": torch.zeros(2, E)}, "teacher_hidden has 2 rows"),
        ({"divergence": "kl"}, "divergence='kl': choose one of forward_kl"),
        ({"divergence": "jsd", "beta": 2.0}, "beta=2.0"),
        ({"weights": torch.zeros(2)}, r"weights \(2,\)"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": torch.ones(2)}, r"temperature \(2,\)"),
        ({"student_hidden": torch.zeros(N, 3)}, "same D"),
    ],
)
def test_refuses(change, message):
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    arguments = dict(zip(names, (torch.zeros(s) for s in ((N, D), (V, D), (N, E), (V, E))), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        linear_divergence(**arguments)
    if "teacher_weight" in change:
        with pytest.raises(ValueError, match="teacher_indices"):
            linear_topk_divergence(*(arguments[n] for n in names[:2]), torch.zeros(N, 3), torch.zeros(N, 2).long())


def device_of(backend):
    """Compiled kernels need the card, the interpreter and the reference do not."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def _extreme(vocabulary, backend):
    """Rows with logits of size 200, a masked column in the teacher, in both, one certain token, equal rows."""
    z, u = torch.randn(2, 6, vocabulary).to(device_of(backend))
    z[0], u[0] = z[0] * 70, u[0] * 70
    u[1, 5] = -torch.inf
    z[1, 5] = -150.0
    z[2, 7] = u[2, 7] = -torch.inf
    z[3, 2] = u[3, 3] = 300.0
    z[4], u[4] = z[4] * 1e-3 + 1000, z[4] * 1e-3 - 1000
    return z, u


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_rows(divergence, backend):
    z, u = _extreme(130, backend)
    z64, u64 = z.double().requires_grad_(), u.double()
    exact = support_divergence(z64.log_softmax(-1), u64.log_softmax(-1), divergence, 0.3)
    exact.sum().backward()
    out = DivergenceStats(*torch.empty(2, 6, device=z.device))
    with _on(backend):
        grad = row_divergence(
            z, u, LogitForm(), LogitForm(), divergence, 0.3, torch.ones_like(out.entropy), out, torch.float32
        )
    # row 0: a last bit of 1e-5 in logits of 200; row 4: of 6e-5 in logits of 1000
    assert torch.allclose(out.divergence.double(), exact, atol=3e-4, rtol=1e-5)
    assert (grad.double() - z64.grad.nan_to_num(0.0)).abs().max() < 3e-4
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_confident_rows_that_nearly_agree(divergence, backend):
    """Logits of size 30, p - q of 1e-3 and less: the gradient does not drown in the rounding of p."""
    z = torch.randn(4, 1500, device=device_of(backend)) * 30
    u = z + torch.randn_like(z) * 0.05
    exact = z.double().requires_grad_()
    support_divergence(exact.log_softmax(-1), u.double().log_softmax(-1), divergence).sum().backward()
    out = DivergenceStats(*torch.empty(2, 4, device=z.device))
    with _on(backend):
        grad = row_divergence(
            z, u, LogitForm(), LogitForm(), divergence, 0.5, torch.ones_like(out.entropy), out, torch.float32
        )
    assert relative_error(grad, exact.grad) < 1e-3


def _on(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    return mock.patch.dict(os.environ, {"FASTALIGN_KERNELS": backend})


@pytest.mark.parametrize(("dtypes", "form"), [("fp32 fp32", "plain"), ("fp32 bf16", "formed"), ("bf16 bf16", "plain")])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_triton_rows(divergence, dtypes, form):
    from triton_checks import DEVICE, assert_guards, guarded

    rows, vocabulary = 3, 2350  # more than one block, divides none
    logits, dtype = (BOUNDS[name] for name in dtypes.split())
    # a narrower gradient lies in the memory of the logits, row by row
    z, u = (torch.randn(2, rows, vocabulary, device=DEVICE) * 3).to(logits)
    forms = PLAIN
    if form == "formed":
        temperature = torch.rand(rows, device=DEVICE) + 0.5
        forms = (LogitForm(0.5, 6.0, temperature), LogitForm(1.5, 4.0, temperature))
    weights = torch.rand(rows, device=DEVICE)
    exact = z.double().cpu().requires_grad_()
    logp = []
    for m, f in zip((exact, u.double().cpu()), forms, strict=True):
        x = m * f.scale
        x = x if f.softcap is None else f.softcap * torch.tanh(x / f.softcap)
        logp.append(torch.log_softmax(x / (temperature.double().cpu()[:, None] if form == "formed" else 1.0), -1))
    values = support_divergence(*logp, divergence, 0.3)
    (values * weights.double().cpu()).sum().backward()
    gap = 6 if logits == torch.float32 else 12
    student, teacher = guarded(z, gap), guarded(u, gap)
    stats = DivergenceStats(*(guarded(torch.empty(rows, device=DEVICE)) for _ in range(2)))
    with _on("triton"):
        grad = row_divergence(student, teacher, *forms, divergence, 0.3, weights, stats, None)
        assert grad is None and torch.equal(student, z)  # no gradient asked for: the logits stay
        grad = row_divergence(student, teacher, *forms, divergence, 0.3, weights, stats, dtype)
    assert_guards(student, gap)
    assert_guards(teacher, gap)
    assert_guards(stats.divergence)
    assert torch.allclose(stats.divergence.double().cpu(), values, atol=1e-5)
    entropy = torch.distributions.Categorical(logits=logp[0]).entropy()
    assert torch.allclose(stats.entropy.double().cpu(), entropy, atol=1e-5)
    bound = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(grad.cpu(), exact.grad) < bound


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_whole_op_in_triton(divergence):
    inputs, weights = operands(torch.float32, 0.7)
    inputs = [v.detach().to(device_of("triton")).requires_grad_() for v in inputs]
    weights = weights.to(inputs[0].device)
    h, w, b, th, tw = inputs
    settings = {"divergence": divergence, "weights": weights, "student_bias": b, "chunk": 8}
    with _on("triton"):
        loss, _ = linear_divergence(h, w, th, tw, **settings)
        loss.backward()
    exact = leaves(*inputs)
    values, _ = oracle(exact, divergence, 0.5)
    (values * weights).sum().backward()
    for ours, theirs in zip(inputs[:3], exact, strict=False):
        assert relative_error(ours.grad, theirs.grad) < GRADIENTS[torch.float32]
