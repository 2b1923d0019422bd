"""One self-contained HTML file about one or several runs: curves, results, samples, settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .page import render_page
from .runs import Run, read_run

__all__ = ["Run", "read_run", "write_report"]


def write_report(
    folders: str | Path | Sequence[str | Path], output: str | Path | None = None, *, title: str | None = None
) -> Path:
    """Write the report about the runs in `folders`; returns the path of the HTML file.

    A folder is a trainer's `output_dir` or one checkpoint. `output` is `report.html` in the first folder if None.
    Raises ValueError where a folder holds no run.
    """
    folders = [folders] if isinstance(folders, (str, Path)) else list(folders)
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for index, run in enumerate(runs):
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({index + 1})"
    path = Path(output) if output is not None else Path(folders[0], "report.html")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(runs, title or ", ".join(run.name for run in runs)), encoding="utf-8")
    return path
