"""Small data and the two trainers that the loop's tests compare: transformers' and ours, on the same model."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_model
from transformers import TrainingArguments

from fastalign.config import AlignConfig
from fastalign.loop import Trainer

SPEED = ("runtime", "per_second", "preparation_time")  # parts of keys that differ from run to run
SETTINGS = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 4,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "log_level": "error",
}


def tiny_rows(num_rows: int = 22, seed: int = 0) -> datasets.Dataset:
    """Rows of 4 to 13 random ids; the first two tokens are not scored."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        ids = rng.integers(5, 331, int(rng.integers(4, 14))).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return datasets.Dataset.from_list(rows)


def pad_rows(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A collator as users write them: right-padded dictionaries."""
    width = max(len(row["input_ids"]) for row in rows)

    def pad(values, fill):
        return torch.tensor([list(v) + [fill] * (width - len(v)) for v in values])

    return {
        "input_ids": pad([row["input_ids"] for row in rows], 0),
        "labels": pad([row["labels"] for row in rows], -100),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def make(kind: str, folder, cls=None, model=None, train=None, **options):
    """A trainer of `kind` ("ours" or "theirs") on the tiny data; config fields and constructor arguments by name."""
    cls = cls or {"ours": Trainer, "theirs": transformers.Trainer}[kind]
    config = {"ours": AlignConfig, "theirs": TrainingArguments}[kind]
    fields = {k: options.pop(k) for k in list(options) if k in config.__dataclass_fields__}
    own = {"kernel_backend": "none"} if config is AlignConfig else {}  # loops are compared: the layers are the model's
    args = config(output_dir=str(folder), **(SETTINGS | own | fields))
    options.setdefault("data_collator", pad_rows)
    train = tiny_rows() if train is None else train
    return cls(model or tiny_model(), args, train_dataset=train, **options)


def history(trainer) -> list[dict]:
    """`log_history` without what depends on the clock."""
    return [
        {k: v for k, v in entry.items() if not any(part in k for part in SPEED)} for entry in trainer.state.log_history
    ]


def keys(trainer) -> list[set]:
    """The keys of each entry of `log_history`."""
    return [set(entry) for entry in trainer.state.log_history]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same_run(ours, theirs, rel: float = 1e-6) -> None:
    """The same log lines, and the same weights, up to `rel`."""
    assert keys(ours) == keys(theirs)
    for mine, reference in zip(history(ours), history(theirs), strict=True):
        assert mine == pytest.approx(reference, rel=rel, abs=1e-12)
    for name, value in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=rel * 10, atol=rel)


def assert_same_values(run, other, names: tuple[str, ...], rel: float = 1e-5) -> None:
    """Equal values of `names`, up to `rel`, wherever either log has them."""
    picked = [[{k: e[k] for k in names if k in e} for e in history(trainer)] for trainer in (run, other)]
    for mine, reference in zip(*picked, strict=True):
        assert mine == pytest.approx(reference, rel=rel)
