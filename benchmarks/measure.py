"""Times implementations of one op against each other: right first, then fast.

Every benchmark of kernels describes its cases here: what is computed, by whom, and how many operations and bytes the
mathematics needs. Each provider's result and gradients are held against fp64 before it is timed; one that is wrong is
named and left out. Repeats of all providers are interleaved, so that a busy moment of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from results_file import append_rows, installed, percentiles, results_file

Tensors = dict[str, torch.Tensor]
SPAN = 20.0  # ms of GPU time between two events, where one call takes less


@dataclass(frozen=True)
class Provider:
    """One implementation. `run(inputs)` gives the results to check by name; gradients are left in the inputs."""

    name: str
    run: Callable[[Tensors], Tensors]
    package: str = "torch"  # without it the provider is left out
    needs_cuda: bool = False
    tolerance: float | None = None  # where the provider's method is known to be less exact than the case asks


@dataclass
class Case:
    """One op at one shape and dtype."""

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[], Tensors]  # new inputs on the device; those that need gradients say so
    exact: Callable[[Tensors], Tensors]  # the specification, given the inputs in fp64
    providers: list[Provider]
    flops: float  # of the products
    bytes: float  # that have to be read and written
    mode: str = ""
    tolerance: dict[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
    )


def device() -> torch.device:
    """The device that is measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], object], times: int = 1) -> float:
    """Time of a call, a mean over `times` calls in a row; on a GPU between two of its events."""
    _finish()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) * 1e3 / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def _times_in_a_row(call: Callable[[], object]) -> int:
    """How often to call between two events: the GPU then waits for Python once, not in each call."""
    if not torch.cuda.is_available():
        return 1
    return max(1, min(20, round(SPAN / max(milliseconds(call), 1e-3))))


class Roof:
    """What the device can do, measured: products per second in a dtype, and bytes per second."""

    def __init__(self):
        self._found: dict[object, float] = {}

    def flops(self, dtype: torch.dtype) -> float:
        """Floating-point operations per second of a large product."""
        if dtype not in self._found:
            size = 8192 if device().type == "cuda" else 1024
            a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
            out = torch.empty(size, size, device=device(), dtype=dtype)
            best = min(milliseconds(lambda: torch.mm(a, b, out=out)) for _ in range(12))
            self._found[dtype] = 2 * size**3 / best * 1e3
        return self._found[dtype]

    def bandwidth(self) -> float:
        """Bytes per second, read and written, of a large copy."""
        if "copy" not in self._found:
            count = 2**30 if device().type == "cuda" else 2**26
            source = torch.ones(count, dtype=torch.uint8, device=device())
            target = torch.empty_like(source)
            best = min(milliseconds(lambda: target.copy_(source)) for _ in range(12))
            self._found["copy"] = 2 * count / best * 1e3
        return self._found["copy"]

    def seconds(self, case: Case) -> float:
        """Time for the case's products and bytes alone."""
        products = case.flops / self.flops(case.dtype) if case.flops else 0.0
        return max(products, case.bytes / self.bandwidth())


def _trim() -> None:
    """Give freed memory back, so that what is measured next starts from what is in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(found.group(1)) * 1024 if found else 0


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Memory that `call` takes at its highest above what is in use before; None where that cannot be read."""
    _trim()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _gradients(inputs: Tensors) -> Tensors:
    return {f"grad_{name}": t.grad for name, t in inputs.items() if t.requires_grad and t.grad is not None}


def _clear(inputs: Tensors) -> None:
    for tensor in inputs.values():
        tensor.grad = None


def _specification(case: Case, inputs: Tensors) -> Tensors:
    """Exact results and gradients: in fp64, or in fp32 where the device has no room for that."""
    for dtype in (torch.float64, torch.float32):
        wide = {
            name: t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for name, t in inputs.items()
        }
        try:
            return {name: value.detach() for name, value in case.exact(wide).items()} | _gradients(wide)
        except torch.OutOfMemoryError as error:
            full = str(error)
        del wide
        _trim()
    raise torch.OutOfMemoryError(full)


def largest_error(found: Tensors, exact: Tensors) -> float:
    """The largest relative error (norm of the difference over the norm) among results and gradients."""
    errors = [
        ((found[name].double() - value).norm() / value.norm().clamp_min(1e-300)).item()
        for name, value in exact.items()
        if name in found
    ]
    missing = [name for name in exact if name not in found]
    if missing:
        raise ValueError(f"{missing} were not computed")
    return max(errors) if all(e == e for e in errors) else float("inf")


def _interleaved(ready: list[Provider], inputs: Tensors, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each provider, one repeat of all after the other."""

    def call_of(provider: Provider) -> Callable[[], object]:
        def call() -> object:
            _clear(inputs)
            return provider.run(inputs)

        return call

    calls = {provider.name: call_of(provider) for provider in ready}
    in_a_row = {name: _times_in_a_row(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(milliseconds(call, in_a_row[name]))
    return times


def measure(case: Case, wanted: list[str], repeats: int, roof: Roof) -> list[dict]:
    """Rows of the case, one for each of the `wanted` providers that is installed and right."""
    torch.manual_seed(0)
    inputs = case.make()
    exact = _specification(case, inputs)
    errors, peaks, ready = {}, {}, []
    for provider in case.providers:
        if provider.name not in wanted:
            continue
        if reason := _why_not(provider):
            print(f"  {provider.name}: left out, {reason}")
            continue
        _clear(inputs)
        try:
            result = {k: v.detach() for k, v in provider.run(inputs).items()}  # warms up, too
            errors[provider.name] = largest_error(result | _gradients(inputs), exact)
        except Exception as error:  # a peer that cannot do this shape is a result, not the end
            print(f"  {provider.name}: left out, {type(error).__name__}: {str(error)[:200]}")
            continue
        allowed = provider.tolerance or case.tolerance[case.dtype]
        if errors[provider.name] > allowed:
            print(f"  {provider.name}: left out, its error {errors[provider.name]:.1e} is above {allowed:.0e}")
            continue
        result = None
        ready.append(provider)
    del exact
    for provider in ready:
        _clear(inputs)
        peaks[provider.name] = peak_bytes(lambda run=provider.run: run(inputs))
    times = _interleaved(ready, inputs, repeats)
    rows = []
    for provider in ready:
        row = {"op": case.op, "provider": provider.name, "mode": case.mode, "shape": case.shape, "unit": "ms"}
        row |= {"dtype": str(case.dtype).removeprefix("torch.")} | percentiles(times[provider.name])
        row |= {"share_of_roof": roof.seconds(case) * 1e3 / row["median"], "error": errors[provider.name]}
        if peaks[provider.name] is not None:
            row["peak_bytes"] = peaks[provider.name]
        if provider.package != "torch":
            row["peer"] = f"{provider.package} {installed(provider.package)}"
        rows.append({k: v for k, v in row.items() if v != ""})
        print(
            f"  {provider.name:14s} {row['median']:9.3f} ms ({row['p20']:.3f} to {row['p80']:.3f}), "
            f"{(row.get('peak_bytes') or 0) / 2**20:8.1f} MiB, {row['share_of_roof']:.2f} of the roof, "
            f"error {row['error']:.1e}",
            flush=True,
        )
    return rows


def _why_not(provider: Provider) -> str:
    if provider.package not in ("torch", "fastalign") and not installed(provider.package):
        return f"{provider.package} is not installed"
    if provider.needs_cuda and not torch.cuda.is_available():
        return "it needs a GPU"
    return ""


def parser_of(description: str | None, peers: list[str], shape_help: str) -> argparse.ArgumentParser:
    """The options that all benchmarks of kernels have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--against", type=lambda text: text.split(","), default=peers, metavar="A,B", help=f"among {', '.join(peers)}"
    )
    parser.add_argument("--shapes", nargs="+", metavar="AxBxC", help=shape_help)
    parser.add_argument("--ops", nargs="+", help="parts of the names of the ops to measure; default: all")
    parser.add_argument("--dtypes", nargs="+", default=None, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/<device>.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, one repeat, nothing is written")
    parser.add_argument("--plot", type=Path, help="also draw the times as a PNG (needs matplotlib)")
    return parser


def run_cases(cases: list[Case], options: argparse.Namespace) -> int:
    """Measure all cases, write the rows, draw them where asked; the exit code."""
    unknown = set(options.against) - {p.name for case in cases for p in case.providers}
    if unknown:
        print(f"--against: unknown {sorted(unknown)}", file=sys.stderr)
        return 2
    roof, rows, failed = Roof(), [], False
    for case in cases:
        if options.ops and not any(part in case.op for part in options.ops):
            continue
        print(f"{case.op} {case.mode} {case.shape} {str(case.dtype).removeprefix('torch.')}", flush=True)
        try:
            found = measure(case, ["fastalign", *options.against], 1 if options.dry_run else options.repeats, roof)
        except torch.OutOfMemoryError as error:  # the specification is what takes most
            print(f"  left out, {str(error)[:200]}")
            found = []
        except Exception as error:  # the other cases are worth having
            print(f"  failed, {type(error).__name__}: {str(error)[:400]}", flush=True)
            found, failed = [], True
        rows += found
        if not options.dry_run:  # each case at once: what is measured stays if a later one is stopped
            append_rows(options.output or results_file(), found)
        _trim()
    if options.plot:
        from plots import draw

        draw(rows, options.plot)
    return 0 if not failed and any(row["provider"] == "fastalign" for row in rows) else 1


def shapes_of(options: argparse.Namespace, default: list[tuple[int, ...]], tiny: tuple[int, ...]) -> list[tuple]:
    """The shapes asked for, each as many numbers as `tiny` has. Exits where one has another number of them."""
    if options.dry_run:
        return [tiny]
    shapes = [tuple(map(int, text.split("x"))) for text in options.shapes or []]
    if wrong := [shape for shape in shapes if len(shape) != len(tiny)]:
        raise SystemExit(f"--shapes {'x'.join(map(str, wrong[0]))}: give {len(tiny)} numbers, such as 2048x512x32000")
    return shapes or default


def dtypes_of(options: argparse.Namespace) -> list[torch.dtype]:
    """The dtypes asked for; by default bf16 on a GPU, fp32 and bf16 on a CPU."""
    names = options.dtypes or (["bfloat16"] if torch.cuda.is_available() else ["float32", "bfloat16"])
    return [getattr(torch, name) for name in names]
