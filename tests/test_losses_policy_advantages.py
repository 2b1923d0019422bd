"""Advantages, corrections for tokens that another policy sampled, and PPO's value side, against worked numbers."""

import math

import pytest
import torch
from fastalign_kernels.losses.advantages import (
    discounted_sums,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    whiten,
)
from fastalign_kernels.losses.corrections import (
    divergence_mask,
    entropy_threshold,
    importance_weights,
    off_policy_mask,
)
from fastalign_kernels.losses.row_sums import Rows
from fastalign_kernels.losses.value import clipped_value_loss, penalised_rewards

F64 = torch.float64
LENGTHS = (5, 1, 0, 7, 4)


def test_importance_weights():
    rows = Rows(torch.tensor([0, 0, 1, 1]), 2)
    sampled = torch.zeros(4, dtype=F64)
    old = torch.log(torch.tensor([2.0, 4.0, 0.4, 1.0], dtype=F64))
    sampled[3] = float("nan")
    weights = lambda mode, **k: importance_weights(old, sampled, mode=mode, rows=rows, **k).tolist()  # noqa: E731
    assert weights("token_truncate") == pytest.approx([2.0, 3.0, 0.4, 1.0])
    assert weights("token_truncate", clip_min=0.5, clip_max=2.0) == pytest.approx([2.0, 2.0, 0.5, 1.0])
    assert weights("token_mask") == pytest.approx([2.0, 0.0, 0.4, 1.0])
    assert weights("token_mask", clip_min=0.5, clip_max=5.0) == pytest.approx([2.0, 4.0, 0.0, 1.0])  # IcePop
    assert weights("sequence_truncate") == pytest.approx([3.0, 3.0, 0.4, 0.4])
    assert weights("sequence_mask") == pytest.approx([0.0, 0.0, 0.4, 0.4])
    assert weights("sequence_mask", clip_max=None) == pytest.approx([8.0, 8.0, 0.4, 0.4])
    assert weights("geometric_mask", clip_min=0.6) == [1.0, 1.0, 1.0, 1.0]  # sqrt(8), sqrt(0.4)
    assert weights("geometric_mask", clip_min=0.7, clip_max=2.9) == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="give rows=Rows"):
        importance_weights(old, sampled)
    with pytest.raises(ValueError, match="mode='tis'"):
        importance_weights(old, sampled, mode="tis")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip_min=4"):
        importance_weights(old, sampled, mode="token_mask", clip_min=4.0)


def test_masks():
    rows = Rows(torch.tensor([0, 0, 1, 2]), 3)
    logp = torch.tensor([-1.0, -2.0, -1.0, -3.0], dtype=F64)
    sampled = torch.tensor([-0.5, -1.5, -0.9, float("nan")], dtype=F64)
    advantages = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=F64)
    assert off_policy_mask(logp, sampled, advantages, rows, 0.2).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert off_policy_mask(logp, sampled, -advantages, rows, 0.2).tolist() == [1.0] * 4
    assert divergence_mask(logp, sampled, advantages, 0.2, 0.2)[:2].tolist() == [0.0, 1.0]
    entropy = torch.rand(101, dtype=F64)
    for share in (0.2, 0.5, 0.37):
        assert float(entropy_threshold(entropy, share)) == pytest.approx(float(torch.quantile(entropy, 1 - share)))


def _trl_advantages(rewards, weights, group, scale):
    """TRL's rule written for one number at a time, with NaN for rewards that are missing."""
    total = [math.nan if r.isnan().all() else float((r * weights).nansum()) for r in rewards]
    found, spread = [], torch.tensor([x for x in total if x == x]).double()
    for i, x in enumerate(total):
        start = i // group * group
        mates = torch.tensor([y for y in total[start : start + group] if y == y]).double()
        std = spread.std() if scale == "batch" else mates.std() if len(mates) > 1 else torch.tensor(math.nan)
        a = (x - float(mates.mean())) / (1.0 if scale == "none" else float(std) + 1e-4) if len(mates) else math.nan
        found.append(0.0 if a != a else a)
    return found


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale):
    rewards = torch.tensor([[1.0, 0], [0, 2], [3, 1], [2, 2], [2, 2], [2, 2]], dtype=F64)
    rewards[1, 1] = rewards[2] = float("nan")
    weights = torch.tensor([1.0, 0.5], dtype=F64)
    found = group_advantages(rewards, 3, reward_weights=weights, scale_rewards=scale)
    assert found.advantages.tolist() == pytest.approx(_trl_advantages(rewards, weights, 3, scale))
    assert found.advantages[2] == 0 and found.rewards[2].isnan()
    assert found.std_is_zero.tolist() == ([False] * 6 if scale == "batch" else [False] * 3 + [True] * 3)


def test_gdpo_by_hand():
    rewards = torch.tensor([[0.0, 10], [2, 10], [1, 0], [1, 4]], dtype=F64)
    found = group_advantages(rewards, 2, multi_objective_aggregation="normalize_then_sum")
    root = math.sqrt(2)
    z = torch.tensor([-1 / (root + 1e-4), 1 / (root + 1e-4), -2 / (2 * root + 1e-4), 2 / (2 * root + 1e-4)]).double()
    assert found.rewards.tolist() == pytest.approx(z.tolist())
    assert found.advantages.tolist() == pytest.approx(((z - z.mean()) / (z.std() + 1e-4)).tolist())


def test_advantages_refuse():
    with pytest.raises(ValueError, match="num_generations=4"):
        group_advantages(torch.zeros(6, 1), 4)
    with pytest.raises(ValueError, match="scale_rewards='row'"):
        group_advantages(torch.zeros(6, 1), 3, scale_rewards="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multi_objective_aggregation='sum'"):
        group_advantages(torch.zeros(6, 1), 3, multi_objective_aggregation="sum")  # type: ignore[arg-type]


def test_leave_one_out():
    nan = float("nan")
    rewards = torch.tensor([1.0, 2, 6, nan, 3, 5, nan, nan, 4], dtype=F64)
    found = leave_one_out_advantages(rewards, 3)
    assert found.tolist() == pytest.approx([-3.0, -1.5, 4.5, 0.0, -2.0, 2.0, 0.0, 0.0, 0.0])
    some = torch.tensor([-3.0, -1.5, 4.5, -2.0, 2.0], dtype=F64)
    normal = leave_one_out_advantages(rewards, 3, normalize_advantages=True)
    assert normal[0] == pytest.approx(float((-3 - some.mean()) / (some.std() + 1e-4)))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_generalised_advantages_equal_the_recursion(gamma, lam):
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    rewards, values = torch.randn(2, len(ids), dtype=F64)
    found, returns = generalised_advantages(rewards, values, ids, gamma=gamma, lam=lam)
    expected, following, advantage = [], 0.0, 0.0
    for t in reversed(range(len(ids))):
        if t + 1 == len(ids) or ids[t + 1] != ids[t]:
            following = advantage = 0.0
        advantage = float(rewards[t] + gamma * following - values[t]) + gamma * lam * advantage
        following = float(values[t])
        expected.insert(0, advantage)
    assert found.tolist() == pytest.approx(expected)
    assert torch.allclose(returns, found + values)
    assert discounted_sums(rewards[:0], ids[:0], 0.5).numel() == 0


def test_whiten():
    x = torch.randn(50, dtype=F64) * 3 + 2
    assert float(whiten(x).mean()) == pytest.approx(0, abs=1e-12) and float(whiten(x).std()) == pytest.approx(1)
    assert float(whiten(x, shift_mean=False).mean()) == pytest.approx(float(x.mean()))


def test_value_loss_and_rewards_by_hand():
    values = torch.tensor([1.0, 1.0, 0.1], dtype=F64, requires_grad=True)
    loss, clipped = clipped_value_loss(values, torch.zeros(3, dtype=F64), torch.tensor([0.0, 3.0, 1.0], dtype=F64))
    assert loss.tolist() == pytest.approx([0.5, 3.92, 0.405])  # (1-0)^2, (0.2-3)^2, (0.1-1)^2, halved
    assert clipped.tolist() == [False, True, False]
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([1.0, 0.0, -0.9])
    logp, ref = torch.tensor([-1.0, -2, -3], dtype=F64), torch.tensor([-1.5, -2, -1], dtype=F64)
    scores, ids = torch.tensor([7.0, 9.0, 5.0], dtype=F64), torch.tensor([0, 0, 2])
    found = penalised_rewards(logp, ref, scores, ids, kl_coef=0.1)
    assert found.tolist() == pytest.approx([-0.05, 7.0, 5.2])
