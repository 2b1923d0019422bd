"""The files of measurements: one CSV per device, one row per measurement, written by every benchmark here."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "op", "provider", "mode", "shape", "dtype", "median", "p20", "p80", "unit", "peak_bytes",
    "device", "torch", "triton", "commit", "date",
)  # fmt: skip


def device_name() -> str:
    """Name of the GPU that torch sees, or of the processor."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def results_file() -> Path:
    """benchmarks/results/<device>.csv of this machine."""
    name = re.sub(r"[^a-z0-9]+", "_", re.sub(r"\((r|tm)\)", "", device_name().lower())).strip("_")
    return ROOT / "benchmarks" / "results" / f"{name}.csv"


def commit() -> str:
    """Commit of the checkout, with `+` where files of the library differ from it."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        return ""
    library = ["fastalign", "kernels", "csrc"]
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", *library], cwd=ROOT, capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if changed.stdout else "")


def percentiles(values: list[float]) -> dict[str, float]:
    """`median`, `p20` and `p80` of repeated measurements, as the columns of a row."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {"median": statistics.median(ordered), "p20": ordered[round(0.2 * last)], "p80": ordered[round(0.8 * last)]}


def append_rows(path: str | Path, rows: list[dict]) -> None:
    """Append measurements to a CSV file (made with its header where it is missing).

    A row has `op`, `provider`, `median` and `unit`, and any other of COLUMNS; device, versions, commit and date are
    filled in. Raises ValueError for another column, for a missing one and for a file with another header.
    """
    import torch

    try:
        import triton
    except ImportError:
        triton = None
    filled = {
        "device": device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    for row in rows:
        if unknown := sorted(set(row) - set(COLUMNS)):
            raise ValueError(f"Unknown columns {unknown}; the columns are {', '.join(COLUMNS)}.")
        if missing := sorted({"op", "provider", "median", "unit"} - set(row)):
            raise ValueError(f"A measurement lacks {missing}: {row}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (header := path.read_text().partition("\n")[0].strip()) != ",".join(COLUMNS):
        raise ValueError(f"{path} has another header: {header}.")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            numbers = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(filled | numbers)
