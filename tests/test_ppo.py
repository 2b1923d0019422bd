"""PPOTrainer against what TRL 1.10 logged (golden/ppo.json), and what must not change its numbers."""

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ppo_case import CASES, completion_of, models, prompts, settings_of
from tiny import tiny_model, tiny_tokenizer

import fastalign

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ppo.json").read_text())
COUNT_PADDING = ("policy/approxkl_avg", "policy/entropy_avg", "val/ratio", "val/ratio_var")  # in TRL
RTOL = 1e-5


class InOrder(fastalign.PPOTrainer):
    """Takes completions as they come in each pass, as the golden runs do."""

    def order(self, num_rows, step, epoch):
        return list(range(num_rows))


def rollout(even: bool):
    texts = tiny_tokenizer().batch_decode([row["input_ids"] for row in prompts()])
    ids_of = {text: row["input_ids"] for text, row in zip(texts, prompts(), strict=True)}
    assert len(ids_of) == len(texts)

    def fixed(given, trainer):
        ids = [ids_of[text] for text in given]
        return {
            "prompt_ids": ids,
            "completion_ids": [completion_of(one, even) for one in ids],
            "logprobs": [None] * len(ids),
        }

    return fixed


def run(folder, case: str, cls=InOrder, **changes):
    settings = settings_of(case) | {"shuffle_dataset": False, "num_sample_generations": 0} | changes
    args = fastalign.PPOConfig(str(folder), **settings)
    trainer = cls(
        args,
        copy.deepcopy(tiny_tokenizer()),
        **models(),
        train_dataset=prompts(),
        rollout_func=rollout(case == "even"),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_every_number_equals_trl(case, tmp_path):
    trainer, golden = run(tmp_path, case), GOLDEN[case]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == len(golden["logs"])
    updates = len(golden["grad_norms"]) // len(logs)
    for own, theirs, norm in zip(logs, golden["logs"], golden["grad_norms"][updates - 1 :: updates], strict=True):
        assert own["grad_norm"] == pytest.approx(norm, rel=RTOL)  # of the batch's last update
        for name, value in theirs.items():
            if case == "even" or name not in COUNT_PADDING:
                assert own[name] == pytest.approx(value, rel=RTOL, abs=1e-6), name
    with torch.no_grad():
        for name, part in {"policy": trainer.model, "value": trainer.value_model}.items():
            total = float(sum(p.double().abs().sum() for p in part.parameters()))
            assert total == pytest.approx(golden["weights"][name], rel=1e-6)


# On completions that are sampled here


def distinct(completion_ids, **kwargs) -> list[float | None]:
    """More different tokens are better; some completions cannot be judged."""
    return [None if ids[0] % 9 == 0 else len(set(ids)) / len(ids) - 0.01 * ids[0] for ids in completion_ids]


def sampled(folder, resume=None, model=None, callbacks=None, **changes):
    """Three steps on prompts of text, from a reward function, with a critic made of the policy."""
    settings = settings_of("ragged") | {
        "learning_rate": 1e-2,
        "num_generations": 2,
        "num_mini_batches": 2,
        "max_steps": 3,
        "num_sample_generations": 0,
        "adam_epsilon": 1e-3,  # with a small one Adam makes rounding large
    }
    settings = {k: v for k, v in settings.items() if k != "total_episodes"} | changes
    peft_config = settings.pop("peft_config", None)
    trainer = fastalign.PPOTrainer(
        fastalign.PPOConfig(str(folder), **settings),
        copy.deepcopy(tiny_tokenizer()),
        tiny_model(seed=0) if model is None else model,
        ref_model=None if peft_config else tiny_model(seed=1),
        train_dataset=Dataset.from_list([{"prompt": f"{i} the quick brown fox"} for i in range(24)]),
        reward_funcs=distinct,
        callbacks=callbacks,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def numbers(trainer) -> list[dict]:
    timed = ("runtime", "per_second", "step_time", "time/", "eps", "train_loss", "total_flos")
    return [
        {k: v for k, v in log.items() if not any(part in k for part in timed)} for log in trainer.state.log_history
    ]


def assert_same_weights(run, other, rel: float) -> None:
    for name in ("model", "value_model"):
        theirs = getattr(other, name).state_dict()
        for key, value in getattr(run, name).state_dict().items():
            torch.testing.assert_close(value, theirs[key], rtol=rel, atol=rel)


def test_how_a_batch_is_cut_changes_nothing(tmp_path):
    shared = sampled(tmp_path / "shared", share_prefix=True, token_budget=40, max_steps=2)
    alone = sampled(tmp_path / "alone", share_prefix=False, max_steps=2)
    for own, theirs in zip(numbers(shared), numbers(alone), strict=True):
        assert own == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert_same_weights(shared, alone, 2e-5)


def test_a_run_that_is_resumed_ends_with_the_same_policy_and_critic(tmp_path):
    whole = sampled(tmp_path / "whole", save_strategy="steps", save_steps=2)
    again = sampled(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_weights(whole, again, 0.0)
    assert numbers(again)[-2] == numbers(whole)[-2]


def test_an_adapter_is_compared_with_the_model_without_it(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_model(seed=0)
    before = {name: value.clone() for name, value in base.named_parameters()}
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)
    run = sampled(tmp_path, model=base, peft_config=config, max_steps=2)
    first, second = [log for log in numbers(run) if "loss" in log]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)  # at first the adapter does nothing
    assert abs(second["objective/kl"]) > 1e-4
    left = {name.replace(".base_layer", ""): value for name, value in run.model.get_base_model().named_parameters()}
    assert all(torch.equal(left[name], value) for name, value in before.items())
    assert run.value_model.score.weight.any()  # it began as zeros


def test_a_critic_on_the_policys_body_is_the_one_with_a_copy_of_it_at_first(tmp_path):
    """A head of zero has no pull on the body, so that the first update is the same."""
    settings = {"num_ppo_epochs": 1, "num_mini_batches": 1, "max_steps": 1}
    shared, own = (sampled(tmp_path / str(share), share_backbone=share, **settings) for share in (True, False))
    mine, theirs = (next(log for log in numbers(run) if "loss" in log) for run in (shared, own))
    assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(shared.value_model.weight, own.value_model.score.weight, rtol=1e-4, atol=1e-6)
    assert shared.value_model.weight.any()
