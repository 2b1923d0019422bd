"""A head whose rows are spread over two ranks gives each rank what the whole head gives one; DTensor weights too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("head_ranks.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen([sys.executable, SCRIPT, str(rank), folder], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode == 0 for process in ranks), "\n".join(errors)[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["native float32", "reference float32", "reference float64"])
@pytest.mark.parametrize("what", ["fused plain", "fused all", "fused negative", "deferred plain", "deferred all",
                                  "deferred negative", "losses"])  # fmt: skip
def test_shards_equal_the_whole_head(found, kind, what):
    """Statistics, losses and gradients; ties and impossible tokens (which count as errors of 1)."""
    for rank in found:
        errors = rank["errors"][f"{kind} {what}"]
        worst = max(errors, key=errors.get)
        assert errors[worst] < (1e-12 if kind.endswith("64") else 1e-6), (worst, errors)


@pytest.mark.parametrize(
    "case",
    [*(f"{op} {place}" for op in ("fused", "deferred") for place in ("shard", "replicate", "fsdp")), "loss shard"],
)
def test_dtensor_weights_get_the_mean_gradient(found, case):
    for rank in found:
        errors = rank["errors"][f"dtensor {case}"]
        assert max(errors.values()) < 1e-12, errors


def test_other_placements_are_refused(found):
    for rank in found:
        weight, hidden = rank["refusals"]
        assert "weight is a DTensor placed as (Shard(dim=1),)" in weight and "redistribute" in weight
        assert "hidden is a DTensor" in hidden
