"""The embedded engine: completions from the training model itself, token by token with cached keys and values."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from fastalign_kernels.head.sampling import Distribution, sample_tokens
from torch import Tensor

from ..data.collate import collate_flat
from ..flat_attention import flat_batch
from ..logit_form import head_output_kept
from ..models import position_limit
from ..policy import policy_info, unwrap
from ..policy_check import is_whole, quiet
from ..scoring_head import ScoringRequest, attach_heads, scoring
from .engine import Completion, FinishReason, Request, SyncReport
from .native_attention import decoding
from .native_cache import CohortCache, DecodeCache, PrefillCache
from .native_sampling import Plan, plan_of, uniforms

FIRST_ROOM = 32  # tokens that a new cohort has room for; it doubles
PREFILL_TOKENS = 8192  # of prompts in one forward


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


class Cohort:
    """Rows that started together, their caches and what they have sampled since."""

    def __init__(self, rows: list[Row], prompts: list[tuple[int, ...]], group_of_row: list[int], device: torch.device):
        self.rows = rows
        self.cache = CohortCache([len(p) for p in prompts], list(group_of_row), device)
        self.device = device
        self.position = torch.tensor([len(prompts[g]) for g in group_of_row], device=device)  # of the next input
        room = [row.plan.max_new_tokens - len(row.ids) for row in rows]
        self.limit = torch.tensor(room, device=device)  # tokens still allowed
        self.longest = max(room)
        self.count = 0  # tokens sampled, the one that is not in the cache yet included
        self.ids = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
        self.logps = torch.empty(len(rows), 0, device=device)
        self.uniforms = torch.empty(len(rows), 0, dtype=torch.float64, device=device)
        self.reserve()

    def reserve(self) -> None:
        """Room for the next token."""
        if self.count < self.ids.shape[1]:
            return
        num_rows, room = len(self.rows), min(max(2 * self.count, FIRST_ROOM), self.longest)
        added = room - self.ids.shape[1]
        self.cache.reserve(room)
        self.ids = torch.cat([self.ids[:num_rows], self.ids.new_empty(num_rows, added)], 1)
        self.logps = torch.cat([self.logps[:num_rows], self.logps.new_empty(num_rows, added)], 1)
        first = [len(row.ids) + self.uniforms.shape[1] for row in self.rows]
        new = uniforms([row.seed for row in self.rows], first, added).to(self.device)
        self.uniforms = torch.cat([self.uniforms[:num_rows], new], 1)

    def put(self, ids: Tensor, logps: Tensor) -> None:
        self.ids[: len(self.rows), self.count], self.logps[: len(self.rows), self.count] = ids, logps
        self.count += 1

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """The last token of each row (rows,), and its position."""
        return self.ids[: len(self.rows), self.count - 1], self.position + self.count - 1

    def flush(self, places: list[int]) -> None:
        """Move what the rows at `places` have sampled into them."""
        ids, logps = (x[places, : self.count].tolist() for x in (self.ids, self.logps))
        for place, own_ids, own_logps in zip(places, ids, logps, strict=True):
            self.rows[place].ids += own_ids
            self.rows[place].logps += own_logps

    def drop(self, places: list[int]) -> None:
        """Forget the rows at `places`; the last ones take them."""
        moves = self.cache.drop(places)
        kept = len(self.rows) - len(places)
        if moves:
            source, target = (list(x) for x in zip(*moves, strict=True))
            for x in (self.ids, self.logps, self.uniforms, self.position, self.limit):
                x[target] = x[source]
            for a, b in moves:
                self.rows[b] = self.rows[a]
        del self.rows[kept:]
        self.position, self.limit = self.position[:kept], self.limit[:kept]
        self.ids, self.logps, self.uniforms = self.ids[:kept], self.logps[:kept], self.uniforms[:kept]


class NativeEngine:
    """Samples from `model` as it stands: its own forward and weights, so `sync` copies nothing.

    The prompts of all waiting requests run as one flat batch, a prompt of several completions once. Rows that finish
    leave at once, waiting requests join between two tokens. Log-probabilities are those of `token_stats` in fp32, of
    the distribution drawn from; at temperature 0 those of temperature 1. A request's tokens depend on its seed and
    its logits alone, not on what else is in the batch (beyond the rounding of the products).
    """

    name = "native"
    exact = True

    def __init__(
        self,
        model: Any,
        *,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        max_rows: int = 512,
        tokens_per_step: int = 8,
        seed: int = 0,
    ):
        """`model` may be PEFT's; `max_rows` completions are made at a time. ValueError for sharded weights."""
        self.model = model
        self.base = unwrap(model)
        self.version = 0
        self.max_rows, self.tokens_per_step = max_rows, tokens_per_step
        self._autocast = autocast
        self._seeds = random.Random(seed)
        self._waiting: deque[Row] = deque()
        self._cohorts: list[Cohort] = []
        self._keys: set[Any] = set()
        self._check_model()

    def _check_model(self) -> None:
        if not is_whole(self.base):
            raise ValueError(
                "The weights are spread over ranks (FSDP or ZeRO-3), which the engine 'native' cannot sample from. "
                "Set `use_vllm=True`, or train with DDP."
            )
        self.info = policy_info(self.model)
        if not self.info.flat:
            raise ValueError(
                f"{type(self.base).__name__} cannot be sampled from by the engine 'native': {self.info.reason}. Set "
                "`use_vllm=True`."
            )

    @property
    def pending(self) -> int:
        return len(self._keys)

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests. ValueError for a prompt that is empty or too long, a key that is pending, or settings that
        this engine does not have."""
        limit = position_limit(self.base)
        plans: dict[int, Plan] = {}
        rows, keys = [], set()
        for request in requests:
            plan = plans.get(id(request.sampling)) or plans.setdefault(id(request.sampling), plan_of(request.sampling))
            if request.key in self._keys or request.key in keys:
                raise ValueError(f"A request with key {request.key!r} is pending already; give each its own key.")
            if not request.prompt_ids:
                raise ValueError(f"The prompt of request {request.key!r} has no tokens; give it at least one.")
            if limit is not None and len(request.prompt_ids) + plan.max_new_tokens > limit + 1:
                raise ValueError(
                    f"The prompt of request {request.key!r} has {len(request.prompt_ids)} tokens and "
                    f"{plan.max_new_tokens} may follow, but the model has {limit} positions. Shorten the prompt or "
                    "lower `max_completion_length`."
                )
            if request.model_inputs:
                raise ValueError(
                    f"Request {request.key!r} has {', '.join(request.model_inputs)}; the engine 'native' takes text "
                    "alone. Set `use_vllm=True`."
                )
            keys.add(request.key)
            seed = self._seeds.getrandbits(64) if request.seed is None else request.seed
            rows.append(Row(request, plan, seed))
        self._keys |= keys
        self._waiting.extend(rows)

    def step(self) -> list[Completion]:
        """Some tokens of every request; returns early when one is finished."""
        finished: list[Completion] = []
        if not self.pending:
            return finished
        with quiet(self.model), self._autocast():
            finished += self._admit()
            for _ in range(self.tokens_per_step):
                if finished or not self._cohorts:
                    break
                finished += self._decode()
        return finished

    def abort(self) -> None:
        """Forget what is pending."""
        self._waiting.clear()
        self._cohorts.clear()
        self._keys.clear()

    def sync(self, version: int) -> SyncReport:
        """The weights are the model's own; keys of older ones are computed again before the next token."""
        for cohort in self._cohorts:
            cohort.flush(list(range(len(cohort.rows))))
            self._waiting.extendleft(reversed(cohort.rows))
        self._cohorts.clear()
        self.version = version
        return SyncReport("same model", 0.0)

    def sleep(self) -> None:
        """Nothing is held but the keys of pending requests: give those back, to be computed again."""
        self.sync(self.version)

    def close(self) -> None:
        """Forget everything; the model stays as it is."""
        self.abort()

    def _admit(self) -> list[Completion]:
        """Start waiting requests for which there is room: their prompts, and the first token of each."""
        room = self.max_rows - sum(len(cohort.rows) for cohort in self._cohorts)
        if not self._waiting or room <= 0:
            return []
        rows = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        number: dict[tuple[int, ...], int] = {}
        group_of_row = [number.setdefault(row.history, len(number)) for row in rows]
        prompts = list(number)
        cohort = Cohort(rows, prompts, group_of_row, self.base.device)
        self._cohorts.append(cohort)
        return self._prefill(cohort, prompts)

    def _prefill(self, cohort: Cohort, prompts: list[tuple[int, ...]]) -> list[Completion]:
        chunks, size = [[]], 0
        for number, prompt in enumerate(prompts):
            if size + len(prompt) > PREFILL_TOKENS and chunks[-1]:
                chunks.append([])
                size = 0
            chunks[-1].append(number)
            size += len(prompt)
        ids = torch.empty(len(cohort.rows), dtype=torch.int64, device=cohort.device)
        logps = torch.empty(len(cohort.rows), device=cohort.device)
        for chunk in chunks:
            batch = collate_flat([list(prompts[n]) for n in chunk]).to(cohort.device)
            last = batch.cu_seqlens[1:].long() - 1
            places = [p for p, g in enumerate(cohort.cache._group_of_row) if chunk[0] <= g <= chunk[-1]]
            group = torch.tensor([cohort.cache._group_of_row[p] - chunk[0] for p in places], device=cohort.device)
            kept = PrefillCache()
            segments = _segments(batch)
            with flat_batch(segments):
                ids[places], logps[places] = self._sample(
                    [(cohort, places)], batch.input_ids[None], batch.position_ids[None], last[group], kept
                )
            cohort.cache.fill_prefix(kept.kept, range(chunk[0], chunk[-1] + 1), [len(prompts[n]) for n in chunk])
        cohort.put(ids, logps)
        for row in cohort.rows:
            row.version = self.version if row.version < 0 else row.version
        return self._finish(cohort)

    def _decode(self) -> list[Completion]:
        """One more token of every row."""
        for cohort in self._cohorts:
            cohort.reserve()
        ids, positions = (torch.cat(x) for x in zip(*(cohort.inputs for cohort in self._cohorts), strict=True))
        cache = DecodeCache([cohort.cache for cohort in self._cohorts])
        rows = [(cohort, list(range(len(cohort.rows)))) for cohort in self._cohorts]
        with decoding(self.base, cache), flat_batch(None):
            source = torch.arange(len(ids), device=ids.device)
            ids, logps = self._sample(rows, ids[:, None], positions[:, None], source, cache)
        finished, start = [], 0
        for cohort in list(self._cohorts):
            stop = start + len(cohort.rows)
            cohort.cache.length += 1
            cohort.put(ids[start:stop], logps[start:stop])
            finished += self._finish(cohort)
            start = stop
        return finished

    def _sample(self, rows, input_ids: Tensor, position_ids: Tensor, source: Tensor, cache) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities of the hidden states at `source`, which belong to `rows`."""
        uniform = torch.cat([cohort.uniforms[places, cohort.count] for cohort, places in rows])
        distributions: dict[Distribution, list[int]] = {}
        owners = [cohort.rows[place] for cohort, places in rows for place in places]
        for place, row in enumerate(owners):
            distributions.setdefault(row.plan.distribution, []).append(place)

        def op(hidden: Tensor, weight: Tensor, **options):
            ids, logps = torch.empty_like(source), uniform.new_empty(len(source), dtype=torch.float32)
            for distribution, places in distributions.items():
                chosen = slice(None) if len(distributions) == 1 else torch.tensor(places, device=hidden.device)
                own = dict(options)
                if own["low_rank"] is not None:
                    own["low_rank"] = own["low_rank"][0][chosen], own["low_rank"][1]
                seen = self._seen(rows, weight.shape[0])[chosen] if distribution.repetition_penalty != 1.0 else None
                ids[chosen], logps[chosen] = sample_tokens(
                    hidden[chosen], weight, uniform[chosen], distribution, seen=seen, **own
                )
            return uniform.new_zeros(()), (ids, logps)

        request = ScoringRequest(
            source=source,
            targets=source,
            length=input_ids.shape[1],
            mode="loss",
            outputs=(),
            form=self.info.form,
            op=op,
            heads=attach_heads(self.base),
        )
        with scoring(request), head_output_kept(self.base):
            self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        return request.result

    def _seen(self, rows, vocabulary: int) -> Tensor:
        """(rows, V) bool: tokens of the prompt and of what was sampled."""
        seen = []
        for cohort, places in rows:
            for place in places:
                row = torch.zeros(vocabulary, dtype=torch.bool, device=cohort.device)
                row[torch.tensor(cohort.rows[place].history, device=cohort.device)] = True
                row[cohort.ids[place, : cohort.count]] = True
                seen.append(row)
        return torch.stack(seen)

    def _finish(self, cohort: Cohort) -> list[Completion]:
        """Take out the rows that are done."""
        last = cohort.ids[: len(cohort.rows), cohort.count - 1]
        stopped = torch.zeros_like(last, dtype=torch.bool)
        for stop in {stop for row in cohort.rows for stop in row.plan.stop_ids}:
            stopped |= last == stop
        ends = (stopped | (cohort.limit <= cohort.count)).nonzero()[:, 0].tolist()
        if not ends:
            return []
        found = zip(ends, last[ends].tolist(), cohort.limit[ends].tolist(), strict=True)
        done = [p for p, id, limit in found if limit <= cohort.count or id in cohort.rows[p].plan.stop_ids]
        cohort.flush(done)
        finished = []
        for place in done:
            row = cohort.rows[place]
            reason: FinishReason = "stop" if row.ids[-1] in row.plan.stop_ids else "length"
            finished.append(Completion(row.request.key, row.ids, row.logps, reason, row.version, self.version))
            self._keys.discard(row.request.key)
        cohort.drop(done)
        if not cohort.rows:
            self._cohorts.remove(cohort)
        return finished


def _segments(batch):
    from fastalign_kernels.attention import Segments

    return Segments(batch.cu_seqlens, batch.max_seqlen) if batch.num_segments > 1 else None
