"""Everything that only a GPU can show, in one call of under nine minutes, with nothing downloaded.

    python benchmarks/gpu_suite.py                 on a GPU
    python benchmarks/gpu_suite.py --dry-run       on a CPU: tiny shapes, kernels in Triton's interpreter

Parts: the tests of kernels as compiled, numerics in bf16, head, layers and attention against peers and the roof, the
choice between the two forms of the head, steps of SFT, DPO and GRPO against TRL on a random model of half a billion
parameters. Each part is written to the output as soon as it is done, and a part that stands there is skipped, so that
a call that was cut off goes on where it stopped (`--again` measures anew). Timings are rows of
benchmarks/results/<device>.json too. From a checkout nothing needs to be installed; training needs the C++ extension
(`python setup.py build_ext --inplace`), and TRL's side of it TRL: what is missing is named and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve().parent
PATHS = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]
sys.path[:0] = PATHS
KERNEL_TESTS = [
    *["test_triton_rows.py", "test_offset.py", "test_layers.py", "test_linear_divergence.py"],
    *["test_head.py", "test_attention.py", "test_policy.py"],
]
FORM_SHAPES = [
    (16384, h, v) for h, v in [(896, 151936), (2048, 128256), (4096, 128256), (2048, 32000), (2304, 256000)]
]
LIMITS = {"tests": 150, "kernels": 110, "layers": 40, "attention": 40, "train": 90}  # seconds; train: of one library
DRY_LIMIT = 900  # a dry run takes minutes on two free cores, and finishes on busy ones too
DRY_PEERS = {  # all but torch.compile, which takes longer than all others
    "kernels": "naive,torch,trl,liger,cce,quack",
    "layers": "torch,liger",
    "attention": "padded,dense-mask,flash-attn,varlen,flex,unshared",
}
DRY_TESTS = {  # of each kernel; all others are among the ordinary tests
    "test_triton_rows.py": ["test_matches_the_reference"],
    "test_offset.py": ["test_statistics_and_gradients_from_logp_alone", "test_all_statistics_and_their_gradients"],
    "test_layers.py": ["test_rms_norm", "test_add_rms_norm", "test_glu", "test_rope", "test_embedding"],
    "test_linear_divergence.py": ["test_whole_op_in_triton"],
}


def machine() -> dict:
    """Device and versions."""
    from results_file import commit, device_name, installed

    names = ("torch", "triton", "transformers", "trl", "liger-kernel", "flash-attn", "quack-kernels")
    versions = {name: version for name in names if (version := installed(name))}
    return {"device": device_name(), "commit": commit(), **versions}


def _run(command: list[str], limit: int) -> dict:
    """Exit code and the last lines of a command that may take `limit` seconds."""
    start, paths = time.perf_counter(), [*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, capture_output=True, text=True, timeout=limit,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as stopped:
        code, text = "stopped", (stopped.stdout or b"").decode(errors="replace")
    seconds = round(time.perf_counter() - start, 1)
    return {"exit_code": code, "seconds": seconds, "lines": text.strip().splitlines()[-80:]}


def tests(dry: bool) -> dict:
    """The tests of kernels: compiled on a GPU, in the interpreter without one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if dry:
        return _run([*command, *(f"tests/{f}::{name}" for f, names in DRY_TESTS.items() for name in names)], DRY_LIMIT)
    at_once = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # most of the time is spent compiling
    return _run([*command, *at_once, "-m", "not slow", *(f"tests/{name}" for name in KERNEL_TESTS)], LIMITS["tests"])


def bench(name: str, dry: bool) -> dict:
    """A benchmark of kernels; its rows are in the results file."""
    command = [sys.executable, str(HERE / f"{name}.py")]
    if not dry:
        return _run([*command, "--repeats", "5"], LIMITS[name])
    return _run([*command, "--dry-run", "--against", DRY_PEERS[name]], DRY_LIMIT)


def numerics(dry: bool) -> dict:
    """Relative errors of loss and gradients of the head in bf16 against fp64, for both forms, at rising scales."""
    import torch
    from fastalign_kernels import fused
    from measure import device

    n, d, v = (24, 32, 100) if dry else (1024, 2048, 128256)
    found = {}
    for form in ("rows", "offset"):
        os.environ["FASTALIGN_HEAD"] = form
        for scale in (1.0, 8.0, 40.0):
            torch.manual_seed(0)
            hidden = (torch.randn(n, d, device=device()) * scale).bfloat16().requires_grad_()
            weight = (torch.randn(v, d, device=device()) / d**0.5).bfloat16().requires_grad_()
            targets = torch.randint(0, v, (n,), device=device())
            loss, stats = fused(hidden, weight, targets, lambda s, span: -s.logp.sum() / n)
            loss.backward()
            exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
            logp = (exact_hidden @ exact_weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
            (-logp.mean()).backward()
            errors = {"logp_max": (stats.logp.double() - logp).abs().max().item()}
            for name, own, other in [("hidden", hidden, exact_hidden), ("weight", weight, exact_weight)]:
                errors[f"grad_{name}"] = ((own.grad.double() - other.grad).norm() / other.grad.norm()).item()
            found[f"{form}, logits of scale {scale:g}"] = errors
    del os.environ["FASTALIGN_HEAD"]
    return found


def forms(dry: bool) -> dict:
    """Milliseconds of the cross-entropy with each form of the head: what the table of forms is filled from."""
    import torch
    from fastalign_kernels import linear_cross_entropy
    from measure import _seconds, device

    found = {}
    for n, d, v in [(24, 32, 100)] if dry else FORM_SHAPES:
        hidden = torch.randn(n, d, device=device(), dtype=torch.bfloat16, requires_grad=True)
        weight = (torch.randn(v, d, device=device()) / d**0.5).bfloat16().requires_grad_()
        targets = torch.randint(0, v, (n,), device=device())
        times: dict[str, list[float]] = {"rows": [], "offset": []}
        for repeat in range(2 if dry else 6):
            for form, values in times.items():
                os.environ["FASTALIGN_HEAD"] = form
                hidden.grad = weight.grad = None
                took = _seconds(lambda h=hidden, w=weight, t=targets: linear_cross_entropy(h, w, t).backward())
                if repeat:  # the first one compiles
                    values.append(took * 1e3)
        found[f"N={n} H={d} V={v}"] = {form: sorted(values)[len(values) // 2] for form, values in times.items()}
    del os.environ["FASTALIGN_HEAD"]
    return found


def train(dry: bool) -> dict:
    """Steps of SFT, DPO and GRPO here and in TRL on a random model of 0.5B parameters: losses and speed."""
    from results_file import append_rows, installed, percentiles, results_file
    from training_steps import make_folder

    steps, batch = (3, 8) if dry else (12, 8)
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        make_folder(pathlib.Path(name), dry, steps, batch)
        options = [name, "--steps", str(steps), "--batch", str(batch), *["--small"] * dry]
        for library in ("fastalign", "trl"):
            if library == "trl" and not installed("trl"):
                found[library] = {"left_out": "trl is not installed"}
                continue
            command = [sys.executable, str(HERE / "training_steps.py"), library, *options]
            done = _run(command, DRY_LIMIT if dry else LIMITS["train"])
            measured = [json.loads(line) for line in done["lines"] if line.startswith('{"mode"')]
            found |= {f"{one['mode']} {library}": one for one in measured}
            if done["exit_code"]:
                found[library] = done
                found["exit_code"] = done["exit_code"]
            rows = [
                {"op": "training steps", "provider": library, "mode": one["mode"], "dtype": "bfloat16"}
                | {"shape": f"0.5B V=151936 batch={batch}", "unit": "tokens/s", "peak_bytes": one["peak_bytes"]}
                | percentiles(one["tokens_per_second_of_steps"])
                for one in measured
            ]
            if not dry:
                append_rows(results_file(), rows)
    return found


PARTS: dict[str, Callable[[bool], dict]] = {
    "numerics": numerics,
    "tests": tests,
    "kernels": lambda dry: bench("kernels", dry),
    "forms": forms,
    "layers": lambda dry: bench("layers", dry),
    "attention": lambda dry: bench("attention", dry),
    "train": train,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, help="default: benchmarks/results/suite/<device>.json")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--again", action="store_true", help="measure parts that are in the file already")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU too; nothing is kept")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        if not options.dry_run:
            raise SystemExit("No GPU here: the suite measures one. `--dry-run` runs every part at tiny sizes.")
        os.environ |= {"FASTALIGN_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    from results_file import results_file

    output = options.output or results_file().parent / "suite" / results_file().name
    results = {}
    if output.exists() and not options.again and not options.dry_run:
        results = json.loads(output.read_text())
    results["machine"] = machine()
    for name in options.parts:
        if name in results:
            continue
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        try:
            results[name] = PARTS[name](options.dry_run)
        except Exception as error:  # the other parts are worth having
            results[name] = {"exit_code": f"{type(error).__name__}: {error}"}
        print(json.dumps(results[name], indent=1), f"\n{time.perf_counter() - start:.0f} s", flush=True)
        if not options.dry_run:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(isinstance(part, dict) and part.get("exit_code") for part in results.values()))


if __name__ == "__main__":
    sys.exit(main())
