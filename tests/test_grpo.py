"""GRPO on sampled data: what must not change the numbers, what must not be computed, resuming, faults and errors."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import Dataset, IterableDataset
from grpo_runs import grpo_trainer, length_reward, prompts, rollout
from test_distributed import KINDS, LAUNCH
from tiny import tiny_model, tiny_tokenizer

import fastalign
from fastalign import prepare_policy, sampled_data
from fastalign.cli.main import main
from fastalign.rollout.loader import BatchPlan, prompt_order
from fastalign.rollout.rewards import RewardError

TIMED = ("runtime", "per_second", "step_time", "time/", "total_flos")
SAMPLED: dict[str, Any] = {"fixed": False, "max_completion_length": 6, "max_steps": 4}


def history(trainer, keys: tuple[str, ...] = ()) -> list[dict]:
    """The log without times, or only `keys` of it."""
    trainer.train()
    return logged(trainer, keys)


def logged(trainer, keys: tuple[str, ...] = ()) -> list[dict]:
    lines = [
        {k: v for k, v in entry.items() if not any(part in k for part in TIMED) and (not keys or k in keys)}
        for entry in trainer.state.log_history
    ]
    return [line for line in lines if line]


def assert_same(ours: list[dict], theirs: list[dict], rel: float = 2e-5) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=rel, abs=2e-7)


OFF: dict[str, Any] = {
    "steps_per_generation": 4,
    "per_device_train_batch_size": 2,
    "num_iterations": 2,
    "max_steps": 4,
}


# Cuts


@pytest.mark.parametrize(
    "loss", [{"loss_type": "bnpo", "entropy_coef": 0.1}, {"loss_type": "grpo", "beta": 0.1} | OFF]
)
def test_no_cut_of_a_step_changes_a_number(loss, tmp_path, monkeypatch):
    model = tiny_model()
    plain = history(grpo_trainer(tmp_path, share_prefix=False, **loss))
    for way in ({"share_prefix": True}, {"token_budget": 31}, {"token_budget": 4000}, {"pad_to_multiple_of": 16}):
        assert_same(history(grpo_trainer(tmp_path, **way, **loss)), plain)
    monkeypatch.setattr(sampled_data, "prepare_policy", lambda m: prepare_policy(m, allow_flat=False))
    assert_same(history(grpo_trainer(tmp_path, model=model, token_budget=60, **loss)), plain)


def test_micro_batches_do_not_change_losses_of_whole_steps(tmp_path):
    keys = ("loss", "grad_norm", "reward", "num_tokens")
    runs = [{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}, {}]
    runs += [{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}]
    first, *others = [history(grpo_trainer(tmp_path, **run), keys) for run in runs]
    for other in others:
        assert_same(other, first)


def test_a_micro_batch_within_the_budget_holds_a_prompt_once(tmp_path):
    trainer = grpo_trainer(tmp_path, token_budget=100, share_prefix=True)
    sizes = []
    compute = trainer.compute_loss

    def watch(model, batch, **kwargs):
        sizes.append((batch.input_ids.numel(), batch.num_tokens, len(batch.experiences)))
        return compute(model, batch, **kwargs)

    trainer.compute_loss = watch
    trainer.train()
    assert all(held <= 100 for held, _, _ in sizes)
    assert sum(count for _, _, count in sizes) == 5 * 8
    assert sum(held for held, _, _ in sizes) < 0.75 * sum(tokens for _, tokens, _ in sizes)


# What is not computed


def half_equal(completion_ids, **kwargs):
    """The same reward for all of every second group."""
    groups = [completion_ids[i : i + 4] for i in range(0, len(completion_ids), 4)]
    return [float(len(ids)) * (len(groups[0][0]) % 2) for group in groups for ids in group]


@pytest.mark.parametrize("reward", [half_equal, lambda completion_ids, **kw: [1.0] * len(completion_ids)])
def test_advantages_of_zero_cost_no_forward_and_change_nothing(reward, tmp_path, monkeypatch):
    keys, seen, weights = ("loss", "grad_norm", "clip_ratio/high_max", "reward"), [], []
    for skips in (True, False):
        if not skips:
            monkeypatch.setattr(fastalign.GRPOTrainer, "skips", lambda self, one: False)
        trainer = grpo_trainer(tmp_path, rewards=reward, weight_decay=0.1, max_steps=4)
        tokens, compute = [], trainer.compute_loss
        trainer.compute_loss = lambda m, b, c=compute, t=tokens, **k: (t.append(b.input_ids.numel()), c(m, b, **k))[1]
        trainer.train()
        seen.append((sum(tokens), logged(trainer, keys)))
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert seen[0][0] < 0.8 * seen[1][0]
    assert_same(seen[0][1], seen[1][1])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-7)


def test_sampled_log_probabilities_stand_for_old_ones(tmp_path, monkeypatch):
    trainer = grpo_trainer(tmp_path, **(SAMPLED | OFF))
    monkeypatch.setattr(trainer, "run_pass", None)  # would fail
    known = history(trainer)
    monkeypatch.setattr(fastalign.GRPOTrainer, "knows_old", False)
    assert_same(history(grpo_trainer(tmp_path, **(SAMPLED | OFF))), known, rel=2e-3)


# Resuming


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_resumed_within_a_generation_goes_on_as_if_it_had_not_stopped(step, tmp_path):
    config: dict[str, Any] = SAMPLED | OFF | {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "beta": 0.1}
    config |= {"gradient_accumulation_steps": 3, "use_adaptive_entropy": True, "entropy_target": 6.0}
    whole = grpo_trainer(tmp_path / "whole", **config)
    expected = history(whole)
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    calls = []

    def counted(completion_ids, **kwargs):
        calls.append(len(completion_ids))
        return length_reward(completion_ids, **kwargs)

    again = grpo_trainer(tmp_path / "again", rewards=counted, **config)
    again.rewards.names[:] = whole.rewards.names
    again.train(resume_from_checkpoint=True)
    assert logged(again)[:-1] == expected[:-1]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert sum(calls) == 8 * (-(-18 // 8) - -(-3 * step // 8))  # each generation once, none twice


# Batches


def test_a_stream_gives_the_batches_of_a_dataset(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(prompts()))
    runs = [history(grpo_trainer(tmp_path, shuffle_dataset=False, data=data)) for data in (prompts(), stream)]
    assert_same([{k: v for k, v in e.items() if k != "epoch"} for e in runs[1]],
                [{k: v for k, v in e.items() if k != "epoch"} for e in runs[0]])  # fmt: skip


def test_ranks_share_the_completions_of_a_prompt():
    plan = {rank: BatchPlan(3, 2, 1, 2, 4, rank=rank, world=2).share(["a", "b", "c"]) for rank in (0, 1)}
    assert plan == {0: [(0, 4), (1, 2)], 1: [(1, 2), (2, 4)]}
    assert sorted(prompt_order(9, 3, 1)) == list(range(9)) != prompt_order(9, 3, 1).tolist()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder in which two ranks have run `grpo_ranks.py`."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("grpo_ranks.py")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path])}
    env.pop("ACCELERATE_USE_CPU", None)
    done = subprocess.run(
        [*LAUNCH, *KINDS["ddp"][0], str(script), str(folder)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def test_two_ranks_do_what_one_process_does(two_ranks, tmp_path):
    from grpo_ranks import CASES, run

    expected = run(tmp_path, world=1)
    found = json.loads((two_ranks / "found.json").read_text())
    for name in CASES:
        assert_same(found[name], expected[name], rel=5e-5)


def test_two_ranks_resumed_within_a_generation_go_on_as_if_they_had_not_stopped(two_ranks):
    first, second = (json.loads((two_ranks / f"resumed-{rank}.json").read_text()) for rank in (0, 1))
    for found in (first, second):
        assert found["again"]["weights"] == found["whole"]["weights"] == first["whole"]["weights"]
    assert first["again"]["log"] == first["whole"]["log"] and len(first["whole"]["log"]) == 6
    assert all(line["grad_norm"] > 0 for line in first["whole"]["log"])


# Faults


def test_failing_rewards_are_counted_and_lose_their_rows_alone(tmp_path):
    data: Any = prompts()
    first = data[int(prompt_order(len(data), 42, 0)[0])]["prompt"]

    def breaks(prompts, completion_ids, **kwargs):
        if prompts[0] == first:
            raise OSError("no answer")
        return [float(len(ids)) for ids in completion_ids]

    lines = history(grpo_trainer(tmp_path, rewards=[breaks, length_reward]))
    assert [line.get("rewards/breaks/failures", 0) for line in lines[:3]] == [1, 0, 0]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines[:3])


def test_a_function_that_always_fails_stops_the_run(tmp_path):
    def breaks(**kwargs):
        raise OSError("no answer")

    with pytest.raises(RewardError, match="no answer"):
        grpo_trainer(tmp_path, rewards=[breaks, length_reward]).train()


def test_empty_and_unscored_completions_take_no_part(tmp_path):
    def some_empty(given, trainer):
        found = rollout(given, trainer)
        for name in ("completion_ids", "logprobs"):
            found[name][1] = []
        return found

    def silent(completion_ids, **kwargs):
        return [None if len(ids) == 4 else float(len(ids)) for ids in completion_ids]

    lines = history(grpo_trainer(tmp_path, rollout_func=some_empty, rewards=silent, loss_type="grpo"))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines[:-1])
    assert lines[0]["completions/min_length"] == 0


def test_masking_every_completion_leaves_the_weights_alone(tmp_path):
    trainer = grpo_trainer(tmp_path, **SAMPLED, mask_truncated_completions=True)
    trainer.end_ids, before = (), torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.loaded.tokenizer.pad_token_id = None  # nothing ends a completion
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert torch.equal(after, before)


# Replay


def test_groups_that_teach_nothing_are_replaced_by_ones_that_did(tmp_path):
    """Rewards are equal from the second step on: then the first group is learned from again, off policy."""
    calls = []

    def once(completion_ids, **kwargs):
        calls.append(1)
        return [float(ids[0] % 7) if len(calls) == 1 else 0.0 for ids in completion_ids]

    config = {"rewards": once, "max_steps": 3, "num_generations": 8, "save_strategy": "steps", "save_steps": 2}
    config |= {"learning_rate": 1e-3}
    trainer = grpo_trainer(tmp_path, **SAMPLED | config, replay_buffer_size=2)
    lines = history(trainer)
    assert [line["replay/groups"] for line in lines[:3]] == [0, 1, 1]
    assert all(line["grad_norm"] > 0 for line in lines[:3])
    again = grpo_trainer(tmp_path, **SAMPLED | config, replay_buffer_size=2)
    again.train(resume_from_checkpoint=True)
    assert logged(again, ("loss", "grad_norm"))[2] == logged(trainer, ("loss", "grad_norm"))[2]
    assert history(grpo_trainer(tmp_path / "without", **SAMPLED | config))[1]["grad_norm"] == 0


# What is shown


def test_completions_are_kept_and_printed(tmp_path, capsys):
    def told(completion_ids, log_extra, **kwargs):
        log_extra("length", [len(ids) for ids in completion_ids])
        return [float(len(ids)) for ids in completion_ids]

    trainer = grpo_trainer(tmp_path, rewards=told, log_completions=True, num_completions_to_print=1, max_steps=1)
    trainer.train()
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert table.columns.tolist() == ["step", "prompt", "completion", "told", "length", "advantage"]
    assert (table.told == table.length).all() and len(table) == 8
    for _, group in table.groupby("prompt"):
        centred = group.told - group.told.mean()
        assert group.advantage.tolist() == pytest.approx((centred / (group.told.std() + 1e-4)).tolist(), rel=1e-5)
    printed = capsys.readouterr().out
    assert table.prompt[0] in printed and "Completions at step 1" in printed
    assert table.prompt[4] not in printed.replace(table.prompt[0], "")


def test_evaluation_samples_and_leaves_training_alone(tmp_path):
    data = prompts()
    plain = history(grpo_trainer(tmp_path, **SAMPLED), ("loss", "reward"))
    trainer = grpo_trainer(
        tmp_path, **SAMPLED, eval_strategy="steps", eval_steps=1, num_generations_eval=2, eval_dataset=data.select([0])
    )
    lines = history(trainer)
    assert [{k: e[k] for k in ("loss", "reward")} for e in lines if "loss" in e] == plain
    scores = [line["eval_reward"] for line in lines if "eval_reward" in line]
    assert len(scores) == 4 and all(
        line["eval_frac_reward_zero_std"] in (0, 1) for line in lines if "eval_reward" in line
    )


# Learning


def test_the_policy_learns_what_is_rewarded(tmp_path):
    def many_sevens(completion_ids, **kwargs):
        return [sum(7 <= token < 60 for token in ids) / max(len(ids), 1) for ids in completion_ids]

    config = {"max_steps": 15, "num_generations": 8, "per_device_train_batch_size": 16, "learning_rate": 2e-2}
    lines = history(grpo_trainer(tmp_path, rewards=many_sevens, **(SAMPLED | config)), ("reward",))
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.35, lines


def test_the_command_trains_and_names_unknown_rewards(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    prompts().to_json("rows.jsonl")
    Path("own_rewards.py").write_text(
        "def length(completions, **kw):\n    return [float(len(c)) for c in completions]\n"
    )
    command = ["grpo", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl", "--output_dir", "out"]
    command += ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--num_generations", "4"]
    command += ["--per_device_train_batch_size", "4", "--max_completion_length", "4", "--max_steps", "2"]
    command += ["--logging_steps", "1", "--scale_rewards", "False"]
    names = ["--reward_funcs", "own_rewards.length", "get_repetition_penalty_reward"]
    assert main([*command, *names]) == 0
    state = json.loads(Path("out/trainer_state.json").read_text())
    assert state["log_history"][0]["reward"] == pytest.approx(
        state["log_history"][0]["rewards/length/mean"]
        + state["log_history"][0]["rewards/repetition_penalty_reward/mean"]
    )
    assert main([*command, "--reward_funcs", "acuracy_reward"]) == 1
    assert "did you mean accuracy_reward" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["gmpo", "dppo"])
def test_losses_beyond_trl_keep_the_policy_near_the_old_one(loss, tmp_path):
    """Their formulas are tested with the kernels; here a clip that allows nothing stops all but the first update."""
    config: dict[str, Any] = SAMPLED | OFF | {"loss_type": loss, "epsilon": 1e-9, "learning_rate": 1e-2, "beta": 0.0}
    lines = history(grpo_trainer(tmp_path, **config), ("grad_norm", "clip_ratio/region_mean"))
    assert lines[0]["grad_norm"] > 0.05
    assert any(line["clip_ratio/region_mean"] > 0.1 for line in lines[1:])


def test_a_part_of_the_vocabulary_is_corrected_for(tmp_path, caplog):
    """Sampled log-probabilities are then not the old ones: those are computed, and nothing is clipped at first."""
    lines = history(grpo_trainer(tmp_path, **(SAMPLED | OFF), top_k=20, off_policy_mask_threshold=1e-4))
    assert "not used" in caplog.text
    assert lines[0]["clip_ratio/region_mean"] == 0
    with pytest.raises(ValueError, match="replay_buffer_size"):
        grpo_trainer(tmp_path, replay_buffer_size=4, top_p=0.9)


# Data


def test_a_dataset_of_other_columns_reaches_the_rewards_unless_dropped(tmp_path):
    seen = []

    def watch(completions, **kwargs):
        seen.append(set(kwargs))
        return [float(len(text)) for text in completions]

    for dropped in (False, True):
        grpo_trainer(tmp_path, rewards=watch, remove_unused_columns=dropped, max_steps=1).train()
    assert "target" in seen[0] and "target" not in seen[-1]


def test_conversations_are_scored_as_messages(tmp_path):
    rows: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts()]

    def watch(prompts, completions, **kwargs):
        assert all(
            p[0]["role"] == "user" and c[0]["role"] == "assistant" for p, c in zip(prompts, completions, strict=True)
        )
        return [float(len(c[0]["content"])) for c in completions]

    lines = history(grpo_trainer(tmp_path, rewards=watch, data=Dataset.from_list(rows), **SAMPLED))
    rendered: Any = tiny_tokenizer().apply_chat_template(rows[0]["prompt"], add_generation_prompt=True)
    assert lines[0]["num_tokens"] > 8 * (len(rendered["input_ids"]) - 3)
