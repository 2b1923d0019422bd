"""What is logged of sampled data: of a generation batch once, of an update for each nominal micro-batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fastalign_kernels.losses.row_sums import Rows
from torch import Tensor

from ..metrics import Metrics
from .group_batches import GroupBatch
from .loader import Step
from .samples import Sample


def sample_facts(samples: list[Sample], end_ids: set[int]) -> dict[str, Any]:
    """Numbers of each sample, (n,) arrays; a sample is truncated where its last token is none of `end_ids`."""
    drawn = [len(one.completion_ids) if one.mask is None else int(np.sum(one.mask)) for one in samples]
    ended = [bool(one.completion_ids) and one.completion_ids[-1] in end_ids for one in samples]
    return {
        "prompt": np.array([len(one.prompt_ids) for one in samples], np.int64),
        "drawn": np.array(drawn, np.int64),
        "truncated": ~np.array(ended, bool),
        "calls": np.array([one.tool_calls for one in samples], np.int64),
        "failures": np.array([one.tool_failures for one in samples], np.int64),
    }


def record_samples(metrics: Metrics, facts: dict[str, np.ndarray], with_tools: bool) -> None:
    """completions/*, tools/*: `facts` are those of all ranks' samples."""
    drawn, ended = facts["drawn"], facts["drawn"][~facts["truncated"]]
    for kind, lengths in {"": drawn, "terminated_": ended if len(ended) else np.zeros(1)}.items():
        metrics.mean(f"completions/mean_{kind}length", float(lengths.mean()))
        metrics.mean(f"completions/min_{kind}length", float(lengths.min()))
        metrics.mean(f"completions/max_{kind}length", float(lengths.max()))
    metrics.mean("completions/clipped_ratio", float(facts["truncated"].mean()))
    if with_tools:
        calls = int(facts["calls"].sum())
        metrics.mean("tools/call_frequency", calls / len(drawn))
        metrics.mean("tools/failure_frequency", int(facts["failures"].sum()) / calls if calls else 0.0)


def record_staleness(metrics: Metrics, samples: list[Sample], step: int) -> None:
    """sampling/staleness: optimizer steps from the weights that sampled to `step`, where samples are first used."""
    metrics.mean("sampling/staleness", sum(step - one.version for one in samples), len(samples))


def record_rewards(metrics: Metrics, names: list[str], rewards: Tensor, weights: Tensor) -> None:
    """rewards/<function>/mean and std, reward, reward_std, of rewards (N, K) over all ranks; NaN takes no part."""
    weighted = (rewards * weights).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)
    columns = {f"rewards/{name}/": rewards[:, k] for k, name in enumerate(names)}
    for name, values in columns.items():
        _mean_and_std(metrics, f"{name}mean", f"{name}std", values)
    _mean_and_std(metrics, "reward", "reward_std", weighted)


def _mean_and_std(metrics: Metrics, mean: str, std: str, values: Tensor) -> None:
    known = values[~values.isnan()]
    metrics.mean(mean, float(known.mean()) if len(known) else 0.0, min(len(known), 1), skip_empty=True)
    enough = len(known) > 1
    metrics.mean(std, float(known.std()) if enough else 0.0, int(enough), skip_empty=True)


class UpdateStatistics:
    """Adds up over the batches of a step, and records one value for each nominal micro-batch when it ends.

    So what is logged does not depend on how the step is cut. Sequences that were not run count as zeros, except in
    `over_seen`.
    """

    def __init__(self, step: Step, device: torch.device):
        self.step, self.device = step, device
        self.rows = [len(part) for part in step.parts]
        self.tokens = [sum(one.num_learned for one in part) for part in step.parts]
        self.seen = [0] * step.num_micro  # learned tokens that were run
        self.totals: dict[str, Tensor] = {}  # (num_micro,)
        self.counts: dict[str, list[int]] = {}
        self.skipping: set[str] = set()  # names of which micro-batches without values do not count
        self.extremes: dict[str, tuple[Tensor, bool]] = {}

    @classmethod
    def of_step(cls, batch: GroupBatch, device: torch.device) -> UpdateStatistics:
        """Those of the step of `batch`, which the next values belong to."""
        state = batch.step.state
        found = state.get("statistics") or state.setdefault("statistics", cls(batch.step, device))
        found.begin(batch)
        return found

    def begin(self, batch: GroupBatch) -> None:
        """The batch that the next values belong to."""
        self.batch_rows = Rows(batch.row, len(batch.experiences))
        micro = torch.tensor(batch.micro, device=self.device)
        self.member = micro == torch.arange(self.step.num_micro, device=self.device)[:, None]  # (num_micro, R)
        for one, number in zip(batch.experiences, batch.micro, strict=True):
            self.seen[number] += one.num_learned

    def mean(
        self,
        name: str,
        values: Tensor,
        *,
        of_rows: bool = False,
        over_seen: bool = False,
        counts: list[int] | None = None,
    ) -> None:
        """Mean over tokens of values (N,), or over sequences of a value that their tokens repeat.

        `counts`: how many values each nominal micro-batch has, where the others are 0.
        """
        sums = self.batch_rows.sums(values.float())
        if of_rows:
            sums = sums / self.batch_rows.lengths.clamp(min=1)
        self._add(name, self.member.float() @ sums)
        self.counts[name] = counts or (self.seen if over_seen else self.rows if of_rows else self.tokens)
        if over_seen:
            self.skipping.add(name)

    def mean_of_rows(self, name: str, values: Tensor) -> None:
        """Mean of values (R,) over the sequences that are learned from."""
        self._add(name, self.member.float() @ values.float())
        self.counts[name] = [sum(one.num_learned > 0 for one in part) for part in self.step.parts]
        self.skipping.add(name)

    def sum(self, name: str, values: Tensor) -> None:
        """Sum of values (N,), over the ranks the mean."""
        self._add(name, self.member.float() @ self.batch_rows.sums(values.float()))
        self.counts[name] = [1] * self.step.num_micro

    def _add(self, name: str, totals: Tensor) -> None:
        self.totals[name] = totals if name not in self.totals else self.totals[name] + totals

    def extreme_row(self, name: str, values: Tensor, *, largest: bool) -> None:
        """Smallest or largest mean of values (N,) over the tokens of a sequence."""
        means = self.batch_rows.sums(values.float()) / self.batch_rows.lengths
        edge = -torch.inf if largest else torch.inf
        found = torch.where(self.member & ~means.isnan(), means, edge)
        found = found.amax(1) if largest else found.amin(1)
        if name in self.extremes:
            found = (torch.maximum if largest else torch.minimum)(found, self.extremes[name][0])
        self.extremes[name] = found, largest

    def record(self, metrics: Metrics) -> None:
        """Hand everything over."""
        for name, totals in self.totals.items():
            for total, count in zip(totals.unbind(), self.counts[name], strict=True):
                metrics.mean(name, total, count, skip_empty=name in self.skipping)
        for name, (found, largest) in self.extremes.items():
            for number, value in enumerate(found.unbind()):
                if self.seen[number] < self.tokens[number]:  # a sequence that was not run has zeros
                    value = value.clamp(min=0.0) if largest else value.clamp(max=0.0)
                metrics.extreme(name, value, largest=largest)


class Mismatch:
    """How this rank's log-probabilities differ from those as sampled, and the weights that correct for it."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, device=device)  # of |difference|, tokens, of weights, weights
        self.largest_difference = torch.zeros((), device=device)
        self.smallest = torch.full((), torch.inf, device=device)
        self.largest = torch.full((), -torch.inf, device=device)

    def add(self, logp: Tensor, sampled: Tensor, weights: Tensor, counts: Tensor, rows: Rows | None) -> None:
        """Tokens (N,) of which `counts` (N,) bool says whether they take part; `rows` where weights are of sequences.

        A token whose log-probability as sampled is not known (NaN) has a weight of 1 and no difference.
        """
        known = counts & ~sampled.isnan()
        difference = torch.where(known, (logp - sampled).abs(), 0.0)
        if rows is not None:  # a sequence's weight stands at each of its tokens
            each = rows.lengths.clamp(min=1)
            weights, counts = rows.sums(weights) / each, (rows.sums(counts.float()) / each) > 0.5
        total = torch.where(counts, weights, 0.0).sum()
        self.sums += torch.stack([difference.sum(), known.sum(), total, counts.sum()])
        if len(difference) and len(weights):
            self.largest_difference = torch.maximum(self.largest_difference, difference.amax())
            self.smallest = torch.minimum(self.smallest, torch.where(counts, weights, torch.inf).amin())
            self.largest = torch.maximum(self.largest, torch.where(counts, weights, -torch.inf).amax())

    def record(self, metrics: Metrics) -> None:
        """sampling/*: means over ranks of their means, and the extremes of all ranks."""
        difference, tokens, weight, number = self.sums.unbind()
        metrics.mean("sampling/sampling_logp_difference/mean", difference / tokens.clamp(min=1))
        metrics.extreme("sampling/sampling_logp_difference/max", self.largest_difference, largest=True)
        metrics.extreme("sampling/importance_sampling_ratio/min", self.smallest, largest=False)
        metrics.mean("sampling/importance_sampling_ratio/mean", weight / number.clamp(min=1))
        metrics.extreme("sampling/importance_sampling_ratio/max", self.largest, largest=True)
