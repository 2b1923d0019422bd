"""Requests on their way through the embedded engine, and cohorts of them that started together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .engine import Completion, FinishReason, Request
from .native_cache import KeyValues
from .native_own_cache import OwnCache
from .native_sampling import Plan, uniforms

FIRST_ROOM = 32  # tokens that a new cohort has room for; it doubles


@dataclass
class Row:
    """A request on its way."""

    request: Request
    plan: Plan
    seed: int
    ids: list[int] = field(default_factory=list)  # sampled before the cohort that it is in now
    logps: list[float] = field(default_factory=list)
    version: int = -1  # of the weights that gave the first token

    @property
    def history(self) -> tuple[int, ...]:
        return (*self.request.prompt_ids, *self.ids)

    @property
    def room(self) -> int:
        """Tokens that may still follow."""
        return self.plan.max_new_tokens - len(self.ids)

    def completion(self, version: int) -> Completion:
        reason: FinishReason = "stop" if self.ids[-1] in self.plan.stop_ids else "length"
        return Completion(self.request.key, self.ids, self.logps, reason, self.version, version)


class Cohort:
    """Rows that have sampled equally many tokens since they started together, and their cache.

    Row tensors may be longer than `rows`: the places of rows that are gone.
    """

    def __init__(self, rows: list[Row], lengths: list[int], cache: KeyValues | OwnCache, device: torch.device):
        """`lengths`: tokens of each row that are in the cache, or about to be."""
        self.rows, self.cache, self.device = rows, cache, device
        self.position = torch.tensor(lengths, device=device)  # of the first token sampled here
        self.limit = torch.tensor([row.room for row in rows], device=device)
        self.count = 0  # tokens sampled here; the last one is not in the cache yet
        self.ids = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
        self.logps = torch.empty(len(rows), 0, device=device)
        self.uniforms = torch.empty(len(rows), 0, dtype=torch.float64, device=device)
        self.seen: Tensor | None = None  # (rows, V) bool, where a repetition penalty asks for it
        self.distributions = {row.plan.distribution for row in rows}
        self.reserve()

    @property
    def is_full(self) -> bool:
        """The next token needs `reserve`."""
        return self.count == self.ids.shape[1]

    @property
    def next_room(self) -> int:
        """Tokens that there is room for after `reserve`."""
        return max(min(max(2 * self.count, FIRST_ROOM), max(row.room for row in self.rows)), 1)

    def reserve(self) -> None:
        """Room for more tokens."""
        num_rows, room = len(self.rows), self.next_room
        added = room - self.ids.shape[1]
        self.cache.reserve(room)
        first = [len(row.ids) + self.uniforms.shape[1] for row in self.rows]
        new = uniforms([row.seed for row in self.rows], first, added).to(self.device)
        self.uniforms = torch.cat([self.uniforms[:num_rows], new], 1)
        self.ids = torch.cat([self.ids[:num_rows], self.ids.new_empty(num_rows, added)], 1)
        self.logps = torch.cat([self.logps[:num_rows], self.logps.new_empty(num_rows, added)], 1)

    def put(self, ids: Tensor, logps: Tensor, version: int) -> None:
        """Take the next token of each row."""
        self.ids[: len(self.rows), self.count], self.logps[: len(self.rows), self.count] = ids, logps
        self.count += 1
        if self.seen is not None:
            self.seen[: len(self.rows)].scatter_(1, ids[:, None], True)
        if self.count == 1:
            for row in self.rows:
                row.version = version if row.version < 0 else row.version

    def inputs(self) -> tuple[Tensor, Tensor]:
        """The last token of each row (rows,), and its position."""
        return self.ids[: len(self.rows), self.count - 1], self.position + self.count - 1

    def seen_tokens(self, vocabulary: int) -> Tensor:
        """(rows, V) bool: tokens of the prompt and of what was sampled."""
        if self.seen is None:
            self.seen = torch.zeros(len(self.rows), vocabulary, dtype=torch.bool, device=self.device)
            for place, row in enumerate(self.rows):
                self.seen[place, torch.tensor(row.history, device=self.device)] = True
            self.seen.scatter_(1, self.ids[: len(self.rows), : self.count], True)
        return self.seen[: len(self.rows)]

    def finished(self) -> list[int]:
        """Places of the rows whose last token is their last."""
        last = self.ids[: len(self.rows), self.count - 1]
        ends = self.limit <= self.count
        for stop in {stop for row in self.rows for stop in row.plan.stop_ids}:
            ends = ends | (last == stop)
        places = ends.nonzero()[:, 0].tolist()  # the one synchronisation of a token
        if not places:
            return []
        found = zip(places, last[places].tolist(), self.limit[places].tolist(), strict=True)
        return [p for p, token, limit in found if limit <= self.count or token in self.rows[p].plan.stop_ids]

    def flush(self, places: list[int], count: int | None = None) -> list[Row]:
        """Write what the rows at `places` have sampled here (the first `count` tokens) into them; returns them."""
        count = self.count if count is None else count
        rows = [self.rows[place] for place in places]
        for row, ids, logps in zip(
            rows, self.ids[places, :count].tolist(), self.logps[places, :count].tolist(), strict=True
        ):
            row.ids += ids
            row.logps += logps
        return rows

    def drop(self, places: list[int]) -> None:
        """Forget the rows at `places`; the last ones move into theirs."""
        kept, gone = len(self.rows) - len(places), set(places)
        source = [place for place in range(kept, len(self.rows)) if place not in gone]
        target = sorted(place for place in places if place < kept)
        if source:
            for x in (self.ids, self.logps, self.uniforms, self.position, self.limit, self.seen):
                if x is not None:
                    x[target] = x[source]
            for a, b in zip(source, target, strict=True):
                self.rows[b] = self.rows[a]
        del self.rows[kept:]
        self.position, self.limit = self.position[:kept], self.limit[:kept]
        self.cache.drop(source, target, kept)


def merged(cohorts: list[Cohort], caches: KeyValues) -> Cohort:
    """One cohort of the rows of `cohorts`, whose keys are in `caches`."""
    rows, last, logps, lengths = [], [], [], []
    for cohort in cohorts:
        places = list(range(len(cohort.rows)))
        rows += cohort.flush(places, cohort.count - 1)
        ids, positions = cohort.inputs()
        last.append(ids)
        logps.append(cohort.logps[places, cohort.count - 1])
        lengths += positions.tolist()
    together = Cohort(rows, lengths, caches, cohorts[0].device)
    together.put(torch.cat(last), torch.cat(logps), -1)
    return together
