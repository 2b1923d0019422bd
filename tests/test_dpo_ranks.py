"""Two ranks that share the weights (FSDP2) train on pairs as one process does, with every kind of reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dpo_ranks import CASES, run
from test_distributed import KINDS, LAUNCH

from fastalign import reference


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    kept = reference.HF_DATASETS_CACHE
    found = run(tmp_path_factory.mktemp("single"), accumulation=2)
    reference.HF_DATASETS_CACHE = kept
    return found


def test_two_ranks_do_what_one_process_does(single, tmp_path):
    script = Path(__file__).with_name("dpo_ranks.py")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path])}
    env.pop("ACCELERATE_USE_CPU", None)
    command = [*LAUNCH, *KINDS["fsdp2"][0], str(script), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kind"] == "FSDP 2"
    for name in CASES:
        mine, expected = torch.tensor(found[name]), torch.tensor(single[name])
        torch.testing.assert_close(mine, expected, rtol=2e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
