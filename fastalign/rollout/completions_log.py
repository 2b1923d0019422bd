"""Completions for people to read: a table on the console, parquet files, tables of wandb and trackio."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import textwrap
from pathlib import Path
from typing import Any

from .rewards import Scores
from .samples import Sample


class CompletionsLog:
    """Keeps the completions of the last generation batch, and shows them when the run logs (main process only)."""

    def __init__(self, args: Any):
        self.args = args
        self.rows: list[dict[str, Any]] = []
        self.folder = Path(args.output_dir) / "completions"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._scheduler = _send_to_hub(args, self.folder) if args.log_completions_hub_repo else None

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Take the place of earlier ones; a row has `prompt`, `completion`, numbers, further columns, `advantage`."""
        self.rows = rows

    def show(self, step: int) -> None:
        """Print what was not shown yet, write `completions_{step}.parquet`, send tables."""
        if not self.rows:
            return
        rows, self.rows = self.rows, []
        import pandas

        table = pandas.DataFrame([{"step": step, **row} for row in rows])
        with contextlib.nullcontext() if self._scheduler is None else self._scheduler.lock:  # sent whole or not yet
            table.to_parquet(self.folder / f"completions_{step:05d}.parquet")
        print(render(rows, step, self.args.num_completions_to_print), flush=True)
        if self.args.log_unique_prompts:  # prompts may be messages, which cannot be compared as they are
            table = table[~table["prompt"].astype(str).duplicated()]
        for name in ("wandb", "trackio"):
            if name in (self.args.report_to or []):
                backend: Any = importlib.import_module(name)
                if name == "trackio" or backend.run is not None:
                    backend.log({"completions": backend.Table(dataframe=table)})


def _send_to_hub(args: Any, folder: Path) -> Any:
    """What sends the files of `folder` to the dataset repository every two minutes."""
    from huggingface_hub import CommitScheduler

    return CommitScheduler(
        repo_id=args.log_completions_hub_repo,
        repo_type="dataset",
        folder_path=folder,
        every=2,
        private=args.hub_private_repo,
        token=args.hub_token,
        allow_patterns=["*.parquet"],
    )


def sample_rows(samples: list[Sample], scores: Scores) -> list[dict[str, Any]]:
    """Rows of a table of samples and their rewards."""
    return [
        {"query": sample.row.get("prompt"), "model response": sample.completion}
        | dict(zip(scores.names, rewards, strict=True))
        for sample, rewards in zip(samples, scores.rewards.tolist(), strict=True)
    ]


def render(rows: list[dict[str, Any]], step: int, limit: int | None = None, width: int | None = None) -> str:
    """A table of at most `limit` rows: texts share the width of the terminal, numbers have two decimals."""
    rows = rows[:limit]
    width = width or min(shutil.get_terminal_size((120, 20)).columns, 200)
    cells = {name: [_text(row.get(name)) for row in rows] for name in rows[0]} if rows else {}
    short = {
        name: max(len(name), *map(len, texts))
        for name, texts in cells.items()
        if all(len(text) <= 12 and "\n" not in text for text in texts)
    }
    free = width - sum(short.values()) - 3 * len(cells) - 1
    others = max(len(cells) - len(short), 1)
    widths = {name: short.get(name, max(free // others, 12)) for name in cells}
    rule = "+" + "+".join("-" * (size + 2) for size in widths.values()) + "+"
    lines = [f"Completions at step {step}", rule, _line(list(cells), list(widths.values())), rule]
    for i in range(len(rows)):
        wrapped = [_wrap(texts[i], widths[name]) for name, texts in cells.items()]
        for number in range(max(map(len, wrapped))):
            lines.append(_line([part[number] if number < len(part) else "" for part in wrapped], [*widths.values()]))
        lines.append(rule)
    return "\n".join(lines)


def _line(texts: list[str], widths: list[int]) -> str:
    return "|" + "|".join(f" {text[:size]:<{size}} " for text, size in zip(texts, widths, strict=True)) + "|"


def _wrap(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() or [""] for part in textwrap.wrap(line, width) or [""]]


def _text(value: Any) -> str:
    """A cell: messages as one block per role, numbers with two decimals."""
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in value)
    return str(value)
