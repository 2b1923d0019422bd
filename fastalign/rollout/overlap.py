"""Sampling ahead: a thread makes the next generation batches while the present one is learned from.

The schedule is fixed: when batch k is asked for, batch k + `depth` begins, from the weights of that moment. So a run
depends on its seed alone, not on how long sampling takes. Only sampling happens in the thread, and the start of reward
functions; what needs the model, the metrics or other ranks happens where the batch is asked for.
"""

from __future__ import annotations

import copy
import json
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any, cast

from .engine import Completion
from .generation import ScoredRollouts
from .image_inputs import without_images
from .rewards import Scores
from .samples import Sample

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
PATIENCE = 10.0  # seconds that closing waits for the thread, which may wait for a tool
KEPT = (  # fields of samples that the update and the completions log read
    *("prompt_ids", "completion_ids", "logps", "mask", "finish_reason", "version", "newest_version"),
    *("tool_calls", "tool_failures", "model_inputs"),
)


class StoppedError(RuntimeError):
    """Sampling was stopped because training ended."""


class StoppableEngine:
    """An engine that another thread can stop."""

    def __init__(self, engine: Any):
        self.engine = engine
        self.stopped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self) -> list[Completion]:
        """The engine's own; StoppedError once it is stopped."""
        if self.stopped:
            raise StoppedError("Sampling was stopped, because training has ended.")
        return self.engine.step()


class Ahead:
    """Generation batches, sampled up to `depth` batches before they are asked for.

    `sample(rows, number, state)` samples one from the engine's weights; `state()` is the trainer's state as it is now.
    """

    def __init__(
        self,
        engine: Any,
        sample: Callable[[Rows, int, Any], ScoredRollouts],
        depth: int,
        state: Callable[[], Any],
    ):
        self.engine, self.sample, self.depth, self.state = engine, sample, depth, state
        self._made: dict[int, Future[ScoredRollouts]] = {}
        self._version: int | None = None  # of the weights that the last of them is sampled from
        self._tasks: queue.SimpleQueue[tuple[Future, tuple] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        engine.stopped = False

    def take(self, number: int, rows: Rows, following: Sequence[tuple[int, Rows]]) -> ScoredRollouts:
        """Batch `number`, once it is sampled; those `following` it begin. Raises what sampling has raised."""
        if number not in self._made:  # the first, or those of a checkpoint are of other data
            self._forget()
            self._begin(number, rows)
        made = self._made[number].result()
        del self._made[number]
        for later, its_rows in following[: self.depth]:
            if later not in self._made:
                self._begin(later, its_rows)
        return made

    def wait(self) -> None:
        """Return when nothing is sampled; weights are brought anew before the next batch."""
        for made in self._made.values():
            made.exception()
        self._version = None

    def close(self) -> None:
        """Stop sampling, drop what is there, end the thread."""
        self._forget()
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(0.0 if self.engine.stopped else PATIENCE)
            self._thread = None

    def _forget(self) -> None:
        """Drop all batches; the one that is being sampled is stopped."""
        running = [made for made in self._made.values() if not made.cancel()]
        self._made.clear()
        self.engine.stopped = True
        if futures.wait(running, PATIENCE).not_done:
            logger.warning("The thread that samples ahead waits for a tool or a server, and is left behind.")
        else:
            self.engine.stopped = False

    def _begin(self, number: int, rows: Rows) -> None:
        """Let the thread sample a batch, from the weights as they are now."""
        state, values = copy.copy(self.state()), None
        step = state.global_step
        if step != self._version:
            if all(made.done() for made in self._made.values()):
                self.engine.sync(step)
            else:  # earlier batches go on under the weights they began with
                values = self.engine.weights.snapshot()
            self._version = step
        made: Future[ScoredRollouts] = Future()
        self._made[number] = made
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="sampling ahead", daemon=True)
            self._thread.start()
        self._tasks.put((made, (rows, number, state, values, step)))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            made, (rows, number, state, values, step) = task
            if not made.set_running_or_notify_cancel():
                continue
            try:
                if values is not None:
                    self.engine.sync(step, values)
                found = self.sample(rows, number, state)
            except BaseException as error:
                made.set_exception(error)
            else:
                made.set_result(found)
            del task, values

    # Checkpoints

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """What was begun, once it is sampled and scored; without batches whose sampling has failed."""
        return {number: _to_state(made.result()) for number, made in self._made.items() if not made.exception()}

    def load_state_dict(self, state: dict[int, dict[str, Any]]) -> None:
        """Continue with what `state_dict` gave."""
        for number, kept in state.items():
            self._made[number] = Future()
            self._made[number].set_result(cast(ScoredRollouts, _Kept(kept)))


def _to_state(made: ScoredRollouts | _Kept) -> dict[str, Any]:
    scores = made.scores()
    shown = [[without_images(sample.row.get("prompt")), sample.completion] for sample in made.samples]
    names = ("names", "failures", "errors", "metrics", "seconds")
    return {
        "samples": [{name: getattr(sample, name) for name in KEPT} for sample in made.samples],
        "shown": json.dumps(shown, default=str),
        "groups": made.groups,
        "rewards": scores.rewards,
        "lost": scores.lost,
        "columns": json.dumps(scores.columns, default=str),
        "scores": {name: getattr(scores, name) for name in names},
    }


class _Kept:
    """A scored batch from a checkpoint, in place of its `ScoredRollouts`."""

    seconds = 0.0  # of sampling, in this run

    def __init__(self, state: dict[str, Any]):
        shown = json.loads(state["shown"])
        self.samples = [
            Sample(row={"prompt": prompt}, completion=completion, **kept)
            for kept, (prompt, completion) in zip(state["samples"], shown, strict=True)
        ]
        self.groups: list[int] = state["groups"]
        columns = json.loads(state["columns"])
        self._scores = Scores(rewards=state["rewards"], lost=state["lost"], columns=columns, **state["scores"])

    def scores(self) -> Scores:
        return self._scores
