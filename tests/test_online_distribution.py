"""What tokens are drawn from and what the loss takes them for; replayed samples, streams, ranks without tokens."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from grpo_runs import SETTINGS, grpo_trainer, length_reward, prompts
from ppo_case import SETTINGS as PPO_SETTINGS
from ppo_case import prompts as ids_of_prompts
from test_grpo import SAMPLED, assert_same, logged
from tiny import tiny_model, tiny_tokenizer

import fastalign
from fastalign.rollout.buffer import Experience
from fastalign.rollout.engine import Sampling
from fastalign.rollout.group_batches import GroupCollator
from fastalign.rollout.update import run_pass

STILL: dict[str, Any] = {"learning_rate": 0.0, "max_steps": 4}


def sharp_model():
    """A model whose log-probabilities depend much on the temperature."""
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def test_settings_that_change_the_distribution_are_named():
    plain = {"stop": ["."], "seed": 3, "do_sample": True, "logit_bias": None, "min_tokens": 0}
    assert Sampling(8, temperature=0.7, top_k=-1, min_p=0.0, options=plain).distortions(0.7) == {}
    assert Sampling(8, temperature=0.7).distortions(1.0) == {"temperature": 0.7}
    assert Sampling(8, top_p=0.9, regex="a+").distortions(1.0) == {
        "top_p": 0.9,
        "vllm_structured_outputs_regex": "a+",
    }
    for option in ({"do_sample": False}, {"logit_bias": {3: -1.0}}, {"bad_words": ["a"]}, {"presence_penalty": 0.5}):
        assert Sampling(8, options=option).distortions(1.0) == option


@pytest.mark.parametrize("given", [{"temperature": 0.5}, {"do_sample": False}, {"top_p": 0.8}])
def test_ratios_of_grpo_are_those_of_the_loss_whatever_it_samples_with(given, tmp_path):
    """Without updates the ratio is 1 in all of the four steps of a generation, and the reference the policy."""
    config = {"steps_per_generation": 8, "beta": 0.1, "kl_drift_bound": 1e-3, "max_completion_length": 6, **STILL}
    trainer = grpo_trainer(tmp_path, model=sharp_model(), fixed=False, generation_kwargs=given, **config)
    assert not trainer.knows_old and not trainer.samples_whole
    trainer.train()
    lines = [line for line in trainer.state.log_history if "kl" in line]
    assert len(lines) == 4 and all(line["clip_ratio/region_mean"] == 0 for line in lines)
    assert [line["kl"] for line in lines] == pytest.approx([0.0] * 4, abs=1e-6)
    assert not any("kl_drift" in key or "mismatch" in key for line in trainer.state.log_history for key in line)


def test_divergences_of_rloo_are_those_of_the_loss(tmp_path):
    config = SETTINGS | STILL | {"max_completion_length": 6, "beta": 0.05, "max_steps": 7}
    config |= {"generation_kwargs": {"temperature": 0.5}}
    trainer = fastalign.RLOOTrainer(
        sharp_model(),
        length_reward,
        fastalign.RLOOConfig(str(tmp_path), **config),
        train_dataset=prompts(),
        processing_class=copy.deepcopy(tiny_tokenizer()),
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "kl" in line]
    assert [line["kl"] for line in lines] == pytest.approx([0.0] * 7, abs=1e-6)
    assert not any("mismatch" in key for line in trainer.state.log_history for key in line)


def test_ratios_of_ppo_are_those_of_the_loss(tmp_path):
    config = PPO_SETTINGS | {"learning_rate": 0.0, "generation_kwargs": {"temperature": 0.35}, "max_steps": 2}
    trainer = fastalign.PPOTrainer(
        fastalign.PPOConfig(str(tmp_path), **config),
        copy.deepcopy(tiny_tokenizer()),
        sharp_model(),
        train_dataset=ids_of_prompts(),
        reward_funcs=lambda completion_ids, **kwargs: [float(len(set(ids))) for ids in completion_ids],
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "val/ratio" in line]
    assert len(lines) == 2
    for line in lines:
        assert (line["val/ratio"], line["objective/kl"]) == pytest.approx((1.0, 0.0), abs=1e-5)


# Replay


def test_replayed_groups_are_no_new_samples(tmp_path):
    """The engine is the model: what it samples has no mismatch, and what is replayed does not count."""
    config = {"num_generations": 2, "max_completion_length": 2, "learning_rate": 3e-2, "max_steps": 8}

    def rare(completion_ids, **kwargs):
        return [float(ids[0] % 5 == 0) for ids in completion_ids]

    trainer = grpo_trainer(tmp_path, fixed=False, rewards=rare, replay_buffer_size=4, **config)
    trainer.train()
    assert sum(line.get("replay/groups", 0) for line in trainer.state.log_history) > 3
    found = [line["mismatch"] for line in trainer.health.past if "mismatch" in line]
    assert len(found) >= 5 and max(found) < 1e-5


# Streams


def test_epochs_of_a_stream_differ_and_are_resumed_exactly(tmp_path):
    """Two generation batches in each epoch; the weights stay, so that only the draw can differ."""
    seen: list[list] = []

    def watched(prompts, completion_ids, target, **kwargs):
        seen[-1] += [(prompt, *ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]
        return length_reward(completion_ids, target)

    def run(resume=None):
        stream = IterableDataset.from_generator(lambda: iter(prompts(4)))
        config = SAMPLED | STILL | {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
        seen.append([])
        trainer = grpo_trainer(tmp_path, rewards=watched, data=stream, **config)
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return logged(trainer, ("loss", "grad_norm", "reward", "epoch"))

    whole = run()
    first, second, third = (seen[0][i : i + 16] for i in (0, 16, 32))
    assert {row[0] for row in first} == {row[0] for row in second} == {row["prompt"] for row in prompts(4)}
    assert len({*first} & {*second}) <= 2 >= len({*second} & {*third})  # short ones may be drawn again
    assert len({tuple(row[0] for row in epoch) for epoch in (first, second, third)}) > 1  # another order
    for step in (2, 3, 5):
        assert_same(run(f"checkpoint-{step}"), whole)
        assert seen[-1] == seen[0][8 * step :]


# Ranks


def test_a_pass_runs_a_stand_in_where_other_ranks_have_tokens():
    """Under FSDP all ranks run as many batches as any of them, also one of which no token is learned."""
    none = np.zeros(0, np.int64)
    rows = [Experience(np.arange(5, 5 + n), np.array([7, 8]), none, group=n) for n in (4, 2)]
    ran = []

    def forward(batch):
        ran.append([one.prompt_ids.tolist() for one in batch.experiences])
        return torch.ones(len(batch.targets))

    found = run_pass(rows, GroupCollator(pad_token_id=0, flat=True), forward, rounds=lambda count: max(count, 3))
    assert ran == [[[5, 6]]] * 3 and [len(values) for values in found] == [0, 0]
    assert run_pass(rows, GroupCollator(pad_token_id=0, flat=True), forward)[0].numel() == 0 and len(ran) == 3
