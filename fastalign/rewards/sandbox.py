"""Running programs that nobody trusts: each in a process without network, with limits on what it can take.

What holds, and what does not, is written in docs/rewards.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from .workers import Replies, WorkerPool

GRACE = 20.0  # seconds beyond a program's own time before its worker counts as dead


class SandboxError(RuntimeError):
    """Programs cannot be confined on this machine."""


@dataclass(frozen=True)
class Limits:
    """What one program may take."""

    timeout: float = 5.0  # seconds
    memory: int = 512 << 20  # bytes of address space
    file_size: int = 16 << 20  # bytes of its largest file
    output: int = 64 << 10  # bytes of output, and as many of errors


@dataclass(frozen=True)
class Program:
    """Python code; `tests` is run behind it in the same module."""

    source: str
    tests: str | None = None
    stdin: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a program ended: by itself (exit code 0: ok, else error), by a signal, or because of a limit."""

    status: Literal["ok", "error", "killed", "timeout", "output"]
    passed: bool  # it ran to its end, and so did its tests
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0


class Sandbox:
    """Runs programs, `size` at a time."""

    def __init__(self, limits: Limits | None = None, size: int | None = None):
        self.limits = limits or Limits()
        self._pool = WorkerPool("fastalign.rewards.sandbox_worker", size or min(8, os.cpu_count() or 1))

    def run(self, programs: Sequence[Program], answers: Sequence[int] | None = None) -> list[Outcome]:
        """How each program ended, in order. SandboxError where they cannot be confined.

        `answers`: a number for each program, equal for neighbours of one answer. Behind the first of an answer that
        takes too long, its others count as such too, so that they need not be run.
        """
        requests = [vars(program) | vars(self.limits) for program in programs]
        answers = range(len(programs)) if answers is None else answers

        def is_late(place: int, replies: Replies) -> bool:
            before = takewhile(lambda other: answers[other] == answers[place], range(place - 1, -1, -1))
            return any((replies[other] or {}).get("status") == "timeout" for other in before)

        replies = self._pool.ask(requests, self.limits.timeout + GRACE, is_late)
        return [
            Outcome("timeout", False) if is_late(place, replies) else self._outcome(reply)
            for place, reply in enumerate(replies)
        ]

    def _outcome(self, reply: dict | None) -> Outcome:
        if reply is None:
            return Outcome("killed", False, stderr="the process that ran it ended")
        if reply["status"] == "refused":
            raise SandboxError(f"Programs cannot be run safely here: {reply['stderr']}.")
        return Outcome(**reply)

    def close(self) -> None:
        """End the processes; `run` starts them again."""
        self._pool.close()
