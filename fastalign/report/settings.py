"""The settings file of a run: what differs from the defaults, written by commands, read by reports."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import yaml
from transformers import TrainingArguments

from .runs import SETTINGS

SECRETS = {"hub_token"}


def changed_settings(config) -> dict:
    """The fields of a config dataclass that differ from its defaults, as plain values (no access tokens)."""
    if isinstance(config, TrainingArguments):
        values, defaults = config.to_dict(), type(config)(config.output_dir).to_dict()
    else:
        values, defaults = asdict(config), asdict(type(config)())
    names = {field.name for field in fields(config) if field.init} - SECRETS
    return {name: value for name, value in values.items() if name in names and value != defaults.get(name)}


def write_settings(output_dir: str, *configs) -> Path:
    """Write `run.yaml` to `output_dir`: `--config run.yaml` repeats the run."""
    settings = {"output_dir": str(output_dir)}
    for config in configs:
        settings |= changed_settings(config)
    path = Path(output_dir, SETTINGS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=True), encoding="utf-8")
    return path
