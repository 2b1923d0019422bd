"""Reward functions by name, as the command line gives them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches

from . import accuracy, code_execution, shape


def find_rewards(names: list[str]) -> list[Callable]:
    """The functions called `names`: of `REWARDS`, or dotted paths (`my_rewards.exact`; the working folder is searched
    too). ValueError for a name that is neither."""
    return [_find(name) for name in names]


def _find(name: str) -> Callable:
    if name in REWARDS:
        return REWARDS[name]()
    module, _, attribute = name.rpartition(".")
    if not module:
        near = get_close_matches(name, REWARDS, 1)
        raise ValueError(
            f"`reward_funcs` has {name!r}{f' (did you mean {near[0]}?)' if near else ''}; allowed are "
            f"{', '.join(REWARDS)}, and dotted paths of your own functions (my_rewards.exact)."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`reward_funcs` has {name!r}, which cannot be imported: {error}.") from error


REWARDS: dict[str, Callable[[], Callable]] = {
    "accuracy_reward": lambda: accuracy.accuracy_reward,
    "reasoning_accuracy_reward": lambda: accuracy.reasoning_accuracy_reward,
    "think_format_reward": lambda: shape.think_format_reward,
    "get_soft_overlong_punishment": lambda: shape.get_soft_overlong_punishment(1280, 256),  # TRL's numbers
    "get_repetition_penalty_reward": lambda: shape.get_repetition_penalty_reward(),
    "code_execution_reward": lambda: code_execution.code_execution_reward,
}
