"""The embedded engine: completions from the training model itself, token by token with cached keys and values."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psutil
import torch
from fastalign_kernels.attention import Segments
from torch import Tensor

from ..data.collate import collate_flat
from ..flat_attention import flat_batch
from ..models import position_limit
from ..policy import policy_info, unwrap
from ..policy_check import is_whole, quiet
from .engine import Completion, Request, SyncReport
from .native_attention import configs_of, decoding
from .native_cache import DecodeCache, KeyValues, PrefillCache, bytes_per_token, joined
from .native_cohort import Cohort, Row, merged
from .native_forward import Owners, is_exact, next_tokens
from .native_images import ImageCache, within_limit
from .native_own_cache import OwnCache
from .native_sampling import Plan, plan_of

PREFILL_TOKENS = 8192  # of prompts in one forward
MOST_COHORTS = 8  # above, small ones become one: each costs calls of its own in each layer
SHORT_PROMPT = 64  # tokens; longer prompts lie beside prompts of more than half their length
EXPECTED_TOKENS = 256  # a request is started where there is memory for so many


class NativeEngine:
    """Samples from `model` as it stands: its own forward and weights, so `sync` copies nothing.

    Waiting prompts run as one flat batch, a prompt of several completions once. Rows that finish leave at once;
    requests that are submitted later start with the next `step`, in cohorts of their own that decode in the same
    forward. Log-probabilities are those of `token_stats`, of the distribution drawn from; at temperature 0 those of
    temperature 1. A request's tokens depend on its seed and its logits alone: on what else is in the batch only
    through the rounding of products. Models whose attention cannot be given from outside (recurrent ones, those with
    images) run with a cache of their own, in batches of equally long prompts; prompts with images in padded ones.
    """

    name = "native"

    def __init__(
        self,
        model: Any,
        *,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        max_rows: int = 512,
        cache_bytes: int | None = None,
        tokens_per_step: int = 8,
        seed: int = 0,
    ):
        """`model` may be PEFT's. At most `max_rows` completions are made at a time, with keys and values in at most
        `cache_bytes` (default: half of the free memory of a GPU, a quarter of a host's). `seed`: of requests without.
        ValueError for weights that are spread over ranks."""
        self.model = model
        self.base = unwrap(model)
        self.version = 0
        self.exact = is_exact(self.base, autocast)
        self.max_rows, self.tokens_per_step = max_rows, tokens_per_step
        self._autocast = autocast
        self._still: Callable[[], AbstractContextManager] = lambda: quiet(model)  # around what is computed
        self._cache_bytes, self._bytes_per_token = cache_bytes, bytes_per_token(self.base)
        self._seeds = random.Random(seed)
        self._waiting: deque[Row] = deque()
        self._cohorts: list[Cohort] = []
        self._keys: set[Any] = set()
        if not is_whole(self.base):
            raise ValueError(
                "The weights are spread over ranks (FSDP or ZeRO-3), which the engine 'native' cannot sample from. "
                "Set `use_vllm=True`, or train with DDP."
            )
        self.info = policy_info(model)
        self._configs = configs_of(self.base)

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
            known = plans.get(id(request.sampling))
            plan = known or plans.setdefault(id(request.sampling), plan_of(request.sampling, self.name))
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
            keys.add(request.key)
            seed = self._seeds.getrandbits(64) if request.seed is None else request.seed
            rows.append(Row(request, plan, seed))
        self._keys |= keys
        self._waiting.extend(rows)

    def step(self) -> list[Completion]:
        """Up to `tokens_per_step` tokens of every request that has started, after starting those that can."""
        finished: list[Completion] = []
        if not self.pending:
            return finished
        with self._still(), self._autocast():
            self._merge_small()
            for rows in self._batches(self._take()):
                finished += self._start(rows)
            for _ in range(self.tokens_per_step):
                if self._cohorts:
                    finished += self._decode()
        return finished

    def abort(self) -> None:
        """Forget what is pending."""
        self._waiting.clear()
        self._cohorts.clear()
        self._keys.clear()

    def sync(self, version: int) -> SyncReport:
        """The weights are the model's own; keys of older ones are computed again before the next token."""
        self.sleep()
        self.version = version
        return SyncReport("same model", 0.0)

    def sleep(self) -> None:
        """Give back the keys of pending requests, to be computed again: nothing else is held."""
        while self._cohorts:
            self._put_back(self._cohorts[-1])

    def close(self) -> None:
        """Forget everything; the model stays as it is."""
        self.abort()

    def _budget(self) -> int:
        """Tokens whose keys and values there is memory for."""
        if self._cache_bytes is None:
            device = self.base.device
            if device.type == "cuda":
                unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
                self._cache_bytes = (torch.cuda.mem_get_info(device)[0] + unused) // 2
            else:
                self._cache_bytes = psutil.virtual_memory().available // 4
        return self._cache_bytes // self._bytes_per_token

    def _used(self) -> int:
        return sum(cohort.cache.num_tokens for cohort in self._cohorts)

    def _take(self) -> list[Row]:
        """Waiting requests for which there is room. A few places that came free wait for more, so that cohorts do not
        become small."""
        room = self.max_rows - sum(len(cohort.rows) for cohort in self._cohorts)
        if self._cohorts and room < min(len(self._waiting), self.max_rows // 8):
            return []
        rows: list[Row] = []
        prompts: set[tuple[int, ...]] = set()
        tokens = self._budget() - self._used()
        while self._waiting and len(rows) < room:
            row = self._waiting[0]
            tokens -= 0 if row.history in prompts else len(row.history)
            tokens -= row.room if row.ids else min(row.room, EXPECTED_TOKENS)  # once put back, it shall not come again
            if tokens < 0 and (rows or self._cohorts):
                break
            if self.info.flat:
                prompts.add(row.history)
            rows.append(self._waiting.popleft())
        return rows

    def _batches(self, rows: list[Row]) -> list[list[Row]]:
        """`rows` in cohorts: by length, so that little is padded; all of one length, unless there are images, for
        models that keep their own cache."""
        batches: dict[Any, list[Row]] = {}
        for row in rows:
            kind: Any = max(len(row.history) - 1, SHORT_PROMPT - 1).bit_length()
            if row.request.model_inputs:
                kind = "images", kind
            elif not self.info.flat:
                kind = -len(row.history)
            batches.setdefault(kind, []).append(row)
        return [part for batch in batches.values() for part in within_limit(batch)]

    def _start(self, rows: list[Row]) -> list[Completion]:
        """Read the prompts of `rows` and draw the first token of each."""
        device = self.base.device
        number: dict[tuple[int, ...], int] = {}
        prompt_of_row = [number.setdefault(row.history, len(number)) for row in rows]
        lengths = [len(row.history) for row in rows]
        if not self.info.flat or rows[0].request.model_inputs:
            histories, inputs = zip(*((row.history, row.request.model_inputs) for row in rows), strict=True)
            if inputs[0]:
                cache = ImageCache(self.model, self.base, histories, inputs)
            else:
                cache = OwnCache(self.model, self.base, torch.tensor(histories, device=device))
            cohort = Cohort(rows, lengths, cache, device)
            self._cohorts.append(cohort)
            return self._decode_own(cohort)
        prompts = list(number)
        cache = KeyValues([len(prompt) for prompt in prompts], prompt_of_row, device)
        cohort = Cohort(rows, lengths, cache, device)
        self._cohorts.append(cohort)
        ids, logps = torch.empty(len(rows), dtype=torch.int64, device=device), torch.empty(len(rows), device=device)
        for chunk in _chunks([len(prompt) for prompt in prompts]):
            batch = collate_flat([list(prompts[number]) for number in chunk]).to(device)
            places = [place for place, prompt in enumerate(prompt_of_row) if prompt in chunk]
            owner = torch.tensor([prompt_of_row[place] - chunk.start for place in places], device=device)
            source = (batch.cu_seqlens[1:].long() - 1)[owner]
            kept = PrefillCache()
            inputs = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}
            inputs |= {"past_key_values": kept, "use_cache": True}
            segments = Segments(batch.cu_seqlens, batch.max_seqlen) if batch.num_segments > 1 else None
            with flat_batch(segments):
                found = self.next_tokens(inputs, source, [(cohort, places)])
            ids[places], logps[places] = found[0], found[1]
            cache.fill_prefix(kept.kept, chunk)
        cohort.put(ids, logps, self.version)
        return self._collect(cohort)

    def _decode(self) -> list[Completion]:
        """One more token of every row."""
        self._make_room()
        finished: list[Completion] = []
        flat = [cohort for cohort in self._cohorts if isinstance(cohort.cache, KeyValues)]
        for cohort in [cohort for cohort in self._cohorts if cohort not in flat]:
            finished += self._decode_own(cohort)
        if not flat:
            return finished
        last, positions = (torch.cat(x) for x in zip(*(cohort.inputs() for cohort in flat), strict=True))
        cache = DecodeCache([cohort.cache for cohort in flat])  # pyright: ignore[reportArgumentType]
        inputs = {"input_ids": last[:, None], "position_ids": positions[:, None]}
        inputs |= {"past_key_values": cache, "use_cache": True}
        source = torch.arange(len(last), device=last.device)
        owners: Owners = [(cohort, None) for cohort in flat]
        with decoding(self._configs, cache), flat_batch(None):
            ids, logps, _ = self.next_tokens(inputs, source, owners)
        sizes = [len(cohort.rows) for cohort in flat]
        for cohort, own_ids, own_logps in zip(flat, ids.split(sizes), logps.split(sizes), strict=True):
            cohort.cache.length += 1  # pyright: ignore
            cohort.put(own_ids, own_logps, self.version)
            finished += self._collect(cohort)
        return finished

    def _decode_own(self, cohort: Cohort) -> list[Completion]:
        """The next token of rows whose model keeps its own cache."""
        cache = cohort.cache
        assert isinstance(cache, OwnCache)
        inputs = cache.inputs(cohort.inputs()[0] if cohort.count else None)
        num_rows, length = inputs["input_ids"].shape
        source = torch.arange(1, num_rows + 1, device=cohort.device) * length - 1
        with flat_batch(None):
            ids, logps, output = self.next_tokens(inputs, source, [(cohort, None)])
        cache.take(output)
        cohort.put(ids, logps, self.version)
        return self._collect(cohort)

    def next_tokens(self, inputs: dict[str, Any], source: Tensor, owners: Owners) -> tuple[Tensor, Tensor, Any]:
        """One forward: see `native_forward.next_tokens`."""
        return next_tokens(self.model, self.base, self.info.form, inputs, source, owners)

    def _collect(self, cohort: Cohort) -> list[Completion]:
        """Take out the rows that are done."""
        done = cohort.finished()
        if not done:
            return []
        completions = [row.completion(self.version) for row in cohort.flush(done)]
        self._keys -= {completion.key for completion in completions}
        if len(done) == len(cohort.rows):
            self._cohorts.remove(cohort)
        else:
            cohort.drop(done)
        return completions

    def _make_room(self) -> None:
        """Memory for the next token of every row; where there is none, rows go back to wait, the newest first."""
        for cohort in list(self._cohorts):
            while cohort in self._cohorts and cohort.is_full:
                added = (cohort.next_room - cohort.count) * len(cohort.rows)
                last = len(self._cohorts) == 1 and len(cohort.rows) == 1  # it must go on, whatever it takes
                if last or self._used() + added <= self._budget():
                    cohort.reserve()
                else:
                    newest = self._cohorts[-1]
                    self._put_back(newest, None if len(self._cohorts) > 1 else len(newest.rows) // 2)

    def _put_back(self, cohort: Cohort, first: int | None = None) -> None:
        """Let rows of `cohort` from place `first` on (None: all) wait again, with what they have sampled."""
        places = list(range(first or 0, len(cohort.rows)))
        self._waiting.extendleft(reversed(cohort.flush(places)))
        if first:
            cohort.drop(places)
        else:
            self._cohorts.remove(cohort)

    def _merge_small(self) -> None:
        """Join the smallest cohorts where there are many."""
        flat = [cohort for cohort in self._cohorts if isinstance(cohort.cache, KeyValues)]
        if len(flat) <= MOST_COHORTS:
            return
        small = sorted(flat, key=lambda cohort: len(cohort.rows))[: len(flat) - MOST_COHORTS // 2]
        self._cohorts = [cohort for cohort in self._cohorts if cohort not in small]
        self._cohorts.append(merged(small, joined([cohort.cache for cohort in small])))  # pyright: ignore


def _chunks(lengths: list[int]) -> list[range]:
    """Consecutive prompts of at most `PREFILL_TOKENS` together, or one longer one."""
    chunks, start, size = [], 0, 0
    for number, length in enumerate(lengths):
        if number > start and size + length > PREFILL_TOKENS:
            chunks.append(range(start, number))
            start, size = number, 0
        size += length
    return [*chunks, range(start, len(lengths))]
