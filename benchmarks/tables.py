"""Rewrites the tables of measurements in README.md and docs/kernels.md from benchmarks/results/*.json.

    python benchmarks/tables.py [--check]

One line per measured case: our median, each other provider's, and how many times better ours is. The newest row of a
case and provider counts. With --check nothing is written, and the exit code is 1 where a page is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measurements: written by benchmarks/tables.py -->", "<!-- end of measurements -->"
OURS = "fastalign"
MORE_IS_BETTER = ("/s",)
INTERVAL = "; p20, p80: 95 % interval"  # shapes that end so have the bounds of an interval there, not of repetitions
KERNELS = ("linear_", "add_rms_norm", "swiglu", "rope", "embedding", "packed_attention", "prefix_attention")
PAGES = {"README.md": ("", ""), "docs/kernels.md": ("../", KERNELS)}  # page -> way to the root, how ops on it begin
CASE = ("op", "mode", "shape", "dtype", "device", "unit")


def read_rows(folder: Path) -> list[dict]:
    """The rows of all result files, each with the `file` it stands in, oldest first."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        rows += [row | {"file": path.name} for row in json.loads(path.read_text(encoding="utf-8"))]
    return sorted(rows, key=lambda row: row["date"])


def newest(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Case -> provider -> its newest row, in the order in which the cases were first measured."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault(tuple(row.get(name, "") for name in CASE), {})[row["provider"]] = row
    return cases


def ratio(ours: float, other: float, unit: str) -> float:
    """How many times better `ours` is: for rates more is better, for times, sizes and waste less."""
    better, worse = (ours, other) if unit.endswith(MORE_IS_BETTER) else (other, ours)
    return better / worse


def number(value: float) -> str:
    """Three digits that matter, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: list[dict], root: str = "") -> str:
    """The Markdown table, or a sentence where nothing is measured; `root`: the way from its page to the root."""
    lines = []
    for (op, mode, shape, dtype, device, unit), providers in newest(rows).items():
        if OURS not in providers:
            continue
        mine = providers[OURS]
        own, memory = float(mine["median"]), mine.get("peak_bytes")
        others = []
        for name, row in providers.items():
            other = float(row["median"])
            times = [f"{ratio(own, other, unit):.1f}x"] if own and other else []
            if row.get("peak_bytes") and memory:
                times.append(f"{float(row['peak_bytes']) / float(memory):.1f}x the memory")
            if name != OURS:
                others.append(f"{name} {number(other)}" + (f" ({', '.join(times)})" if times else ""))
        unit_and_more = unit
        if shape.endswith(INTERVAL):
            shape = shape.removesuffix(INTERVAL)
            unit_and_more += f" (95 % interval {number(float(mine['p20']))} to {number(float(mine['p80']))})"
        case = " ".join(filter(None, (mode, shape, dtype)))
        link = f"[{device}]({root}benchmarks/results/{mine['file']})"
        lines.append(f"| {op} | {case} | {number(own)} {unit_and_more} | {', '.join(others)} | {link} |")
    if not lines:
        return "No measurements yet: `fastalign bench` in a checkout makes them."
    head = "| what | case | fastalign | others (how many times better fastalign is) | machine |\n|---|---|---|---|---|"
    return "\n".join([head, *lines])


def with_table(page: str, text: str) -> str:
    """`page` with `text` between the two marks. ValueError where a mark is missing."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"A page must hold {BEGIN!r} and {END!r} once each.")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Rewrite the pages, or check that they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where a page is out of date")
    options = parser.parse_args()
    rows, changed = read_rows(ROOT / "benchmarks" / "results"), 0
    for name, (root, ops) in PAGES.items():
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = with_table(old, table([row for row in rows if row["op"].startswith(ops)], root))
        changed += new != old
        if not options.check:
            path.write_text(new, encoding="utf-8")
            print(f"{path} {'is rewritten' if new != old else 'was up to date'}")
    return int(options.check and changed > 0)


if __name__ == "__main__":
    sys.exit(main())
