"""XPOTrainer against what TRL 1.10 logged (golden/sampled_pairs.json), its loss by hand, its opponent, learning."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fastalign_kernels.losses.sampled_pairs import sampled_pair_loss
from sampled_pair_case import (
    CASES,
    LEARNING,
    assert_same,
    completion_of,
    evenness,
    golden,
    length_reward,
    make,
    numbers,
    prompt_ids,
    prompts,
    reward_model,
)
from test_parity_sft import _lora
from tiny import tiny_model

import fastalign
from fastalign.rollout.engine import Request, Sampling, generate
from fastalign.rollout.native import NativeEngine
from fastalign.rollout.opponents import ReferenceEngine


@pytest.mark.parametrize("case", CASES["XPO"])
def test_every_number_equals_trl(case, tmp_path):
    trainer = make("XPO", tmp_path, reward_model(), **CASES["XPO"][case])
    trainer.train()
    for own, other in zip(trainer.state.log_history, golden("XPO", case), strict=True):
        assert_same(own, other, CASES["XPO"][case].get("gradient_accumulation_steps", 1))


def test_losses_of_pairs_by_hand():
    first, second = torch.tensor([-2.0, -1.0, -4.0]).double(), torch.tensor([-3.0, -2.5, -1.0]).double()
    ref_first, ref_second = torch.tensor([-2.5, -1.0, -3.0]).double(), torch.tensor([-2.0, -3.0, -1.5]).double()
    first.requires_grad_(), second.requires_grad_()
    given = {"better": torch.tensor([1.0, -1.0, -1.0]), "pair_weight": torch.tensor([0.5, 0.25, 0.0]), "beta": 0.4}
    found = sampled_pair_loss(first, second, ref_first, ref_second, alpha=0.1, **given)
    h = [1.5, 0.5]  # 0.5 - (-1.0), and -(0 - 0.5)
    sigmoid = [
        0.5 * (-F.logsigmoid(torch.tensor(0.6).double()) - 0.3),
        0.25 * (-F.logsigmoid(torch.tensor(0.2).double()) - 0.25),
    ]
    torch.testing.assert_close(found.losses, torch.stack([*sigmoid, torch.zeros(()).double()]))
    torch.testing.assert_close(found.chosen_rewards, 0.4 * torch.tensor([0.5, 0.5, 0.5]).double())
    torch.testing.assert_close(found.rejected_rewards, 0.4 * torch.tensor([-1.0, 0.0, -1.0]).double())
    found.losses.sum().backward()
    slope = [-0.5 * 0.4 / (1 + torch.e**0.6), 0.25 * 0.4 / (1 + torch.e**0.2), 0.0]
    assert first.grad.tolist() == pytest.approx(slope)
    assert second.grad.tolist() == pytest.approx([-slope[0] + 0.05, -slope[1] + 0.025, 0.0])
    ipo = sampled_pair_loss(first, second, ref_first, ref_second, loss_type="ipo", **given)
    assert ipo.losses.tolist() == pytest.approx([0.5 * (h[0] - 1.25) ** 2, 0.25 * (h[1] - 1.25) ** 2, 0.0])
    with pytest.raises(ValueError, match="hinge"):
        sampled_pair_loss(first, second, ref_first, ref_second, loss_type="hinge", **given)


def test_a_step_by_hand_with_the_alpha_of_its_epoch(tmp_path):
    """fp64; the opponent's completion is in the bonus whether it won or not."""
    policy, reference = tiny_model(seed=0).double(), tiny_model(seed=1).double()
    options = {"alpha": [0.0, 0.05], "beta": 0.2, "max_steps": 2, "learning_rate": 0.0, "max_grad_norm": 1e9}
    trainer = make("XPO", tmp_path, model=policy, ref_model=reference, **options)
    data = trainer.train_dataset = prompts().select(range(4))
    trainer.train()

    def logp(model, row, number):
        ids, own = prompt_ids(row["prompt"], bos=True), completion_of(row["prompt"], number)
        logits = model(torch.tensor([[*ids, *own]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        return logits.gather(1, torch.tensor(own)[:, None]).sum()

    losses = []
    for row in data:
        pair = [completion_of(row["prompt"], number) for number in (0, 1)]
        own, other = length_reward(pair, [row["target"]] * 2)
        ratio, opponent = (logp(policy, row, i) - logp(reference, row, i).detach() for i in (0, 1))
        sign = 1 if own >= other else -1
        losses.append(-F.logsigmoid(0.2 * sign * (ratio - opponent)) + 0.05 * logp(policy, row, 1))
    policy.zero_grad()
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters()])
    log = trainer.state.log_history[1]
    assert (log["alpha"], log["epoch"]) == (0.05, 2.0)
    assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)  # the reference's are kept in fp32
    assert log["grad_norm"] == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_opponent_samples_from_the_reference(adapter, tmp_path):
    """From the second model, or from the policy without its adapter, whatever the policy has become."""
    extra = {"ref_model": None, "peft_config": _lora(init_lora_weights=False)} if adapter else {}
    trainer = make("XPO", tmp_path, fixed=False, **extra)
    expected = NativeEngine(tiny_model(seed=0 if adapter else 1))
    sampling = Sampling(6, temperature=0.9, stop_ids=(2,))
    requests = [Request(i, [1, 20 + i % 3, 40], sampling, seed=i) for i in range(6)]
    engine = trainer.rollouts.other.engine
    assert isinstance(engine, ReferenceEngine)
    found = {one.key: one for one in generate(engine, requests)}
    policy = {one.key: one.ids for one in generate(trainer.engine, requests)}
    for one in generate(expected, requests):
        assert found[one.key].ids == one.ids
        assert found[one.key].logps == pytest.approx(one.logps, abs=1e-5)
    assert policy != {key: one.ids for key, one in found.items()}
    samples = [group.samples for group in trainer.rollouts.run([{"prompt": "the fox"}, {"prompt": "quick"}], 2, 5)]
    assert all(len(pair) == 2 and pair[0].prompt_ids == pair[1].prompt_ids for pair in samples)


def test_it_learns_evaluates_and_resumes(tmp_path):
    options = LEARNING | {"save_strategy": "steps", "save_steps": 6, "adam_epsilon": 1e-3}
    whole = make("XPO", tmp_path / "whole", evenness, fixed=False, ref_model=None, **options)
    before = whole.evaluate()["eval_objective/model_scores"]
    whole.train()
    after = whole.evaluate()
    assert before < 0.55 and after["eval_objective/model_scores"] > 0.65, (before, after)
    assert after["eval_objective/ref_scores"] < 0.55
    reference = copy.deepcopy(tiny_model())
    again = make("XPO", tmp_path / "again", evenness, fixed=False, ref_model=reference, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert numbers(again)[-3:-1] == numbers(whole)[-4:-2]


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="`alpha` is empty"):
        fastalign.XPOConfig(str(tmp_path), alpha=[])
