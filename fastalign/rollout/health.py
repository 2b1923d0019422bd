"""What goes wrong in runs that learn from samples: what is recorded of them, and what the logs then show.

Levels are means of 5 logs, once there are 6; trends as in `fastalign.loop.health`. Logs between two generation batches
have nothing of samples and do not count.
"""

from __future__ import annotations

from typing import Any

import torch
from fastalign_kernels.losses.advantages import group_advantages
from torch import Tensor

from ..findings import bounds
from ..loop.health import HIDDEN, LEAST_LOGS, SPAN, jump, series
from ..metrics import Metrics
from .buffer import Experience
from .generation import GenerationBatch
from .group_batches import GroupBatch
from .statistics import UpdateStatistics

LEVEL_LOGS = SPAN + 1  # logs before a level is judged
LITTLE_ENTROPY = 0.1  # nats per token; above, a fall is learning
LITTLE_WEIGHT = 0.05  # of a token in the importance correction: as good as left out
GROWTH = 1.25  # of completions that are rewarded for their length


# What generation batches and losses record


def watch_samples(metrics: Metrics, batch: GenerationBatch, weights: Tensor, distortions: dict) -> None:
    """Lost rewards, length and reward, and the distance from the reference of a batch that is learned from.

    `weights` (K,) of the reward functions; `distortions` of log-probabilities as sampled, which then do not count.
    """
    assert batch.scores is not None
    lost = batch.scores.lost
    metrics.mean(f"{HIDDEN}lost", float(lost.sum()), max(lost.numel(), 1))
    rewards = (batch.rewards * weights).nansum(1).masked_fill(batch.rewards.isnan().all(1), torch.nan)
    correlation = length_correlation(rewards, batch.lengths, batch.num_generations)
    metrics.mean(f"{HIDDEN}length", correlation or 0.0, int(correlation is not None), skip_empty=True)
    if any("ref_logp" in one.tokens for one in batch.experiences):
        drift = [_distance(one, with_sampled=not distortions) for one in batch.experiences]
        total = torch.stack([total for total, _ in drift]).sum()
        metrics.mean(f"{HIDDEN}sampled_drift", total, sum(count for _, count in drift))


def watch_groups(metrics: Metrics, rewards: Tensor, num_generations: int) -> None:
    """The share of the groups with equal `rewards` (N,), where a trainer's own number is of something else."""
    if metrics.training:
        equal = group_advantages(rewards[:, None], num_generations).std_is_zero
        metrics.mean(f"{HIDDEN}equal", float(equal.float().mean()))


def length_correlation(rewards: Tensor, lengths: Tensor, num_generations: int) -> float | None:
    """Correlation of rewards (N,) and lengths (N,), both without the mean of their group; NaN takes no part.

    None where one of them is the same within all groups.
    """
    known = ~rewards.isnan()
    pair = [x.double().masked_fill(~known, torch.nan).view(-1, num_generations) for x in (rewards, lengths)]
    reward, length = ((x - x.nanmean(1, keepdim=True)).nan_to_num(nan=0.0) for x in pair)
    size = (reward.square().sum() * length.square().sum()).sqrt()
    return float((reward * length).sum() / size) if size > 1e-12 else None


def _distance(one: Experience, with_sampled: bool) -> tuple[Tensor, int]:
    """Sum over the learned tokens of |log ratio to the reference|, and their number."""
    reference = one.tokens["ref_logp"]
    logp = one.tokens.get("old_logp", one.tokens.get("sampling_logp") if with_sampled else None)
    if logp is None:
        return reference.new_zeros(()), 0
    difference = (logp.to(reference) - reference).abs()
    if "has_token" in one.tokens:  # the state behind the last token has none
        difference = difference * one.tokens["has_token"].to(reference)
    return difference.nan_to_num(nan=0.0).sum(), len(difference)


def watch_update(
    log: UpdateStatistics, batch: GroupBatch, logp: Tensor, weights: Tensor | None = None, most: float | None = None
) -> None:
    """How log-probabilities (N,) of training differ from those as sampled, at the first update from new samples.

    Replayed ones are not new: those as sampled are their old ones.

    `weights` (N,): of the importance correction, of which those near 0 or cut at `most` are counted.
    """
    step, sampled = batch.step, batch.extras.get("sampling_logp")
    if not step.training or sampled is None or any(made != step.number for made in step.made):
        return
    known = ~sampled.isnan() & (batch.weight != 0)
    if (old := batch.extras.get("old_logp")) is not None:
        known &= old != sampled
    log.mean(f"{HIDDEN}mismatch", torch.where(known, (logp - sampled).abs(), 0.0), over_seen=True)
    if weights is not None:
        cut = (weights < LITTLE_WEIGHT) | (weights >= (torch.inf if most is None else most))
        log.mean(f"{HIDDEN}cut", (known & cut).float(), over_seen=True)


# What a log shows


def sampled_findings(
    found: dict[str, float],
    history: list[dict[str, float]],
    past: list[dict[str, float]],
    *,
    ends: bool = True,
    given: dict[str, float] | None = None,
) -> dict[str, float]:
    """`found`, with the findings of sampled data: finding -> number, for the newest of the logs `history`.

    `past`: hidden means of the last logs. `ends`: completions may end before they are cut. `given`: bounds in place
    of ours.
    """
    bound, newest = bounds(given), history[-1]
    norms = [line for line in history if line.get("grad_norm")]  # steps without advantages have none
    own = {
        "grad_norm_spike": jump(series(norms, "grad_norm"), bound["grad_norm_spike"], 1.0)
        if norms and norms[-1] is newest
        else None,
        "entropy_collapse": _entropy_collapse(history, bound["entropy_collapse"]),
        "length_hacking": _length_hacking(history, past, bound["length_hacking"]),
        "zero_variance": _level(past, "equal", bound["zero_variance"], len(history))
        if any("equal" in line for line in past)
        else _level(history, "frac_reward_zero_std", bound["zero_variance"]),
        "clipped_completions": _level(history, "completions/clipped_ratio", bound["clipped_completions"])
        if ends
        else None,
        "sampling_mismatch": _level(past, "mismatch", bound["sampling_mismatch"], len(history)),
        "stale_samples": _level(past, "cut", bound["stale_samples"], len(history)),
        "reward_failures": past[-1].get("lost") if past[-1].get("lost", 0.0) > bound["reward_failures"] else None,
    }
    kept = {name: value for name, value in found.items() if name != "grad_norm_spike"}
    if "rewards/chosen" not in newest:  # a policy gradient's loss is about 0, whatever happens
        kept.pop("loss_spike", None)
    return kept | {name: float(value) for name, value in own.items() if value is not None}


def _level(logs: list[dict[str, float]], key: str, bound: float, num_logs: int | None = None) -> float | None:
    """The mean of `key` over the last logs that have it, if above `bound`."""
    values = [line[key] for line in logs if key in line][-SPAN:]
    if len(values) < SPAN or (len(logs) if num_logs is None else num_logs) < LEVEL_LOGS:
        return None
    mean = sum(values) / len(values)
    return mean if mean > bound else None


def _entropy_collapse(history: list[dict[str, float]], share: float) -> float | None:
    entropies = series(history, "entropy", "policy/entropy_avg")
    if len(entropies) < LEAST_LOGS:
        return None
    first, last = entropies[:SPAN].mean(), entropies[-SPAN:].mean()
    return last if last < min(share * first, LITTLE_ENTROPY) else None


def _length_hacking(history: list[dict[str, float]], past: list[dict[str, float]], bound: float) -> float | None:
    lengths, found = series(history, "completions/mean_length"), [line["length"] for line in past if "length" in line]
    if len(lengths) < LEAST_LOGS or not found or lengths[-SPAN:].mean() < GROWTH * lengths[:SPAN].mean():
        return None
    correlation = sum(found[-SPAN:]) / len(found[-SPAN:])
    return correlation if correlation > bound else None


def findings_of(trainer: Any, found: dict, history: list[dict], past: list[dict]) -> dict[str, float]:
    """`sampled_findings` of a trainer's logs."""
    ends = bool(trainer.sampling.stop_ids)
    found = sampled_findings(found, history, past, ends=ends, given=trainer.args.health_bounds)
    if trainer.sampling.distortions(trainer.loss_temperature):
        found.pop("sampling_mismatch", None)
    return found
