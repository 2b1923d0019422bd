"""Runs that are killed: whatever the moment, the resumed run ends with the bits of one that was never stopped."""

import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from loop_runs import run

from fastalign.loop.checkpoint_files import checkpoints, find_last_checkpoint, problem

DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1}
SETTINGS = {"family": "gpt2", "model_kwargs": DROPOUT, "max_steps": 14, "logging_steps": 3, "save_steps": 2}


@pytest.fixture(scope="module")
def start():
    """Start `run(...)` in a process of its own; all are forked from one that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loop_runs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # else the fork server does not find what it preloads
        forkserver.ensure_running()
    children = []

    def start(*args, **options):
        child = context.Process(target=run, args=args, kwargs=options, daemon=True)
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        if child.is_alive():
            child.kill()
        child.join()


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    child = start(folder / "run", result=folder / "result", **SETTINGS)
    child.join(120)
    assert child.exitcode == 0
    return torch.load(folder / "result")


def wait_for(condition, child, seconds=60.0):
    """Poll until `condition()` holds or the process ended; whether it held."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and child.is_alive():
        if condition():
            return True
        time.sleep(0.0005)
    return False


def kill(child) -> bool:
    """Send SIGKILL; False if the process had ended before."""
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def finish(start, folder, uninterrupted, **settings):
    """Resume to the end; weights, log and the last checkpoint must be those of the uninterrupted run."""
    resume = True if find_last_checkpoint(folder) else None
    result = folder.with_name("result")
    child = start(folder, resume=resume, result=result, **(SETTINGS | settings))
    child.join(120)
    assert child.exitcode == 0
    found = torch.load(result)
    assert found["weights"].keys() == uninterrupted["weights"].keys()
    for name, value in uninterrupted["weights"].items():
        assert torch.equal(found["weights"][name], value), name
    assert found["history"][:-1] == uninterrupted["history"][:-1]  # the last line is of the last process alone
    assert not list(folder.glob("tmp-*"))
    assert all(problem(path) is None for path in checkpoints(folder))


def being_written(folder, after=0):
    return [p for p in Path(folder).glob("tmp-*") if int(p.name.rsplit("-", 1)[1]) > after]


@pytest.mark.parametrize("seed", range(2))
def test_killed_while_saving(seed, start, uninterrupted, tmp_path):
    # each time one step further, at another moment of the writing: just begun, or with some of its files there
    rng, folder, kills = random.Random(seed), tmp_path / "run", 0
    for step in (0, 3, 7, 10):
        resume = True if find_last_checkpoint(folder) else None
        child = start(folder, resume=resume, **SETTINGS)
        assert wait_for(lambda step=step: being_written(folder, step), child), child.exitcode
        time.sleep(rng.choice([0.0, 0.001, 0.003, 0.01, 0.03]))
        kill(child)
        kills += bool(being_written(folder))
        last = find_last_checkpoint(folder)
        assert last is None or problem(last) is None
    assert kills > 0  # at least one kill left a half-written folder
    finish(start, folder, uninterrupted)


def test_killed_at_any_moment(start, uninterrupted, tmp_path):
    rng, folder, kills = random.Random(5), tmp_path / "run", 0
    for _ in range(4):
        known = {path.name for path in checkpoints(folder)}
        child = start(folder, resume=True if known else None, save_total_limit=2, **SETTINGS)
        wait_for(lambda known=known: {p.name for p in checkpoints(folder)} - known, child)
        time.sleep(rng.uniform(0.0, 0.06))
        kills += kill(child)
        assert find_last_checkpoint(folder) is not None
    assert kills > 0
    finish(start, folder, uninterrupted, save_total_limit=2)
    assert len(checkpoints(folder)) == 2


def test_token_budget_and_adapters_survive_a_kill(start, tmp_path):
    settings = {"family": "llama", "model_kwargs": None, "peft": True, "token_budget": 90, "max_steps": 9}
    child = start(tmp_path / "a" / "run", result=tmp_path / "a" / "result", **(SETTINGS | settings))
    folder = tmp_path / "b" / "run"
    victim = start(folder, **(SETTINGS | settings))
    assert wait_for(lambda: being_written(folder, 3), victim), victim.exitcode
    kill(victim)
    child.join(120)
    finish(start, folder, torch.load(tmp_path / "a" / "result"), **settings)
