"""Environments: objects with a state, one per sample, whose methods are the tools of that sample."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .tools import ToolRunner, tool_schemas

logger = logging.getLogger(__name__)

EMPTY_PROMPT = [{"role": "user", "content": ""}]  # where `reset` alone gives the prompt
_NO_TOOLS = ("reset", "get_reward")


def tool_methods(environment: Any) -> list[Callable]:
    """Public methods of an environment other than `reset` and `get_reward`, by name."""
    found = inspect.getmembers(type(environment), predicate=inspect.isfunction)  # on the class: no property runs
    return [getattr(environment, name) for name, _ in found if not name.startswith("_") and name not in _NO_TOOLS]


class Environments:
    """Makes environments with one factory, or with the one that the row's `environment` column names.

    An instance serves one sample at a time and is used again once it is released. `reward_funcs` has a reward
    function for each class with a `get_reward`: named after the class, None for samples of other classes.
    ValueError for a factory whose object has no `reset`.
    """

    def __init__(
        self, environment_factory: Callable[[], Any] | Mapping[str, Callable[[], Any]], tools: Sequence[Callable] = ()
    ):
        self.by_column = isinstance(environment_factory, Mapping)
        self.factories: dict[Any, Callable[[], Any]] = (
            dict(environment_factory) if isinstance(environment_factory, Mapping) else {None: environment_factory}
        )
        self.tools = list(tools)
        self.schemas: dict[str | None, list[dict[str, Any]]] = {}
        self.reward_funcs: list[Callable] = []
        self._free: dict[str | None, list[Any]] = {}
        classes = []
        for name, factory in self.factories.items():
            instance = factory()
            if not inspect.isfunction(getattr(type(instance), "reset", None)):
                raise ValueError(
                    f"`environment_factory` gave a {type(instance).__name__} without a method `reset`; an environment "
                    "needs `reset(**row)`, which returns text for the end of the prompt, or None."
                )
            self.schemas[name] = tool_schemas([*self.tools, *tool_methods(instance)])
            self._free[name] = [instance]
            if inspect.isfunction(getattr(type(instance), "get_reward", None)) and type(instance) not in classes:
                classes.append(type(instance))
                self.reward_funcs.append(_own_reward(type(instance)))

    def name_of(self, row: Mapping[str, Any]) -> str | None:
        """Which factory a row wants; ValueError where its `environment` names none."""
        if not self.by_column:
            return None
        name = row.get("environment")
        if name not in self.factories:
            raise ValueError(
                f"A row has environment={name!r}; `environment_factory` knows {list(self.factories)}. Correct the "
                "`environment` column of the dataset or add the factory."
            )
        return name

    def functions(self, environment: Any) -> dict[str, Callable]:
        """Everything that a sample in this environment can call."""
        return {function.__name__: function for function in [*self.tools, *tool_methods(environment)]}

    async def begin(self, runner: ToolRunner, row: Mapping[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
        """A fresh environment for one sample of `row`, and the prompt with what its `reset` returned at the end.

        A `reset` that fails is tried once more with another instance; RuntimeError where that fails too.
        """
        name = self.name_of(row)
        arguments = {key: value for key, value in row.items() if not (self.by_column and key == "environment")}
        free = self._free[name]
        for last in (False, True):
            environment = None
            try:
                environment = free.pop() if free else await runner.call(self.factories[name], {})
                observation = await runner.call(environment.reset, arguments)
                return environment, extended(row.get("prompt") or EMPTY_PROMPT, observation)
            except Exception as error:
                kind = name if environment is None else type(environment).__name__
                if last:
                    raise RuntimeError(f"The environment {kind} could not be reset: {error}") from error
                logger.warning("The environment %s could not be reset (%s); trying another one.", kind, error)
        raise AssertionError("unreachable")

    def release(self, environment: Any, row: Mapping[str, Any]) -> None:
        """Give back an environment whose sample has its rewards."""
        self._free[self.name_of(row)].append(environment)


def extended(prompt: Any, observation: Any) -> list[dict[str, Any]]:
    """The prompt with an observation (text or content blocks; None: nothing) at the end of its last message."""
    if isinstance(prompt, str):
        raise ValueError(
            f"Environments need prompts of messages; found the text {prompt[:50]!r}. Write it as "
            "[{'role': 'user', 'content': ...}]."
        )
    if observation is None:
        return prompt
    parts: list[Any] = [prompt[-1]["content"], observation]
    if len({isinstance(part, str) for part in parts}) == 2:  # one text and one list of blocks: both as blocks
        parts = [[{"type": "text", "text": part}] if isinstance(part, str) else part for part in parts]
    return [*prompt[:-1], {**prompt[-1], "content": parts[0] + parts[1]}]


def _own_reward(kind: type) -> Callable:
    """A reward function that asks each environment of exactly this class for its reward."""
    if inspect.iscoroutinefunction(kind.get_reward):

        async def ask_later(environments: Sequence[Any], **_: Any) -> list[float | None]:
            return [await one.get_reward() if type(one) is kind else None for one in environments]

        reward: Callable = ask_later
    else:

        def ask(environments: Sequence[Any], **_: Any) -> list[float | None]:
            return [one.get_reward() if type(one) is kind else None for one in environments]

        reward = ask
    reward.__name__ = kind.__name__
    return reward
