"""`fastalign bench`: runs the benchmark scripts of a source checkout."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import fastalign

from .config_file import nearest

NOT_BENCHMARKS = {"tables", "results_file", "gpu_suite"}  # the last measures a GPU, by hand


def benchmark_folder() -> Path | None:
    """`benchmarks/` beside the package, or below the current folder; None where there is no checkout."""
    for root in (Path(fastalign.__file__).parents[1], Path.cwd()):
        if (root / "benchmarks" / "tables.py").is_file():
            return root / "benchmarks"
    return None


def main(arguments: list[str]) -> int:
    """Run one benchmark, or all of them in turn."""
    parser = argparse.ArgumentParser(
        prog="fastalign bench", description="Run benchmarks; results go to benchmarks/results/ of the checkout."
    )
    parser.add_argument("name", nargs="?", help="one benchmark (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options, script_arguments = parser.parse_known_args(arguments)
    folder = benchmark_folder()
    if folder is None:
        print(
            "fastalign bench: error: the benchmarks are part of the source checkout, not of the package. Clone the "
            "repository and run this inside it.",
            file=sys.stderr,
        )
        return 1
    scripts = {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem not in NOT_BENCHMARKS}
    if options.list:
        print("\n".join(scripts))
        return 0
    if options.name is not None and options.name not in scripts:
        parser.error(f"no benchmark {options.name!r}{nearest(options.name, scripts)}; there are {', '.join(scripts)}")
    chosen = [scripts[options.name]] if options.name else list(scripts.values())
    failed = []
    for script in chosen:
        print(f"== {script.stem}", flush=True)
        if subprocess.run([sys.executable, str(script), *script_arguments], check=False, cwd=folder.parent).returncode:
            failed.append(script.stem)
    print(f"\nResults: {folder / 'results'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    print("`python benchmarks/tables.py` puts them into README.md.")
    return 1 if failed else 0
