"""Two ranks evaluate, predict, keep token budgets and read streams as one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loop_ranks import run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("loop_ranks.py")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path])}
    env["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    started = subprocess.Popen(
        [*command, str(folder / "out.json")], env=env, cwd=folder, stderr=subprocess.PIPE, text=True
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        one = run(world=1)
    finally:
        os.chdir(before)
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors[-3000:]
    return json.loads((folder / "out.json").read_text()), one


@pytest.mark.parametrize("name", ["evaluated", "budget None", "budget 30", "stream"])
def test_two_ranks_log_what_one_process_logs(name, results):
    two, one = results[0][name], results[1][name]
    assert len(two) == len(one) >= 5
    for mine, other in zip(two, one, strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() - {"total_flos"}:  # padding differs with the micro-batches
            assert mine[key] == pytest.approx(other[key], rel=2e-5), key


def test_predictions_of_two_ranks_have_each_row_once(results):
    assert results[0]["predicted"] == results[1]["predicted"] == [7, 12, 331, 7]


def test_predictions_of_two_ranks_have_each_answer_of_a_pair_once(results):
    assert results[0]["answers"] == results[1]["answers"]
    assert [number for number, _ in results[0]["answers"]] == [14, 14]


def test_rows_that_fill_up_the_last_batches_count_nowhere(results):
    """Means over pairs; CPO's and ORPO's losses have a mean over the tokens of a batch, which ranks cut otherwise."""
    for number, (two, one) in enumerate(zip(results[0]["pairs"], results[1]["pairs"], strict=True)):
        means = {k for k in one if number == 0 or k.startswith(("eval_rewards", "eval_logps"))}
        assert "eval_rewards/margins" in means
        assert {k: two[k] for k in means} == pytest.approx({k: one[k] for k in means}, rel=2e-5)


def test_evaluation_ran(results):
    assert [entry["eval_rows"] for entry in results[0]["evaluated"] if "eval_rows" in entry] == [12, 12]
