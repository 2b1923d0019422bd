"""What goes wrong in online training: what it costs, what counts it, and that the run goes on or says what to do."""

import io
import itertools
import math
import re
import time
from html import unescape
from types import SimpleNamespace
from typing import Any

import huggingface_hub.hf_api
import pandas
import pytest
import torch
from datasets import Dataset
from grpo_runs import END, grpo_trainer, length_reward, prompts, rollout
from scripted_engine import ScriptedEngine
from test_grpo import SAMPLED, history
from tiny import tiny_model
from transformers import TrainerCallback

from fastalign.report import write_report

NAN = math.nan
STILL = {"optim": "sgd", "learning_rate": 1e-2}  # a gradient of zero leaves the weights where they are
LOST = slice(4, 8)  # the second group of the first generation batch


class Weights(TrainerCallback):
    """The weights after each step, as one vector."""

    def __init__(self):
        self.at: list[torch.Tensor] = []

    def keep(self, args, state, control, model=None, **kwargs):
        self.at.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())

    on_train_begin = on_step_end = keep


def watched(folder, rewards, **config):
    """(lines of the log, rewards (N, K) and advantages (N,) of each generation batch, weights after each step)."""
    weights, batches = Weights(), []
    trainer = grpo_trainer(folder, rewards=rewards, callbacks=[weights], **{"max_steps": 3} | config)
    score = trainer.score

    def watch(batch):
        score(batch)
        batches.append((batch.rewards.clone(), batch.advantages.clone(), batch))

    trainer.score = watch
    lines = history(trainer)[:-1]
    assert trainer.state.global_step == len(lines) == len(weights.at) - 1
    assert all(at.isfinite().all() for at in weights.at) and all(math.isfinite(line["loss"]) for line in lines)
    return lines, batches, weights.at


# Reward functions


def tokens(completion_ids, **kwargs):
    return [float(sum(ids) % 13) for ids in completion_ids]


class Faulty:
    """`tokens`, except in the call of one number (counted over the run), where it does as `fault` says."""

    __name__ = "faulty"

    def __init__(self, fault, number=1):
        self.fault, self.number, self.calls = fault, number, 0

    def __call__(self, completion_ids, **kwargs):
        self.calls += 1
        good = tokens(completion_ids)
        return self.fault(good) if self.calls == self.number + 1 else good


def hangs(good):
    time.sleep(30)


def raises(good):
    raise ConnectionError("the judge is away")


FAULTS = {  # -> calls that count as failed, whether the rows count as lost
    "says nothing": (lambda good: [None] * len(good), 0, False),
    "hangs": (hangs, 1, True),
    "raises": (raises, 1, True),
    "too few": (lambda good: good[:-1], 1, True),
    "too many": (lambda good: [*good, 1.0], 1, True),
    "no list": (lambda good: None, 1, True),
    "nan": (lambda good: [NAN] * len(good), 1, False),
    "infinite": (lambda good: [-math.inf] * len(good), 1, False),
}


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """The run whose function says nothing of the second group."""
    folder = tmp_path_factory.mktemp("silent")
    return watched(folder, [Faulty(FAULTS["says nothing"][0]), length_reward])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_call_costs_its_rows_and_nothing_else(fault, silent, tmp_path):
    """Every fault is as if the function had said nothing of these rows: same rewards, losses and weights."""
    does, failures, is_lost = FAULTS[fault]
    timeout = 0.5 if fault == "hangs" else 60.0
    lines, batches, weights = watched(tmp_path, [Faulty(does), length_reward], reward_timeout=timeout)
    for (rewards, advantages, batch), (expected, same, _) in zip(batches, silent[1], strict=True):
        assert torch.equal(rewards.nan_to_num(99.0), expected.nan_to_num(99.0)) and torch.equal(advantages, same)
        assert batch.scores.lost[:, 0].any() == (is_lost and batch is batches[0][2])
    rewards, advantages, batch = batches[0]
    assert rewards[LOST, 0].isnan().all() and not rewards[:4].isnan().any() and not rewards[:, 1].isnan().any()
    assert batch.scores.lost[:, 0].tolist() == [False] * 4 + [is_lost] * 4
    other = rewards[LOST, 1]  # the other function still ranks them
    assert torch.allclose(advantages[LOST], (other - other.mean()) / (other.std() + 1e-4))
    assert lines[0]["rewards/faulty/mean"] == pytest.approx(float(rewards[:4, 0].mean()))
    assert lines[0]["reward"] == pytest.approx(float(rewards.nansum(1).mean()))
    assert [line.get("rewards/faulty/failures", 0) for line in lines] == [failures, 0, 0]
    assert not any("frac_unscored" in line for line in lines)
    for line, expected in zip(lines, silent[0], strict=True):
        assert [line[key] for key in ("loss", "grad_norm", "reward")] == [
            expected[key] for key in ("loss", "grad_norm", "reward")
        ]
    assert torch.equal(weights[-1], silent[2][-1]) and not torch.equal(weights[-1], weights[0])


class Second:
    """Scores all but the second generation batch (two calls each), of which it says `value`."""

    __name__ = "second"

    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self, completion_ids, **kwargs):
        self.calls += 1
        return [self.value] * len(completion_ids) if self.calls in (3, 4) else length_reward(completion_ids, **kwargs)


@pytest.mark.parametrize("value, failures", [(None, 0), (NAN, 2), (0.25, 0)])
def test_a_batch_that_nobody_scores_or_that_is_all_equal_moves_nothing(value, failures, tmp_path):
    lines, batches, weights = watched(tmp_path, Second(value), **STILL)
    known = value is not None and math.isfinite(value)
    assert batches[1][0].isnan().all() != known and not batches[0][0].isnan().any()
    assert batches[1][1].tolist() == [0.0] * 8
    assert [line.get("frac_unscored", 0.0) for line in lines] == [0.0, 0.0 if known else 1.0, 0.0]
    assert [line.get("rewards/second/failures", 0) for line in lines] == [0, failures, 0]
    assert [line["frac_reward_zero_std"] for line in lines] == [0.0, float(known), 0.0]
    assert lines[1].get("reward") == (0.25 if known else None)
    assert lines[1]["loss"] == 0 and [line["grad_norm"] > 0 for line in lines] == [True, False, True]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert moved == [True, False, True]


# Completions and prompts


def test_completions_that_end_at_once(tmp_path):
    """Of each group one is the end token alone: it is scored as an empty text, and learned from as one token."""
    texts = []

    def brief(completions, completion_ids, **kwargs):
        texts.extend(text for text, ids in zip(completions, completion_ids, strict=True) if ids == [END])
        return [1.0 / len(ids) for ids in completion_ids]

    engine = ScriptedEngine(lambda request: [END] if request.key[1] == 0 else [7 + request.key[1]] * 3 + [END])
    trainer = grpo_trainer(tmp_path, rewards=brief, **SAMPLED)
    trainer.engine = trainer.rollouts.engine = engine
    learned, score = [], trainer.score
    trainer.score = lambda batch: (score(batch), learned.append([one.num_learned for one in batch.experiences]))
    lines = history(trainer)[:-1]
    assert texts == [""] * 8 and learned == [[1, 4, 4, 4] * 2] * 4
    for line in lines:
        assert line["completions/min_length"] == line["completions/min_terminated_length"] == 1
        assert line["completions/mean_length"] == 3.25 and line["completions/clipped_ratio"] == 0
        assert line["reward"] == pytest.approx((1 + 3 * 0.25) / 4)
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("ids", [[], [END]])
def test_nothing_but_empty_completions(ids, tmp_path):
    def nothing(given, trainer):
        found = rollout(given, trainer)
        return found | {"completion_ids": [ids] * len(given), "logprobs": [[-1.0] * len(ids)] * len(given)}

    def chance(completion_ids, **kwargs):
        return [float(i) for i, _ in enumerate(completion_ids)]

    lines, _, weights = watched(tmp_path, chance, rollout_func=nothing, **STILL)
    for line in lines:
        assert line["completions/max_length"] == len(ids) and line["completions/clipped_ratio"] == float(not ids)
        assert line["completions/mean_terminated_length"] == len(ids) and line["reward"] == 1.5
        assert line["grad_norm"] == pytest.approx(0, abs=1e-6)  # they did the same, so that advantages cancel out
    torch.testing.assert_close(weights[0], weights[-1], rtol=0, atol=1e-7)


def long_prompts(length: int) -> Dataset:
    return Dataset.from_list([{"prompt": "the " * length, "target": 0}] * 4)


def test_prompts_are_never_cut(tmp_path):
    """Rotary positions have no end: a prompt beyond `max_position_embeddings` is read whole."""
    data = long_prompts(300)
    lines, batches, _ = watched(tmp_path, length_reward, data=data, **SAMPLED | {"max_steps": 1})
    lengths = {len(one.prompt_ids) for one in batches[0][2].experiences}
    assert len(lengths) == 1 and min(lengths) >= 300 > tiny_model().config.max_position_embeddings
    assert lines[0]["num_tokens"] == 8 * min(lengths) + 8 * lines[0]["completions/mean_length"]


def test_prompts_beyond_a_table_of_positions_are_refused(tmp_path):
    trainer = grpo_trainer(tmp_path, model=tiny_model("gpt2"), data=long_prompts(254), **SAMPLED)
    expected = (
        r"\d+ tokens and 6 may follow, but the model has 256 positions.*`max_completion_length`.*begins with 'the "
    )
    with pytest.raises(ValueError, match=expected):
        trainer.train()
    assert trainer.state.global_step == 0 and not trainer.engine.pending


# Weights


def test_the_engine_follows_the_best_weights_that_come_back(tmp_path):
    """`load_best_model_at_end` changes them after the last step: an evaluation then samples from those."""

    def worse(completion_ids, trainer_state, **kwargs):
        return [reward - 100 * trainer_state.global_step for reward in length_reward(completion_ids, **kwargs)]

    options: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "eval_dataset": prompts(2)}
    weights = Weights()
    trainer = grpo_trainer(
        tmp_path, rewards=worse, callbacks=[weights], **SAMPLED | options | {"max_staleness": 1, "max_steps": 3}
    )
    trainer.train()
    now = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert torch.equal(now, weights.at[1]) and not torch.equal(now, weights.at[3])
    pairs = trainer.engine.weights._pairs  # of the model, and of the copy that is sampled from
    assert not all(torch.equal(a, b) for a, b in pairs)  # it is as the last evaluation left it
    trainer.evaluate()
    assert all(torch.equal(a, b) for a, b in pairs)


# What is uploaded


@pytest.fixture
def hub(monkeypatch):
    """Calls of the Hub: (name of the call, its arguments, files with their contents)."""
    calls = []

    def create_repo(self, **given):
        calls.append(("create", given | {"token": self.token}, {}))
        return SimpleNamespace(repo_id=given["repo_id"])

    def create_commit(self, operations, **given):
        files = {}
        for one in operations:
            with one.as_file() as file:
                files[one.path_in_repo] = file.read()
        calls.append(("commit", given, files))

    monkeypatch.setattr(huggingface_hub.hf_api.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.hf_api.HfApi, "create_commit", create_commit)
    return calls


def test_completions_are_uploaded_as_they_were_written(hub, tmp_path):
    config = {"log_completions": True, "log_completions_hub_repo": "me/log", "hub_token": "secret", "max_steps": 2}
    trainer = grpo_trainer(tmp_path, hub_private_repo=True, num_completions_to_print=0, **config)
    created = {"repo_id": "me/log", "repo_type": "dataset", "private": True, "exist_ok": True, "token": "secret"}
    assert hub == [("create", created, {})]
    trainer.train()
    (tmp_path / "completions" / "notes.txt").write_text("not for others")
    scheduler = trainer.completions_log._scheduler
    scheduler.trigger().result()
    uploaded: dict[str, bytes] = {}
    for kind, given, files in hub[1:]:
        assert kind == "commit" and given["repo_id"] == "me/log" and given["repo_type"] == "dataset"
        uploaded |= files
    assert sorted(uploaded) == ["completions_00001.parquet", "completions_00002.parquet"]
    for name, content in uploaded.items():
        assert content == (tmp_path / "completions" / name).read_bytes()
        table = pandas.read_parquet(io.BytesIO(content))
        assert table.columns.tolist() == ["step", "prompt", "completion", "length_reward", "advantage"]
        assert len(table) == 8 and set(table.step) == {int(name[12:17])}
    count = len(hub)
    scheduler.trigger().result()
    assert len(hub) == count  # nothing is sent twice
    scheduler.stop()


def test_files_are_sent_whole_or_not_yet(hub, tmp_path, monkeypatch):
    """The scheduler lists files under its lock, which is held while one is written."""
    config = {"log_completions": True, "log_completions_hub_repo": "me/log", "max_steps": 1}
    trainer = grpo_trainer(tmp_path, num_completions_to_print=0, **config)
    scheduler, held, write = trainer.completions_log._scheduler, [], pandas.DataFrame.to_parquet
    monkeypatch.setattr(
        pandas.DataFrame, "to_parquet", lambda *given: (held.append(scheduler.lock.locked()), write(*given))
    )
    trainer.train()
    assert held == [True] and not scheduler.lock.locked()
    scheduler.stop()


def test_the_report_of_a_run_shows_rewards_first_and_completions_as_they_were(tmp_path):
    config = {"log_completions": True, "num_completions_to_print": 0, "max_steps": 3}
    trainer = grpo_trainer(tmp_path, rewards=[tokens, length_reward], **config)
    trainer.train()
    trainer.save_state()
    page = write_report(tmp_path).read_text()
    captions = [re.sub("<.*", "", text) for text in re.findall(r"<figcaption>(.*?)</figcaption>", page)]
    rewards = ["reward", "rewards/length reward/mean", "rewards/tokens/mean"]  # the state has its keys in this order
    assert captions[:6] == [*rewards, "loss", "entropy", "gradient norm"]
    tables = page[page.index("<h2>Completions</h2>") :].split("<h4>")[1:]
    assert [table[: table.index("<")] for table in tables] == ["step 1", "step 3"]
    for table, step in zip(tables, (1, 3), strict=True):
        written = pandas.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        shown = re.findall("<tr><td>(.*?)</tr>", table.split("</tbody>")[0], re.DOTALL)
        cells = [[re.sub("<.*?>", "", cell) for cell in row.split("</td>")[:5]] for row in shown]
        assert [unescape(row[1]) for row in cells] == written.completion.tolist() and len(cells) == 8
        for place, name in ((2, "tokens"), (3, "length_reward"), (4, "advantage")):
            assert [float(row[place]) for row in cells] == pytest.approx(written[name].tolist(), rel=1e-3, abs=1e-3)
