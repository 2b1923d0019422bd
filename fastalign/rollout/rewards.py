"""Rewards of samples: functions, coroutines and reward models, run side by side, none of which can lose a batch."""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .reward_calls import AsyncLoop, FunctionThread, Job, callable_name, list_arguments
from .reward_models import RewardModel, load_reward_model, tokenize
from .samples import Sample

logger = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """A reward function failed on every completion of a generation batch."""


@dataclass
class Scores:
    """What the reward functions (K) say of n samples, in the order of the samples."""

    names: list[str]
    rewards: Tensor  # (n, K) fp32, CPU; NaN: no score
    lost: Tensor  # (n, K) bool: no score because a call failed
    failures: dict[str, int] = field(default_factory=dict)  # calls that failed, of functions that had any
    errors: dict[str, str] = field(default_factory=dict)  # the last failure of each
    columns: dict[str, list] = field(default_factory=dict)  # of log_extra, n values each, None where there is none
    metrics: dict[str, list[float]] = field(default_factory=dict)  # of log_metric, in the order of the calls
    seconds: dict[str, float] = field(default_factory=dict)  # that each function took

    def check(self) -> None:
        """RewardError where every row of a function is lost; a warning where some sample has no score at all."""
        for k, name in enumerate(self.names):
            if len(self.lost) and bool(self.lost[:, k].all()):
                raise RewardError(
                    f"The reward function {name!r} failed on all {len(self.lost)} completions of a batch. Its last "
                    f"failure:\n{self.errors.get(name, '')}"
                )
        if unscored := int(self.rewards.isnan().all(dim=1).sum()):
            logger.warning(
                "No reward function scored %d of %d completions; they take no part in the update.",
                unscored, len(self.rewards),
            )  # fmt: skip


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of several submissions as those of one, in their order."""
    joined = Scores(
        parts[0].names, torch.cat([part.rewards for part in parts]), torch.cat([part.lost for part in parts])
    )
    done = 0
    for part in parts:
        for name, count in part.failures.items():
            joined.failures[name] = joined.failures.get(name, 0) + count
        for name, entries in part.metrics.items():
            joined.metrics.setdefault(name, []).extend(entries)
        for name, seconds in part.seconds.items():
            joined.seconds[name] = joined.seconds.get(name, 0.0) + seconds
        for name, values in part.columns.items():
            joined.columns.setdefault(name, [None] * len(joined.rewards))[done : done + len(values)] = values
        joined.errors |= part.errors
        done += len(part.rewards)
    return joined


class RewardPool:
    """Scores samples with several reward functions at once.

    `reward_funcs` are functions, async functions, reward models (objects or names) or a list of them, called as TRL's
    GRPO calls them. Each function has a thread of its own, in which its calls follow one another; async functions
    share one event loop; models run in the thread that asks for the result. `timeout` (seconds, None: no limit) is for
    one call; `on_error="raise"` makes the first failure an error instead of a lost score. ValueError where the numbers
    of functions, weights and processing classes differ.
    """

    def __init__(
        self,
        reward_funcs: Any,
        reward_weights: Sequence[float] | None = None,
        reward_processing_classes: Any = None,
        *,
        device: torch.device | str = "cpu",
        timeout: float | None = None,
        on_error: str = "skip",
        chat_template_kwargs: dict[str, Any] | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ):
        functions = _as_list(reward_funcs)
        processing_classes = _as_list(reward_processing_classes) or [None] * len(functions)
        _check(functions, reward_weights, processing_classes, timeout, on_error)
        self.timeout, self.on_error = timeout, on_error
        self.chat_template_kwargs = chat_template_kwargs or {}
        revision = (model_init_kwargs or {}).get("revision")
        self.functions: list[Any] = []  # callables and RewardModels
        for function, processing_class in zip(functions, processing_classes, strict=True):
            if isinstance(function, str):
                function = load_reward_model(function, **(model_init_kwargs or {}))
            if isinstance(function, nn.Module):
                function = RewardModel(function, processing_class, device=device, revision=revision)
            self.functions.append(function)
        self.names: list[str] = []
        for function in self.functions:
            self.names.append(_fresh_name(function, self.names))
        self.weights = torch.tensor(reward_weights or [1.0] * len(functions), dtype=torch.float32)
        self._loop = AsyncLoop(timeout)
        self._threads: dict[str, FunctionThread] = {}
        self._main_thread: set[str] = set()  # functions that run nowhere else
        self._unscored: list[PendingScores] = []  # submissions that reward models have not seen
        weakref.finalize(self, _close_all, self._threads).atexit = False  # the loop sees to itself

    def add(self, name: str, function: Callable, weight: float = 1.0) -> None:
        """One more function, after the others (the reward of an environment)."""
        self.functions.append(function)
        self.names.append(name)
        self.weights = torch.cat([self.weights, torch.tensor([weight])])

    def submit(
        self, samples: list[Sample], trainer_state: Any = None, prompts: Sequence[int] | None = None
    ) -> PendingScores:
        """Start scoring `samples`, one group after the other; returns at once.

        `prompts`: the number of each sample's prompt; None: neighbours whose prompts are equal are a group.
        """
        state = copy.copy(trainer_state)  # as it is now, whatever training does meanwhile
        groups = split_groups([sample.row.get("prompt") for sample in samples] if prompts is None else prompts)
        given = list_arguments(samples, state)
        pending = PendingScores(self, samples)
        for k, (name, function) in enumerate(zip(self.names, self.functions, strict=True)):
            if isinstance(function, RewardModel) or not samples:
                continue
            job = pending.jobs[k] = Job(name, function, given, groups)
            if name in self._main_thread:
                job.needs_main_thread = job.done = True  # nothing to wait for
            else:
                self._runner(job).submit(job)
        if any(isinstance(function, RewardModel) for function in self.functions):
            self._unscored.append(pending)
        return pending

    def close(self) -> None:
        """Let threads and loop end."""
        _close_all(self._threads)
        self._loop.close()

    def score_with_models(self) -> None:
        """Run the reward models on all that was submitted since they ran last."""
        waiting = [*self._unscored]
        del self._unscored[: len(waiting)]  # another thread may submit meanwhile
        samples = [sample for pending in waiting for sample in pending.samples]
        if not samples:
            return
        tokenized: dict[int, list[list[int]]] = {}
        for k, model in enumerate(self.functions):
            if not isinstance(model, RewardModel):
                continue
            key = 0 if model.reads_ids else id(model.processing_class)
            if key not in tokenized:
                tokenized[key] = (
                    [sample.prompt_ids + sample.completion_ids for sample in samples]
                    if model.reads_ids
                    else tokenize(samples, model.processing_class, self.chat_template_kwargs)
                )
            start = time.monotonic()
            parts = model.score(tokenized[key]).split([len(pending.samples) for pending in waiting])
            seconds = (time.monotonic() - start) / len(samples)
            for pending, part in zip(waiting, parts, strict=True):
                pending.of_models[k] = part
                pending.model_seconds[k] = seconds * len(part)

    def _runner(self, job: Job) -> AsyncLoop | FunctionThread:
        if job.is_async:
            return self._loop
        return self._threads.setdefault(job.name, FunctionThread(job.name, self.timeout))

    def finish(self, job: Job) -> None:
        """Return once `job` is done."""
        if not job.done:
            self._runner(job).wait(job)
        if not job.needs_main_thread:
            return
        if threading.current_thread() is threading.main_thread():
            if job.name not in self._main_thread:
                logger.warning("The reward function %r needs the main thread: it runs there from now on.", job.name)
                self._main_thread.add(job.name)
            job.run_in_main_thread()
        elif not job.failures:
            job.lose(range(job.size), "It needs the main thread, and its scores were asked for in another one.")


class PendingScores:
    """Scores that are being made."""

    def __init__(self, pool: RewardPool, samples: list[Sample]):
        self.pool, self.samples = pool, samples
        self.jobs: dict[int, Job] = {}
        self.of_models: dict[int, Tensor] = {}
        self.model_seconds: dict[int, float] = {}
        self._scores: Scores | None = None

    def result(self) -> Scores:
        """The scores, once all functions are done or out of time. Call it in the main thread.

        What failed has no score and is counted; see `Scores.check`. RewardError if the pool's `on_error` is "raise".
        """
        if self._scores is None:
            self._scores = self._collect()
        return self._scores

    def _collect(self) -> Scores:
        pool, n = self.pool, len(self.samples)
        if self in pool._unscored:
            pool.score_with_models()
        shape = (n, len(pool.names))
        scores = Scores([*pool.names], torch.full(shape, torch.nan), torch.zeros(shape, dtype=torch.bool))
        for k, found in self.of_models.items():
            scores.rewards[:, k] = found
            scores.seconds[pool.names[k]] = self.model_seconds[k]
        for job in sorted(self.jobs.values(), key=lambda job: not job.done):  # first what runs in this thread
            pool.finish(job)
        for k, job in self.jobs.items():
            self._add(scores, k, job)
        if any(job.abandoned and job.takes("environments") for job in self.jobs.values()):
            for sample in self.samples:
                sample.environment = None  # the call may still be at work in it: no other sample gets it
        return scores

    def _add(self, scores: Scores, k: int, job: Job) -> None:
        scores.rewards[:, k] = torch.tensor(job.rewards)
        scores.lost[:, k] = torch.tensor(job.lost)
        scores.seconds[job.name] = job.seconds
        scores.columns |= job.columns
        for name, entries in job.metrics.items():
            scores.metrics.setdefault(name, []).extend(entries)
        if job.failures:
            scores.failures[job.name] = job.failures
            scores.errors[job.name] = job.error
            if self.pool.on_error == "raise":
                raise RewardError(f"The reward function {job.name!r} failed:\n{job.error}")


def split_groups(prompts: Sequence[Any]) -> list[range]:
    """Places of neighbours that are equal."""
    starts = [i for i, prompt in enumerate(prompts) if not i or prompt != prompts[i - 1]]
    return [range(a, b) for a, b in pairwise([*starts, len(prompts)])]


def _close_all(threads: dict[str, FunctionThread]) -> None:
    for thread in threads.values():
        thread.close()


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _fresh_name(function: Any, taken: list[str]) -> str:
    name = function.name if isinstance(function, RewardModel) else callable_name(function)
    count = sum(other == name or other.startswith(f"{name}_") for other in taken)
    return name if name not in taken else f"{name}_{count + 1}"


def _check(functions: list, weights: Any, processing_classes: list, timeout: Any, on_error: str) -> None:
    if weights is not None and len(weights) != len(functions):
        raise ValueError(
            f"`reward_weights` has {len(weights)} numbers for {len(functions)} reward functions; give one for each."
        )
    if len(processing_classes) != len(functions):
        raise ValueError(
            f"`reward_processing_classes` has {len(processing_classes)} entries for {len(functions)} reward "
            "functions; give one for each, None for those that are no models."
        )
    for function in functions:
        if not (isinstance(function, (str, nn.Module)) or callable(function)):
            raise ValueError(
                f"`reward_funcs` has {function!r}; allowed are functions, async functions, models and their names."
            )
    if timeout is not None and not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"`reward_timeout` is {timeout}; it is a number of seconds above 0, or None for no limit.")
    if on_error not in ("skip", "raise"):
        raise ValueError(f"`on_error` is {on_error!r}; allowed are 'skip' and 'raise'.")
