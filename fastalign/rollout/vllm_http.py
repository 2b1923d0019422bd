"""Requests to a vLLM server: kept connections, retries while it is away, errors that say what failed and where."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from collections import Counter
from typing import Any
from urllib.parse import urlencode, urlsplit

logger = logging.getLogger(__name__)

START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --max-logprobs -1"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds between two attempts
CONNECT_TIMEOUT = 30.0  # seconds
ANSWER_TIMEOUT = 3600.0  # seconds for one answer: a long completion behind many others
HEALTH = "/health"
HEALTH_TIMEOUT = 30.0  # seconds for the answer that it is well
AWAY = (ConnectionError, TimeoutError, http.client.HTTPException, OSError)
TEMPORARY = (500, 502, 503, 504)


class ServerError(RuntimeError):
    """The server answered that it cannot do what it was asked."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Client:
    """Calls of one server. Threads may share it; each keeps a connection of its own.

    `timeout`: seconds that the server may be away before a call gives up with ConnectionError. `counts` says how
    often something was tried again ("retries") and how many calls were given up ("failed").
    """

    def __init__(self, base_url: str, timeout: float):
        parts = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"`vllm_server_base_url` is {base_url!r}; give an address such as http://localhost:8000.")
        self.host, self.path = parts.hostname, parts.path.rstrip("/")
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.timeout = timeout
        self.counts: Counter[str] = Counter()
        self.num_broken = 0  # connections that ended unexpectedly
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._own = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()
        self._epoch = 0  # calls of an older one are not wanted any more
        self._hung_up = threading.Event()

    def get(self, path: str, **query: Any) -> Any:
        return self.call("GET", path, None, query)

    def post(self, path: str, body: dict | None = None, **query: Any) -> Any:
        return self.call("POST", path, body or {}, query)

    def call(self, method: str, path: str, body: dict | None, query: dict[str, Any]) -> Any:
        """The answer read as JSON, as text where it is none, None where it is empty.

        Tried again while the server is away or answers with a temporary error. ConnectionError after `timeout`
        seconds of that, ServerError for any other refusal.
        """
        target = f"{self.path}{path}" + (f"?{urlencode(query)}" if query else "")
        seconds = HEALTH_TIMEOUT if path == HEALTH else ANSWER_TIMEOUT
        data = None if body is None else json.dumps(body).encode()
        pause, deadline, problem, epoch = FIRST_PAUSE, None, "", self._epoch
        while True:
            try:
                status, answer = self._once(method, target, data, epoch, seconds)
                if status < 300:
                    return _read(answer)
                problem = f"HTTP {status}: {answer[:500].decode(errors='replace')}"
                if status not in TEMPORARY:
                    raise ServerError(f"The vLLM server refused {method} {self._where(path)}: {problem}", status)
            except AWAY as error:
                problem = f"{type(error).__name__}: {error}"
            self._check_wanted(epoch)
            now = time.monotonic()
            deadline = now + self.timeout if deadline is None else deadline
            if now + pause > deadline:
                self._count("failed")
                raise ConnectionError(
                    f"The vLLM server at {self._where(path)} could not be used for {self.timeout:.0f} s "
                    f"(`vllm_server_timeout`); the last attempt ended with {problem}. Is it running, and is the "
                    f"address right (`vllm_server_base_url`, or `vllm_server_host` and `vllm_server_port`)? It is "
                    f"started with: {START}"
                )
            self._count("retries")
            self.num_broken += 1
            logger.warning("vLLM server, %s: %s; next attempt in %.1f s", self._where(path), problem, pause)
            self._hung_up.wait(pause)
            self._check_wanted(epoch)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _check_wanted(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise ConnectionAbortedError("the call was given up")

    def _where(self, path: str) -> str:
        return f"{self.host}:{self.port}{self.path}{path}"

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _once(self, method: str, target: str, data: bytes | None, epoch: int, seconds: float) -> tuple[int, bytes]:
        kept = getattr(self._own, "connection", None)
        if kept is not None and kept.sock is not None:
            with contextlib.suppress(ConnectionError, http.client.RemoteDisconnected):
                kept.sock.settimeout(seconds)
                return self._ask(kept, method, target, data)
            self._check_wanted(epoch)
            with self._lock:
                self.num_broken += 1  # it was idle for long, or the server is another one now
        connection = self._own.connection = self._kind(self.host, self.port, timeout=CONNECT_TIMEOUT)
        connection.connect()
        connection.sock.settimeout(seconds)
        with self._lock:
            self._open.add(connection)
        return self._ask(connection, method, target, data)

    def _ask(self, connection: http.client.HTTPConnection, method: str, target: str, data: bytes | None):
        try:
            connection.request(method, target, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except BaseException:
            self._drop(connection)
            raise

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._open.discard(connection)
        connection.close()

    def hang_up(self) -> None:
        """End all calls with ConnectionAbortedError: the server gives up what it was doing for them."""
        with self._lock:
            self._epoch += 1
            connections = list(self._open)
        self._hung_up.set()
        for connection in connections:
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for the answer
        self._hung_up = threading.Event()


def _read(answer: bytes) -> Any:
    if not answer.strip():
        return None
    try:
        return json.loads(answer)
    except ValueError:
        return answer.decode(errors="replace")
