"""Prompts, fixed completions and settings of trainers on pairs of completions, for TRL, for ours and by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from ppo_case import scorer
from tiny import tiny_model, tiny_tokenizer

BOS, END, PAD, LONGEST = 1, 2, 0, 8
SETTINGS = {  # of both libraries
    "per_device_train_batch_size": 4,
    "max_new_tokens": LONGEST,
    "learning_rate": 1e-2,
    "beta": [0.3],
    "max_steps": 5,
    "logging_steps": 1,
    "lr_scheduler_type": "linear",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
CASES = {  # trainer -> name -> settings; the numbers of TRL 1.10 are in golden/sampled_pairs.json
    "XPO": {
        "default": {},
        "ipo": {"loss_type": "ipo", "alpha": [0.01], "missing_eos_penalty": 0.7},
        "accumulated": {"gradient_accumulation_steps": 2, "alpha": [0.05]},
    },
    "NashMD": {
        "default": {},
        "penalty": {"missing_eos_penalty": 1.5, "beta": [0.05], "mixture_coef": [0.3]},
        "accumulated": {"gradient_accumulation_steps": 2},
    },
}


def prompts(num_rows: int = 40) -> Dataset:
    """Rows of a number and up to three words, each different."""
    words = ["the", "quick", "brown", "fox"]
    return Dataset.from_list(
        [{"prompt": " ".join([str(i), *words[: i % 4]]), "target": i % 5} for i in range(num_rows)]
    )


def prompt_ids(prompt: str, bos: bool = False) -> list[int]:
    ids = tiny_tokenizer()(prompt, add_special_tokens=False)["input_ids"]
    return [BOS, *ids] if bos else ids


def completion_of(prompt: str, number: int, even: bool = False) -> list[int]:
    """Completion `number` of a prompt: the end token comes last, except in those of LONGEST tokens."""
    rng = np.random.default_rng([*prompt.encode(), number])
    length = LONGEST if even else int(rng.integers(1, LONGEST + 1))
    ids = rng.integers(5, 330, length).tolist()
    return ids if length == LONGEST else [*ids[:-1], END]


def fixed_rollouts(even: bool = False, bos: bool = False):
    """A rollout function that gives every prompt its completions 0 and 1."""

    def rollout(given, trainer):
        ids = [prompt_ids(prompt, bos) for prompt in given]
        completions = [completion_of(prompt, place % 2, even) for place, prompt in enumerate(given)]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [None] * len(ids)}

    return rollout


def models() -> dict:
    return {"model": tiny_model(seed=0), "ref_model": tiny_model(seed=1)}


def reward_model():
    """Tiny, random, large enough to matter."""
    return scorer(2)


def length_reward(completion_ids, target, **kwargs) -> list[float]:
    """Numbers that padding behind a completion does not change."""
    rows = [[i for i in ids if i != PAD] for ids in completion_ids]
    return [len(set(ids)) + 0.1 * (sum(ids) % 7) - t for ids, t in zip(rows, target, strict=True)]


def first_reward(completion_ids, **kwargs) -> list[float]:
    return [float(ids[0] % 11) / 7 for ids in completion_ids]


def evenness(completion_ids, **kwargs) -> list[float]:
    """Share of even tokens: what the tests of learning reward."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


LEARNING = {  # in a few steps, from a model that knows nothing
    "max_steps": 12,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 5e-2,
    "lr_scheduler_type": "constant",
    "temperature": 1.0,
    "beta": 0.05,
}


def golden(name: str, case: str) -> list[dict]:
    """What TRL 1.10 logged, with losses as they were before it rounded them."""
    found = json.loads((Path(__file__).parent / "golden" / "sampled_pairs.json").read_text())[name][case]
    per_step = CASES[name][case].get("gradient_accumulation_steps", 1)
    for number, log in enumerate(found["logs"][:-1]):
        log["loss"] = sum(found["losses"][number * per_step : (number + 1) * per_step])
    return found["logs"]


def make(name: str, folder, rewards=length_reward, fixed=True, **changes):
    """fastalign's trainer `name` on the prompts; `fixed`: completions that are not sampled. Constructor arguments and
    config fields by name."""
    import fastalign
    from fastalign.rollout.function_rollouts import FunctionRollouts

    config = getattr(fastalign, f"{name}Config")
    fields = {key: changes.pop(key) for key in list(changes) if key in config.__dataclass_fields__}
    trainer = getattr(fastalign, f"{name}Trainer")(
        **(models() | {key: changes.pop(key) for key in ("model", "ref_model") if key in changes}),
        reward_funcs=rewards,
        args=config(str(folder), **(SETTINGS | {"shuffle_dataset": False} | fields)),
        train_dataset=prompts(),
        eval_dataset=prompts().select(range(16)),
        processing_class=copy.deepcopy(tiny_tokenizer()),
        **changes,
    )
    if fixed:
        trainer.rollouts = FunctionRollouts(
            fixed_rollouts(bos=True), trainer, trainer.processing_class, trainer.end_ids
        )
    return trainer


TIMES = ("runtime", "per_second", "step_time", "time/", "train_loss", "total_flos")


def numbers(trainer) -> list[dict]:
    """`log_history` without what depends on the clock."""
    return [{k: v for k, v in log.items() if not any(t in k for t in TIMES)} for log in trainer.state.log_history]


def assert_same(own: dict, other: dict, accumulation: int = 1, but: tuple[str, ...] = ()) -> None:
    """All numbers of TRL's log `other`, whose gradients are sums over the micro-batches of a step, where ours are
    means. Rewards and losses are differences of sums of log-probabilities around 30 nats; fp32 keeps 5e-6 of them,
    and the loss of a step adds those of its micro-batches."""
    assert set(other) <= set(own), set(other) - set(own)
    for key in {key for key in other if not any(t in key for t in TIMES)} - {*but}:
        error = 1e-5 if key.startswith(("rewards/", "objective/", "loss")) else 2e-7
        error *= accumulation if key == "loss" else 1
        value = other[key] / accumulation if key == "grad_norm" else other[key]
        assert own[key] == pytest.approx(value, rel=1e-5, abs=error), (key, own[key], value)
