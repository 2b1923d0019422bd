"""The settings file of a run, written by commands and read by reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .runs import SETTINGS

SECRETS = {"hub_token"}


def write_settings(output_dir: str, settings: Mapping[str, Any]) -> Path:
    """Write `run.yaml` to `output_dir`, without access tokens: `--config run.yaml` repeats the run."""
    kept = {name: value for name, value in settings.items() if name not in SECRETS} | {"output_dir": str(output_dir)}
    path = Path(output_dir, SETTINGS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(kept, sort_keys=True), encoding="utf-8")
    return path
