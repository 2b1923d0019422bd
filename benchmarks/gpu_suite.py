"""Everything that only a GPU can show, in one call of under nine minutes, with nothing downloaded.

    python benchmarks/gpu_suite.py                 on a GPU
    python benchmarks/gpu_suite.py --dry-run       on a CPU: tiny shapes, kernels in Triton's interpreter

Parts: the tests of kernels as compiled, numerics in bf16, head, layers and attention against peers and the roof, the
choice between the two forms of the head, training against TRL on a random model of half a billion parameters. Each
part is written to the output as soon as it is done, and a part that stands there is skipped, so that a call that was
cut off goes on where it stopped (`--again` measures anew). Timings are rows of benchmarks/results/<device>.json too.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
KERNEL_TESTS = [
    *["test_triton_rows.py", "test_offset.py", "test_layers.py", "test_linear_divergence.py"],
    *["test_head.py", "test_attention.py", "test_policy.py"],
]
FORM_SHAPES = [
    (16384, h, v) for h, v in [(896, 151936), (2048, 128256), (4096, 128256), (2048, 32000), (2304, 256000)]
]
LIMITS = {"tests": 150, "kernels": 110, "layers": 40, "attention": 40, "train": 170}  # seconds
HALF_BILLION = {  # the shape of Qwen2-0.5B
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


def machine() -> dict:
    """Device and versions."""
    from results_file import commit, device_name, installed

    names = ("torch", "triton", "transformers", "trl", "liger-kernel", "flash-attn", "quack-kernels")
    versions = {name: version for name in names if (version := installed(name))}
    return {"device": device_name(), "commit": commit(), **versions}


def _run(command: list[str], limit: int) -> dict:
    """Exit code and the last lines of a command that may take `limit` seconds."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, capture_output=True, text=True, timeout=limit,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as stopped:
        code, text = "stopped", (stopped.stdout or b"").decode(errors="replace")
    seconds = round(time.perf_counter() - start, 1)
    return {"exit_code": code, "seconds": seconds, "lines": text.strip().splitlines()[-80:]}


def tests(dry: bool) -> dict:
    """The tests of kernels: compiled on a GPU, in the interpreter without one."""
    files = [f"tests/{name}" for name in KERNEL_TESTS if (HERE.parent / "tests" / name).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    return _run(command + (["-k", "float32 and not gradcheck", "-x"] if dry else ["-m", "not slow"]), LIMITS["tests"])


def bench(name: str, dry: bool) -> dict:
    """A benchmark of kernels; its rows are in the results file."""
    command = [sys.executable, str(HERE / f"{name}.py")]
    return _run([*command, "--dry-run"] if dry else [*command, "--repeats", "5"], LIMITS[name])


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
    """Tokens per second and peak memory of training here and in TRL on a random model of 0.5B parameters."""
    from sft_against_trl import MODES, SMALL, make_model_folder, make_texts

    found: dict[str, dict] = {}
    rows = make_texts(200 if dry else 2000)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        make_model_folder(folder / "model", rows, 1000 if dry else 151_936, SMALL if dry else HALF_BILLION)
        for mode, settings in MODES.items():
            options = settings | {"bf16": True, "max_steps": 2 if dry else 20, "per_device_train_batch_size": 8}
            for library in ("fastalign", "trl"):
                script = [sys.executable, str(HERE / "sft_against_trl.py"), "--child"]
                done = _run([*script, library, name, json.dumps(options)], LIMITS["train"] // 4)
                if done["exit_code"]:
                    found[f"{mode} {library}"] = done
                    continue
                result = json.loads(next(line for line in reversed(done["lines"]) if line.startswith("{")))
                result["losses"], result["grad_norms"] = result["losses"][:5], result["grad_norms"][:5]
                found[f"{mode} {library}"] = result
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
