"""Metrics of a run, summed on the device: one reduction over the ranks and one transfer to the host per log."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

FOLD = 1024  # micro-batches of a metric that wait as they are; then their ratios are added up, to bound memory


class Metrics:
    """Collects what a logging window reports.

    `mean` follows TRL: the logged value is the mean over the micro-batches of the window of
    sum(total over ranks) / sum(count over ranks); a micro-batch whose count is zero contributes 0. Every rank must
    record the same names equally often between two logs. Training and evaluation are kept apart by `training`.
    """

    def __init__(
        self,
        device: torch.device,
        reduce: Callable[[Tensor], Tensor] | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        """`reduce` sums a 1-D tensor over the ranks; None in a single process."""
        self.device = device
        self.reduce = reduce
        self.rank, self.world = rank, world
        # MPS has no fp64; token counts are exact up to 2^24 there
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.reset()

    def reset(self) -> None:
        """Forget both windows and the counters; training is what is measured."""
        self.training = True
        self.muted = False  # what is recorded is of rows that were counted before
        self._ratios: dict[bool, dict[str, list[tuple]]] = {True: {}, False: {}}
        self._folded: dict[bool, dict[str, tuple]] = {True: {}, False: {}}  # (sum of global ratios, how many)
        self._skipping: set[str] = set()  # names whose empty micro-batches do not count
        self._latest: dict[bool, dict[str, Tensor | float]] = {True: {}, False: {}}
        self._extremes: dict[bool, dict[str, list]] = {True: {}, False: {}}  # [whether the largest, *values]
        self._counts: dict[str, float] = {}  # global, as of the last collection
        self._added: dict[str, float] = {}  # of this rank, since then
        self._logged_counts: dict[bool, set[str]] = {True: set(), False: set()}

    def mean(self, name: str, total: Tensor | float, count: Tensor | float = 1.0, *, skip_empty: bool = False) -> None:
        """Record one micro-batch of a ratio, such as summed entropy (nats) over scored tokens; both 0-dim.

        `skip_empty`: micro-batches of count zero are left out of the mean, and a name without others is not logged.
        """
        if self.muted:
            total = count = 0.0
        if skip_empty:
            self._skipping.add(name)
        pairs = self._ratios[self.training].setdefault(name, [])
        pairs.append(tuple(x.detach() if isinstance(x, Tensor) else x for x in (total, count)))
        if len(pairs) == FOLD:
            totals, counts = self._reduced([x for pair in pairs for x in pair])[:-1].view(-1, 2).unbind(1)
            ratios = torch.where(counts == 0, 0, totals / counts).sum()
            number = (counts != 0).sum() if name in self._skipping else FOLD
            before = self._folded[self.training].get(name, (0.0, 0))
            self._folded[self.training][name] = before[0] + ratios, before[1] + number
            pairs.clear()

    def last(self, name: str, value: Tensor | float) -> None:
        """Record a value of which the last one is logged, averaged over the ranks."""
        self._latest[self.training][name] = value.detach() if isinstance(value, Tensor) else value

    def extreme(self, name: str, value: Tensor | float, *, largest: bool) -> None:
        """Record a micro-batch's smallest or largest value; the mean over micro-batches of that over ranks is logged.

        A value that is not finite is that of a rank which has none.
        """
        if self.muted:
            value = math.inf
        values = self._extremes[self.training].setdefault(name, [largest])
        values.append(value.detach() if isinstance(value, Tensor) else value)

    def count(self, name: str, amount: int = 0, *, logged: bool = True) -> None:
        """Add to a counter that runs through all of training (summed over ranks, kept in checkpoints).

        With `logged` it appears in the log of the mode that touched it. Evaluation may pass amount 0 to show it.
        """
        self._added[name] = self._added.get(name, 0) + amount
        if logged:
            self._logged_counts[self.training].add(name)

    def tokens(self, amount: int) -> None:
        """Count a micro-batch's tokens as `num_tokens`; evaluation shows the count of training without adding."""
        self.count("num_tokens", amount if self.training else 0)

    def collect(self, **sums: Tensor | float) -> dict[str, float]:
        """Host values of the current mode's window, which then starts anew; `sums` come back averaged over ranks."""
        ratios, latest = self._ratios[self.training], self._latest[self.training]
        folded, added = self._folded[self.training], sorted(self._added)
        flat: list = [*sums.values(), *latest.values(), *(x for pair in folded.values() for x in pair)]
        flat += [self._added[name] for name in added]
        for pairs in ratios.values():
            flat += [x for pair in pairs for x in pair]
        extremes = self._extremes[self.training]
        flat += [x for kept in extremes.values() for value in kept[1:] for x in self._slots(value)]
        world, values = self._to_host(flat)
        result: dict[str, float] = {}
        for name in (*sums, *latest):
            result[name] = next(values) / world
        before = {name: (next(values) / world, next(values) / world) for name in folded}
        for name in added:
            self._counts[name] = self._counts.get(name, 0) + next(values)
        for name, pairs in ratios.items():
            shares = [(next(values), next(values)) for _ in pairs]
            total, number = before.get(name, (0.0, 0))
            total += sum(total / count if count else 0.0 for total, count in shares)
            number += sum(1 for _, count in shares if count or name not in self._skipping)
            if number:
                result[name] = total / number
        for name, (largest, *kept) in extremes.items():
            over_ranks = [self._extreme_of(values, largest) for _ in kept]
            if found := [value for value in over_ranks if value is not None]:
                result[name] = sum(found) / len(found)
        result.update({name: self._counts[name] for name in sorted(self._logged_counts[self.training])})
        for part in (ratios, folded, latest, extremes, self._added, self._logged_counts[self.training]):
            part.clear()
        return result

    def _slots(self, value: Tensor | float) -> list:
        """(value, whether it is one) of each rank, 0 for the others: their sum over ranks has all of them."""
        if isinstance(value, Tensor):
            known = torch.isfinite(value)
            own = [torch.where(known, value, 0.0), known]
        else:
            known = math.isfinite(value)
            own = [value if known else 0.0, float(known)]
        slots: list = [0.0] * (2 * self.world)
        slots[2 * self.rank : 2 * self.rank + 2] = own
        return slots

    def _extreme_of(self, values: Iterator[float], largest: bool) -> float | None:
        pairs = [(next(values), next(values)) for _ in range(self.world)]
        known = [value for value, is_one in pairs if is_one]
        return (max if largest else min)(known) if known else None

    def counts(self) -> dict[str, float]:
        """The global counters, as of the last `collect`."""
        return dict(self._counts)

    def set_counts(self, counts: dict[str, float]) -> None:
        """Continue counting from `counts` (a checkpoint's)."""
        self._counts, self._added = dict(counts), {}

    def reduce_counts(self) -> None:
        """Bring the global counters up to date (all ranks must call it), without closing the window."""
        added = sorted(self._added)
        _, values = self._to_host([self._added[name] for name in added])
        for name in added:
            self._counts[name] = self._counts.get(name, 0) + next(values)
            self._added[name] = 0

    def state_dict(self) -> dict:
        """This rank's open training window, as numbers."""
        ratios = {n: [(float(a), float(b)) for a, b in pairs] for n, pairs in self._ratios[True].items()}
        latest = {n: float(value) for n, value in self._latest[True].items()}
        folded = {n: (float(total), float(number)) for n, (total, number) in self._folded[True].items()}
        counted = sorted(self._logged_counts[True])
        extremes = {n: [kept[0], *map(float, kept[1:])] for n, kept in self._extremes[True].items()}
        return {
            "ratios": ratios,
            "folded": folded,
            "latest": latest,
            "extremes": extremes,
            "logged_counts": counted,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue a training window."""
        self._ratios[True] = {name: list(pairs) for name, pairs in state["ratios"].items()}
        self._folded[True] = dict(state["folded"])
        self._latest[True] = dict(state["latest"])
        self._extremes[True] = dict(state.get("extremes", {}))
        self._logged_counts[True] = set(state["logged_counts"])

    def _to_host(self, flat: list):
        """(number of ranks, iterator over the summed values); the one synchronisation of a log."""
        if self.reduce is None and not any(isinstance(x, Tensor) for x in flat):
            return 1, iter([float(x) for x in flat])
        *values, world = self._reduced(flat).tolist()
        return round(world), iter(values)

    def _reduced(self, flat: list) -> Tensor:
        """`flat`, and a 1, on the device as one vector, summed over the ranks."""
        host = torch.tensor([0.0 if isinstance(x, Tensor) else x for x in (*flat, 1.0)], dtype=self.dtype)
        vector = host.to(self.device)
        on_device = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
        if on_device:
            parts = [flat[i].to(self.device, self.dtype).reshape(()) for i in on_device]
            vector[torch.tensor(on_device, device=self.device)] = torch.stack(parts)
        return vector if self.reduce is None else self.reduce(vector)


class RunCounters(TrainerCallback, ExportableState):
    """Carries the counters of `Metrics` through `trainer_state.json`."""

    def __init__(self, metrics: Metrics | None = None):
        self.metrics = metrics
        self.counts: dict[str, float] = {}

    def state(self) -> dict:
        counts = self.metrics.counts() if self.metrics is not None else self.counts
        return {"args": {}, "attributes": {"counts": counts}}
