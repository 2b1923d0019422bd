"""Answers of the model to held-out tasks, and how many are right."""

from __future__ import annotations

import contextlib
import resource
import sys
from dataclasses import dataclass

import torch

from .task import Task, is_right


@dataclass
class Score:
    """Shares of right answers, between 0 and 1, and the sampled answers themselves."""

    greedy: float
    sampled: float  # one sample per task, temperature 1
    completions: list[str]


@torch.no_grad()
def complete(
    model, tokenizer, prompts: list[str], *, max_new_tokens: int, sample: bool = False, batch_size: int = 256
) -> list[str]:
    """The model's continuations of `prompts`, greedy or sampled at temperature 1, up to the end token."""
    was_training = model.training
    model.eval()
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} if sample else {"do_sample": False}
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True).to(model.device)
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        texts += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return texts


def score(model, tokenizer, tasks: list[Task], *, seed: int) -> Score:
    """Greedy and sampled accuracy on `tasks`; sampling is seeded and leaves torch's random state alone."""
    prompts = [task.prompt for task in tasks]
    longest = max(len(task.answer) for task in tasks) + 2
    greedy = complete(model, tokenizer, prompts, max_new_tokens=longest)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sampled = complete(model, tokenizer, prompts, max_new_tokens=longest, sample=True)
    return Score(_share(tasks, greedy), _share(tasks, sampled), sampled)


def _share(tasks: list[Task], completions: list[str]) -> float:
    return sum(map(is_right, tasks, completions)) / len(tasks)


def peak_memory() -> int:
    """Most memory this process has held so far, in bytes: of the GPU where there is one, else resident memory."""
    with contextlib.suppress(RuntimeError):
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
