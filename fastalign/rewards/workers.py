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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main(sys.argv[2])"
ENVIRONMENT = ("LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")  # what a process gets of ours


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
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._folder = ""

    def ask(self, requests: Sequence[dict[str, Any]], timeout: float) -> list[dict[str, Any] | None]:
        """The answers, in order; None where the process died or took longer than `timeout` seconds."""
        with self._lock:
            if self._threads is None:
                self._folder = tempfile.mkdtemp(prefix="fastalign-")
                os.chmod(self._folder, 0o711)  # programs that run as nobody go through it
                self._threads = ThreadPoolExecutor(self.size, thread_name_prefix=self.module.rpartition(".")[2])
                for i in range(self.size):
                    self._idle.put(_Worker(self.module, os.path.join(self._folder, str(i))))
                atexit.register(self.close)
        return list(self._threads.map(lambda request: self._ask(request, timeout), requests))

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        worker = self._idle.get()
        try:
            return worker.ask(request, timeout)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes; the next request starts them again."""
        with self._lock:
            if self._threads is None:
                return
            atexit.unregister(self.close)
            self._threads.shutdown()
            self._threads = None
            while not self._idle.empty():
                self._idle.get().stop()
            shutil.rmtree(self._folder, ignore_errors=True)


class _Worker:
    def __init__(self, module: str, folder: str):
        self.module, self.folder = module, folder
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + timeout
        if self.process is not None and self.process.poll() is not None:
            self.stop()
        process = self.process or self._start()
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
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        self.process.wait()
        self.process = None


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
