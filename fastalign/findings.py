"""What can be wrong with a run that trains without an error: the findings' names, what they mean and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """One kind of finding."""

    says: str  # what was seen; {value} is the number that is logged as `health/<name>`
    remedy: str
    bound: float | None = None  # where it begins; `health_bounds` may set another, docs/health.md has units


ALL = "all"  # stands for every name in `stop_on_health`
PREFIX = "health/"  # of the keys of findings in logs
FINDINGS: dict[str, Finding] = {
    "margin_collapse": Finding(
        "the reward margin is at chance: {value:.3g} on average over the last 5 logs",
        "If it had risen before, lower learning_rate or raise beta; if it never rose, raise learning_rate, and see "
        "whether chosen and rejected are mixed up, or preferences random.",
    ),
    "chosen_falling": Finding(
        "chosen answers become unlikely while the loss falls: their log-probability fell by {value:.3g} nats",
        "The margin grows because rejected answers fall faster. Add a likelihood term (DPO: loss_type=['sigmoid', "
        "'sft'], CPO: cpo_alpha), lower learning_rate, or raise beta.",
        0.3,
    ),
    "kl_drift": Finding(
        "the policy is far from the reference: {value:.3g} nats per token on average (|log ratio| of answers)",
        "Raise beta, lower learning_rate or stop earlier; where answers are short and this is meant, raise "
        "kl_drift_bound.",
    ),
    "few_rows": Finding(
        "few rows make up the gradient: it is as uneven as if {value:.1%} of the rows had all of it",
        "Most rows are learnt, or a few are outliers. Stop earlier, look for wrong labels among the rows with the "
        "largest loss, or use a loss that bounds their weight (label_smoothing, loss_type='ipo').",
        0.1,
    ),
    "truncation": Finding(
        "{value:.1%} of the rows fill max_length, so that answers are cut",
        "Raise max_length, or leave such rows out: the model is taught answers without an end.",
    ),
    "duplicate_pairs": Finding(
        "{value:.1%} of the rows repeat an earlier one", "Remove repeated rows: they are learnt by heart."
    ),
    "contradictory_pairs": Finding(
        "{value:.1%} of the rows contradict another one: same prompt and answers, opposite judgement",
        "Remove both rows of each contradiction, or set label_smoothing to their share.",
    ),
    "loss_spike": Finding(
        "the loss jumped to {value:.3g}, over twice what it was in the last 10 logs",
        "Look for broken rows among those of the step; lower learning_rate or max_grad_norm, or warm up longer.",
        2.0,
    ),
    "grad_norm_spike": Finding(
        "the gradient norm jumped to {value:.3g}, over ten times what it was in the last 10 logs",
        "Look for broken rows among those of the step; lower learning_rate or max_grad_norm, or warm up longer.",
        10.0,
    ),
    "entropy_collapse": Finding(
        "the policy has stopped trying things: its entropy is {value:.3g} nats per token, a small part of what it was",
        "Completions of a prompt are nearly the same, so that little is left to learn from. Lower learning_rate, "
        "raise temperature or beta, or reward entropy (GRPO: entropy_coef); if the task is solved, stop.",
        0.1,
    ),
    "length_hacking": Finding(
        "longer completions are rewarded and completions grow: reward and length correlate by {value:.2f} in groups",
        "Read some completions. If they are padded, mend the reward or let it charge for length (fastalign.rewards: "
        "get_soft_overlong_punishment), and use a loss without a preference for length (GRPO: loss_type='dr_grpo').",
        0.5,
    ),
    "sampling_mismatch": Finding(
        "tokens were sampled with other probabilities than training finds: {value:.3g} nats per token apart",
        "Gradients are biased by that. Compare precision and attention of engine and training model; with samples of "
        "older weights, lower learning_rate. GRPO corrects for it: keep vllm_importance_sampling_correction on.",
        0.1,
    ),
    "zero_variance": Finding(
        "in {value:.0%} of the groups all completions have the same reward, over the last 5 logs",
        "They teach nothing. Take easier or harder prompts (drop those that are always right or always wrong), more "
        "completions per prompt, a finer reward, or GRPO's replay_buffer_size.",
        0.8,
    ),
    "clipped_completions": Finding(
        "{value:.0%} of the completions are cut at max_completion_length, over the last 5 logs",
        "Their rewards judge half an answer. Raise max_completion_length, punish length, or set "
        "mask_truncated_completions; if none ever ends, see whether the end token is the one the model was taught.",
        0.5,
    ),
    "reward_failures": Finding(
        "{value:.1%} of the rewards are missing because reward functions failed",
        "Their errors are in the log above. Mend the function, raise reward_timeout, or set reward_on_error='raise' "
        "to stop at the first one.",
        0.05,
    ),
    "stale_samples": Finding(
        "{value:.0%} of the tokens are left out or cut by the importance correction, over the last 5 logs",
        "The policy has moved too far from what sampled them. Lower max_staleness, steps_per_generation or "
        "learning_rate, or raise vllm_importance_sampling_clip_max.",
        0.2,
    ),
}


def check_names(names: Iterable[str]) -> None:
    """ValueError for what `stop_on_health` does not know."""
    if unknown := [name for name in names if name not in FINDINGS and name != ALL]:
        raise ValueError(f"stop_on_health has {unknown}: allowed are {ALL!r} and {', '.join(FINDINGS)}.")


def bounds(given: Mapping[str, float] | None = None) -> dict[str, float]:
    """The bound of each finding that has one, those `given` in place of ours."""
    return {name: finding.bound for name, finding in FINDINGS.items() if finding.bound is not None} | dict(given or {})


def check_bounds(given: Any) -> None:
    """ValueError for what `health_bounds` cannot set."""
    if unknown := sorted(set(given or {}) - set(bounds())):
        raise ValueError(f"health_bounds has {unknown}: allowed are {', '.join(bounds())}.")
    for name, value in (given or {}).items():
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"health_bounds has {value!r} for {name}: give a number that is not negative.")


def sentence(name: str, value: float) -> str:
    """What was found, and what to do."""
    finding = FINDINGS[name]
    return f"{name}: {finding.says.format(value=value)}. {finding.remedy}"
