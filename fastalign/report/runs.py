"""What a run left in its folder: log, samples, results, settings."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..findings import FINDINGS, PREFIX

SAMPLES, RESULTS, SETTINGS, STATE = "samples.jsonl", "results.json", "run.yaml", "trainer_state.json"
COMPLETIONS = "completions"  # folder
NOT_CURVES = re.compile(
    r"health/.*|epoch|step|total_flos|train_.*|(.*_)?(num_tokens|num_input_tokens_seen)"
    r"|.*_(runtime|per_second|preparation_time)"
)


@dataclass
class Run:
    """One training run as its files tell it."""

    name: str
    folder: Path
    state: dict[str, Any]  # trainer_state.json
    samples: list[dict[str, Any]]  # lines of samples.jsonl: stage, prompt, completion, expected, correct
    results: dict[str, Any] | None  # results.json: {"columns": [...], "rows": [[...], ...]}
    settings: dict[str, Any]  # run.yaml
    completions: list[list[dict[str, Any]]]  # rows of the first and of the last of completions/*.parquet, by step

    @property
    def log(self) -> list[dict[str, Any]]:
        return self.state.get("log_history", [])

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Metric -> (step, value) points, in the order of the log; values that are not finite are left out."""
        found: dict[str, list[tuple[float, float]]] = {}
        for entry in self.log:
            for key, value in entry.items():
                if NOT_CURVES.fullmatch(key) or not _is_number(value):
                    continue
                found.setdefault(key, []).append((entry.get("step", 0), value))
        return found

    def findings(self) -> dict[str, list[tuple[int, float]]]:
        """Finding -> (step, number) of every log that has it."""
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in self.log:
            for key in entry:
                if key.removeprefix(PREFIX) in FINDINGS and key.startswith(PREFIX) and _is_number(entry[key]):
                    found.setdefault(key.removeprefix(PREFIX), []).append((entry.get("step", 0), entry[key]))
        return found

    def last(self, key: str) -> float | None:
        """The last logged value of `key`, None where it was never logged."""
        return next((entry[key] for entry in reversed(self.log) if _is_number(entry.get(key))), None)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_run(folder: str | Path) -> Run:
    """Read the run in `folder` (an output_dir or a checkpoint). ValueError where there is none that can be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder; give the output_dir of a run.")
    states = [_read_json(path) for path in _state_files(folder)]
    if not states:
        raise ValueError(
            f"{str(folder)!r} holds no run: neither it nor a checkpoint-N in it has a {STATE}. Give the output_dir of "
            "a run that has saved a checkpoint or ended."
        )
    beside = [folder, folder.parent] if re.fullmatch(r"checkpoint-\d+", folder.name) else [folder]
    results = _first(beside, RESULTS)
    settings = _first(beside, SETTINGS)
    return Run(
        name=folder.resolve().name,
        folder=folder,
        state=max(states, key=lambda state: len(state.get("log_history", []))),
        samples=_read_samples(_first(beside, SAMPLES)),
        results=_read_json(results) if results else None,
        settings=_read_yaml(settings) if settings else {},
        completions=_read_completions(_first(beside, COMPLETIONS)),
    )


def _state_files(folder: Path) -> list[Path]:
    checkpoints = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    checkpoints.sort(key=lambda path: int(path.name.split("-")[1]))
    return [path / STATE for path in [folder, *checkpoints[-1:]] if (path / STATE).is_file()]


def _first(folders: list[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def _read_completions(folder: Path | None) -> list[list[dict[str, Any]]]:
    if folder is None:
        return []
    from pyarrow import parquet

    found = [(re.fullmatch(r"completions_(\d+)\.parquet", path.name), path) for path in folder.iterdir()]
    files = [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]
    try:
        return [parquet.read_table(path).to_pylist() for path in [*files[:1], *files[1:][-1:]]]
    except (OSError, ValueError) as error:
        raise ValueError(f"A file in {folder} cannot be read as completions ({error}).") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); the run may have been cut off while writing it."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def _read_samples(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} must hold one JSON object per line ({error}).") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
