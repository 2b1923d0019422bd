"""PPO's targets against padded matrices worked through as TRL does, and the critic against its model's own forward."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastalign_kernels.losses.value import episode_targets
from ppo_case import scorer
from tiny import tiny_model

from fastalign.adapters import add_adapter
from fastalign.data.collate import collate_flat, collate_padded
from fastalign.models import LoadedModel
from fastalign.reward_head import prepare_reward_model
from fastalign.rollout.buffer import Experience
from fastalign.rollout.states import add_last_state, set_targets
from fastalign.value_model import ValueHead, critic_loss, make_value_model, state_values

F64 = torch.float64
OWN = {"share_backbone": False}
WIDTH = 6
LENGTHS = (6, 1, 4, 6, 5)  # those of the full width have no state behind the last token


def masked_whiten(values, mask, shift_mean):
    kept = values[mask]
    whitened = (values - kept.mean()) * torch.rsqrt(kept.var() + 1e-8)
    return whitened if shift_mean else whitened + kept.mean()


def padded_targets(logp, ref, values, scores, *, kl_coef, kl_estimator, whiten_rewards, gamma, lam):
    """The same from (B, WIDTH): a score stands behind the last token where there is room, else at it."""
    place, last = torch.arange(WIDTH), torch.tensor(LENGTHS)[:, None] - 1
    token, state = place <= last, place <= last + 1
    d = (ref - logp) * token
    rewards = -kl_coef * (-d if kl_estimator == "k1" else d.exp() - 1 - d)
    end = (last + 1).clamp(max=WIDTH - 1)
    rewards.scatter_add_(1, end, scores[:, None])
    if whiten_rewards:
        rewards = masked_whiten(rewards, state, False) * state
    values, running, out = values * state, torch.zeros(len(LENGTHS), dtype=F64), []
    for t in reversed(range(WIDTH)):
        following = values[:, t + 1] if t + 1 < WIDTH else 0.0
        running = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
        out.insert(0, running)
    advantages = torch.stack(out, 1)
    returns = (advantages + values)[state]
    return masked_whiten(advantages, token, True)[token], returns, token, state


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize(("kl_estimator", "gamma", "lam"), [("k1", 1.0, 0.95), ("k3", 0.9, 0.7)])
def test_targets_equal_the_padded_recursion(kl_estimator, gamma, lam, whiten_rewards):
    torch.manual_seed(0)
    options = {"kl_coef": 0.3, "kl_estimator": kl_estimator, "gamma": gamma, "lam": lam}
    logp, ref, values = torch.randn(3, len(LENGTHS), WIDTH, dtype=F64)
    scores = torch.randn(len(LENGTHS), dtype=F64)
    advantages, returns, token, state = padded_targets(
        logp, ref, values, scores, whiten_rewards=whiten_rewards, **options
    )
    rows = torch.arange(len(LENGTHS))[:, None].expand(-1, WIDTH)[state]
    found = episode_targets(
        logp[token], ref[token], values[state], scores, rows, token[state], whiten_rewards=whiten_rewards, **options
    )
    torch.testing.assert_close(found.advantages, advantages)
    torch.testing.assert_close(found.returns, returns)


def test_states_of_experiences_by_hand():
    """Without divergence and discount returns are the score, and advantages, before whitening, what it adds."""
    ended, cut = (
        Experience(np.array([7]), np.array(ids), np.arange(len(ids)), 0, tokens={"old_logp": -torch.ones(len(ids))})
        for ids in ([5, 6, 2], [5, 6, 8, 9])
    )
    for one in (ended, cut):
        add_last_state(one, 4, 0)
        one.tokens["value"] = torch.arange(float(one.num_learned))
    assert ended.completion_ids.tolist() == [5, 6, 2, 0] and ended.learned_at.tolist() == [0, 1, 2, 3]
    assert ended.tokens["has_token"].tolist() == [1, 1, 1, 0] and cut.tokens["has_token"].tolist() == [1] * 4
    options = {"kl_coef": 0.0, "kl_estimator": "k1", "whiten_rewards": False, "gamma": 1.0, "lam": 1.0}
    sums = set_targets([ended, cut], torch.tensor([3.0, -1.0]), "cpu", **options)
    assert ended.tokens["return"].tolist() == [3.0] * 4 and cut.tokens["return"].tolist() == [-1.0] * 4
    plain = torch.tensor([3.0, 2, 1, -1, -2, -3, -4])  # of the seven tokens: the last state has none
    expected = (plain - plain.mean()) / plain.std()
    found = torch.cat([ended.tokens["advantage"], cut.tokens["advantage"]])
    torch.testing.assert_close(found, torch.cat([expected[:3], torch.zeros(1), expected[3:]]))
    assert {name: float(value) for name, value in sums.items()} == {"entropy": 7.0, "scores": 2.0}


@pytest.mark.parametrize("allow_flat", [True, False])
def test_values_are_the_heads_at_every_listed_position(allow_flat):
    model, ids = scorer(0), [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    expected = [model.score(model.model(torch.tensor([row])).last_hidden_state)[0, :, 0] for row in ids]
    wanted = [[1, 2, 3], [0], [0, 2]]
    assert prepare_reward_model(model, allow_flat=allow_flat).flat == allow_flat
    batch = collate_flat(ids) if allow_flat else collate_padded(ids, pad_token_id=0)
    width = None if allow_flat else batch.input_ids.shape[1]
    starts = [i * width for i in range(3)] if width else batch.cu_seqlens.tolist()
    batch.source = torch.tensor([s + p for s, where in zip(starts, wanted, strict=False) for p in where])
    right = torch.cat([row[where] for row, where in zip(expected, wanted, strict=True)])
    torch.testing.assert_close(state_values(model, batch, model), right.detach())
    batch.extras = {"value": right.detach(), "return": right.detach() - torch.arange(6)}
    loss, _ = critic_loss(model, batch, right, torch.ones(6), 0.2)  # of (v - R)^2 / 2, whose gradient is 0, 1, ..., 5
    loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (right * torch.arange(6)).sum().backward()
    for name, grad in got.items():
        torch.testing.assert_close(grad, dict(model.named_parameters())[name].grad, rtol=1e-4, atol=1e-6)


def test_a_head_on_the_policy_pulls_on_its_hidden_states():
    head, hidden = ValueHead(tiny_model()), torch.randn(5, 32, requires_grad=True)
    torch.nn.init.normal_(head.weight)
    returns, weights = torch.randn(5), torch.rand(5)
    values = (hidden @ head.weight[0]).detach()
    batch = SimpleNamespace(extras={"value": values, "return": returns})
    loss, (losses, clipped) = critic_loss(head, batch, hidden, weights, 0.2)
    torch.testing.assert_close(losses, (values - returns) ** 2 / 2)
    assert not clipped.any()
    loss.backward()
    torch.testing.assert_close(hidden.grad, (weights * (values - returns))[:, None] * head.weight)


@pytest.mark.parametrize("lora", [False, True])
def test_a_critic_made_of_the_policy_has_its_body_and_a_head_of_zero(lora):
    policy, args = tiny_model("qwen2"), SimpleNamespace(**OWN, gradient_checkpointing=False, deepspeed_plugin=None)
    expected = policy.model(torch.tensor([[5, 6, 7]])).last_hidden_state
    if lora:
        peft = pytest.importorskip("peft")
        loaded = LoadedModel(policy, None)
        add_adapter(loaded, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False), args)
        policy = loaded.model
    critic = make_value_model(None, None, policy, args)
    torch.testing.assert_close(critic.model(torch.tensor([[5, 6, 7]])).last_hidden_state, expected)
    assert critic.score.weight.shape == (1, 32) and not critic.score.weight.any()


def test_critics_that_do_not_fit_are_refused():
    policy, reward = tiny_model(), scorer(0)
    with pytest.raises(ValueError, match="same object"):
        make_value_model(reward, reward, policy, SimpleNamespace(**OWN))
    with pytest.raises(ValueError, match="one number per token"):
        make_value_model(tiny_model(seed=1), reward, policy, SimpleNamespace(**OWN))
    copied = make_value_model(None, reward, policy, SimpleNamespace(**OWN))
    assert copied is not reward and torch.equal(copied.score.weight, reward.score.weight)
