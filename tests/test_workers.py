"""Processes that answer requests: what nobody waits for does not run, and nothing outlives the process that asks."""

import subprocess
import sys
import threading
import time

import pytest

from fastalign.rewards import confinement
from fastalign.rewards.code_execution import get_code_execution_reward
from fastalign.rewards.workers import WorkerPool
from fastalign.rollout.rewards import RewardPool
from fastalign.rollout.samples import Sample

MODULE = """
import time
from fastalign.rewards.workers import serve
def answer(request):
    with open(request["log"], "a") as file:
        file.write(str(request["number"]))
    time.sleep(request["seconds"])
    return {"number": request["number"]}
def main(folder):
    serve(answer)
"""
confined = pytest.mark.skipif(confinement.obstacle() is not None, reason=str(confinement.obstacle()))


@pytest.fixture
def pool(tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = WorkerPool("sleeper", 1)
    yield found
    found.close()


def numbered(folder, count, seconds):
    return [{"number": i, "seconds": seconds, "log": str(folder / "log")} for i in range(count)]


def score(function, completions, timeout=None):
    samples = [Sample({"prompt": "p", "tests": "pass"}, [1], [2], None, "stop", text) for text in completions]
    return RewardPool([function], timeout=timeout).submit(samples).result().rewards[:, 0].tolist()


def test_requests_of_a_call_that_was_given_up_do_not_begin(pool, tmp_path):
    def asks(completions, **kwargs):
        replies = pool.ask(numbered(tmp_path, len(completions), 0.2 if len(completions) == 20 else 0.0), 60.0)
        return [reply["number"] for reply in replies]

    assert score(asks, "ab") == [0, 1]  # the process is there from now on
    assert str(score(asks, "x" * 20, timeout=0.3)) == str([float("nan")] * 20)
    assert score(asks, "abc", timeout=1.5) == [0, 1, 2]  # 20 requests would take 4 seconds
    assert (tmp_path / "log").read_text() in ("01" + "01" + "012", "01" + "012" + "012")


def test_closing_ends_what_is_being_asked(pool, tmp_path):
    errors = []

    def asks():
        try:
            pool.ask(numbered(tmp_path, 3, 30.0), 60.0)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=asks)
    thread.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    start, process = time.monotonic(), pool._workers[0].process
    pool.close()
    thread.join(5)
    assert time.monotonic() - start < 5 and process.returncode == -9
    assert errors == ["The processes were ended while they were asked."]
    assert pool.ask(numbered(tmp_path, 1, 0.0), 60.0) == [{"number": 0}]  # it starts again


def test_the_end_of_the_process_waits_for_no_answer(pool, tmp_path):
    code = f"""
import os, sys, threading, time
sys.path.insert(0, {str(tmp_path)!r})
from fastalign.rewards.workers import WorkerPool
pool = WorkerPool("sleeper", 1)
requests = [{{"number": 0, "seconds": 30.0, "log": {str(tmp_path / "log")!r}}}] * 9
threading.Thread(target=pool.ask, args=(requests, 60.0), daemon=True).start()
while not os.path.exists({str(tmp_path / "log")!r}):
    time.sleep(0.01)
print(pool._folder)
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25, check=True)
    assert time.monotonic() - start < 20 and (tmp_path / "log").read_text() == "0"
    assert subprocess.run(["ls", done.stdout.strip()], capture_output=True).returncode != 0  # nor does a folder stay


@confined
def test_an_answer_that_runs_out_of_time_is_not_tried_further():
    reward = get_code_execution_reward(timeout=0.3, num_workers=2)
    slow = "def f(x):\n    while x:\n        pass"
    tests = ["assert f(0) is None", *["f(1)"] * 12, "assert f(0) is None"]
    log = {}
    start = time.monotonic()
    found = reward([slow, "def f(x):\n    pass"], tests=[tests, tests], log_extra=log.__setitem__)
    assert found == [1 / 14, 1.0] and log["code_execution"] == ["timeout", ""]  # the last one passes, and is too late
    assert time.monotonic() - start < 3
    reward._sandbox.close()
