"""The fused policy loss against full logits and autograd: every loss type, any chunks, references, entropy masks."""

from unittest import mock

import pytest
import torch
from fastalign_kernels.head import policy as module
from fastalign_kernels.head.policy import linear_policy_loss, linear_policy_loss_reference
from fastalign_kernels.head.products import Head
from fastalign_kernels.head.token_stats import LogitForm
from fastalign_kernels.losses.corrections import entropy_threshold, high_entropy_mask
from fastalign_kernels.losses.policy_gradient import (
    POLICY_LOSSES,
    PolicyObjective,
    PolicyTokens,
    policy_terms,
    token_weights,
)
from head_oracle import leaves, oracle_stats, relative_error
from tolerances import GRADIENTS

F64 = torch.float64
LENGTHS, D, V = (6, 1, 0, 9, 4), 10, 53
N = sum(LENGTHS)
ROWS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


def batch(dtype=F64):
    """Operands that need gradients, and what is known of the tokens."""
    hidden, weight, bias = (
        torch.randn(*s, dtype=F64).mul(0.7).to(dtype).requires_grad_() for s in ((N, D), (V, D), (V,))
    )
    targets = torch.randint(V, (N,))
    temperature = torch.rand(N, dtype=F64) + 0.5
    stats = oracle_stats(*leaves(hidden, weight), targets, bias.detach().double(), temperature=temperature)
    near = lambda scale: (stats["logp"].detach() + scale * torch.randn(N, dtype=F64)).to(dtype)  # noqa: E731
    known = {"old_logp": near(0.4), "ref_logp": near(0.3), "sampling_logp": near(0.3)}
    known["importance_weights"] = torch.rand(N, dtype=F64).to(dtype) + 0.5
    advantages = torch.randn(len(LENGTHS), dtype=F64)[ROWS].to(dtype)
    return (hidden, weight, bias), targets, advantages, known, LogitForm(temperature=temperature)


def expected_loss(inputs, targets, advantages, known, form, options, num_tokens=None):
    """Loss, terms and entropy from full logits in fp64."""
    objective = PolicyObjective(**options)
    hidden, weight, bias = inputs
    stats = oracle_stats(hidden, weight, targets, bias, temperature=form.temperature)
    weights = token_weights(ROWS, len(LENGTHS), objective.loss_type, num_tokens=num_tokens, max_completion_length=12)
    known = {name: None if v is None else v.double() for name, v in known.items()}
    tokens = PolicyTokens(advantages.double(), weights.double(), ROWS, **known)
    entropy, count = stats["entropy"], float(N)
    if objective.top_entropy_quantile < 1.0:
        threshold = entropy_threshold(entropy.detach(), objective.top_entropy_quantile)
        tokens.entropy_mask = high_entropy_mask(entropy.detach(), threshold)
        entropy, count = entropy * tokens.entropy_mask, tokens.entropy_mask.sum()
    terms = policy_terms(stats["logp"], tokens, objective, len(LENGTHS))
    policy_loss = (terms.loss * weights).sum()
    return policy_loss - objective.entropy_coef * entropy.sum() / count, policy_loss, terms, stats, weights


def assert_equal(batch, options, **settings):
    """Loss, gradients and per-token numbers of the fused loss are those of the oracle."""
    inputs, targets, advantages, known, form = batch
    hidden, weight, bias = inputs
    exact = leaves(*inputs)
    loss, policy_loss, terms, stats, weights = expected_loss(exact, targets, advantages, known, form, options)
    grads = torch.autograd.grad(2 * loss, exact)
    found, numbers = linear_policy_loss(
        hidden, weight, targets, advantages, rows=ROWS, num_rows=len(LENGTHS), bias=bias, form=form,
        **{"weights": weights, **known, **options, **settings},
    )  # fmt: skip
    bound = 1e-7 if hidden.dtype == F64 else 2e-5
    assert found.item() == pytest.approx(loss.item(), rel=bound, abs=bound)
    given = {name: None if v is None else v.double() for name, v in known.items()}
    tokens = PolicyTokens(advantages.double(), weights.double(), ROWS, **given)
    specified = linear_policy_loss_reference(
        exact[0],
        exact[1],
        targets,
        tokens,
        PolicyObjective(**options),
        num_rows=len(LENGTHS),
        bias=exact[2],
        form=form,
    )
    assert specified.item() == pytest.approx(loss.item(), rel=1e-9)
    assert numbers.policy_loss.item() == pytest.approx(policy_loss.item(), rel=bound, abs=bound)
    for ours, theirs in zip(torch.autograd.grad(2 * found, inputs), grads, strict=True):
        assert relative_error(ours, theirs) < 4 * GRADIENTS[hidden.dtype]
    pairs = [(numbers.logp, stats["logp"]), (numbers.entropy, stats["entropy"])]
    for name in ("loss", "ratio", "kl", "clip_low", "clip_high", "phi"):
        ours, theirs = getattr(numbers.terms, name), getattr(terms, name)
        assert (ours is None) == (theirs is None), name
        pairs += [] if ours is None else [(ours, theirs)]
    for ours, theirs in pairs:
        assert not ours.requires_grad
        assert torch.allclose(ours.double(), theirs.detach().double(), atol=bound * 10, rtol=bound * 10)


OPTIONS = {
    "plain": {},
    "all": {"beta": 0.1, "entropy_coef": 0.05, "off_policy_mask_threshold": 0.05, "delta": 1.5},
    "sequence": {"importance_sampling_level": "sequence", "beta": 0.1, "kl_estimator": "k2"},
    "entropy mask": {"top_entropy_quantile": 0.5, "entropy_coef": 0.05, "importance_sampling_level": "sequence"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_equals_full_logits(loss_type, options):
    assert_equal(batch(), {"loss_type": loss_type, **OPTIONS[options]}, chunk=10)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("options", ["all", "sequence"])
def test_any_chunk_gives_the_same(options, chunk):
    assert_equal(batch(), {"loss_type": "grpo", **OPTIONS[options]}, chunk=chunk)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo", "rloo"])
def test_fp32(loss_type):
    assert_equal(batch(torch.float32), {"loss_type": loss_type, "beta": 0.1, "entropy_coef": 0.05}, chunk=10)


@pytest.mark.parametrize("options", ["plain", "sequence"])
def test_on_policy(options):
    inputs, targets, advantages, known, form = batch()
    known = {"old_logp": None, "ref_logp": known["ref_logp"]}
    assert_equal((inputs, targets, advantages, known, form), {"loss_type": "grpo", **OPTIONS[options]}, chunk=10)


def test_each_logit_is_made_once_unless_a_row_is_longer_than_a_chunk():
    inputs, targets, advantages, known, form = batch()
    scored = {"token": 0, "sequence": 0, "long": 0}
    for name, chunk, level in (("token", 3, "token"), ("sequence", 9, "sequence"), ("long", 8, "sequence")):
        with mock.patch.object(Head, "logits", autospec=True, side_effect=Head.logits) as logits:
            loss, _ = linear_policy_loss(
                *inputs[:2], targets, advantages, rows=ROWS, num_rows=len(LENGTHS), old_logp=known["old_logp"],
                form=form, chunk=chunk, importance_sampling_level=level,
            )  # fmt: skip
            loss.backward()
        scored[name] = sum(call.args[1].stop - call.args[1].start for call in logits.call_args_list)
    assert scored == {"token": N, "sequence": N, "long": 2 * N}


def test_reference_head():
    inputs, targets, advantages, known, form = batch()
    ref_hidden, ref_weight = torch.randn(N, 4, dtype=F64), torch.randn(V, 4, dtype=F64)
    stats = oracle_stats(ref_hidden, ref_weight, targets, temperature=form.temperature)
    known["ref_logp"] = stats["logp"]
    given = {"ref_logp": None, "ref_hidden": ref_hidden, "ref_weight": ref_weight}
    assert_equal((inputs, targets, advantages, known, form), {"beta": 0.2}, **given, chunk=10)
    own = oracle_stats(inputs[0].detach() + 0.1, inputs[1].detach(), targets, temperature=form.temperature)
    known["ref_logp"] = own["logp"]
    given = {"ref_logp": None, "ref_hidden": inputs[0] + 0.1}
    assert_equal((inputs, targets, advantages, known, form), {"beta": 0.2}, **given, chunk=10)


def test_threshold_over_all_devices():
    inputs, targets, advantages, _, form = batch()
    seen = []

    def threshold_of(entropy):
        seen.append(entropy)
        return entropy.sort().values[-3]

    _, numbers = linear_policy_loss(
        *inputs[:2], targets, advantages, form=form, top_entropy_quantile=0.5, threshold_of=threshold_of
    )
    assert torch.equal(seen[0], numbers.entropy) and not seen[0].requires_grad
    assert torch.equal(numbers.entropy_mask.bool(), numbers.entropy >= numbers.entropy.sort().values[-3])
    assert numbers.entropy_mask.sum() == 3


def test_default_weights():
    inputs, targets, advantages, _, form = batch()
    run = lambda **k: linear_policy_loss(*inputs[:2], targets, advantages, form=form, **k)[0].item()  # noqa: E731
    given = {"rows": ROWS, "num_rows": len(LENGTHS)}
    assert run() == pytest.approx(-advantages.mean().item(), rel=1e-6)  # the ratio is 1
    by_row = torch.stack([advantages[r == ROWS].mean() if n else torch.zeros(()) for r, n in enumerate(LENGTHS)])
    assert run(loss_type="grpo", **given) == pytest.approx(-by_row.mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="loss_type='grpo' weighs by them"):
        run(loss_type="grpo")
    with pytest.raises(ValueError, match="max_completion_length is not given"):
        run(loss_type="dr_grpo", **given)


def test_zero_advantage_is_no_gradient_and_rows_may_be_dropped():
    inputs, targets, advantages, known, form = batch()
    advantages = torch.where(ROWS == 3, 0.0, advantages)
    weights = token_weights(ROWS, len(LENGTHS), "grpo").double()
    kept = ROWS != 3

    def run(at):
        form_at = LogitForm(temperature=form.temperature[at])
        loss, _ = linear_policy_loss(
            inputs[0][at], inputs[1], targets[at], advantages[at], weights=weights[at], rows=ROWS[at],
            num_rows=len(LENGTHS), old_logp=known["old_logp"][at], form=form_at, importance_sampling_level="sequence",
        )  # fmt: skip
        return loss.item(), torch.autograd.grad(loss, inputs[:2])

    (all_loss, all_grads), (loss, grads) = run(torch.ones_like(kept)), run(kept)
    assert not all_grads[0][~kept].any()
    assert loss == pytest.approx(all_loss, rel=1e-12)
    assert all(torch.allclose(x, y, atol=1e-14) for x, y in zip(grads, all_grads, strict=True))


@pytest.mark.parametrize("options", ["plain", "sequence", "entropy mask"])
def test_no_tokens(options):
    (hidden, weight, _), targets, advantages, known, _ = batch()
    none = {name: v[:0] for name, v in known.items()}
    loss, numbers = linear_policy_loss(
        hidden[:0], weight, targets[:0], advantages[:0], rows=ROWS[:0], num_rows=2, **none, **OPTIONS[options]
    )
    loss.backward()
    assert loss.item() == 0 and not weight.grad.any() and numbers.logp.numel() == 0


def test_without_gradient_the_numbers_are_the_same():
    inputs, targets, advantages, known, form = batch()
    run = lambda: linear_policy_loss(*inputs[:2], targets, advantages, form=form, beta=0.1, **known)  # noqa: E731
    loss, numbers = run()
    with torch.no_grad():
        again, others = run()
    assert not again.requires_grad and again.item() == loss.item()
    assert torch.equal(numbers.terms.kl, others.terms.kl)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logp": torch.zeros(2)}, r"old_logp \(2,\): give \(20,\)"),
        ({"beta": 0.1}, "beta=0.1 needs the reference"),
        ({"loss_type": "gmpo", "weights": torch.ones(N)}, "looks at whole rows"),
        ({"loss_type": "x"}, "loss_type='x'"),
        ({"rows": ROWS.flip(0), "num_rows": 5, "loss_type": "rloo"}, "rows: give non-decreasing ids from 0 to 4"),
        ({"rows": ROWS, "num_rows": 4, "loss_type": "rloo"}, "rows: give non-decreasing ids from 0 to 3"),
    ],
)
def test_refuses(change, message):
    inputs, targets, advantages, _, _ = batch()
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(*inputs[:2], targets, advantages, **change)
    with pytest.raises(TypeError):
        module.linear_policy_loss(*inputs[:2], targets, advantages, epsilon_hihg=0.3)
