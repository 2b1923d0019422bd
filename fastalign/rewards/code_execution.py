"""Rewards of code: the share of tests that an answer's program passes when it is run in a sandbox."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .sandbox import Limits, Outcome, Program, Sandbox
from .texts import answer_text

FENCE = re.compile(r"```([^\n`]*)\n(.*?)(?:\n```|\Z)", re.DOTALL)
PYTHON = ("", "python", "python3", "py")
NO_PROGRAM = Outcome("error", False, stderr="no Python code in the answer")


def find_program(text: str) -> str:
    """The last fenced block of Python code; without any fence the whole text; '' where other languages are fenced."""
    blocks = FENCE.findall(text)
    if not blocks:
        return text
    found = [code for language, code in blocks if language.strip().lower() in PYTHON]
    return found[-1] if found else ""


@dataclass
class CodeExecutionReward:
    """See `get_code_execution_reward`."""

    limits: Limits
    num_workers: int | None = None
    __name__ = "code_execution_reward"
    _sandbox: Sandbox | None = field(default=None, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __getstate__(self) -> dict:
        return {"limits": self.limits, "num_workers": self.num_workers, "_sandbox": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def __call__(
        self,
        completions: list[Any],
        tests: Sequence[Any],
        log_extra: Callable[[str, list], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        wanted = [(find_program(answer_text(c)), _cases(t)) for c, t in zip(completions, tests, strict=True)]
        found = [
            (answer, Program(source, *case[:2]))
            for answer, (source, cases) in enumerate(wanted)
            if source.strip()
            for case in cases
        ]
        with self._lock:
            self._sandbox = self._sandbox or Sandbox(self.limits, self.num_workers)
        outcomes = iter(self._sandbox.run([program for _, program in found], [answer for answer, _ in found]))
        rewards: list[float | None] = []
        notes: list[str] = []
        for source, cases in wanted:
            ended = [next(outcomes) if source.strip() else NO_PROGRAM for _ in cases]
            right = [_is_right(outcome, case[2]) for outcome, case in zip(ended, cases, strict=True)]
            rewards.append(sum(right) / len(right) if right else None)
            notes.append(next((_note(o) for o, is_right in zip(ended, right, strict=True) if not is_right), ""))
        if log_extra is not None:
            log_extra("code_execution", notes)
        return rewards


def _cases(tests: Any) -> list[tuple[str | None, str, str | None]]:
    """Each test as (code behind the program, its input, the output it has to give)."""
    if tests is None:
        return []
    cases: list[tuple[str | None, str, str | None]] = []
    for test in [tests] if isinstance(tests, (str, dict)) else tests:
        if isinstance(test, str):
            cases.append((test, "", None))
        elif isinstance(test, dict) and isinstance(test.get("output"), str):
            cases.append((None, test.get("input") or "", test["output"]))
        else:
            raise ValueError(
                f"`tests` has {test!r}; allowed are code that raises where the program is wrong (`assert f(2) == 4`), "
                "{'input': text, 'output': text}, a list of them, or None."
            )
    return cases


def _is_right(outcome: Outcome, expected: str | None) -> bool:
    if expected is None:
        return outcome.passed
    return outcome.status == "ok" and _lines(outcome.stdout) == _lines(expected)


def _lines(text: str) -> list[str]:
    """Lines without the space at their ends and the empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _note(outcome: Outcome) -> str:
    last = outcome.stderr.strip().rpartition("\n")[2]
    return f"{outcome.status}: {last}" if last else outcome.status if outcome.status != "ok" else "wrong output"


def get_code_execution_reward(
    timeout: float = 5.0,
    memory: int = 512,
    file_size: int = 16,
    output: int = 64,
    num_workers: int | None = None,
) -> Callable:
    """A reward that runs an answer's Python code in a sandbox: the share of `tests` that it passes, None without any.

    The column `tests` has, for each prompt, code to run behind the program in the same module (`assert f(2) == 4`), or
    {"input", "output"}, texts of standard input and of what has to be printed, or a list of them. `timeout` is in
    seconds per test: behind the first that takes longer, an answer's further tests do not pass, so that they need not
    be run. `memory` (MiB), `file_size` (MiB) and `output` (KiB) limit each program; `num_workers` programs run at the
    same time (one per core, at most 8). SandboxError where programs cannot be confined.
    """
    for name, value in (("timeout", timeout), ("memory", memory), ("file_size", file_size), ("output", output)):
        if value <= 0:
            raise ValueError(f"`{name}` of the code execution reward is {value}; it has to be above 0.")
    limits = Limits(timeout, int(memory * (1 << 20)), int(file_size * (1 << 20)), int(output * (1 << 10)))
    return CodeExecutionReward(limits, num_workers)


code_execution_reward = get_code_execution_reward()
