"""Tiny models, prompts, fixed completions and settings that PPO is compared on, with TRL 1.10 and by hand."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from datasets import Dataset
from tiny import SIZES, tiny_model

END, PAD, LONGEST = 2, 0, 7
SETTINGS = {  # of both libraries
    "per_device_train_batch_size": 4,
    "num_ppo_epochs": 2,
    "response_length": LONGEST,
    "stop_token": "eos",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
CASES = {  # name -> settings; "even": all completions have LONGEST tokens, so that TRL averages over no padding
    "ragged": {"gradient_accumulation_steps": 2, "missing_eos_penalty": 0.7, "kl_coef": 0.3},
    "even": {"gradient_accumulation_steps": 2, "cliprange": 0.02, "cliprange_value": 0.02, "vf_coef": 0.5},
    "mini_batches": {"per_device_train_batch_size": 6, "num_mini_batches": 3, "gamma": 0.9, "lam": 0.8},
    "whitened": {"per_device_train_batch_size": 8, "whiten_rewards": True, "kl_estimator": "k3", "temperature": 1.3},
}
NUM_BATCHES = 2


def settings_of(case: str) -> dict:
    """Settings of `case`, for NUM_BATCHES batches."""
    settings = SETTINGS | CASES[case]
    batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    return settings | {"total_episodes": NUM_BATCHES * batch}


def prompts(num_rows: int = 40) -> Dataset:
    """Rows of 2 to 6 random ids, each different."""
    rng = np.random.default_rng(0)
    rows = [{"input_ids": [10 + i, *rng.integers(60, 300, int(rng.integers(1, 6))).tolist()]} for i in range(num_rows)]
    return Dataset.from_list(rows)


def completion_of(prompt_ids: list[int], even: bool) -> list[int]:
    """The fixed completion of a prompt: the end token comes last, except in those of LONGEST tokens."""
    rng = np.random.default_rng(prompt_ids)
    length = LONGEST if even or prompt_ids[0] % 4 == 3 else int(rng.integers(1, LONGEST))
    ids = rng.integers(5, 330, length).tolist()
    return ids if length == LONGEST else [*ids[:-1], END]


def scorer(seed: int) -> torch.nn.Module:
    """A tiny random model with one number per sequence, large enough to matter."""
    config = transformers.LlamaConfig(**SIZES, num_labels=1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForSequenceClassification(config)
        torch.nn.init.normal_(model.score.weight, std=0.2)
    return model.eval()


def models() -> dict:
    """The four models of a run, all different."""
    return {
        "model": tiny_model(seed=0),
        "ref_model": tiny_model(seed=1),
        "reward_model": scorer(2),
        "value_model": scorer(3),
    }
