"""One generation batch: samples made and scored, and what all ranks together know of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..metrics import Metrics
from .buffer import Buffer, Experience
from .image_inputs import without_images
from .loader import BatchPlan
from .rewards import PendingScores, RewardPool, Scores, join_scores
from .samples import Sample
from .statistics import record_rewards, record_samples, sample_facts


@dataclass
class GenerationBatch:
    """One generation batch: this rank's samples, and what all ranks know of it. n samples here, N over all ranks."""

    samples: list[Sample]  # (n) prompt by prompt
    num_generations: int
    training: bool
    left: int = 0  # micro-batches that are learned from before the weights change
    server: dict[str, int] = field(default_factory=dict)  # what went wrong with this rank's calls of a vLLM server
    experiences: list[Experience] = field(default_factory=list)  # (n)
    scores: Scores | None = None  # of the samples
    rewards: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # (N, K) fp32, host; NaN: no score
    lengths: Tensor = field(default_factory=lambda: torch.zeros(0))  # (N,) tokens that the policy has drawn
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))  # (N,), for the log
    own: slice = field(default_factory=lambda: slice(0, 0))  # of this rank in N
    num_items: float = 1.0  # learned tokens of all ranks, by the number of ranks

    @classmethod
    def of(
        cls, made: Any, num_generations: int, end_ids: set[int], learns: Callable[[Sample, bool], bool], **known: Any
    ) -> GenerationBatch:
        """The batch of `ScoredRollouts`; `learns(sample, whether it is cut)` says which have a loss."""
        batch = cls(made.samples, num_generations, **known)
        for sample, group in zip(made.samples, made.groups, strict=True):
            cut = not sample.completion_ids or sample.completion_ids[-1] not in end_ids
            batch.experiences.append(Experience.of(sample, group, learn=learns(sample, cut)))
        return batch

    def set_advantages(self, advantages: Tensor) -> None:
        """(N,) advantages of all ranks' samples, to be learned from."""
        self.advantages = advantages
        for one, advantage in zip(self.experiences, advantages[self.own].tolist(), strict=True):
            one.advantage = advantage

    def buffer(self, size: int | None, step: int) -> Buffer:
        """What is learned from after `step` optimizer steps, in micro-batches of `size` completions (None: in one)."""
        size = size or max(len(self.experiences), 1)
        parts = [self.experiences[i : i + size] for i in range(0, len(self.experiences), size)]
        return Buffer(parts, self.num_items, step)

    def shown(self) -> list[dict[str, Any]]:
        """Rows of the completions log of this rank's samples."""
        assert self.scores is not None
        advantages = self.advantages[self.own].tolist()
        rows = []
        for i, sample in enumerate(self.samples):
            row = {"prompt": without_images(sample.row.get("prompt")), "completion": sample.completion}
            row |= dict(zip(self.scores.names, self.scores.rewards[i].tolist(), strict=True))
            row |= {name: values[i] for name, values in self.scores.columns.items()}
            rows.append(row | ({"advantage": advantages[i]} if advantages else {}))
        return rows


class ScoredRollouts:
    """Samples that are being scored while others are still sampled."""

    def __init__(self, rollouts: Any, rewards: RewardPool, wanted: Sequence[tuple[dict, int]], seed: int, state: Any):
        """Sample: `wanted` are rows of the dataset and how many completions of each; `state` is for the rewards."""
        start = time.perf_counter()
        self.pending: list[PendingScores] = []
        self.order: list[int] = []  # place of each scored sample
        repeats = math.gcd(*(count for _, count in wanted))
        prompts = [place for place, (_, count) in enumerate(wanted) for _ in range(count // repeats)]
        rows = [wanted[place][0] for place in prompts]
        found: list[list[Sample]] = [[] for _ in rows]
        waiting: list[int] = []
        at_once = max(1, len(rows) // 8)  # calls of reward functions see a few groups each, and begin early

        def submit() -> None:
            samples = [one for index in waiting for one in found[index]]
            numbers = [prompts[index] for index in waiting for _ in found[index]]
            self.pending.append(rewards.submit(samples, state, numbers))
            self.order.extend(index * repeats + i for index in waiting for i in range(repeats))
            waiting.clear()

        for group in rollouts.run(rows, repeats, seed):
            found[group.index] = group.samples
            waiting.append(group.index)
            if len(waiting) >= at_once:
                submit()
        if waiting or not self.pending:
            submit()
        self.samples = [sample for group in found for sample in group]
        self.groups: list[int] = []  # number of the prompt of each sample, in the run
        self.seconds = time.perf_counter() - start  # of sampling

    def scores(self) -> Scores:
        """The scores, in the order of `samples`, once all are there."""
        scores = join_scores([one.result() for one in self.pending])
        back = torch.tensor(self.order, dtype=torch.int64).argsort()
        columns = {name: [values[i] for i in back.tolist()] for name, values in scores.columns.items()}
        return replace(scores, rewards=scores.rewards[back], lost=scores.lost[back], columns=columns)


def sample_share(
    rollouts: Any,
    rewards: RewardPool,
    plan: BatchPlan,
    rows: list[dict],
    number: int,
    seed: int,
    training: bool,
    state: Any,
) -> ScoredRollouts:
    """This rank's samples of generation batch `number`, whose rewards are on their way; `rows` are all ranks' prompts.

    Same weights, rows, number and `seed` give the same samples.
    """
    entropy = (seed, int(training), number, plan.rank)
    own_seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    shares = plan.share(rows)
    made = ScoredRollouts(rollouts, rewards, [(rows[place], count) for place, count in shares], own_seed, state)
    made.groups = [number * len(rows) + place for place, count in shares for _ in range(count)]
    return made


def exchange(
    batch: GenerationBatch, metrics: Metrics, weights: Tensor, end_ids: set[int], *, world: int, rank: int, tools: bool
) -> None:
    """Rewards of all ranks' samples into `batch`, and what is logged of them: one exchange per generation batch.

    `weights` (K,) of the reward functions. RewardError on all ranks where a function failed everywhere.
    """
    scores = batch.scores
    assert scores is not None
    facts = sample_facts(batch.samples, end_ids)
    mine = {"rewards": scores.rewards, "lost": scores.lost, "facts": facts}
    mine |= {"learned": sum(one.num_learned for one in batch.experiences)}
    mine |= {"metrics": scores.metrics, "failures": scores.failures, "server": batch.server}
    ranks: list[dict[str, Any]] = gather_object([mine]) if world > 1 else [mine]
    sizes = [len(part["rewards"]) for part in ranks]
    batch.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    rewards = torch.cat([part["rewards"] for part in ranks])
    batch.rewards = rewards.masked_fill(rewards.isinf(), torch.nan)  # which no mean survives
    replace(scores, rewards=batch.rewards, lost=torch.cat([part["lost"] for part in ranks])).check()
    batch.num_items = max(sum(part["learned"] for part in ranks), 1) / world
    metrics.tokens(int(facts["prompt"].sum() + facts["drawn"].sum()))
    everywhere = {name: np.concatenate([part["facts"][name] for part in ranks]) for name in facts}
    batch.lengths = torch.from_numpy(everywhere["drawn"])
    record_samples(metrics, everywhere, tools)
    record_rewards(metrics, scores.names, batch.rewards, weights)
    for name in sorted({name for part in ranks for name in part["metrics"]}):
        values = [value for part in ranks for value in part["metrics"].get(name, [])]
        metrics.mean(name, sum(values), len(values))
    if unscored := int(batch.rewards.isnan().all(1).sum()) if scores.names else 0:
        metrics.mean("frac_unscored", unscored / len(rewards))
    for kind, key in (("failures", "rewards/{}/failures"), ("server", "sampling/server_{}")):
        for name in sorted({name for part in ranks for name in part[kind]}):
            metrics.mean(key.format(name), sum(part[kind].get(name, 0) for part in ranks))
