"""Each finding is provoked, by made-up logs or a tiny run; healthy runs show none; runs stop where asked."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from dpo_runs import make, train
from fastalign_kernels.head.preference import linear_preference_loss
from tiny import tiny_model, tiny_tokenizer

from fastalign import DPOConfig, HealthError, KTOConfig, KTOTrainer
from fastalign.cli.main import main
from fastalign.data.examine import examine
from fastalign.findings import FINDINGS
from fastalign.loop.health import findings
from fastalign.report import write_report

LIMITS = {"drift": 1.0, "rows": 100}
RISING = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]
NOISE = [0.02, -0.03, 0.01, -0.02, 0.03, -0.01, 0.02, -0.02, 0.0, 0.01, -0.03, 0.02, 0.01, -0.02]


def history(num_logs: int = 14, **series) -> list[dict]:
    """Logs of a healthy run, except for the given series ("rewards_margins": "rewards/margins")."""
    steps = np.arange(num_logs)
    usual = {
        "loss": 0.69 - 0.03 * steps,
        "grad_norm": 2.0 + 0.3 * np.cos(steps),
        "rewards/margins": 0.1 * steps,
        "rewards/accuracies": np.minimum(0.5 + 0.04 * steps, 0.9),
        "logps/chosen": -100 - 1.0 * steps + 5 * np.cos(steps),
    }
    usual |= {
        name.replace("rewards_", "rewards/").replace("logps_", "logps/"): values for name, values in series.items()
    }
    return [{name: float(values[i]) for name, values in usual.items()} for i in range(num_logs)]


def judged(logs, hidden=None, progress=0.9, **limits):
    return findings(logs, hidden or {}, progress=progress, **(LIMITS | limits))


def test_a_healthy_history_shows_nothing():
    assert judged(history()) == {}
    assert judged(history(2)) == {} and judged([{"loss": 1.0, "grad_norm": 1.0}]) == {}


def test_margin_that_rose_and_fell_back_to_chance():
    margins = [*RISING[:9], *(0.01 * x for x in (1, -2, 1, 0, -1))]
    accuracies = [0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8, 0.7, 0.52, 0.48, 0.5, 0.5, 0.5]
    found = judged(history(rewards_margins=margins, rewards_accuracies=accuracies), progress=0.2)
    assert found == {"margin_collapse": pytest.approx(-0.002)}
    accuracies[-5:] = [0.8] * 5  # small margins that still rank
    assert judged(history(rewards_margins=margins, rewards_accuracies=accuracies), progress=0.2) == {}
    of_kto = [{k: v for k, v in entry.items() if "accuracies" not in k} for entry in history(rewards_margins=margins)]
    assert list(judged(of_kto, progress=0.2)) == ["margin_collapse"]


def test_margin_that_stays_at_zero_counts_in_the_second_half():
    chance = {"rewards_margins": NOISE, "rewards_accuracies": [0.5] * 14}
    assert judged(history(**chance), progress=0.4) == {}
    assert list(judged(history(**chance), progress=0.6)) == ["margin_collapse"]
    small = {"rewards_margins": [1e-4] * 14, "rewards_accuracies": [0.5] * 14}  # slow, but not noise
    assert judged(history(**small), progress=0.6) == {}
    reward = [{"loss": 0.7, "grad_norm": 1.0, "margin": m, "accuracy": 0.5} for m in NOISE]
    assert list(judged(reward, progress=0.6)) == ["margin_collapse"]


def test_chosen_answers_that_fall_while_the_loss_falls():
    falling = {"logps_chosen": [-100.0 - 5 * i for i in range(14)]}  # from -110 to -155 on average
    assert judged(history(**falling)) == {"chosen_falling": pytest.approx(45)}
    assert judged(history(**falling, loss=[0.7] * 14)) == {}
    noisy = {"logps_chosen": [-100.0, -200, -60, -180, -90, 0, 0, 0, 0, -250, -90, -260, -110, -150]}
    assert judged(history(**noisy)) == {}


def test_drift_and_few_rows_from_what_losses_record():
    assert judged(history(1), {"drift": 0.9}) == {}
    assert judged(history(1), {"drift": 1.1}) == {"kl_drift": 1.1}
    one_of_hundred = {"pull": 1.0, "pull_squared": 1.0, "rows": 100.0}
    assert judged(history(1), one_of_hundred) == {"few_rows": pytest.approx(0.01)}
    assert judged(history(1), one_of_hundred, rows=63) == {}
    assert judged(history(1), {"pull": 20.0, "pull_squared": 20.0, "rows": 100.0}) == {}  # 20 of 100 pull alike


def test_jumps_of_loss_and_gradient_norm():
    loss, norm = [0.69 - 0.03 * i for i in range(14)], [2.0] * 14
    assert judged(history(loss=[*loss[:13], 1.2])) == {"loss_spike": 1.2}
    assert judged(history(loss=[*loss[:12], 1.2, 0.3])) == {}  # over
    assert judged(history(loss=[*[0.69] * 5, *[0.01] * 8, 0.1])) == {}  # ten times as much, but little
    assert judged(history(grad_norm=[*norm[:13], 25.0])) == {"grad_norm_spike": 25.0}
    assert judged(history(grad_norm=[*norm[:13], 18.0])) == {}


# Data


def token_rows(pairs, names=("prompt_ids", "chosen_ids", "rejected_ids")) -> Dataset:
    return Dataset.from_dict(
        {name: list(column) for name, column in zip(names, zip(*pairs, strict=True), strict=True)}
    )


def test_repeated_and_contradictory_pairs_are_found_however_their_tokens_are_cut():
    rows = [([i, 5], [i + 1, 7], [i + 2]) for i in range(100)]
    assert examine(token_rows(rows)) == {}
    assert examine(token_rows([*rows, rows[3], rows[3]])) == {"duplicate_pairs": pytest.approx(2 / 102)}
    prompt, chosen, rejected = rows[8]
    assert examine(token_rows([*rows, (prompt, rejected, chosen)])) == {"contradictory_pairs": pytest.approx(2 / 101)}
    moved = ([8, 5, 9], [7], [10])  # the same tokens as row 8, but another prompt
    assert examine(token_rows([*rows, moved, ([8], [5, 9, 7], [10]), ([8, 5], [9, 7, 10], [])])) == {}


def test_judged_answers_that_repeat_or_contradict():
    rows = [([i, 5], [i + 1], i % 2 == 0) for i in range(100)]
    names = ("prompt_ids", "completion_ids", "label")
    assert examine(token_rows(rows, names)) == {}
    assert examine(token_rows([*rows, rows[0]], names)) == {}  # 1 of 101 is not 1 %
    assert examine(token_rows([*rows[:50], rows[0]], names)) == {"duplicate_pairs": pytest.approx(1 / 51)}
    assert examine(token_rows([*rows, ([0, 5], [1], False)], names)) == {"contradictory_pairs": pytest.approx(2 / 101)}


def test_hashes_keep_rows_apart():
    numbers = np.arange(50_000)
    column = [[int(n) % 50, int(n) // 50 % 64, int(n) // 3200] for n in numbers]
    rows = Dataset.from_dict(
        {"prompt_ids": [[1]] * len(column), "chosen_ids": column, "rejected_ids": [[2]] * len(column)}
    )
    assert examine(rows) == {}


def test_rows_that_fill_max_length_count_as_cut():
    rows = [([1] * 6, [2] * (4 if i < 10 else 3), [3 + i]) for i in range(100)]
    assert examine(token_rows(rows), 10) == {"truncation": pytest.approx(0.1)}
    assert examine(token_rows(rows), 11) == {} and examine(token_rows(rows[6:]), 10) == {}


# Runs


def pairs(num_rows: int = 64, seed: int = 0) -> Dataset:
    """Distinct prompts whose chosen answer says one thing, the rejected another."""
    digits = np.random.default_rng(seed).permutation(10_000)[:num_rows]
    prompts = [f"{n:04d}:" for n in digits]
    return Dataset.from_dict(
        {"prompt": prompts, "chosen": [" yes it is"] * num_rows, "rejected": [" no, never"] * num_rows}
    )


def keys_of(trainer) -> set[str]:
    return {key.removeprefix("health/") for entry in trainer.state.log_history for key in entry if "health/" in key}


def test_a_healthy_run_shows_nothing(tmp_path, caplog):
    trainer = train(tmp_path, pairs(), max_steps=16, learning_rate=1e-3)
    assert keys_of(trainer) == set() and "Health" not in caplog.text
    assert not any("_health" in key for entry in trainer.state.log_history for key in entry)
    assert "<h2>Health</h2><p>Nothing was found.</p>" in write_report(saved(trainer)).read_text()


def saved(trainer) -> str:
    trainer.save_state()
    return trainer.args.output_dir


def test_drift_of_a_run_is_that_of_its_answers(tmp_path, caplog):
    """The number is the mean |log ratio| per token, worked out from the reference's and the policy's sums."""
    trainer = train(tmp_path, pairs(8), max_steps=3, learning_rate=3e-2, kl_drift_bound=0.05, beta=0.5)
    assert keys_of(trainer) == {"kl_drift"} and caplog.text.count("kl_drift: the policy is far") == 1
    assert "Health, over the whole run: kl_drift in 2 logs." in caplog.text
    entry = trainer.state.log_history[1]  # one direction each: rewards are beta times the sums of log-ratios
    ids = [trainer.train_dataset[0][f"{name}_ids"] for name in ("chosen", "rejected")]
    assert entry["rewards/chosen"] > 0 > entry["rewards/rejected"]
    by_hand = (entry["rewards/chosen"] - entry["rewards/rejected"]) / 0.5 / sum(map(len, ids))
    assert entry["health/kl_drift"] == pytest.approx(by_hand, rel=1e-5)
    page = write_report(saved(trainer)).read_text()
    assert "nats per token on average" in page and "<td>in 2 logs</td>" in page and "Raise beta" in page
    assert "health/kl_drift" not in re.sub(r"<table.*?</table>", "", page)  # no curve


@pytest.mark.parametrize("chunk", [None, 8])
def test_pulls_are_the_derivatives_by_log_probabilities(chunk):
    """Of DPO's sigmoid loss: beta * sigmoid(-margin) / pairs for each token of both answers."""
    rows = torch.tensor([0] * 3 + [1] * 5 + [2] * 4 + [3] * 2 + [4] + [5] * 2)
    hidden, weight = torch.randn(len(rows), 8, requires_grad=True), torch.randn(13, 8)
    targets, references = torch.randint(0, 13, (len(rows),)), -2.5 * torch.tensor([3.0, 5, 4, 2, 1, 2])
    settings = {"num_pairs": 3, "ref_logps": references, "beta": 0.3, "chunk": chunk}
    found = linear_preference_loss(hidden, weight, targets, rows, **settings)
    margins = 0.3 * (found.chosen_logps - found.rejected_logps - references[::2] + references[1::2])
    by_hand = torch.tensor([8, 6, 3]) * 0.3 * torch.sigmoid(-margins) / 3
    torch.testing.assert_close(found.pulls, by_hand)
    with torch.no_grad():
        assert linear_preference_loss(hidden, weight, targets, rows, **settings).pulls is None


def test_few_rows(tmp_path):
    """One pair that nothing can learn among pairs that are learnt at once."""
    rows = pairs(64)
    flipped = {"prompt": rows[0]["prompt"], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    rows = Dataset.from_list([{**flipped, "prompt": "the quick brown fox"}, *[rows[i] for i in range(63)]])
    settings = {
        "per_device_train_batch_size": 64,
        "max_steps": 40,
        "logging_steps": 1,
        "learning_rate": 2e-2,
        "beta": 1.0,
    }
    trainer = train(tmp_path, rows, kl_drift_bound=1e9, **settings)
    assert "few_rows" in keys_of(trainer)


def test_data_findings_stop_before_the_first_step(tmp_path):
    rows = pairs(20)
    rows = Dataset.from_list(
        [*rows, {"prompt": rows[0]["prompt"], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}]
    )
    trainer = train(tmp_path / "a", rows)  # only told
    assert trainer.state.log_history[0]["health/contradictory_pairs"] == pytest.approx(2 / 21)
    assert trainer.state.log_history[0]["loss"] > 0 and len(trainer.state.log_history) == 3
    trainer = make(tmp_path / "b", rows, stop_on_health=["contradictory_pairs"])
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(HealthError, match=r"step 0, contradictory_pairs: 9\.5% of the rows.*Remove both rows"):
        trainer.train()
    assert trainer.state.global_step == 0 and trainer.state.log_history[0]["step"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_run_stops_at_its_first_finding_with_a_checkpoint(tmp_path):
    settings = {
        "max_steps": 8,
        "learning_rate": 3e-2,
        "kl_drift_bound": 0.05,
        "save_strategy": "steps",
        "save_steps": 100,
    }
    trainer = make(tmp_path, pairs(), stop_on_health="all", **settings)
    with pytest.raises(HealthError, match=r"step (\d), kl_drift"):
        trainer.train()
    step = trainer.state.global_step
    assert 1 < step < 8 and keys_of(trainer) == {"kl_drift"}
    state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["health/kl_drift"] > 0.05
    onward = make(tmp_path, pairs(), **settings)
    onward.train(resume_from_checkpoint=True)
    assert onward.state.global_step == 8


def test_unknown_findings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"stop_on_health has .'kl_dirft'.: allowed are 'all' and margin_collapse"):
        DPOConfig(str(tmp_path), stop_on_health=["kl_dirft"])


def test_kto_is_watched_too(tmp_path, caplog):
    config = {
        "max_steps": 4,
        "learning_rate": 3e-2,
        "kl_drift_bound": 0.01,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
    }
    config |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "loss_type": "apo_zero_unpaired"}
    trainer = KTOTrainer(
        tiny_model(),
        args=KTOConfig(str(tmp_path), **config),
        train_dataset=pairs(16),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert "kl_drift" in keys_of(trainer)


def test_the_command_ends_with_3_and_the_report_shows_why(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [*pairs(20), pairs(20)[0]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = ["dpo", "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    run += [
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "2",
        "--use_cpu",
        "--bf16",
        "false",
        "--report_to",
        "none",
    ]
    assert main([*run, "--stop_on_health", "kl_drift", "duplicate_pairs"]) == 3
    assert "fastalign dpo: Stopped by stop_on_health at step 0, duplicate_pairs: 4.8%" in capsys.readouterr().err
    page = write_report(tmp_path / "out").read_text()
    assert "duplicate_pairs" in page and FINDINGS["duplicate_pairs"].remedy in page


def test_docs_name_every_finding():
    text = (Path(__file__).parent.parent / "docs" / "health.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, flags=re.M) == [*FINDINGS]
