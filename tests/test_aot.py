"""Every kernel as compiled for the cards that matter: no spills, shared memory that fits, the instructions meant.

Registers and shared memory are held against a golden file, so that a change of a kernel or a table shows what it
costs. After a change that is meant: `python tests/test_aot.py` writes the file anew (with the Triton that is
installed), and the table in docs/kernels.md.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
GOLDEN = HERE / "aot_registers.json"
ARCHITECTURES = (80, 90, 100)
FP8_KERNELS = {"_quantise_rows_kernel", "_quantise_columns_kernel"}  # e4m3 came after Ampere
PAGE = HERE.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- kernels as compiled: written by tests/test_aot.py -->", "<!-- end of kernels as compiled -->"
if sys.platform != "linux":
    pytest.skip("Triton's assembler runs on Linux", allow_module_level=True)


def compiled_for(arch: int, folder: Path) -> dict:
    """What tests/aot_compile.py found, in a process of its own: this one has Triton in interpreter mode."""
    output = folder / f"{arch}.json"
    environment = os.environ | {"FASTALIGN_KERNELS": "triton", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(HERE / "aot_compile.py"),
        "--arch",
        str(arch),
        "--output",
        str(output),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


def resources_of(facts: dict) -> dict[str, list[list]]:
    """Case -> [kernel, registers, bytes of shared memory] of each of its binaries, sorted."""
    return {
        name: sorted([b["kernel"], b["registers"], b["shared"]] for b in found["binaries"])
        for name, found in facts["cases"].items()
    }


def kernels_of_the_library() -> set[str]:
    """Names of all functions that are launched: decorated with triton.jit, and named so."""
    source = "".join(path.read_text() for path in (HERE.parent / "kernels").rglob("*.py"))
    return set(re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", source))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills(arch, tmp_path):
    from fastalign_kernels.launch import SHARED_MEMORY

    facts = compiled_for(arch, tmp_path)
    compiled = {binary["kernel"] for found in facts["cases"].values() for binary in found["binaries"]}
    assert compiled == kernels_of_the_library() - (FP8_KERNELS if arch == 80 else set())
    for name, found in facts["cases"].items():
        for binary in found["binaries"]:
            label, instructions = f"sm_{arch}, {name}: {binary}", binary["instructions"]
            assert binary["stack"] == 0, label
            assert "fp64" not in instructions, label  # a Python number outside of fp32's range makes them
            assert binary["shared"] <= SHARED_MEMORY[arch], label
            if binary["kernel"] == "score_product_kernel" and name.startswith(("offset ", "offset-gradient ")):
                meant = {80: {"mma"}, 90: {"wgmma", "tma_load"}, 100: {"tcgen05", "tma_load"}}[arch]
                assert meant <= instructions.keys(), label
                assert arch == 80 or "mma" not in instructions, label
            if name.startswith(("rows V=32000", "glu silu", "rms_norm D=4096")):
                assert instructions["load_128"] and instructions["store"], label
    golden = json.loads(GOLDEN.read_text()).get(facts["triton"], {}).get(str(arch))
    if golden is not None:  # another version of Triton allots registers differently; the rules above hold for all
        assert resources_of(facts) == golden, "registers changed; if that is meant: python tests/test_aot.py"
    check_launches(facts["cases"]["launches of a cross-entropy with masked targets"])


def check_launches(found: dict) -> None:
    """64 positions, half of them masked, one chunk: one program for each scored row, and no other launch."""
    launches = Counter((launch["kernel"], tuple(launch["grid"])) for launch in found["launches"])
    assert launches == {("_row_stats_fwd_kernel", (32,)): 1, ("_row_gradient_bwd_kernel", (32,)): 1}


def span(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def table(golden: dict) -> str:
    """Markdown: registers of each kernel's binaries and their shared memory at most, by architecture."""
    found: dict[str, dict[str, list[list]]] = {}
    for arch, cases in golden.items():
        for binary in itertools.chain.from_iterable(cases.values()):
            found.setdefault(binary[0], {}).setdefault(arch, []).append(binary)
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in ARCHITECTURES) + " |", "|---|---|---|---|"]
    for kernel, by_arch in sorted(found.items()):
        cells = []
        for arch in map(str, ARCHITECTURES):
            binaries = by_arch.get(arch, [])
            shared = max((size for _, _, size in binaries), default=0)
            size = f"{shared / 1024:.0f} KiB" if shared >= 1024 else f"{shared} B"
            cells.append(f"{span([r for _, r, _ in binaries])}, {size}" if binaries else "")
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(page: str, golden: dict) -> str:
    """The page of the docs with the table of the newest Triton's binaries."""
    before, rest = page.split(BEGIN)
    version = max(golden, key=lambda text: [int(part) for part in text.split(".")])
    about = f"Registers a thread, and shared memory at most, of all configurations; Triton {version}:"
    return f"{before}{BEGIN}\n{about}\n\n{table(golden[version])}\n{END}{rest.split(END)[1]}"


def test_the_table_of_the_docs_is_that_of_the_golden_file():
    page, golden = PAGE.read_text(), json.loads(GOLDEN.read_text())
    assert with_table(page, golden) == page, "docs/kernels.md is out of date: python tests/test_aot.py"
    assert {"3.6.0", "3.9.0"} <= golden.keys()


def write_golden() -> None:
    """Compile everything, write the resources of this Triton's binaries, and the table of the docs."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHITECTURES:
            facts = compiled_for(arch, Path(folder))
            golden.setdefault(facts["triton"], {})[str(arch)] = resources_of(facts)
    blocks = []
    for version, by_arch in sorted(golden.items()):
        parts = []
        for arch, cases in sorted(by_arch.items()):
            lines = [f"   {json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(cases.items())]
            parts.append(f'  "{arch}": {{\n' + ",\n".join(lines) + "\n  }")
        blocks.append(f' "{version}": {{\n' + ",\n".join(parts) + "\n }")
    GOLDEN.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    PAGE.write_text(with_table(PAGE.read_text(), golden))


if __name__ == "__main__":
    write_golden()
