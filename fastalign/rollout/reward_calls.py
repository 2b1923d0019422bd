"""Calls of reward functions: what they are given, what they may return, and the threads and the loop they run on.

A `Job` is one function's work on one submission. It calls the function with all samples; where that raises and there
are several groups, it calls it again with each group alone, so that an error costs the groups it belongs to.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import math
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..rewards.workers import given_up

logger = logging.getLogger(__name__)

LOOP_GRACE = 1.0  # seconds that a cancelled coroutine has to end before its loop counts as blocked
COPIED = ("prompts", "completions", "completion_ids")  # arguments whose entries functions may change
OWN_COLUMNS = ("prompt", "completion", "completion_ids")  # of a row: functions get them under TRL's names


def callable_name(function: Callable) -> str:
    """The name that metrics are logged under: of the function, or of the class of a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_async(function: Any) -> bool:
    """Whether calling `function` (a function, a partial, an object with `__call__`) returns a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def accepted_names(function: Callable) -> set[str] | None:
    """The arguments `function` can be given by name; None: any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def list_arguments(samples: list, trainer_state: Any) -> dict[str, list]:
    """What TRL's GRPO passes: prompts, completions, their ids, every other column, environments; lists of n."""
    rows = [{**sample.row, **sample.extras} for sample in samples]
    columns = {name: [row.get(name) for row in rows] for name in (rows[0] if rows else ()) if name not in OWN_COLUMNS}
    columns["prompts"] = [row.get("prompt") for row in rows]
    columns["completions"] = [sample.completion for sample in samples]
    columns["completion_ids"] = [sample.completion_ids for sample in samples]
    columns["trainer_state"] = [trainer_state] * len(samples)
    if any(sample.environment is not None for sample in samples):
        columns["environments"] = [sample.environment for sample in samples]
    return columns


def own_copy(value: Any) -> Any:
    """Lists and dicts anew, all the way down (lists of other things by their first entry)."""
    if isinstance(value, dict):
        return {key: own_copy(one) for key, one in value.items()}
    if isinstance(value, list):
        return [own_copy(one) for one in value] if value and isinstance(value[0], (dict, list)) else value[:]
    return value


class Attempt:
    """One call of the function: its arguments, what it logs, and whether it failed."""

    def __init__(self, job: Job, rows: range):
        self.job, self.rows = job, rows
        self.columns: dict[str, list] = {}
        self.metrics: dict[str, list[float]] = {}
        self.returned: Any = None

    def arguments(self) -> dict[str, Any]:
        """Fresh lists and messages for each call, so that functions cannot change each other's, nor the samples."""
        part = slice(self.rows.start, self.rows.stop)
        given: dict[str, Any] = {n: values[part] for n, values in self.job.given.items() if self.job.takes(n)}
        given |= {name: own_copy(given[name]) for name in COPIED if name in given}
        own = {
            "trainer_state": self.job.given["trainer_state"][0],
            "log_extra": self._extra,
            "log_metric": self._metric,
        }
        return given | {name: value for name, value in own.items() if self.job.takes(name)}

    def _extra(self, column: str, values: list) -> None:
        self.columns.setdefault(column, []).extend(values)

    def _metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def values(self) -> list[float]:
        """One number per completion, NaN for None; ValueError where that is not what was returned."""
        returned, advice = self.returned, ""
        if inspect.iscoroutine(returned):
            returned.close()
            advice = " Make it `async def`, and so the decorators around it."
        if isinstance(returned, (str, Mapping, set)) or not hasattr(returned, "__len__"):
            raise ValueError(
                f"The reward function {self.job.name!r} returned {type(returned).__name__}; it must return a "
                f"list with one number or None per completion.{advice}"
            )
        if len(self.returned) != len(self.rows):
            raise ValueError(
                f"The reward function {self.job.name!r} returned {len(self.returned)} rewards for {len(self.rows)} "
                "completions; it must return one number or None per completion."
            )
        return [math.nan if value is None else float(value) for value in self.returned]


class Job:
    """One function's work on one submission; what comes of it is read once `done`.

    rewards: one per sample, NaN where there is none. lost: rows of calls that failed. failures: calls that raised,
    timed out, returned the wrong count, NaN or an infinite number.
    """

    def __init__(self, name: str, function: Callable, given: dict[str, list], groups: list[range]):
        self.name, self.function, self.given, self.groups = name, function, given, groups
        self.names, self.is_async = accepted_names(function), is_async(function)
        self.size = groups[-1].stop
        self.rewards = [math.nan] * self.size
        self.lost = [False] * self.size
        self.failures = 0
        self.error = ""
        self.columns: dict[str, list] = {}
        self.metrics: dict[str, list[float]] = {}
        self.started = 0.0  # time.monotonic(); 0: waits for its turn
        self.seconds = 0.0
        self.done = self.abandoned = self.raised = False
        self.needs_main_thread = self.in_main_thread = False

    def takes(self, name: str) -> bool:
        """Whether the function is given what has this name."""
        return self.names is None or name in self.names

    def attempts(self) -> Iterator[Attempt]:
        """The calls to make: all samples at once, and each group alone where that failed."""
        yield Attempt(self, range(self.size))
        if self.raised and len(self.groups) > 1 and not self.needs_main_thread:
            for group in self.groups:
                if self.abandoned:
                    return
                yield Attempt(self, group)

    @contextlib.contextmanager
    def settle(self, attempt: Attempt) -> Iterator[None]:
        """Around a call: takes what it returned, or keeps what went wrong to its rows."""
        self.raised = True
        asked = given_up.set(lambda: self.abandoned)
        try:
            yield
            self.raised = False  # what returns the wrong count is wrong: another count might fit by chance
            values = attempt.values()
        except BaseException as error:
            if self.abandoned or isinstance(error, KeyboardInterrupt):
                raise
            movable = not (self.in_main_thread or self.is_async)
            self.needs_main_thread = movable and _wants_main_thread(error)
            self.lose(attempt.rows, traceback.format_exc())
        else:
            if not self.abandoned:
                self._take(attempt, values)
        finally:
            given_up.reset(asked)

    def _take(self, attempt: Attempt, values: list[float]) -> None:
        if broken := [value for value in attempt.returned if value is not None and not math.isfinite(float(value))]:
            self.failures += 1
            logger.warning(
                "The reward function %r returned %s for %d of %d completions, which are taken as not scored.",
                self.name, float(broken[0]), len(broken), len(values),
            )  # fmt: skip
        for row, value in zip(attempt.rows, values, strict=True):
            self.rewards[row], self.lost[row] = value if math.isfinite(value) else math.nan, False
        for name, entries in attempt.metrics.items():
            self.metrics.setdefault(name, []).extend(entries)
        for name, entries in attempt.columns.items():
            if len(entries) != len(attempt.rows):
                logger.warning(
                    "log_extra(%r) of %r got %d values for %d completions; the column is left out.",
                    name, self.name, len(entries), len(attempt.rows),
                )  # fmt: skip
                continue
            column = self.columns.setdefault(name, [None] * self.size)
            column[attempt.rows.start : attempt.rows.stop] = entries

    def lose(self, rows: range, error: str) -> None:
        """A call failed: its rows have no reward."""
        self.failures += 1
        self.error = error
        for row in rows:
            self.rewards[row], self.lost[row] = math.nan, True
        if not self.needs_main_thread:
            logger.warning("The reward function %r failed on %d completions.\n%s", self.name, len(rows), error)

    def abandon(self, reason: str) -> None:
        """Stop waiting; what was not scored by now is lost."""
        self.abandoned = True
        for group in self.groups:
            if all(map(math.isnan, self.rewards[group.start : group.stop])):
                self.lost[group.start : group.stop] = [True] * len(group)
        self.failures += 1
        self.error = reason
        logger.warning("The reward function %r was given up: %d completions. %s", self.name, sum(self.lost), reason)
        self.finish()

    def run(self) -> None:
        """Call the function, in the thread that asks."""
        for attempt in self.attempts():
            with self.settle(attempt):
                attempt.returned = self.function(**attempt.arguments())

    async def run_async(self) -> None:
        """Await the function."""
        for attempt in self.attempts():
            with self.settle(attempt):
                attempt.returned = await self.function(**attempt.arguments())

    def finish(self) -> None:
        """Nothing more comes."""
        self.seconds = time.monotonic() - self.started
        self.done = True

    def run_in_main_thread(self) -> None:
        """Call the function here, and forget what came of it in another thread."""
        self.failures, self.error, self.lost = 0, "", [False] * self.size
        self.in_main_thread, self.started = True, time.monotonic()
        self.run()
        self.finish()


def _wants_main_thread(error: BaseException) -> bool:
    """Whether it is Python's complaint about signals in other threads, or math-verify's wording of it."""
    return isinstance(error, ValueError) and ("main thread" in str(error) or "threaded environment" in str(error))


class FunctionThread:
    """A daemon thread that runs one function's jobs one after the other, and a fresh one behind each that hangs."""

    def __init__(self, name: str, timeout: float | None):
        self.name, self.timeout = name, timeout
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._current: Job | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        with self._changed:
            self._queue.append(job)
            self._expire()
            if self._thread is None:
                self._start()
            self._changed.notify_all()

    def wait(self, job: Job) -> None:
        """Return once `job` is done, at the latest when those before it and itself had their time."""
        with self._changed:
            while not job.done:
                left = self._expire()
                if not job.done:
                    self._changed.wait(left)

    def close(self) -> None:
        """Let the thread end after what it does now."""
        with self._changed:
            self._thread = None
            self._changed.notify_all()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"reward-{self.name}", daemon=True)
        self._thread.start()

    def _expire(self) -> float | None:
        """Give up the current job if its time is over; returns the seconds until that may be."""
        if self.timeout is None or self._current is None:
            return self.timeout
        left = self._current.started + self.timeout - time.monotonic()
        if left > 0:
            return left
        self._current.abandon(f"It took longer than the time-out of {self.timeout:g} s; its thread is left behind.")
        self._current = None
        self._start()
        self._changed.notify_all()
        return self.timeout

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._thread is threading.current_thread() and not self._queue:
                    self._changed.wait()
                if self._thread is not threading.current_thread():
                    return
                job = self._current = self._queue.popleft()
                job.started = time.monotonic()
                self._changed.notify_all()
            with contextlib.suppress(BaseException):  # of a job that was given up: nobody waits for it
                job.run()
            with self._changed:
                if job.abandoned:
                    return
                job.finish()
                job = self._current = None  # nothing that the job knows is kept until the next one
                self._changed.notify_all()


def start_loop(owner: Any, name: str) -> tuple[asyncio.AbstractEventLoop, weakref.finalize]:
    """An event loop on a daemon thread, and what ends it, which happens of itself when `owner` is no more."""
    loop = asyncio.new_event_loop()
    end = weakref.finalize(owner, loop.call_soon_threadsafe, loop.stop)
    end.atexit = False

    def run() -> None:
        loop.run_forever()
        loop.close()

    threading.Thread(target=run, name=name, daemon=True).start()
    return loop, end


class AsyncLoop:
    """One event loop on a daemon thread for all async functions; their calls run at the same time."""

    def __init__(self, timeout: float | None):
        self.timeout = timeout
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[Job, asyncio.Task] = {}  # kept here, because a loop holds its tasks weakly

    def submit(self, job: Job) -> None:
        with self._changed:
            if self._loop is None:
                self._loop, self._end = start_loop(self, "reward-loop")
            job.started = time.monotonic()  # until it runs: a loop that is blocked may never begin it
            self._loop.call_soon_threadsafe(self._start, self._loop, job)

    def wait(self, job: Job) -> None:
        """Return once `job` is done or its time is over; a loop that is blocked is left behind with all its calls."""
        with self._changed:
            while not job.done:
                left = None if self.timeout is None else job.started + self.timeout - time.monotonic()
                if left is not None and left <= 0:
                    self._give_up(job)
                    return
                self._changed.wait(left)

    def close(self) -> None:
        if self._loop is not None:
            self._end()
            self._loop = None

    def _start(self, loop: asyncio.AbstractEventLoop, job: Job) -> None:
        self._tasks[job] = loop.create_task(self._run(job))

    async def _run(self, job: Job) -> None:
        job.started = time.monotonic()
        try:
            with contextlib.suppress(BaseException):  # of a job that was given up; SystemExit would end the loop
                await job.run_async()
        finally:
            with self._changed:
                self._tasks.pop(job, None)
                if not job.abandoned:
                    job.finish()
                self._changed.notify_all()

    def _give_up(self, job: Job) -> None:
        job.abandon(f"It took longer than the time-out of {self.timeout:g} s.")
        loop, task = self._loop, self._tasks.get(job)
        if loop is None:
            return
        if task is not None:
            loop.call_soon_threadsafe(task.cancel)
        self._changed.wait_for(lambda: job not in self._tasks, LOOP_GRACE)
        if job not in self._tasks and task is not None:
            return
        self._end()
        self._loop = None
        for other in [*self._tasks]:
            if not other.done:
                other.abandon(
                    f"The event loop was blocked, perhaps by {job.name!r} (use `await`, not blocking calls)."
                )
        self._tasks = {}
