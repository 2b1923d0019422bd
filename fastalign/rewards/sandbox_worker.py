"""A process that runs programs, each in a confined process of its own, which it watches and ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
import types
from typing import Any

from . import confinement
from .workers import serve

PRELOADED = ("bisect", "collections", "functools", "heapq", "itertools", "math", "random", "re", "string", "typing")
FOLDER_BYTES, FOLDER_FILES = 64 << 20, 2048  # of all files of a program, where the kernel lets us limit that
OPEN_FILES, THREADS = 64, 64
UNCONFINED = b"!"  # before the secret: the program was not run


def main(folder: str) -> None:
    """Serve programs; `folder` is where each has its working folder."""
    for name in PRELOADED:
        __import__(name)
    obstacle = confinement.obstacle()
    if obstacle is None:
        confinement.private_folder(folder, FOLDER_BYTES, FOLDER_FILES)
        confinement.hide_memory()
    serve(lambda request: {"status": "refused", "stderr": obstacle} if obstacle else run(request, folder))


def run(request: dict[str, Any], folder: str) -> dict[str, Any]:
    """{source, tests, stdin, timeout, memory, file_size, output} -> {status, passed, stdout, stderr, seconds}."""
    place = os.path.join(folder, "run")
    _remove(place)
    os.mkdir(place)
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.chown(place, confinement.NOBODY, confinement.NOBODY)
    pipes = [os.pipe() for _ in range(3)]  # output, errors, verdict
    start, me, secret = time.monotonic(), os.getpid(), os.urandom(16)  # the program cannot say that it has passed
    given = os.memfd_create("stdin")
    os.write(given, request["stdin"].encode("utf-8", "surrogateescape"))
    os.lseek(given, 0, os.SEEK_SET)
    child = os.fork()
    if child == 0:
        _become(request, place, me, [given, *(write for _, write in pipes)], secret)
    for fd in (given, *(write for _, write in pipes)):
        os.close(fd)
    ends = [read for read, _ in pipes]
    try:
        status, texts = _watch(ends, start + request["timeout"], request["output"])
        if status == "ok":
            status = _wait(child, start + request["timeout"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
        for fd in ends:
            os.close(fd)
        _remove(place)
    out, errors = (text.decode("utf-8", "replace") for text in texts[:2])
    if texts[2] == UNCONFINED + secret:  # not the program's fault
        return {"status": "refused", "stderr": errors.strip().rpartition("\n")[2]}
    passed = status == "ok" and texts[2] == secret
    return {"status": status, "passed": passed, "stdout": out, "stderr": errors, "seconds": time.monotonic() - start}


def _remove(place: str) -> None:
    """Remove a folder, however deep it is: `shutil.rmtree` calls itself for each level, and ends with an error."""
    while os.path.isdir(place) and (entries := list(os.scandir(place))):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)  # it may have been made without the right to read it
            for name in os.listdir(entry.path):  # up one level, under a name that is new there
                os.rename(os.path.join(entry.path, name), os.path.join(place, os.urandom(16).hex()))
            os.rmdir(entry.path)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(place)


def _watch(ends: list[int], deadline: float, most: int) -> tuple[str, list[bytes]]:
    """What arrives at `ends` until they are closed: "ok", "timeout", or "output" where one gets more than `most`."""
    texts, poll = dict.fromkeys(ends, b""), select.poll()
    for fd in ends:
        poll.register(fd, select.POLLIN)
    left, status = len(ends), "ok"
    while left and status == "ok":
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if time.monotonic() >= deadline:
            status = "timeout"
        for fd, _ in ready:
            data = os.read(fd, 1 << 16)
            if not data:
                poll.unregister(fd)
                left -= 1
            texts[fd] += data
            if len(texts[fd]) > most:
                status = "output"
    return status, [texts[fd][:most] for fd in ends]


def _wait(child: int, deadline: float) -> str:
    """How the process ended: "ok", "error" (an exit code above 0), "killed" (by a signal), "timeout"."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "killed" if os.WIFSIGNALED(status) else "error" if os.WEXITSTATUS(status) else "ok"
        if time.monotonic() >= deadline:
            return "timeout"
        time.sleep(0.001)


# In the confined process


def _become(request: dict[str, Any], place: str, parent: int, ends: list[int], secret: bytes) -> None:
    """Turn the forked process into the program; never returns."""
    try:
        os.setsid()
        os.chdir(place)
        for target, fd in enumerate(ends):
            os.dup2(fd, target)
        os.closerange(4, 1 << 16)
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False, buffering=1)  # noqa: SIM115
        sys.argv = ["program.py"]
        os.environ.update(HOME=place, TMPDIR=place)
        confinement.limit(
            seconds=int(request["timeout"]) + 1,
            memory=request["memory"],
            file_size=request["file_size"],
            open_files=OPEN_FILES,
            threads=THREADS,
        )
        confinement.confine(place, parent)
    except BaseException:
        traceback.print_exc()
        os.write(3, UNCONFINED + secret)
        os._exit(70)
    os._exit(_execute(request["source"], request["tests"], secret))


def _execute(source: str, tests: str | None, secret: bytes) -> int:
    """Run the program, then its tests in the same module; the exit code. Descriptor 3 hears that all was done."""
    run, make, say = exec, compile, os.write  # whatever the program puts in their place
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    code = 0
    try:
        run(make(source, "program.py", "exec"), module.__dict__)
        if tests is not None:
            run(make(tests, "tests.py", "exec"), module.__dict__)
        say(3, secret)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    return code & 0xFF
