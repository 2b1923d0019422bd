"""An engine that says what a test tells it to: completions are looked up or computed, nothing is sampled."""

from __future__ import annotations

from collections.abc import Callable

from fastalign.rollout.engine import Completion, Request, SyncReport


class ScriptedEngine:
    """Answers each request with `script(request) -> ids`, the last one of `order` first; one answer for each step."""

    name = "scripted"
    exact = True
    version = 3

    def __init__(self, script: Callable[[Request], list[int]], *, newest_first: bool = False):
        self.script = script
        self.newest_first = newest_first
        self.queue: list[Request] = []
        self.seen: list[Request] = []
        self.aborted = 0

    @property
    def pending(self) -> int:
        return len(self.queue)

    def submit(self, requests) -> None:
        self.queue += requests
        self.seen += requests

    def step(self) -> list[Completion]:
        if not self.queue:
            return []
        request = self.queue.pop(-1 if self.newest_first else 0)
        wanted = self.script(request)
        ids = wanted[: request.sampling.max_new_tokens]
        reason = "stop" if ids[-1] in request.sampling.stop_ids else "length"
        logps = [-0.01 * token for token in ids]
        return [Completion(request.key, ids, logps, reason, self.version, self.version)]

    def abort(self) -> None:
        self.aborted += len(self.queue)
        self.queue.clear()

    def sync(self, version: int) -> SyncReport:
        self.version = version
        return SyncReport("same model", 0.0)

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        self.queue.clear()
