"""Compiles the launches of library code for a GPU that is not there and reads what came out of the assembler.

    FASTALIGN_KERNELS=triton TRITON_INTERPRET=0 python tests/aot_compile.py --arch 90 --output facts.json

A stand-in for the driver lets library code on CPU tensors launch its kernels as on a card: each launch is specialised
from its real arguments and compiled, and nothing runs (outputs keep what the memory held). Registers, stack and shared
memory are read from the binary, with the cuobjdump of the Triton wheel: what spills has a stack. The instructions that
matter are counted in the PTX, as disassembling every binary takes longer than compiling it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTIONS = {  # of PTX
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"\bmma\.sync",
    "tma_load": r"\bcp\.async\.bulk\.tensor\.\w+\.shared",
    "tma_store": r"\bcp\.async\.bulk\.tensor\.\w+\.global",
    "load": r"\bld\.global",
    "load_128": r"\bld\.global[\w.:]*\.v4\.b32",
    "store": r"\bst\.global",
    "store_128": r"\bst\.global[\w.:]*\.v4\.b32",
    "fp64": r"\.f64\b",
    "atomic": r"\b(?:atom|red)\.",
}


@dataclasses.dataclass
class Binary:
    """What one specialisation of one kernel became."""

    kernel: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]


@dataclasses.dataclass
class Launch:
    """One launch: which binary (index), and the grid."""

    kernel: str
    binary: int
    grid: tuple[int, ...]


@dataclasses.dataclass
class Log:
    """All launches inside of one `compiling_for`."""

    binaries: list[Binary] = dataclasses.field(default_factory=list)
    launches: list[Launch] = dataclasses.field(default_factory=list)


class _Device:
    """The part of a driver that is asked before a launch."""

    def __init__(self, arch: int):
        self._target = GPUTarget("cuda", arch, 32)
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        from fastalign_kernels.launch import MULTIPROCESSORS_ELSEWHERE, SHARED_MEMORY

        return {
            "max_shared_mem": SHARED_MEMORY[self._target.arch],
            "multiprocessor_count": MULTIPROCESSORS_ELSEWHERE,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@functools.cache
def _read(compiled, name: str) -> Binary:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        command = [str(CUOBJDUMP), "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, f"cuobjdump shows no resource usage: {usage}"
    registers, stack, static, local = map(int, found.groups())
    counts = {key: len(re.findall(pattern, compiled.asm["ptx"])) for key, pattern in INSTRUCTIONS.items()}
    return Binary(
        kernel=name,
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        registers=registers,
        stack=stack + local,
        shared=compiled.metadata.shared + max(0, static - 1024),  # the system's own 1 KiB is counted by cuobjdump
        instructions={key: count for key, count in counts.items() if count},
    )


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[Log]:
    """Inside, every launch is compiled for compute capability `arch` / 10, noted in the log, and not run."""
    log, known = Log(), {}
    run, before = JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup=False, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        name = self.fn.__name__
        if compiled.hash not in known:
            known[compiled.hash] = len(log.binaries)
            log.binaries.append(_read(compiled, name))
        if callable(grid):
            grid = grid(dict(zip(self.arg_names, args, strict=False)) | kwargs)
        log.launches.append(Launch(name, known[compiled.hash], tuple(grid)))
        return compiled

    JITFunction.run, driver._active = compile_only, _Device(arch)  # type: ignore[assignment]
    try:
        yield log
    finally:
        JITFunction.run, driver._active = run, before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, required=True, choices=[80, 90, 100])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="", help="a part of the names of the cases")
    options = parser.parse_args()
    os.environ["FASTALIGN_ARCH"] = str(options.arch)
    from aot_cases import CASES

    facts = {}
    for name, case in CASES.items():
        if options.only in name:
            torch.manual_seed(0)
            with compiling_for(options.arch) as log:
                case()
            facts[name] = dataclasses.asdict(log)
    options.output.write_text(json.dumps({"triton": triton.__version__, "arch": options.arch, "cases": facts}))


if __name__ == "__main__":
    main()
