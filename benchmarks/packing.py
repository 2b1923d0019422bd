"""Packing: time of a plan over a million rows, and of packing a data set end to end against TRL's `pack_dataset`.

    python benchmarks/packing.py [--rows 100000] [--repeats 5] [--plan-only]

Lengths are log-normal with mean 360 tokens (sigma 1), the capacity is 2048. Both libraries read the same Arrow file
from disk and write their result to a file beside it; calls alternate. Peak memory is that of a fresh process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from results_file import append_rows, installed, percentiles, results_file

CAPACITY = 2048
UNCACHED = {"load_from_cache_file": False}


def make_lengths(num_rows: int) -> np.ndarray:
    """Log-normal lengths (N,) with a mean of about 360 tokens."""
    lengths = np.random.default_rng(0).lognormal(np.log(360) - 0.5, 1.0, num_rows)
    return np.maximum(1, lengths).astype(np.int64)


def make_dataset(folder: Path, num_rows: int):
    """Random ids (int32, as the tokenizers of `datasets` store them), on disk."""
    import pyarrow as pa
    from datasets import Dataset, load_from_disk

    lengths = make_lengths(num_rows)
    ids = np.random.default_rng(1).integers(0, 32_000, int(lengths.sum()), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))})
    Dataset(table).save_to_disk(folder)
    return load_from_disk(folder)


def provider(name: str):
    if name == "trl":
        from trl import pack_dataset
    else:
        from fastalign.data.packing import pack_dataset
    return pack_dataset


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bench_plan(num_rows: int, repeats: int) -> list[dict]:
    from fastalign.data.packing import plan_packs

    lengths = make_lengths(num_rows)
    plan = plan_packs(lengths, CAPACITY)
    times = [seconds(lambda: plan_packs(lengths, CAPACITY)) for _ in range(repeats)]
    shape = f"{num_rows} rows, {plan.num_tokens} tokens, capacity {CAPACITY}"
    row = {"op": "plan_packs", "provider": "fastalign", "mode": "bfd", "shape": shape}
    waste = {"median": 100 * plan.waste, "unit": "% empty"}
    return [row | percentiles(times) | {"unit": "s"}, row | waste]


def bench_dataset(num_rows: int, repeats: int, names: list[str]) -> list[dict]:
    import datasets

    datasets.disable_progress_bars()
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder), num_rows)
        num_tokens = int(np.minimum(make_lengths(num_rows), CAPACITY).sum())
        row = {"op": "pack_dataset", "shape": f"{num_rows} rows, {num_tokens} tokens, capacity {CAPACITY}"}
        row |= {"mode": "bfd, from a file", "dtype": "int32"}
        waste = {}
        for name in names:  # warm-up, and how full the packs are
            packed = provider(name)(dataset, CAPACITY, map_kwargs=UNCACHED)
            waste[name] = 100 * (1 - num_tokens / (len(packed) * CAPACITY))
        for repeat in range(repeats):
            for name in names:
                pack = provider(name)
                times[name].append(seconds(lambda pack=pack: pack(dataset, CAPACITY, map_kwargs=UNCACHED)))
            print(f"repeat {repeat + 1}/{repeats}:", {name: round(values[-1], 3) for name, values in times.items()})
        rows = []
        for name in names:
            peak = subprocess.run(
                [sys.executable, __file__, "--peak-of", name, folder], capture_output=True, text=True, check=True
            )
            measured = percentiles(times[name]) | {"unit": "s", "peak_bytes": int(peak.stdout)}
            rows += [
                row | {"provider": name} | measured,
                row | {"provider": name, "median": waste[name], "unit": "% empty"},
            ]
    return rows


def print_peak(name: str, folder: str) -> None:
    """Growth of the resident memory, in bytes, at its peak during one call in this process (Linux)."""
    import datasets

    datasets.disable_progress_bars()
    pack, dataset = provider(name), datasets.load_from_disk(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    pack(dataset, CAPACITY, map_kwargs=UNCACHED)
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the data set that is packed")
    parser.add_argument("--plan-rows", type=int, default=1_000_000, help="rows of the plan")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--against", choices=["trl", "none"], default="trl")
    parser.add_argument("--dry-run", action="store_true", help="print, do not write the results file")
    parser.add_argument("--peak-of", nargs=2, metavar=("PROVIDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        return print_peak(*options.peak_of)
    rows = bench_plan(options.plan_rows, options.repeats)
    if not options.plan_only:
        names = ["fastalign"]
        if options.against == "trl" and installed("trl"):
            names.append("trl")
        elif options.against == "trl":
            print("trl: left out, it is not installed")
        rows += bench_dataset(options.rows, options.repeats, names)
    print(f"{'op':14} {'provider':10} {'median':>10} {'unit':8} {'peak MiB':>9}  shape")
    for row in rows:
        peak = f"{row['peak_bytes'] / 2**20:9.0f}" if "peak_bytes" in row else " " * 9
        print(f"{row['op']:14} {row['provider']:10} {row['median']:10.4g} {row['unit']:8} {peak}  {row['shape']}")
    if not options.dry_run:
        append_rows(results_file(), rows)
        print(f"appended to {results_file()}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
