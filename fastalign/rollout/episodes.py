"""Rollouts: prompts go in, whole groups of samples come out as they finish, each at the pace of its own tools."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

from ..data.formats import has_images, is_conversational
from .chat_tokens import ChatTokens
from .engine import Completion, Engine, FinishReason, Request, Sampling
from .environments import Environments
from .prompts import TOKENISED
from .samples import Group, Sample
from .tools import Answer, ToolRunner, tool_schemas

Key = tuple[int, int]  # place of the row, number of the generation


class _Episode:
    """One sample in the making: turns of the policy and answers of tools, as ids that are only ever appended to."""

    def __init__(
        self,
        row: dict[str, Any],
        prompt_ids: list[int],
        schemas: list[dict],
        functions: dict,
        world: Any,
        model_inputs: dict[str, Any] | None = None,
    ):
        self.row, self.prompt_ids, self.schemas = row, prompt_ids, schemas
        self.model_inputs = model_inputs or {}
        self.functions: dict[str, Callable] = functions
        self.environment = world
        self.ids: list[int] = []
        self.logps: list[float] = []
        self.drawn: list[bool] = []
        self.messages: list[dict[str, Any]] = []
        self.rounds = self.num_calls = self.num_failures = 0
        self.finish_reason: FinishReason = "length"
        self.versions: list[int] = []

    def take(self, completion: Completion, tokens: ChatTokens) -> list[dict[str, Any]]:
        """Append a turn of the policy; returns the tool calls in it."""
        prefix = self.prompt_ids + self.ids
        self._append(completion.ids, completion.logps, True)
        self.finish_reason = completion.finish_reason
        self.versions += [completion.version, completion.newest_version]
        if not is_conversational(self.row):
            return []
        self.messages.append(tokens.message(prefix, completion.ids, self.schemas))
        return self.messages[-1].get("tool_calls") or []

    def answered(self, answers: list[Answer], tokens: ChatTokens, longest: int, longest_total: float) -> int:
        """Append the answers; returns how many tokens are left for the next turn.

        Answers that do not fit into the completion (`longest`) or the context (`longest_total`) are dropped whole.
        """
        self.rounds += 1
        self.num_calls += len(answers)
        self.num_failures += sum(answer.failed for answer in answers)
        messages = [answer.message for answer in answers]
        ids = tokens.answer_ids(messages, self.ids[-1])
        length = len(self.ids) + len(ids)
        if length > longest or len(self.prompt_ids) + length >= longest_total:
            return 0
        self.messages += messages
        self._append(ids, [math.nan] * len(ids), False)
        if length == longest:
            self.finish_reason = "length"
        return int(min(longest - length, longest_total - len(self.prompt_ids) - length))

    def _append(self, ids: list[int], logps: list[float], drawn: bool) -> None:
        self.ids = self.ids + ids
        self.logps = self.logps + logps
        self.drawn = self.drawn + [drawn] * len(ids)

    def sample(self, tokens: ChatTokens) -> Sample:
        """What it has come to."""
        return Sample(
            row=self.row,
            prompt_ids=self.prompt_ids,
            completion_ids=self.ids,
            logps=self.logps,
            finish_reason=self.finish_reason,
            completion=self.messages or tokens.text(self.ids),
            mask=None if all(self.drawn) else self.drawn,
            version=min(self.versions),
            newest_version=max(self.versions),
            environment=self.environment,
            tool_calls=self.num_calls,
            tool_failures=self.num_failures,
            model_inputs=self.model_inputs,
        )


class Rollouts:
    """Samples episodes from an engine: turns of the policy, with the answers of tools between them.

    `tools` are functions (or coroutine functions) with type hints and docstrings; `environment_factory` makes one
    object for each sample, whose methods are further tools. `max_tool_calling_iterations` bounds the rounds of calls
    in a sample (None: no bound), `tool_timeout` each call in seconds, `num_tool_threads` the functions that run at
    once, `max_model_length` prompt and completion together, in tokens. `sampling.max_new_tokens` is for the whole
    completion, tool results included. `reward_funcs` holds the rewards that environments give themselves.
    One thread uses it, one run at a time.
    """

    def __init__(
        self,
        engine: Engine,
        processing_class: Any,
        sampling: Sampling,
        *,
        tools: Iterable[Callable] | None = None,
        environment_factory: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_tool_calling_iterations: int | None = None,
        tool_timeout: float | None = 300.0,
        num_tool_threads: int = 64,
        max_model_length: int | None = None,
    ):
        self.engine = engine
        self.sampling = sampling
        if max_tool_calling_iterations is not None and max_tool_calling_iterations < 0:
            raise ValueError(
                f"`max_tool_calling_iterations` is {max_tool_calling_iterations}; it must be at least 0, or None."
            )
        self.max_rounds = math.inf if max_tool_calling_iterations is None else max_tool_calling_iterations
        self.max_model_length = max_model_length or math.inf
        self.runner = ToolRunner(tool_timeout, num_tool_threads)
        self.tools = list(tools or ())
        self.schemas = tool_schemas(self.tools)
        self.environments = None if environment_factory is None else Environments(environment_factory, self.tools)
        self.reward_funcs = [] if self.environments is None else self.environments.reward_funcs
        every = [self.schemas] if self.environments is None else list(self.environments.schemas.values())
        self.tokens = ChatTokens(
            processing_class, sampling.stop_ids, chat_template_kwargs, calls_tools=any(len(each) for each in every)
        )

    def run(self, rows: list[dict[str, Any]], num_generations: int, seed: int) -> Iterator[Group]:
        """`num_generations` samples of each row's `prompt`, group by group as they finish (`Group.index`: the row).

        Same weights, rows and `seed` give the same samples, if tools and environments do the same. ValueError for a
        prompt that cannot be tokenised or that the engine finds too long; RuntimeError for an environment that cannot
        be reset. An iterator that is not read to its end leaves nothing behind in the engine.
        """
        return _Run(self, rows, num_generations, seed).groups()

    def release(self, samples: Iterable[Sample]) -> None:
        """Take back the environments of samples that have their rewards, for later runs.

        Without it every sample gets a new object. An environment whose method hangs is not used again.
        """
        for sample in samples:
            if sample.environment is not None and self.environments is not None:
                if not self.runner.is_hung(sample.environment):
                    self.environments.release(sample.environment, sample.row)
                sample.environment = None

    def close(self) -> None:
        """End the thread that tools wait on; the engine is not closed."""
        self.runner.close()


class _Run:
    """One batch of prompts on its way through the engine and the tools."""

    def __init__(self, rollouts: Rollouts, rows: list[dict[str, Any]], num_generations: int, seed: int):
        self.rollouts = rollouts
        self.rows = rows
        self.seed = seed
        self.samples: list[list[Any]] = [[None] * num_generations for _ in rows]
        self.waiting = {(index, number) for index in range(len(rows)) for number in range(num_generations)}
        self.finished: list[Group] = []
        self.episodes: dict[Key, _Episode] = {}
        self.beside: dict[Key, Future] = {}  # environments and tools that are at work
        self.back: queue.SimpleQueue[tuple[Key, Any]] = queue.SimpleQueue()  # and what they returned

    def groups(self) -> Iterator[Group]:
        engine = self.rollouts.engine
        if engine.pending:
            raise RuntimeError(f"The engine {engine.name!r} is busy with another run; read it to its end or close it.")
        try:
            requests = self._begin()
            while self.waiting:
                requests += [request for key, result in self._returned() if (request := self._go_on(key, result))]
                if requests:
                    self._submit(requests)
                    requests = []
                elif not engine.pending and not self.beside and self.waiting:
                    raise RuntimeError(f"The engine {engine.name!r} has lost {len(self.waiting)} requests.")
                for completion in engine.step() if engine.pending else ():
                    self._take(completion)
                while self.finished:
                    yield self.finished.pop(0)
        finally:
            for future in self.beside.values():
                future.cancel()
            if engine.pending:
                engine.abort()

    def _begin(self) -> list[Request]:
        """First requests; where there are environments, their resets are begun instead."""
        rollouts = self.rollouts
        requests = []
        for index, row in enumerate(self.rows):
            keys = [(index, number) for number in range(len(self.samples[index]))]
            if rollouts.environments is not None:
                rollouts.environments.name_of(row)
                for key in keys:
                    self._beside(key, rollouts.environments.begin(rollouts.runner, row))
                continue
            inputs: dict[str, Any] = {}
            if has_images(row):
                row, ids, inputs = rollouts.tokens.with_images(row)
            else:
                ids = row.get(TOKENISED) or rollouts.tokens.prompt_ids(row["prompt"], rollouts.schemas)
            functions = {function.__name__: function for function in rollouts.tools}
            for key in keys:
                requests.append(self._first(key, _Episode(row, ids, rollouts.schemas, functions, None, inputs)))
        return requests

    def _submit(self, requests: list[Request]) -> None:
        """Hand them to the engine; its errors say which prompt they are about."""
        try:
            self.rollouts.engine.submit(requests)
        except ValueError as error:
            for request in requests:
                if repr(request.key) in str(error):
                    prompt = str(self.rows[request.key[0]].get("prompt"))
                    raise ValueError(f"{error} The prompt begins with {prompt[:200]!r}.") from error
            raise

    def _beside(self, key: Key, work: Any) -> None:
        self.beside[key] = self.rollouts.runner.start(work, lambda result: self.back.put((key, result)))

    def _first(self, key: Key, episode: _Episode) -> Request:
        self.episodes[key] = episode
        return self._request(key, self.rollouts.sampling.max_new_tokens)

    def _request(self, key: Key, max_new_tokens: int) -> Request:
        episode = self.episodes[key]
        sampling = self.rollouts.sampling
        if max_new_tokens != sampling.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=max_new_tokens)
        seed = episode_seed(self.seed, *key, episode.rounds)
        return Request(key, episode.prompt_ids + episode.ids, sampling, seed, episode.model_inputs)

    def _returned(self) -> Iterator[tuple[Key, Any]]:
        """What tools and environments have returned by now; waits for one where nothing else can be done.

        Resets that come back together go on together, so that the engine sees the equal prompts of a group at once.
        """
        idle = not self.rollouts.engine.pending
        opening = idle and len(self.episodes) < len(self.waiting)
        block, timeout = idle, None
        while self.beside:
            try:
                key, result = self.back.get(block, timeout)
            except queue.Empty:
                return
            block, timeout = opening, 0.01
            del self.beside[key]
            yield key, result

    def _go_on(self, key: Key, result: Any) -> Request | None:
        """The next request of an episode, whose environment was reset or whose tools have answered."""
        if isinstance(result, BaseException):
            raise result
        rollouts = self.rollouts
        if key not in self.episodes:
            assert rollouts.environments is not None
            environment, prompt = result
            row = self.rows[key[0]]
            schemas = rollouts.environments.schemas[rollouts.environments.name_of(row)]
            functions = rollouts.environments.functions(environment)
            ids = rollouts.tokens.prompt_ids(prompt, schemas)
            return self._first(key, _Episode({**row, "prompt": prompt}, ids, schemas, functions, environment))
        longest = rollouts.sampling.max_new_tokens
        left = self.episodes[key].answered(result, rollouts.tokens, longest, rollouts.max_model_length)
        if left:
            return self._request(key, left)
        return self._finish(key)

    def _take(self, completion: Completion) -> None:
        episode = self.episodes[completion.key]
        calls = episode.take(completion, self.rollouts.tokens)
        if calls and self.rollouts.tokens.calls_tools and episode.rounds < self.rollouts.max_rounds:
            self._beside(completion.key, self.rollouts.runner.answers(calls, episode.functions))
        else:
            self._finish(completion.key)

    def _finish(self, key: Key) -> None:
        self.waiting.remove(key)
        index, number = key
        group = self.samples[index]
        group[number] = self.episodes[key].sample(self.rollouts.tokens)
        if all(sample is not None for sample in group):
            self.finished.append(Group(index, group))


def episode_seed(seed: int, index: int, number: int, turn: int = 0) -> int:
    """A seed of 63 bits for one turn of a sample, unrelated to those of its neighbours."""
    entropy = (seed & (2**64 - 1), index, number, turn)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
