"""A small DPO trainer on the tiny model, as the tests of the trainer and of references make it."""

from __future__ import annotations

import copy

import torch
from test_parity_dpo import pairs
from tiny import tiny_model, tiny_tokenizer

from fastalign import DPOConfig, DPOTrainer

SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "use_cpu": True,
    "disable_tqdm": True,
}


def make(folder, data=None, **options) -> DPOTrainer:
    """An untrained trainer; config fields and constructor arguments by name."""
    fields = {name: options.pop(name) for name in list(options) if name in DPOConfig.__dataclass_fields__}
    model = options.pop("model", None)
    return DPOTrainer(
        model=tiny_model() if model is None else model,
        args=DPOConfig(output_dir=str(folder), **(SETTINGS | fields)),
        train_dataset=pairs() if data is None else data,
        processing_class=copy.deepcopy(tiny_tokenizer()),
        **options,
    )


def train(folder, data=None, **options) -> DPOTrainer:
    trainer = make(folder, data, **options)
    trainer.train()
    return trainer


def losses(trainer) -> torch.Tensor:
    """(steps, 3): loss, gradient norm and margin of every logged step."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return torch.tensor([[row["loss"], row["grad_norm"], row["rewards/margins"]] for row in rows])


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
