"""Running programs that nobody trusts: each in a process without network, with limits on what it can take.

What holds, and what does not, is written in docs/rewards.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .workers import WorkerPool

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

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """How each program ended, in order. SandboxError where they cannot be confined."""
        requests = [vars(program) | vars(self.limits) for program in programs]
        return [self._outcome(reply) for reply in self._pool.ask(requests, self.limits.timeout + GRACE)]

    def _outcome(self, reply: dict | None) -> Outcome:
        if reply is None:
            return Outcome("killed", False, stderr="the process that ran it ended")
        if reply["status"] == "refused":
            raise SandboxError(f"Programs cannot be run safely here: {reply['stderr']}.")
        return Outcome(**reply)

    def close(self) -> None:
        """End the processes; `run` starts them again."""
        self._pool.close()
