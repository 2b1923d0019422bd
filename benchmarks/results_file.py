"""The files of measurements: one JSON file per device, one line per measurement, written by every benchmark here."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {  # name of a field of a measurement -> what it says
    "op": "what was done",
    "provider": "whose implementation did it",
    "mode": "how",
    "shape": "on what",
    "dtype": "in which type",
    "median": "the result, in `unit`",
    "p20": "a fifth of the repeats were below",
    "p80": "a fifth of the repeats were above",
    "unit": "ms, s, tokens/s, % empty, ...",
    "peak_bytes": "memory at the highest, above what was in use before (a training run: of the whole process)",
    "share_of_roof": "time that the device needs for the products and the bytes alone, over the time taken",
    "error": "largest relative error of results and gradients against fp64",
    "device": "name of the GPU or processor",
    "torch": "version",
    "triton": "version",
    "peer": "version of the provider's package",
    "commit": "of this repository; + where the library differed from it",
    "date": "of the measurement",
}
REQUIRED = ("op", "provider", "median", "unit")


def device_name() -> str:
    """Name of the GPU that torch sees, or of the processor."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def results_file() -> Path:
    """benchmarks/results/<device>.json of this machine."""
    name = re.sub(r"[^a-z0-9]+", "_", re.sub(r"\((r|tm)\)", "", device_name().lower())).strip("_")
    return ROOT / "benchmarks" / "results" / f"{name}.json"


def commit() -> str:
    """Commit of the checkout, with `+` where files of the library differ from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here
        return ""
    if head.returncode:
        return ""
    library = ["fastalign", "kernels", "csrc"]
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", *library], cwd=ROOT, capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if changed.stdout else "")


def installed(package: str) -> str:
    """Version of an installed package, or an empty text."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def percentiles(values: list[float]) -> dict[str, float]:
    """`median`, `p20` and `p80` of repeated measurements, as the fields of a row."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {"median": statistics.median(ordered), "p20": ordered[round(0.2 * last)], "p80": ordered[round(0.8 * last)]}


def read_rows(path: str | Path) -> list[dict]:
    """The measurements of a file, oldest first; none where there is no file."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def append_rows(path: str | Path, rows: list[dict]) -> None:
    """Append measurements to a JSON file, one a line (made where it is missing).

    A row has `op`, `provider`, `median` and `unit`, and any other of FIELDS; device, versions, commit and date are
    filled in. Raises ValueError for another field and for a missing one.
    """
    filled = {
        "device": device_name(),
        "torch": installed("torch"),
        "triton": installed("triton"),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    for row in rows:
        if unknown := sorted(set(row) - set(FIELDS)):
            raise ValueError(f"Unknown fields {unknown}; the fields are {', '.join(FIELDS)}.")
        if missing := [name for name in REQUIRED if name not in row]:
            raise ValueError(f"A measurement lacks {missing}: {row}.")
    new = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in (row | filled).items()} for row in rows]
    lines = [json.dumps({k: row[k] for k in FIELDS if k in row}) for row in [*read_rows(path), *new]]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
