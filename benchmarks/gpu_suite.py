"""Everything that only a GPU can show, in one call of under nine minutes, with nothing downloaded.

    python benchmarks/gpu_suite.py                 on a GPU
    python benchmarks/gpu_suite.py --dry-run       on a CPU: tiny shapes, kernels in Triton's interpreter

Parts: numerics in bf16, the tests of kernels as compiled, head, losses, layers and attention against peers and the
roof, the choice between the two forms of the head and among tiles, steps of SFT, DPO and GRPO against TRL on a random
model of half a billion parameters. Each part is a process of its own with a limit of time, so that one that crashes or
hangs costs no other. What it found is written as soon as it is done; parts that are done are skipped by the next call,
so that a call that was cut off, or whose minutes were spent, goes on where it stopped (`--again` measures anew).
`--output FOLDER` gets suite/<device>.json with all of it and <device>.json with the timings as rows; it is
benchmarks/results otherwise. From a checkout nothing needs to be installed: the C++ extension is built if it is
missing. Training needs `datasets`, its peer `trl`; what is missing is named and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
PATHS = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]
sys.path[:0] = PATHS
DRY_LIMIT = 900  # a dry run takes minutes on two free cores, and finishes on busy ones too
LEAST = 25  # seconds: with less left of its minutes, a call starts no part
KERNEL_TESTS = [
    *["test_triton_rows.py", "test_offset.py", "test_layers.py", "test_fp8.py"],
    *["test_linear_divergence.py", "test_attention.py", "test_policy.py"],
]
DRY_TESTS = {  # of each kernel; all others are among the ordinary tests
    "test_triton_rows.py": ["test_matches_the_reference"],
    "test_offset.py": ["test_statistics_and_gradients_from_logp_alone", "test_all_statistics_and_their_gradients"],
    "test_layers.py": ["test_rms_norm", "test_add_rms_norm", "test_glu", "test_rope", "test_embedding"],
    "test_linear_divergence.py": ["test_whole_op_in_triton"],
}
BENCHMARKS = {  # part -> script, its options, its peers in a dry run: all but torch.compile, which takes longest
    "head": ("kernels", ["--ops", "cross_entropy", "logprobs"], "naive,torch,trl,liger,cce,quack"),
    "losses": ("kernels", ["--ops", "preference", "policy", "divergence"], "naive,trl"),
    "layers": ("layers", [], "torch,liger"),
    "attention": ("attention", [], "padded,dense-mask,flash-attn,varlen,flex,unshared"),
}


def machine() -> dict:
    """Device, driver and versions."""
    import torch
    from results_file import commit, device_name, installed

    names = ("torch", "triton", "transformers", "trl", "liger-kernel", "flash-attn", "quack-kernels")
    versions = {name: version for name in names if (version := installed(name))}
    driver = ""
    with contextlib.suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "device": device_name(),
        "driver, clock, power": driver,
        "cuda": torch.version.cuda,
        "commit": commit(),
    } | versions


class Call(NamedTuple):
    """What a part is told."""

    dry: bool
    limit: float  # seconds
    rows: pathlib.Path  # where timings go


def run(command: list[str], limit: float) -> dict:
    """Exit code, seconds and the last lines of a command; past its limit it is killed with all that it started."""
    start, paths = time.perf_counter(), [*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile() as out:  # a pipe would stay open where a worker outlives its parent
        process = subprocess.Popen(
            command, cwd=HERE.parent, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        lines = out.read().decode(errors="replace").strip().splitlines()[-120:]
    return {"exit_code": code, "seconds": round(time.perf_counter() - start, 1), "lines": lines}


def left_out(*packages: str) -> dict:
    """Why a part cannot run, or nothing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return {"left_out": f"not installed: {', '.join(missing)}"} if missing else {}


def build(call: Call) -> dict:
    """The C++ extension, where it is missing: preparing data and the CPU's side of tests need it."""
    found = run([sys.executable, "-c", "import fastalign._native"], call.limit)
    if not found["exit_code"]:
        return {"extension": "is there"}
    os.environ["FASTALIGN_BUILD_JOBS"] = str(os.cpu_count() or 2)
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], call.limit)


def tests(call: Call) -> dict:
    """The tests of kernels: compiled on a GPU, in the interpreter without one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if call.dry:
        return run([*command, *(f"tests/{f}::{name}" for f, names in DRY_TESTS.items() for name in names)], call.limit)
    processes = str(max(2, (os.cpu_count() or 4) * 3 // 4))  # most of the time is spent compiling
    at_once = ["-n", processes] if importlib.util.find_spec("xdist") else []
    files = [f"tests/{name}" for name in KERNEL_TESTS]
    return left_out("pytest") or run([*command, *at_once, "--tb=short", "-m", "not slow", *files], call.limit)


def bench(name: str) -> Callable[[Call], dict]:
    """A benchmark of kernels; its rows are in the results file."""
    script, options, peers = BENCHMARKS[name]
    command = [sys.executable, str(HERE / f"{script}.py"), *options]

    def measured(call: Call) -> dict:
        if call.dry:
            return run([*command, "--dry-run", "--against", peers], call.limit)
        return run([*command, "--repeats", "5", "--output", str(call.rows)], call.limit)

    return measured


def inside(name: str) -> Callable[[Call], dict]:
    """A part of suite_parts.py; its last line is what it found."""

    def measured(call: Call) -> dict:
        done = run([sys.executable, str(HERE / "suite_parts.py"), name, *["--dry-run"] * call.dry], call.limit)
        return done if done["exit_code"] else json.loads(next(x for x in done["lines"][::-1] if x.startswith("{")))

    return measured


def train(call: Call) -> dict:
    """Steps of SFT, DPO and GRPO here and in TRL on a random model of 0.5B parameters: losses and speed."""
    if missing := left_out("datasets", "accelerate", "tokenizers"):
        return missing
    from results_file import append_rows, percentiles
    from training_steps import make_folder

    steps, batch, started = 3 if call.dry else 12, 8, time.perf_counter()
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        make_folder(pathlib.Path(name), call.dry, steps, batch)
        options = [name, "--steps", str(steps), "--batch", str(batch), *["--small"] * call.dry]
        for left, library in ((2, "fastalign"), (1, "trl")):
            if library == "trl" and left_out("trl"):
                found[library] = left_out("trl")
                continue
            limit = (call.limit - (time.perf_counter() - started)) / left
            done = run([sys.executable, str(HERE / "training_steps.py"), library, *options], limit)
            measured = [json.loads(line) for line in done["lines"] if line.startswith('{"mode"')]
            found |= {f"{one['mode']} {library}": one for one in measured}
            if done["exit_code"]:
                found |= {library: done, "exit_code": done["exit_code"]}
            rows = [
                {"op": "training steps", "provider": library, "mode": one["mode"], "dtype": "bfloat16"}
                | {"shape": f"0.5B V=151936 batch={batch}", "unit": "tokens/s", "peak_bytes": one["peak_bytes"]}
                | percentiles(one["tokens_per_second_of_steps"])
                for one in measured
            ]
            if not call.dry:
                append_rows(call.rows, rows)
    return found


PARTS: dict[str, tuple[int, Callable[[Call], dict]]] = {  # name -> seconds at most on a GPU, and what runs
    "build": (60, build),
    "numerics": (60, inside("numerics")),
    "tests": (150, tests),
    "head": (120, bench("head")),
    "losses": (80, bench("losses")),
    "forms": (60, inside("forms")),
    "layers": (70, bench("layers")),
    "train": (150, train),
    "attention": (70, bench("attention")),
    "tiles": (80, inside("tiles")),
}


def measure(name: str, call: Call) -> dict:
    """What a part found, or the error that ended it: the other parts are worth having."""
    start = time.perf_counter()
    try:
        found = PARTS[name][1](call)
    except Exception as error:
        found = {"exit_code": f"{type(error).__name__}: {error}"}
    print(json.dumps(found, indent=1), f"\n{time.perf_counter() - start:.0f} s", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, help="folder; default: benchmarks/results")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--again", action="store_true", help="measure parts that are in the file already")
    parser.add_argument(
        "--minutes", type=float, default=8.8, help="of this call; a part that they cut off comes again"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU too; nothing is kept")
    options = parser.parse_args()
    import torch
    from results_file import read_rows, results_file
    from suite_parts import goals

    deadline = time.monotonic() + 60 * options.minutes
    if not torch.cuda.is_available():
        if not options.dry_run:
            raise SystemExit("No GPU here: the suite measures one. `--dry-run` runs every part at tiny sizes.")
        os.environ |= {"FASTALIGN_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    folder = (options.output or results_file().parent).resolve()
    output, rows, results = folder / "suite" / results_file().name, folder / results_file().name, {}
    if output.exists() and not options.again and not options.dry_run:
        results = json.loads(output.read_text())
    results["machine"], waiting = machine(), []
    if not options.dry_run:
        output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.parts:
        if name in results and not results[name].get("exit_code"):
            continue
        left = DRY_LIMIT if options.dry_run else min(PARTS[name][0], deadline - time.monotonic())
        if left < LEAST:
            waiting.append(name)
            continue
        print(f"== {name}", flush=True)
        results[name] = measure(name, Call(options.dry_run, left, rows))
        if not options.dry_run:
            output.write_text(json.dumps(results, indent=1) + "\n")
    if not options.dry_run:
        results["goals"] = goals(read_rows(rows))
        output.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results["goals"], indent=1))
    failed = [name for name, part in results.items() if part.get("exit_code")]
    print(f"failed: {', '.join(failed) or 'none'}; for the next call: {', '.join(waiting) or 'none'}")
    return int(bool(failed or waiting))


if __name__ == "__main__":
    sys.exit(main())
