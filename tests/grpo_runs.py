"""Prompts, rewards and fixed completions that the tests of GRPO share."""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

import fastalign

STEPS = 5
END, LONGEST = 2, 9
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": LONGEST,
    "max_steps": STEPS,
    "adam_epsilon": 1e-4,  # what rounding leaves of gradients that are zero makes no whole steps
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def prompts(n: int = 24) -> Dataset:
    """Rows of one to four words, each different."""
    words = ["the", "quick", "brown", "fox"]
    return Dataset.from_list([{"prompt": " ".join([str(i), *words[: i % 4]]), "target": i % 5} for i in range(n)])


def length_reward(completion_ids, target, **kwargs) -> list[float]:
    return [len(set(ids)) + 0.1 * (sum(ids) % 7) - t for ids, t in zip(completion_ids, target, strict=True)]


def parity_reward(completion_ids, log_metric, **kwargs) -> list[float | None]:
    log_metric("odd", sum(len(ids) % 2 for ids in completion_ids) / len(completion_ids))
    return [None if len(ids) == 3 else float(ids[0] % 11) / 7 for ids in completion_ids]


def rollout(given, trainer, with_mask=False, offset=0):
    """The same completions for the same prompts, with log-probabilities of a policy that is a little different.

    The completions of a prompt are numbered from `offset` on.
    """
    tokenizer, seen = tiny_tokenizer(), {}
    found = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for prompt in given:
        number = seen[prompt] = seen.get(prompt, offset) + 1
        ids = tokenizer(text=prompt)["input_ids"]
        rng = np.random.default_rng([*ids, number])
        length = int(rng.integers(1, LONGEST + 1))
        completion = rng.integers(5, 330, length).tolist()
        if length < LONGEST:
            completion[-1] = END
        found["prompt_ids"].append(ids)
        found["completion_ids"].append(completion)
        found["logprobs"].append(_logps(tuple(ids), tuple(completion), number))
        found["env_mask"].append([int(i % 3 != 1) for i in range(length)])
    if not with_mask:
        del found["env_mask"]
    return found


@functools.cache
def _logps(ids: tuple, completion: tuple, number: int) -> list[float]:
    with torch.no_grad():
        logits = tiny_model().forward(torch.tensor([[*ids, *completion]])).logits[0].log_softmax(-1)
    places = torch.arange(len(completion)) + len(ids) - 1
    noise = np.random.default_rng(number).normal(0, 0.05, len(completion))
    return (logits[places, torch.tensor(completion)] + torch.from_numpy(noise)).tolist()


def grpo_trainer(folder, *, model=None, rewards=length_reward, data=None, fixed=True, **config):
    """A trainer on the tiny prompts; `fixed`: completions that do not depend on the policy. Constructor arguments and
    config fields by name."""
    known = fastalign.GRPOConfig.__dataclass_fields__
    fields = {name: config.pop(name) for name in list(config) if name in known}
    if fixed:
        config.setdefault("rollout_func", rollout)
    return fastalign.GRPOTrainer(
        tiny_model() if model is None else model,
        rewards,
        fastalign.GRPOConfig(str(folder), **(SETTINGS | fields)),
        train_dataset=prompts() if data is None else data,
        processing_class=copy.deepcopy(tiny_tokenizer()),
        **config,
    )
