"""Reward functions ready for use: answers checked by mathematics or by running code, format, length, repetition."""

from importlib import import_module as _import_module
from typing import Any as _Any

_MODULES = {  # public name -> module that defines it; imported on first use
    "accuracy_reward": "accuracy",
    "reasoning_accuracy_reward": "accuracy",
    "get_cosine_scaled_reward": "accuracy",
    "think_format_reward": "shape",
    "get_repetition_penalty_reward": "shape",
    "get_soft_overlong_punishment": "shape",
    "code_execution_reward": "code_execution",
    "get_code_execution_reward": "code_execution",
    "find_rewards": "names",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> _Any:
    if name in _MODULES:
        return getattr(_import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
