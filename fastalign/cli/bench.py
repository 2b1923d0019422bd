"""`fastalign bench`: runs the benchmark scripts of a source checkout."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import fastalign

from .config_file import nearest

SUITES = {  # name -> the scripts that it runs in turn
    "kernels": ["kernels"],
    "layers": ["layers"],
    "attention": ["attention"],
    "data": ["packing", "prepare"],
    "train": ["sft_against_trl"],
    "preferences": ["preferences_against_trl"],
}


def benchmark_folder() -> Path | None:
    """`benchmarks/` beside the package, or below the current folder; None where there is no checkout."""
    for root in (Path(fastalign.__file__).parents[1], Path.cwd()):
        if (root / "benchmarks" / "tables.py").is_file():
            return root / "benchmarks"
    return None


def main(arguments: list[str]) -> int:
    """Run one suite, or all of them in turn."""
    parser = argparse.ArgumentParser(
        prog="fastalign bench",
        description="Run benchmarks; results go to benchmarks/results/ of the checkout. Further options go to the "
        "scripts: --against trl,liger,... chooses the peers, `fastalign bench kernels --help` shows all.",
        add_help=not arguments or arguments[0].startswith("-"),
    )
    parser.add_argument("name", nargs="?", help=f"{', '.join(SUITES)} (default: all)")
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
    if options.list:
        print("\n".join(SUITES))
        return 0
    if options.name is not None and options.name not in SUITES:
        parser.error(f"no benchmark {options.name!r}{nearest(options.name, SUITES)}; there are {', '.join(SUITES)}")
    chosen = SUITES[options.name] if options.name else [script for scripts in SUITES.values() for script in scripts]
    failed = []
    for script in chosen:
        print(f"== {script}", flush=True)
        command = [sys.executable, str(folder / f"{script}.py"), *script_arguments]
        if subprocess.run(command, check=False, cwd=folder.parent).returncode:
            failed.append(script)
    print(f"\nResults: {folder / 'results'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    print("`python benchmarks/tables.py` puts them into README.md.")
    return 1 if failed else 0
