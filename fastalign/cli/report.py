"""`fastalign report`: one HTML file from the folders of one or several runs."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str]) -> int:
    """Write the report and say where it is."""
    parser = argparse.ArgumentParser(
        prog="fastalign report", description="Write one HTML file with the curves, samples and settings of runs."
    )
    parser.add_argument(
        "output_dir", nargs="+", help="folder of a run (its output_dir, or one checkpoint); several compare"
    )
    parser.add_argument("--output", help="file to write [default: report.html in the first folder]")
    parser.add_argument("--title", help="heading of the page [default: the folders' names]")
    options = parser.parse_args(arguments)
    from ..report import write_report

    try:
        path = write_report(options.output_dir, options.output, title=options.title)
    except ValueError as error:
        print(f"fastalign report: error: {error}", file=sys.stderr)
        return 1
    print(f"Report: {path}")
    return 0
