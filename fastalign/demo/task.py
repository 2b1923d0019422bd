"""The task: sort digits. Its answers can be checked, and its training answers can be spoilt on purpose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Task:
    """One question with its right answer."""

    prompt: str  # "583920="
    answer: str  # "023589"


def sort_tasks(num_tasks: int, num_digits: int, seed: int, without: frozenset[str] = frozenset()) -> list[Task]:
    """Random digit strings to sort; prompts in `without` do not occur (so held-out tasks stay held out)."""
    random = np.random.default_rng(seed)
    tasks: list[Task] = []
    while len(tasks) < num_tasks:
        for digits in random.integers(0, 10, (num_tasks, num_digits)):
            prompt = "".join(map(str, digits)) + "="
            if prompt not in without and len(tasks) < num_tasks:
                tasks.append(Task(prompt, "".join(map(str, np.sort(digits)))))
    return tasks


def noisy_rows(tasks: list[Task], noise: float, seed: int) -> dict[str, list[str]]:
    """Columns `prompt` and `completion`; a share `noise` of the completions is random digits.

    Wrong answers leave room: the model learns the task and keeps sampling wrong answers about that often, which
    preference and reinforcement learning can then unlearn.
    """
    random = np.random.default_rng(seed)
    spoilt = random.random(len(tasks)) < noise
    wrong = random.integers(0, 10, (len(tasks), len(tasks[0].answer)))
    completions = ["".join(map(str, w)) if bad else t.answer for t, bad, w in zip(tasks, spoilt, wrong, strict=True)]
    return {"prompt": [task.prompt for task in tasks], "completion": completions}


def preference_rows(tasks: list[Task], seed: int) -> dict[str, list[str]]:
    """Columns `prompt`, `chosen` (the answer) and `rejected` (random digits that are not)."""
    random = np.random.default_rng(seed)
    drawn = random.integers(0, 10, (len(tasks), len(tasks[0].answer)))
    spoilt = ["".join(map(str, digits)) for digits in drawn]
    pairs = [(task, wrong) for task, wrong in zip(tasks, spoilt, strict=True) if wrong != task.answer]
    return {
        "prompt": [task.prompt for task, _ in pairs],
        "chosen": [task.answer for task, _ in pairs],
        "rejected": [wrong for _, wrong in pairs],
    }


def is_right(task: Task, completion: str) -> bool:
    """Whether the completion is the answer, exactly."""
    return completion.strip() == task.answer
