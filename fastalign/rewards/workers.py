"""Processes that answer requests, one after the other, and are replaced where they die or take too long.

What a process does is a module with `main(folder)`, which calls `serve(answer)`: a line of JSON in, one out.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main(sys.argv[2])"
ENVIRONMENT = ("LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")  # what a process gets of ours
given_up: ContextVar[Callable[[], bool]] = ContextVar("given_up", default=lambda: False)
"""Whether nobody waits any more for the call that asks; what sets a time limit on calls sets it."""

Replies = list[dict[str, Any] | None]


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer requests until there are no more; what `answer` prints goes nowhere."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(nothing, fd)
    for line in requests:
        replies.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        replies.flush()


class WorkerPool:
    """Up to `size` processes that run `module`; thread-safe. Processes start when they are first needed."""

    def __init__(self, module: str, size: int):
        self.module, self.size = module, max(1, size)
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._folder = ""
        self._exits = False

    def ask(
        self, requests: Sequence[dict[str, Any]], timeout: float, skip: Callable[[int, Replies], bool] | None = None
    ) -> Replies:
        """The answers, in order; None where the process died or took longer than `timeout` seconds.

        None also for requests that have not begun when `given_up()`, or when `skip(place, answers so far)`. What
        asking raises is raised once the requests that have begun are answered; RuntimeError where `close` ended them.
        """
        idle, places, errors = self._open(), queue.SimpleQueue(), []
        replies: Replies = [None] * len(requests)
        nobody_waits = given_up.get()
        for place in range(len(requests)):
            places.put(place)

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while not errors:
                    place, worker = places.get_nowait(), idle.get()
                    try:
                        if not nobody_waits() and not (skip and skip(place, replies)):
                            replies[place] = worker.ask(requests[place], timeout)
                    except BaseException as error:
                        errors.append(error)
                    finally:
                        idle.put(worker)

        threads = [  # daemons, which the end of this process does not wait for
            threading.Thread(target=work, name=self.module.rpartition(".")[2], daemon=True)
            for _ in range(min(self.size, len(requests)))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # KeyboardInterrupt: nothing further begins
            errors.append(error)
        if errors:
            raise KeyboardInterrupt if self._exits else errors[0]
        return replies

    def _open(self) -> queue.LifoQueue[_Worker]:
        """The workers that are idle, which `close` replaces."""
        with self._lock:
            if self._exits:
                raise KeyboardInterrupt  # ends what daemon threads do without a word
            if not self._workers:
                self._folder = tempfile.mkdtemp(prefix="fastalign-")
                os.chmod(self._folder, 0o711)  # programs that run as nobody go through it
                self._workers = [_Worker(self.module, os.path.join(self._folder, str(i))) for i in range(self.size)]
                self._idle = queue.LifoQueue()
                for worker in self._workers:
                    self._idle.put(worker)
                atexit.register(self._exit)
            return self._idle

    def _exit(self) -> None:
        self._exits = True
        self.close()

    def close(self) -> None:
        """End the processes, busy or not; the next request starts them again."""
        with self._lock:
            if self._workers:
                atexit.unregister(self._exit)
                for worker in self._workers:
                    worker.close()
                self._workers = []
                shutil.rmtree(self._folder, ignore_errors=True)


class _Worker:
    def __init__(self, module: str, folder: str):
        self.module, self.folder = module, folder
        self.process: subprocess.Popen[bytes] | None = None
        self.closed = False
        self._busy = threading.Lock()

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        with self._busy:
            reply = None if self.closed else self._ask(request, timeout)
        if self.closed:
            raise RuntimeError("The processes were ended while they were asked.")
        return reply

    def close(self) -> None:
        """End the process for good, even while it is asked."""
        self.closed = True
        self._kill()
        with self._busy:  # which whoever asks now leaves at once
            self.stop()

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + timeout
        if self.process is not None and self.process.poll() is not None:
            self.stop()
        process = self.process or self._start()
        if self.closed:
            return self.stop()
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it died just now, which reading shows
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        line = _read_line(process, deadline)
        if line is None:
            self.stop()
        return None if line is None else json.loads(line)

    def _start(self) -> subprocess.Popen[bytes]:
        os.makedirs(self.folder, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", START.format(module=self.module), json.dumps(sys.path), self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | {"OMP_NUM_THREADS": "1"},
            cwd=self.folder,
            start_new_session=True,
        )
        return self.process

    def stop(self) -> None:
        if self.process is None:
            return
        self._kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        self.process.wait()
        self.process = None

    def _kill(self) -> None:
        if (process := self.process) is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """One line of what the process writes; None if it ends or `deadline` (time.monotonic()) passes before that."""
    assert process.stdout is not None
    fd, parts = process.stdout.fileno(), []
    poll = select.poll()  # `select` cannot wait for descriptors above 1023
    poll.register(fd, select.POLLIN)
    while not parts or not parts[-1].endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return None
        parts.append(os.read(fd, 1 << 16))
        if not parts[-1]:
            return None
    return b"".join(parts)
