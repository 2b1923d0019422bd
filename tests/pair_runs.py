"""Small preference data, and runs of a trainer of ours and of TRL's on them, that parity tests compare."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math

from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
# parts of keys that differ from run to run, that TRL leaves at 0, or that only we have
TIMED = ("runtime", "per_second", "total_flos", "health/")
LAYOUTS = ("flat", "shared", "padded")
SETTINGS = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "use_cpu": True,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def text(i: int, length: int) -> str:
    return " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(length))


@functools.cache
def pair_rows(form: str = "text", num_rows: int = 18) -> Dataset:
    """Prompts with `chosen`, `rejected` and `reference`: "text", "chat" or "implicit" (text without `prompt`)."""
    rows = []
    for i in range(num_rows):
        row = {"chosen": text(i + 1, 1 + 3 * i % 7), "rejected": text(i + 2, 1 + 4 * i % 5)}
        row["reference"] = text(i + 5, 1 + 2 * i % 6)
        prompt = text(i, 3 + 5 * i % 9)
        if form == "chat":
            row = {name: [{"role": "assistant", "content": answer}] for name, answer in row.items()}
            row["prompt"] = [{"role": "user", "content": prompt}]
        elif form == "text":
            row = {name: " " + answer for name, answer in row.items()} | {"prompt": prompt}
        else:
            row = {name: f"{prompt}: {i}{j} {answer}" for j, (name, answer) in enumerate(row.items())}
        rows.append(row)
    return Dataset.from_list(rows)


def run(config_class, trainer_class, folder, *, layout: str | None = None, form: str = "text", **options):
    """A trained and evaluated trainer of any library; config fields and constructor arguments by name.

    `layout` (ours only): "flat", "shared" (a prompt once for all its answers) or "padded". `streamed`: rows come as a
    stream.
    """
    fields = {k: options.pop(k) for k in list(options) if k in config_class.__dataclass_fields__}
    if layout is not None:
        fields["share_prefix"] = layout == "shared"
    rows = options.pop("rows", None) or pair_rows(form)
    rows = rows.to_iterable_dataset() if options.pop("streamed", False) else rows
    trainer = trainer_class(
        model=options.pop("model", None) or tiny_model(),
        args=config_class(output_dir=str(folder), **(SETTINGS | fields)),
        train_dataset=rows,
        eval_dataset=pair_rows(form).select(range(6)),
        processing_class=copy.deepcopy(tiny_tokenizer()),
        **options,
    )
    if layout == "padded":
        trainer.data_collator.flat = False
    trainer.train()
    trainer.evaluate()
    return trainer


def history(trainer) -> list[dict]:
    """`log_history` without what depends on the clock."""
    return [
        {k: v for k, v in entry.items() if not any(part in k for part in TIMED)} for entry in trainer.state.log_history
    ]


def assert_same_history(ours, theirs, more: frozenset[str] = frozenset(), rtol: float = 1e-5) -> None:
    """Every number that TRL logs, up to `rtol`; ours logs those and `more`."""
    mine, other = history(ours), history(theirs)
    assert len(mine) == len(other)
    for own, reference in zip(mine, other, strict=True):
        surplus = {name.removeprefix("eval_") for name in set(own) - set(reference)}
        assert set(reference) <= set(own) and surplus <= more, set(own) ^ set(reference)
        for key, value in reference.items():
            parts = "rewards/" if "margins" in key else "logps/" if "log_odds" in key else None  # of a difference
            sizes = [abs(number) for name, number in reference.items() if parts is not None and parts in name]
            apart = 5e-7 * max([0.4, *sizes])  # a few last bits of fp32
            assert math.isclose(own[key], value, rel_tol=rtol, abs_tol=apart), (key, own[key], value)


def assert_same_interface(ours, theirs, our_config, their_config, apart: frozenset[str] = frozenset()) -> None:
    """Constructor arguments in TRL's order, then our own; every field of TRL's config with its default."""
    their_names = list(inspect.signature(theirs.__init__).parameters)
    assert list(inspect.signature(ours.__init__).parameters)[: len(their_names)] == their_names
    known = {field.name: field for field in dataclasses.fields(our_config)}
    for field in dataclasses.fields(their_config):
        assert field.name in known, field.name
        if field.name not in apart:
            assert (known[field.name].default, field.name) == (field.default, field.name)
