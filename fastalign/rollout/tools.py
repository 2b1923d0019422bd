"""Tools: functions that the policy calls while it writes, run beside the sampling loop with a limit on each call."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema

from .reward_calls import start_loop

Functions = Mapping[str, Callable]  # name that the policy calls -> function or coroutine function


@dataclass(frozen=True)
class Answer:
    """What a tool call came to."""

    name: str
    content: Any  # text, or a list of content blocks
    failed: bool = False

    @property
    def message(self) -> dict[str, Any]:
        return {"role": "tool", "name": self.name, "content": self.content}


def tool_schemas(functions: Sequence[Callable]) -> list[dict[str, Any]]:
    """JSON schemas from type hints and Google-style docstrings, as chat templates and response parsing take them.

    ValueError for what is no function or method, has no usable docstring, or shares its name with another.
    """
    schemas = []
    for function in functions:
        if not (inspect.isfunction(function) or inspect.ismethod(function)):
            raise ValueError(
                f"`tools` has {function!r}, which is no function; wrap it in `def name(...)` with type hints and a "
                "docstring that says what each argument is."
            )
        try:
            schemas.append(get_json_schema(function))
        except Exception as error:
            raise ValueError(
                f"The tool {function.__name__!r} has no schema: {error} Give every argument a type hint and a line "
                "`name: what it is` under `Args:` in the docstring."
            ) from error
    names = [function.__name__ for function in functions]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"`tools` has more than one tool named {doubled}; tools and methods need distinct names.")
    return schemas


class ToolRunner:
    """An event loop in a thread of its own, on which tool calls and environments wait.

    Functions run in threads (`num_threads` at once), coroutine functions on the loop. A call that takes longer than
    `timeout` seconds fails; a thread cannot be stopped, so it is left behind, and the object whose method hangs
    answers no further call until the method returns.
    """

    def __init__(self, timeout: float | None, num_threads: int):
        if timeout is not None and timeout <= 0:
            raise ValueError(f"`tool_timeout` is {timeout}; it is a number of seconds above 0, or None for no limit.")
        if num_threads < 1:
            raise ValueError(f"`num_tool_threads` is {num_threads}; it must be at least 1.")
        self.timeout, self.num_threads = timeout, num_threads
        self._hung: dict[int, Any] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, work: Coroutine[Any, Any, Any], done: Callable[[Any], None]) -> Future:
        """Run `work`; `done` gets its result or its error, on the loop's thread."""
        if self._loop is None:
            self._loop, self._end = start_loop(self, "fastalign-tools")
            self._threads = asyncio.Semaphore(self.num_threads)

        async def deliver() -> None:
            try:
                result = await work
            except Exception as error:
                result = error
            done(result)

        return asyncio.run_coroutine_threadsafe(deliver(), self._loop)

    def is_hung(self, owner: Any) -> bool:
        """Whether a method of `owner` is running that took too long."""
        return id(owner) in self._hung

    async def call(self, function: Callable, arguments: Mapping[str, Any]) -> Any:
        """The result of one call; raises what it raises, TimeoutError after `timeout` seconds."""
        if inspect.iscoroutinefunction(function):
            work = function(**arguments)
        else:
            owner = getattr(function, "__self__", None)
            if self.is_hung(owner):
                raise RuntimeError("an earlier call took too long and is still running")
            await self._threads.acquire()
            work = self._in_thread(function, arguments, owner)
        task = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait({task}, timeout=self.timeout)
        finally:
            task.cancel()  # of no effect on what is done
        if not done:
            raise TimeoutError(f"timed out after {self.timeout:g} s")
        return task.result()

    async def _in_thread(self, function: Callable, arguments: Mapping[str, Any], owner: Any) -> Any:
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

        def returned(result: Any, error: BaseException | None) -> None:
            self._hung.pop(id(owner), None)
            if not outcome.done():
                outcome.set_result((result, error))

        def run() -> None:
            result, error = None, None
            try:
                result = function(**arguments)
            except BaseException as raised:  # SystemExit too: it must not end this thread unheard
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(returned, result, error)

        threading.Thread(target=run, name=f"tool {getattr(function, '__name__', '')}", daemon=True).start()
        try:
            result, error = await outcome
        except asyncio.CancelledError:
            if owner is not None:
                self._hung[id(owner)] = owner
            raise
        finally:
            self._threads.release()
        if error is not None:
            raise error if isinstance(error, Exception) else RuntimeError(repr(error))
        return await result if inspect.isawaitable(result) else result

    async def answers(self, calls: Sequence[Mapping[str, Any]], functions: Functions) -> list[Answer]:
        """Answers to the calls of one turn, in their order: functions one after another, then coroutines together."""
        answers: dict[int, Answer] = {}
        together = {}
        for place, call in enumerate(calls):
            wanted = call.get("function", call)
            function = functions.get(wanted.get("name"))
            answer = self._answer(call, wanted, function)
            if inspect.iscoroutinefunction(function):
                together[place] = answer
            else:
                answers[place] = await answer
        answers |= zip(together, await asyncio.gather(*together.values()), strict=True)
        return [answers[place] for place in range(len(calls))]

    async def _answer(self, call: Mapping[str, Any], wanted: Mapping[str, Any], function: Callable | None) -> Answer:
        name = str(wanted.get("name", "unknown"))
        try:
            if call.get("type", "function") != "function":
                raise ValueError(f"Unsupported tool call type: {call['type']}")
            if function is None:
                raise ValueError(f"Tool {name} not found.")
            return Answer(name, _content(await self.call(function, wanted.get("arguments") or {})))
        except Exception as error:
            return Answer(name, str({"error": str(error)}), failed=True)

    def close(self) -> None:
        """End the loop; what still runs on it is forgotten."""
        if self._loop is not None:
            self._end()
            self._loop = None


def _content(result: Any) -> Any:
    """A result as the content of a tool message: text, or content blocks as they are."""
    if not (isinstance(result, list) and result and all(isinstance(part, dict) and "type" in part for part in result)):
        return str(result)
    if kinds := {part["type"] for part in result} - {"text"}:
        raise ValueError(f"content blocks of type {sorted(kinds)} are not supported in a tool's result, only text")
    return result
