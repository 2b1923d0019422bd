"""Preference losses: numbers worked out by hand, gradients by differences, and TRL's own loss code."""

import math

import pytest
import torch
from fastalign_kernels.losses.odds import cpo_loss, log_odds_ratio, orpo_loss, tpo_loss
from fastalign_kernels.losses.preference import PREFERENCE_LOSSES, preference_loss
from fastalign_kernels.losses.reward import bradley_terry_loss, process_reward_loss, step_labels
from fastalign_kernels.losses.sequences import ld_weights, row_sums, wpo_weights
from fastalign_kernels.losses.unpaired import bco_loss, density_ratio_weights, kl_baseline, kto_loss, running_mean

LN3, LN9 = math.log(3), math.log(9)
log = math.log

# beta = 1/2, log-ratios +-2 ln 3: beta rho = +-ln 3 with sigma 3/4 and 1/4, beta d = +-ln 9 with sigma 0.9 and 0.1.
# The first pair is ordered right, the second has its answers exchanged; lengths 2 (chosen) and 4 (rejected), tau 1.
BY_HAND = {
    "sigmoid": (-log(0.9), -log(0.1)),
    "hinge": (0.0, 1 + LN9),
    "ipo": ((1.5 * LN3 - 1) ** 2, (-1.5 * LN3 - 1) ** 2),
    "exo_pair": (0.0, 0.8 * LN9),
    "nca_pair": (-log(0.75) - 0.5 * log(0.25) - 0.5 * log(0.75), -log(0.25) - 0.5 * log(0.75) - 0.5 * log(0.25)),
    "robust": ((-0.9 * log(0.9) + 0.1 * log(0.1)) / 0.8, (-0.9 * log(0.1) + 0.1 * log(0.9)) / 0.8),
    "bco_pair": (-2 * log(0.75), -2 * log(0.25)),
    "sppo_hard": (2 * (2 * LN3 - 1) ** 2, 2 * (2 * LN3 + 1) ** 2),
    "aot": (-0.9 * log(0.1) - 0.1 * log(0.9), -0.9 * log(0.9) - 0.1 * log(0.1)),  # sorted: smallest margin first
    "aot_unpaired": (log(2), log(2)),  # both answers have the same log-ratios, in another order
    "apo_zero": (0.5, 1.5),
    "apo_down": (0.85, 1.15),
    "discopop": (-0.1 * log(0.9) + 0.9 / 9, -0.9 * log(0.1) + 0.1 * 9),
    "sft": (-LN3, LN3),
    "sigmoid_norm": (log(1 + 3**-0.75), log(1 + 3**0.75)),
}
MIX = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
TRL_CASES = [{"loss_type": [name]} for name in PREFERENCE_LOSSES if name not in ("exo_pair", "robust")]
TRL_CASES += [{"loss_type": [name], "label_smoothing": 0.1} for name in ("exo_pair", "robust", "aot", "aot_unpaired")]
TRL_CASES += [{"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")]
TRL_CASES += [{"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}]
TRL_CASES += [{"f_divergence_type": "forward_kl", "loss_type": ["ipo", "sft"], "beta": 0.3}]
TRL_CASES += [MIX, MIX | {"ld_alpha": 0.3}, {"ld_alpha": 0.5, "loss_type": ["ipo"]}, {"use_weighting": True}]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def settings_of(case):
    return {key: case[key] for key in case if key not in ("ld_alpha", "use_weighting")}


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_preference_losses_by_hand(name):
    chosen, rejected = tensor(2 * LN3, -2 * LN3), tensor(-2 * LN3, 2 * LN3)
    smoothing = 0.1 if name in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0
    lengths = {"chosen_lengths": torch.tensor([2, 2]), "rejected_lengths": torch.tensor([4, 4])}
    settings = {"beta": 0.5, "label_smoothing": smoothing, "discopop_tau": 1.0, **lengths}
    found = preference_loss(chosen, rejected, torch.zeros(2), torch.zeros(2), loss_type=name, **settings)
    assert found.losses.tolist() == pytest.approx(list(BY_HAND[name]), abs=1e-12)
    assert found.chosen_rewards.tolist() == pytest.approx([LN3, -LN3])
    assert found.margins.tolist() == pytest.approx([LN9, -LN9]) and found.accuracies.tolist() == [1.0, 0.0]


def test_divergences_mixes_and_weights_by_hand():
    chosen, rejected, zero = tensor(log(2)), tensor(log(0.5)), tensor(0.0)
    for name, margin in {  # f'(2) - f'(1/2)
        "reverse_kl": log(4),
        "forward_kl": (1 - 1 / 2) - (1 - 2),
        "js_divergence": log(4 / 3) - log(2 / 3),
        "alpha_divergence": (2**-0.5 - 2**0.5) / -0.5,
    }.items():
        found = preference_loss(chosen, rejected, zero, zero, beta=1.0, f_divergence_type=name).losses
        assert found.item() == pytest.approx(log(1 + math.exp(-margin)), rel=1e-12)
    both = {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.5, 2.0], "beta": 0.5}
    found = preference_loss(chosen, rejected, zero, zero, weights=tensor(0.25), **both).losses
    assert found.item() == pytest.approx(0.25 * (0.5 * log(1 + 0.5) + 2 * (1 - log(2))), rel=1e-12)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_policy_at_the_reference_and_gradients(name):
    values = [torch.randn(5, dtype=torch.float64, requires_grad=i < 2) for i in range(4)]
    lengths = {"chosen_lengths": torch.arange(1, 6), "rejected_lengths": torch.arange(3, 8)}
    smoothing = 0.1 if name in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0
    settings = {"loss_type": name, "label_smoothing": smoothing, "beta": 0.7, "discopop_tau": 0.5, **lengths}
    assert torch.autograd.gradcheck(lambda *v: preference_loss(*v, **settings).losses, values)
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
        if name in ("sigmoid", "ipo", "robust"):
            own = {**settings, "f_divergence_type": divergence}
            assert torch.autograd.gradcheck(lambda *v, own=own: preference_loss(*v, **own).losses, values)
    at_reference = {"sigmoid": log(2), "hinge": 1.0, "nca_pair": 2 * log(2), "bco_pair": 2 * log(2), "apo_zero": 1.0}
    at_reference |= {"robust": log(2), "apo_down": 1.0, "sigmoid_norm": log(2), "ipo": 1 / 1.4**2}
    if name in at_reference:
        chosen, rejected = values[0].detach(), values[1].detach()
        same = preference_loss(chosen, rejected, chosen, rejected, **settings).losses
        assert same.tolist() == pytest.approx([at_reference[name]] * 5)


@pytest.mark.parametrize("size", [1e4, 1e2, 0.0])
def test_extreme_log_probabilities_give_no_nan(size):
    signs = torch.tensor([[1.0, -1, -1, 1, 1, 0], [-1.0, 1, -1, 1, 0, -1]])
    lengths = {"chosen_lengths": torch.ones(6), "rejected_lengths": torch.ones(6)}
    cases = [(name, "reverse_kl") for name in PREFERENCE_LOSSES]
    cases += [("sigmoid", name) for name in ("forward_kl", "js_divergence", "alpha_divergence")]
    for name, divergence in cases:
        logps = (size * signs).requires_grad_()
        settings = {"loss_type": name, "f_divergence_type": divergence, "label_smoothing": 0.1, **lengths}
        losses = preference_loss(logps[0], logps[1], torch.zeros(6), torch.zeros(6), **settings).losses
        losses.sum().backward()
        assert losses.isfinite().all() and logps.grad.isfinite().all(), (name, divergence)
    for divergence in ("forward_kl", "alpha_divergence"):  # scores of exp(80), squared
        logps = (size * signs).requires_grad_()
        settings = {"loss_type": "ipo", "f_divergence_type": divergence, "beta": 0.1, **lengths}
        losses = preference_loss(logps[0], logps[1], torch.zeros(6), torch.zeros(6), **settings).losses
        losses.sum().backward()
        assert losses.isfinite().all() and logps.grad.isfinite().all() and (size or (losses == 25).all())
    for fn in (
        orpo_loss,
        lambda c, r: cpo_loss(c, r, loss_type="ipo", alpha=0.25),
        lambda c, r: cpo_loss(c, r, loss_type="alphapo", alpha=0.25),
    ):
        logps = (-size * signs.abs()).requires_grad_()
        losses = fn(logps[0], logps[1]).losses
        losses.sum().backward()
        assert losses.isfinite().all() and logps.grad.isfinite().all()


def test_odds_losses_by_hand():
    assert log_odds_ratio(tensor(log(0.5)), tensor(log(0.25))).item() == pytest.approx(LN3)
    assert orpo_loss(tensor(log(0.5)), tensor(log(0.25)), beta=2.0).losses.item() == pytest.approx(-2 * log(0.75))
    chosen, rejected = tensor(-1.0), tensor(-3.0)
    for loss_type, expected in {
        "sigmoid": log(1 + math.exp(-1)),
        "hinge": 0.0,
        "ipo": 1.0,
        "simpo": log(1 + math.exp(-0.5)),
    }.items():
        assert cpo_loss(chosen, rejected, loss_type=loss_type, beta=0.5).losses.item() == pytest.approx(expected)
        if loss_type != "simpo":
            assert tpo_loss(chosen, rejected, loss_type=loss_type, beta=0.5).losses.item() == pytest.approx(expected)
    assert tpo_loss(chosen, rejected, loss_type="tpo-l", beta=0.5).losses.item() == pytest.approx(
        log(1 + math.exp(-0.5))
    )
    smoothed = cpo_loss(chosen, rejected, beta=0.5, label_smoothing=0.25).losses.item()
    assert smoothed == pytest.approx(0.75 * log(1 + math.exp(-1)) + 0.25 * log(1 + math.e))
    alpha = cpo_loss(tensor(log(0.5)), tensor(log(0.25)), loss_type="alphapo", alpha=1.0, beta=1.0, simpo_gamma=0.0)
    assert alpha.chosen_rewards.item() == pytest.approx(-1) and alpha.rejected_rewards.item() == pytest.approx(-3)
    assert alpha.losses.item() == pytest.approx(log(1 + math.exp(-2)))
    small = cpo_loss(chosen, rejected, loss_type="simpo", alpha=1e-9).losses  # alpha -> 0 is SimPO
    assert small.item() == pytest.approx(cpo_loss(chosen, rejected, loss_type="simpo").losses.item(), rel=1e-6)


def test_unpaired_losses_by_hand_and_gradients():
    logps, labels = tensor(2.0, 2.0), torch.tensor([True, False])
    kl = kl_baseline(tensor(1.0, 3.0), tensor(0.0, 2.0))
    found = kto_loss(logps, tensor(0.0, 0.0), labels, kl, beta=LN3, desirable_weight=2.0, undesirable_weight=3.0)
    assert found.losses.tolist() == pytest.approx([0.5, 2.25]) and found.rewards.tolist() == pytest.approx(
        [2 * LN3] * 2
    )
    assert kl_baseline(tensor(-1.0), tensor(0.0)) == 0
    found = kto_loss(logps / 2, tensor(0.0, 0.0), labels, loss_type="apo_zero_unpaired", beta=LN3)
    assert found.losses.tolist() == pytest.approx([0.25, 0.75])
    mean, count = running_mean(tensor(0.0)[0], tensor(0.0)[0], tensor(1.0, 2.0))
    mean, count = running_mean(mean, count, tensor(6.0))
    assert mean.item() == pytest.approx(3) and count.item() == 3
    weights = density_ratio_weights(tensor(0.75, 0.1, 1.0))
    assert weights.tolist() == pytest.approx([3, 0.5, 10])
    settings = {"beta": LN3, "undesirable_weights": tensor(5.0, 3.0)}
    found = bco_loss(logps, tensor(0.0, 0.0), labels, tensor(LN3)[0], **settings)
    assert found.losses.tolist() == pytest.approx([-log(0.75), -3 * log(0.25)])
    leaf = logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: kto_loss(v, tensor(0.1, 0.2), labels, kl).losses, leaf)
    assert torch.autograd.gradcheck(lambda v: bco_loss(v, tensor(0.1, 0.2), labels, kl).losses, leaf)


def test_reward_losses_by_hand():
    settings = {"margin": tensor(1.0, 0.0), "center_rewards_coefficient": 0.5}
    found = bradley_terry_loss(tensor(LN3 + 1, 0.0), tensor(0.0, LN3), **settings)
    assert found.tolist() == pytest.approx([-log(0.75) + 0.5 * (LN3 + 1) ** 2, -log(0.25) + 0.5 * LN3**2])
    labels = step_labels([2, 1, 3], [True, False, True], prompt_length=2)
    assert labels.tolist() == [-100, -100, -100, 1, 0, -100, -100, 1]
    assert step_labels([2, 1], [1, 0], last_step_only=True).tolist() == [-100, -100, 0]
    losses = process_reward_loss(tensor(0.0, LN3).expand(8, 2), labels)
    assert losses.tolist() == pytest.approx([0, 0, 0, -log(0.75), -log(0.25), 0, 0, -log(0.75)])
    with pytest.raises(ValueError, match="no empty step"):
        step_labels([2, 0], [1, 0])


def test_sequences_by_hand():
    lengths = torch.tensor([2, 0, 1])
    logp = tensor(-1.0, -3.0, -2.0)
    assert row_sums(logp, lengths).tolist() == [-4.0, 0.0, -2.0]
    with pytest.raises(ValueError, match="lengths add up to 3"):
        row_sums(logp[:2], lengths)
    assert ld_weights(torch.tensor([0, 1, 2]), torch.tensor([2, 2, 2]), 0.25).tolist() == [1.0, 1.0, 0.25]
    weights = wpo_weights(logp, tensor(-1.0, -1.0, -3.0), lengths)
    assert weights.tolist() == pytest.approx([math.exp(-1), 1.0, math.e])
    counted = wpo_weights(logp, tensor(-1.0, -1.0, -3.0), lengths, tensor(0.0, 1.0, 1.0))
    assert counted.tolist() == pytest.approx([math.exp(-2), 1.0, math.e])


def _padded(num_rows, longest=6):
    """Log-probabilities (R, L) with gradient, and a mask (R, L + 1) of answers after prompts of one or two tokens."""
    mask = torch.zeros(num_rows, longest + 1, dtype=torch.int64)
    for i in range(num_rows):
        mask[i, 1 + i % 2 : 1 + i % 2 + 1 + (3 * i) % 5] = 1
    return -torch.rand(num_rows, longest, dtype=torch.float64).requires_grad_(), mask


@pytest.mark.parametrize("case", TRL_CASES, ids=str)
def test_preference_losses_equal_trl(case):
    pytest.importorskip("trl")
    from trl_preferences import trl_dpo

    per_token, mask = _padded(8)
    if case.get("f_divergence_type") == "alpha_divergence":  # TRL has no clamp for fp64
        per_token = per_token.detach().float().requires_grad_()
    kept, ref, log_sum_p2 = mask[:, 1:], -3 * torch.rand(8, dtype=per_token.dtype), -torch.rand(8, 6)
    expected, metrics = trl_dpo(per_token, mask, ref, log_sum_p2, **case)
    (expected_grad,) = torch.autograd.grad(expected, per_token)
    lengths = kept.sum(1)
    weights, chosen_nll = kept, -(per_token * kept).sum(1)[:4] * 4 / lengths[:4].sum()
    if "ld_alpha" in case:
        shared = torch.minimum(lengths[:4], lengths[4:]).repeat(2)
        weights = kept * ld_weights(kept.cumsum(1) - 1, shared[:, None], case["ld_alpha"])
    logps = (per_token * weights).sum(1)
    own = {"chosen_lengths": lengths[:4], "rejected_lengths": lengths[4:], "chosen_nll": chosen_nll}
    if case.get("use_weighting"):
        flat = kept.bool()
        factors = wpo_weights(per_token[flat], log_sum_p2[flat], lengths)
        own["weights"] = factors[:4] * factors[4:]
    found = preference_loss(logps[:4], logps[4:], ref[:4], ref[4:], **own, **settings_of(case))
    (grad,) = torch.autograd.grad(found.losses.mean(), per_token)
    assert found.losses.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(grad, expected_grad, rtol=1e-5, atol=1e-8)
    for key, values in (("chosen", found.chosen_rewards), ("rejected", found.rejected_rewards)):
        assert values.mean().item() == pytest.approx(metrics[f"rewards/{key}"], rel=1e-5)
    assert found.accuracies.mean().item() == pytest.approx(metrics["rewards/accuracies"])
    assert found.margins.mean().item() == pytest.approx(metrics["rewards/margins"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", [{"desirable_weight": 1.5}, {"loss_type": "apo_zero_unpaired", "beta": 0.4}], ids=str)
def test_kto_equals_trl(case):
    pytest.importorskip("trl")
    from trl_preferences import trl_kto

    per_token, mask = _padded(6)
    labels = torch.tensor([True, False, False, True, True, False])
    ref, kl_logps, ref_kl_logps = (-torch.rand(6, dtype=torch.float64) * s for s in (3, 1, 4))
    expected, metrics = trl_kto(per_token, mask, ref, labels, kl_logps, ref_kl_logps, **case)
    (expected_grad,) = torch.autograd.grad(expected, per_token)
    kl = kl_baseline(kl_logps, ref_kl_logps)
    found = kto_loss((per_token * mask[:, 1:]).sum(1), ref, labels, kl, **case)
    (grad,) = torch.autograd.grad(found.losses.mean(), per_token)
    assert found.losses.mean().item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.allclose(grad, expected_grad, rtol=1e-9)
    assert found.rewards[labels].mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-9)
    if case.get("loss_type") is None:
        assert kl.item() == pytest.approx(metrics["kl"]) and kl > 0


@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_cpo_and_orpo_equal_trl(loss_type, alpha):
    pytest.importorskip("trl")
    from trl_preferences import trl_cpo, trl_orpo

    logps = (-2 * torch.rand(2, 5)).requires_grad_()
    settings = {"loss_type": loss_type, "alpha": alpha, "label_smoothing": 0.1, "beta": 2.0, "simpo_gamma": 0.7}
    for found, expected in (
        (cpo_loss(*logps, **settings), trl_cpo(*logps, **settings)),
        (orpo_loss(*logps, beta=0.3), trl_orpo(*logps, 0.3)),
    ):
        (grad,) = torch.autograd.grad(found.losses.sum(), logps)
        (expected_grad,) = torch.autograd.grad(expected[0].sum(), logps)
        assert torch.allclose(grad, expected_grad, rtol=1e-5)
        for value, reference in zip(found, expected[:3], strict=True):
            assert torch.allclose(value, reference, rtol=1e-5)
    assert log_odds_ratio(*logps).mean().item() == pytest.approx(expected[4].item(), rel=1e-5)


def test_bradley_terry_equals_trl():
    pytest.importorskip("trl")
    from trl_preferences import trl_reward

    rewards, margin = torch.randn(8, dtype=torch.float64, requires_grad=True), torch.rand(4)
    for settings in ({}, {"margin": margin}, {"center_rewards_coefficient": 0.01}):
        found = bradley_terry_loss(*rewards.chunk(2), **settings).mean()
        expected = trl_reward(rewards, **settings)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        assert torch.allclose(*(torch.autograd.grad(loss, rewards)[0] for loss in (found, expected)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sigmod"}, "choose among sigmoid"),
        ({"loss_type": []}, "at least one"),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights"),
        ({"loss_type": "ipo"}, "chosen_lengths"),
        ({"loss_type": "exo_pair"}, "label_smoothing=0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "below 0.5"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "partition function"),
        ({"f_divergence_type": "kl"}, "reverse_kl, forward_kl"),
        ({"loss_type": "aot", "weights": torch.ones(2)}, "weights with"),
    ],
)
def test_preference_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(*torch.zeros(4, 2), **settings)


def test_other_errors():
    pair = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="choose among sigmoid, hinge, ipo, simpo"):
        cpo_loss(*pair, loss_type="tpo-l")
    with pytest.raises(ValueError, match="tpo-l"):
        tpo_loss(*pair, loss_type="simpo")
    with pytest.raises(ValueError, match="label_smoothing=2"):
        tpo_loss(*pair, label_smoothing=2)
    with pytest.raises(ValueError, match="kl=None"):
        kto_loss(*pair, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="kto or apo_zero_unpaired"):
        kto_loss(*pair, torch.ones(2, dtype=torch.bool), loss_type="bco")
