"""Findings of runs on samples: each by made-up logs and, where a tiny run shows it, by one; healthy runs show none."""

import copy

import numpy as np
import pytest
import torch
from grpo_runs import SETTINGS, grpo_trainer, length_reward, prompts
from test_grpo import SAMPLED
from tiny import tiny_model, tiny_tokenizer

import fastalign
from fastalign import HealthError
from fastalign.findings import FINDINGS
from fastalign.report import write_report
from fastalign.rollout.health import length_correlation, sampled_findings

STEPS = np.arange(14)
USUAL = {
    "loss": 0.01 * np.sin(7 * STEPS),
    "grad_norm": 1.0 + 0.2 * np.cos(STEPS),
    "entropy": 0.35 - 0.015 * STEPS,
    "reward": 0.3 + 0.04 * STEPS,
    "completions/mean_length": 100.0 + STEPS,
    "completions/clipped_ratio": 0.1 + 0 * STEPS,
    "frac_reward_zero_std": 0.2 + 0.03 * STEPS,
}
HIDDEN = {"lost": 0.0, "length": 0.2, "mismatch": 0.01, "cut": 0.02}


def judged(num_logs: int = 14, *, found=None, past=None, hidden=None, **series):
    """What logs of a healthy run show, except for the given series ("frac_reward_zero_std", "mean_length")."""
    usual = USUAL | {next(key for key in USUAL if key.endswith(name)): values for name, values in series.items()}
    history = [{name: float(np.resize(values, 14)[i]) for name, values in usual.items()} for i in range(num_logs)]
    past = past or [HIDDEN | (hidden or {})] * min(num_logs, 5)
    return sampled_findings(found or {}, history, past)


def test_healthy_logs_show_nothing():
    assert judged() == {} and judged(1) == {}
    assert judged(found={"loss_spike": 3.0, "grad_norm_spike": 2.0}) == {}  # of a loss that is about 0


def test_loss_spikes_count_where_the_loss_is_one_of_preferences():
    history = [{"loss": 0.6, "grad_norm": 1.0, "rewards/margins": 0.1}] * 14  # as of Nash-MD, a policy gradient
    assert sampled_findings({"loss_spike": 3.0}, history, [HIDDEN]) == {}
    history = [line | {"rewards/chosen": 0.1} for line in history]
    assert sampled_findings({"loss_spike": 3.0}, history, [HIDDEN]) == {"loss_spike": 3.0}


def test_entropy_that_falls_to_a_tenth_and_near_zero():
    collapsed = [0.5] * 5 + [0.02] * 9
    assert judged(entropy=collapsed) == {"entropy_collapse": pytest.approx(0.02)}
    assert judged(11, entropy=collapsed) == {}
    assert judged(entropy=[0.5] * 5 + [0.06] * 9) == {}  # an eighth
    assert judged(entropy=[5.0] * 5 + [0.3] * 9) == {}  # a learned task, far from none
    of_ppo = [{"loss": 0.0, "policy/entropy_avg": value} for value in collapsed]
    assert sampled_findings({}, of_ppo, [HIDDEN]) == {"entropy_collapse": pytest.approx(0.02)}


def test_length_that_is_rewarded_and_grows():
    growing = {"mean_length": 100.0 + 8 * STEPS}
    assert judged(**growing, hidden={"length": 0.7}) == {"length_hacking": pytest.approx(0.7)}
    assert judged(**growing) == {}  # it grows, but is not what is rewarded
    assert judged(hidden={"length": 0.7}) == {}  # it is rewarded, but does not grow
    assert judged(mean_length=200.0 - 8 * STEPS, hidden={"length": 0.7}) == {}


def test_levels_need_six_logs_and_a_mean_above_their_bound():
    for series, name, bound in (
        ("frac_reward_zero_std", "zero_variance", 0.8),
        ("clipped_ratio", "clipped_completions", 0.5),
    ):
        assert judged(**{series: [bound + 0.05]}) == {name: pytest.approx(bound + 0.05)}
        assert judged(**{series: [bound - 0.05]}) == {} == judged(5, **{series: [bound + 0.05]})
        assert judged(**{series: [0.9] * 13 + [0.0]}) == ({name: pytest.approx(0.72)} if bound < 0.72 else {})
    for key, name, bound in (("mismatch", "sampling_mismatch", 0.1), ("cut", "stale_samples", 0.2)):
        assert judged(hidden={key: bound + 0.01}) == {name: pytest.approx(bound + 0.01)}
        assert judged(hidden={key: bound - 0.01}) == {} == judged(5, hidden={key: bound + 0.01})
    assert judged(1, hidden={"lost": 0.06}) == {"reward_failures": 0.06}
    assert judged(1, hidden={"lost": 0.04}) == {}


def test_completions_that_never_end_by_wish_are_not_clipped():
    history = [{"loss": 0.0, "completions/clipped_ratio": 1.0}] * 14
    assert list(sampled_findings({}, history, [HIDDEN])) == ["clipped_completions"]
    assert sampled_findings({}, history, [HIDDEN], ends=False) == {}


def test_jumps_of_the_gradient_norm_leave_out_steps_without_advantages():
    norms = [1.0, 0, 1.1, 0, 0.9, 0, 1.0, 0, 1.0, 0, 1.2, 0, 0, 1.5] * 2
    history = [{"loss": 0.0, "grad_norm": norm} for norm in norms]
    assert sampled_findings({}, history, [HIDDEN]) == {}
    history[-1]["grad_norm"] = 15.0
    assert sampled_findings({}, history, [HIDDEN]) == {"grad_norm_spike": 15.0}


def test_bounds_are_those_of_the_config():
    history = [{"loss": 0.0, "frac_reward_zero_std": 0.7}] * 6
    assert sampled_findings({}, history, [HIDDEN]) == {}
    assert list(sampled_findings({}, history, [HIDDEN], given={"zero_variance": 0.6})) == ["zero_variance"]
    bounds = fastalign.GRPOConfig(
        "out", bf16=False, use_cpu=True, health_bounds='{"zero_variance": 0.6}'
    ).health_bounds
    assert bounds == {"zero_variance": 0.6}
    for wrong, message in (({"kl_drift": 2.0}, "allowed are .*entropy_collapse"), ({"few_rows": "x"}, "a number")):
        with pytest.raises(ValueError, match=message):
            fastalign.GRPOConfig("out", bf16=False, use_cpu=True, health_bounds=wrong)


def test_correlation_is_that_within_groups():
    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=(6, 4)), rng.integers(1, 50, (6, 4)).astype(float)
    rewards += 10 * np.arange(6)[:, None]  # between groups, which must not matter
    lengths -= 30 * np.arange(6)[:, None]
    inner = [x - x.mean(1, keepdims=True) for x in (rewards, lengths)]
    expected = np.corrcoef(inner[0].ravel(), inner[1].ravel())[0, 1]
    given = [torch.tensor(x).flatten() for x in (rewards, lengths)]
    assert length_correlation(*given, 4) == pytest.approx(expected)
    given[0][5] = torch.nan
    kept = [np.delete(x.numpy(), 5) for x in given]
    groups = np.delete(np.arange(24) // 4, 5)
    inner = [x - np.array([x[groups == g].mean() for g in groups]) for x in kept]
    assert length_correlation(*given, 4) == pytest.approx(np.corrcoef(*inner)[0, 1])
    assert length_correlation(torch.ones(8), torch.arange(8.0), 4) is None
    assert length_correlation(torch.arange(8.0), torch.arange(8.0), 1) is None


# Runs

CONFIG = SAMPLED | {"max_steps": 14, "num_generations": 8, "per_device_train_batch_size": 16}


def keys_of(trainer) -> set[str]:
    return {key.removeprefix("health/") for entry in trainer.state.log_history for key in entry if "health/" in key}


def sevens(completion_ids, **kwargs):
    return [sum(7 <= token < 60 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def test_a_healthy_run_shows_nothing_and_a_hot_one_is_stopped(tmp_path, caplog):
    """Completions of the tiny model rarely end: that bound is raised, as a user would."""
    usual = {"learning_rate": 3e-3, "beta": 0.01, "health_bounds": {"clipped_completions": 1.0}}
    trainer = grpo_trainer(tmp_path / "a", rewards=sevens, **CONFIG | usual)
    trainer.train()
    assert keys_of(trainer) == set() and "Health" not in caplog.text
    assert not any("_health" in key for entry in trainer.state.log_history for key in entry)
    hot = {"learning_rate": 0.1, "beta": 0.01, "kl_drift_bound": 0.5, "stop_on_health": ["kl_drift"]}
    hot |= {"save_strategy": "steps", "save_steps": 100}
    trainer = grpo_trainer(tmp_path / "b", rewards=sevens, **CONFIG | hot)
    with pytest.raises(HealthError, match=r"step \d+, kl_drift: the policy is far"):
        trainer.train()
    assert 0 < trainer.state.global_step < 14
    page = write_report(tmp_path / "b" / f"checkpoint-{trainer.state.global_step}").read_text()
    assert "nats per token on average" in page and FINDINGS["kl_drift"].remedy in page


def test_runs_that_teach_nothing_and_clip_everything(tmp_path, caplog):
    """Two updates learn from each batch of samples: every other log has nothing of samples."""

    def equal(completion_ids, **kwargs):
        return [1.0] * len(completion_ids)

    config = CONFIG | {"max_steps": 10, "num_iterations": 2, "learning_rate": 0.0}
    trainer = grpo_trainer(tmp_path, rewards=equal, **config)
    trainer.train()
    assert keys_of(trainer) == {"zero_variance", "clipped_completions"}
    lines = [entry for entry in trainer.state.log_history if "health/zero_variance" in entry]
    sampled = [entry["step"] for entry in trainer.state.log_history if "frac_reward_zero_std" in entry]
    assert sampled == [1, 3, 5, 7, 9] and [entry["step"] for entry in lines] == [9, 10]
    assert lines[0]["health/zero_variance"] == 1.0
    assert caplog.text.count("zero_variance: in 100% of the groups") == 1


def test_failures_and_mismatch_of_a_run(tmp_path):
    """The engine's log-probabilities are off by 0.3; a reward fails for one of every two groups."""
    first = set()

    def breaks(prompts, completion_ids, **kwargs):
        if len(set(prompts)) == 1 and (not first or prompts[0] in first):
            first.add(prompts[0])
            raise OSError("no answer")
        return [float(len(ids)) for ids in completion_ids]

    config = CONFIG | {"max_steps": 6, "health_bounds": {"clipped_completions": 1.0, "zero_variance": 1.0}}
    trainer = grpo_trainer(tmp_path, rewards=[breaks, sevens], data=prompts(4), **config)
    step = trainer.engine.step

    def off():
        found = step()
        for one in found:
            one.logps = [logp + 0.3 for logp in one.logps]
        return found

    trainer.engine.step = off
    trainer.train()
    assert keys_of(trainer) >= {"reward_failures", "sampling_mismatch"}
    line = trainer.state.log_history[-2]
    assert line["health/sampling_mismatch"] == pytest.approx(0.3, abs=0.01)


def test_samples_that_are_too_old_are_told(tmp_path):
    """A large step between sampling and learning: most completions are outside of the correction's bounds."""
    config = CONFIG | {"max_staleness": 1, "max_steps": 7, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    bounds = {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 1.01}
    trainer = grpo_trainer(tmp_path, rewards=length_reward, **config | bounds)
    trainer.train()
    assert {"stale_samples", "sampling_mismatch"} <= keys_of(trainer)


def test_what_was_seen_before_is_kept_in_checkpoints(tmp_path):
    """A level of five logs, of which three were before the checkpoint."""
    config = CONFIG | {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "rewards": sevens}
    config |= {"max_staleness": 1, "learning_rate": 0.05, "health_bounds": {"stale_samples": 0.0}}
    whole = grpo_trainer(tmp_path, **config)
    whole.train()
    again = grpo_trainer(tmp_path, **config)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    ours, theirs = ([e.get("health/sampling_mismatch") for e in t.state.log_history] for t in (whole, again))
    assert ours == theirs and any(value is not None for value in ours)


def test_rloo_is_watched_too(tmp_path):
    """Equal rewards are found although the divergence, part of RLOO's reward, differs."""
    config = SETTINGS | {"max_completion_length": 6, "num_generations": 4, "max_steps": 6, "beta": 0.05}
    trainer = fastalign.RLOOTrainer(
        tiny_model(),
        lambda completion_ids, **kwargs: [1.0] * len(completion_ids),
        fastalign.RLOOConfig(str(tmp_path), **config),
        train_dataset=prompts(),
        processing_class=copy.deepcopy(tiny_tokenizer()),
    )
    trainer.train()
    assert "zero_variance" in keys_of(trainer) and "loss_spike" not in keys_of(trainer)
