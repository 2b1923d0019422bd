"""Every kernel as compiled for the cards that matter: no spills, shared memory that fits, the instructions meant.

Registers are held against a golden file, so that a change of a kernel or a table shows what it costs. After a change
that is meant: `python tests/test_aot.py` writes the file anew (with the Triton that is installed).
"""

import json
import os
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


def registers_of(facts: dict) -> dict[str, list[str]]:
    """Case -> "kernel registers" of each of its binaries, sorted."""
    return {
        name: sorted(f"{b['kernel']} {b['registers']}" for b in found["binaries"])
        for name, found in facts["cases"].items()
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills(arch, tmp_path):
    from fastalign_kernels.launch import SHARED_MEMORY

    facts = compiled_for(arch, tmp_path)
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
        assert registers_of(facts) == golden, "registers changed; if that is meant: python tests/test_aot.py"
    check_launches(facts["cases"]["launches of a cross-entropy with masked targets"])


def check_launches(found: dict) -> None:
    """64 positions, half of them masked, one chunk: one program for each scored row, and no other launch."""
    launches = Counter((launch["kernel"], tuple(launch["grid"])) for launch in found["launches"])
    assert launches == {("_row_stats_fwd_kernel", (32,)): 1, ("_row_gradient_bwd_kernel", (32,)): 1}


def write_golden() -> None:
    """Compile everything and write the registers of this Triton's binaries."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHITECTURES:
            facts = compiled_for(arch, Path(folder))
            golden.setdefault(facts["triton"], {})[str(arch)] = registers_of(facts)
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write_golden()
