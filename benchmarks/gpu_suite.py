"""Everything that only a GPU can show, in one call: bf16 correctness, the head against its roofline, SFT.

    python benchmarks/gpu_suite.py --output benchmarks/results/gpu_suite.json

Each part is written to the file as soon as it is done, and a part that stands there is skipped, so that a call that
was cut off goes on where it stopped (`--again` measures everything anew). Nothing is downloaded. Takes under nine
minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
HEAD_SHAPES = [(8192, 896, 151936), (8192, 2048, 128256), (16384, 4096, 128256)]  # tokens, hidden size, vocabulary
HALF_BILLION = {  # the shape of Qwen2-0.5B
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


def machine() -> dict:
    """Device and versions."""
    import torch
    import transformers
    from results_file import commit, device_name

    return {
        "device": device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
    }


def tests(quick: bool) -> dict:
    """The tests that need a GPU: attention back ends and policies in bf16."""
    files = ["tests/test_attention.py", "tests/test_policy.py", "tests/test_head.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    command += ["-k", "cuda or gpu"] if not quick else ["-k", "gpu"]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    return {"exit_code": done.returncode, "summary": done.stdout.strip().splitlines()[-12:]}


def numerics(quick: bool, device: str) -> dict:
    """Relative errors of loss and gradients of the head in bf16 against fp64, at ordinary and at large logits."""
    import torch
    from fastalign_kernels import fused, linear_cross_entropy

    found = {}
    n, d, v = (64, 32, 500) if quick else (1024, 512, 32000)
    for scale in (1.0, 8.0):
        torch.manual_seed(0)
        hidden = (torch.randn(n, d, device=device) * scale).bfloat16().requires_grad_()
        weight = (torch.randn(v, d, device=device) / d**0.5).bfloat16().requires_grad_()
        targets = torch.randint(0, v, (n,), device=device)
        loss, stats = fused(hidden, weight, targets, lambda s, span: -s.logp.sum() / n)
        loss.backward()
        exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
        logp = (exact_hidden @ exact_weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        exact = -logp.mean()
        exact.backward()
        errors = {"logp_max": (stats.logp.double() - logp).abs().max().item()}
        for name, own, other in [("hidden", hidden, exact_hidden), ("weight", weight, exact_weight)]:
            errors[f"grad_{name}"] = ((own.grad.double() - other.grad).norm() / other.grad.norm()).item()
        errors["loss"] = abs(loss.item() / exact.item() - 1)
        errors["cross_entropy"] = abs(linear_cross_entropy(hidden, weight, targets).item() / exact.item() - 1)
        found[f"scale {scale:g}"] = errors
    return found


def head(quick: bool, device: str) -> dict:
    """Milliseconds of forward and backward, interleaved: ours, full logits, and the three products alone (the "
    "roof)."""
    import torch
    from fastalign_kernels import fused

    def ours(hidden, weight, targets):
        loss, _ = fused(hidden, weight, targets, lambda s, span: -s.logp.sum() / len(targets))
        loss.backward()

    def full_logits(hidden, weight, targets):
        torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets).backward()

    def products(hidden, weight, targets):
        with torch.no_grad():
            logits = hidden @ weight.T
            logits @ weight, logits.T @ hidden

    found = {}
    for n, d, v in [(256, 64, 1000)] if quick else HEAD_SHAPES:
        hidden = torch.randn(n, d, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = (torch.randn(v, d, device=device) / d**0.5).bfloat16().requires_grad_()
        targets = torch.randint(0, v, (n,), device=device)
        times: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        for repeat in range(2 if quick else 9):
            for run in (ours, full_logits, products):
                hidden.grad = weight.grad = None
                _wait(device)
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                run(hidden, weight, targets)
                _wait(device)
                if repeat > 0:  # the first one warms up
                    times.setdefault(run.__name__, []).append((time.perf_counter() - start) * 1e3)
                if device == "cuda":
                    peaks[run.__name__] = torch.cuda.max_memory_allocated()
        medians = {name: statistics.median(values) for name, values in times.items()}
        share = medians["products"] / medians["ours"]
        found[f"N={n} H={d} V={v}"] = {"milliseconds": medians, "share_of_roof": share, "peak_bytes": peaks}
    return found


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def sft(quick: bool) -> dict:
    """Tokens per second and peak memory of SFT here and in TRL on a random model of 0.5B parameters, packed and "
    "not."""
    from sft_against_trl import MODES, SMALL, make_model_folder, make_texts

    found: dict[str, dict] = {}
    rows = make_texts(200 if quick else 2000)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        make_model_folder(folder / "model", rows, 1000 if quick else 151_936, SMALL if quick else HALF_BILLION)
        for mode, settings in MODES.items():
            options = settings | {"bf16": True, "max_steps": 2 if quick else 20, "per_device_train_batch_size": 8}
            for library in ("fastalign", "trl"):
                command = [
                    sys.executable,
                    str(HERE / "sft_against_trl.py"),
                    "--child",
                    library,
                    name,
                    json.dumps(options),
                ]
                done = subprocess.run(
                    command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
                )
                if done.returncode:
                    found[f"{mode} {library}"] = {"error": done.stderr[-2000:]}
                    continue
                result = json.loads(done.stdout.strip().splitlines()[-1])
                result["losses"], result["grad_norms"] = result["losses"][:5], result["grad_norms"][:5]
                found[f"{mode} {library}"] = result
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results" / "gpu_suite.json")
    parser.add_argument("--parts", nargs="+", default=["tests", "numerics", "head", "sft"])
    parser.add_argument("--again", action="store_true", help="measure parts that are in the file already")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the script works, on a CPU too")
    options = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        raise SystemExit("No GPU here: the suite measures one. `--quick` runs every part at tiny sizes on the CPU.")
    parts = {
        "tests": lambda: tests(options.quick),
        "numerics": lambda: numerics(options.quick, device),
        "head": lambda: head(options.quick, device),
        "sft": lambda: sft(options.quick),
    }
    results = json.loads(options.output.read_text()) if options.output.exists() and not options.again else {}
    results["machine"] = machine()
    for name in options.parts:
        if name not in results:
            print(f"== {name}", flush=True)
            results[name] = parts[name]()
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
