"""Reward functions run side by side: what they are given, what they may do wrong, and what that costs."""

import asyncio
import functools
import math
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fastalign.rollout.rewards import RewardError, RewardPool, join_scores, split_groups
from fastalign.rollout.samples import Sample

NAN = math.nan


def sample(prompt: str, completion: str, *, environment=None, extras=None, **columns) -> Sample:
    return Sample(
        {"prompt": prompt, **columns},
        [1, 2],
        [ord(c) for c in completion],
        None,
        "stop",
        completion,
        environment=environment,
        extras=extras or {},
    )


SAMPLES = [sample("p", "a", answer=1), sample("p", "bb", answer=1), sample("q", "ccc", answer=2)]


def score(functions, samples=SAMPLES, state=None, **options):
    pool = RewardPool(functions, **options)
    try:
        return pool.submit(samples, state).result()
    finally:
        pool.close()


def equal(found, expected) -> bool:
    return torch.equal(found.nan_to_num(-99), torch.tensor(expected).float().nan_to_num(-99))


def length(completions, **kwargs):
    return [len(c) for c in completions]


def test_functions_get_what_trl_gives():
    seen = {}

    def everything(**kwargs):
        seen.update(kwargs)
        return [0.0] * 3

    def named(completion_ids, answer, tag=None):
        return [len(ids) + a for ids, a in zip(completion_ids, answer, strict=True)]

    environments = [object(), object(), object()]
    columns = {"completion": "the dataset's", "completion_ids": [0]}  # names that belong to the samples
    samples = [
        sample("ppq"[i], "abc"[i], answer=i, environment=environments[i], extras={"turns": 7 + i}) for i in range(3)
    ]
    for one in samples:
        one.row |= columns
    state = SimpleNamespace(global_step=4)
    found = score([everything, named], samples, state)
    assert equal(found.rewards, [[0, 1], [0, 2], [0, 3]])
    assert seen.pop("trainer_state").global_step == 4
    assert callable(seen.pop("log_extra")) and callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": ["p", "p", "q"],
        "completions": ["a", "b", "c"],
        "completion_ids": [[97], [98], [99]],
        "answer": [0, 1, 2],
        "turns": [7, 8, 9],
        "environments": environments,
    }


def test_weights_names_and_numbers_of_any_kind():
    class Judge:
        def __call__(self, completions, **kwargs):
            return torch.arange(len(completions))

    def half(completions, share, **kwargs):
        return [True, None, share]

    pool = RewardPool([length, functools.partial(half, share=0.5), Judge(), length], [1, 2, 0.5, 0])
    assert pool.names == ["length", "half", "Judge", "length_2"]
    assert pool.weights.tolist() == [1, 2, 0.5, 0]
    pool.add("Game", length, 3.0)
    found = pool.submit(SAMPLES).result()
    assert equal(found.rewards, [[1, 1, 0, 1, 1], [2, NAN, 1, 2, 2], [3, 0.5, 2, 3, 3]])
    assert found.failures == {} and not found.lost.any() and pool.weights.tolist()[-1] == 3.0


def test_slow_functions_overlap_and_one_functions_calls_do_not():
    busy, most = [0], [0]

    def alone(completions, **kwargs):
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.05)
        busy[0] -= 1
        return [0.0] * len(completions)

    def slow(completions, **kwargs):
        time.sleep(0.2)
        return [1.0] * len(completions)

    def slower(completions, **kwargs):
        time.sleep(0.3)
        return [2.0] * len(completions)

    async def waits(completions, **kwargs):
        await asyncio.sleep(0.3)
        return [3.0] * len(completions)

    pool = RewardPool([alone, slow, slower, waits])
    start = time.monotonic()
    pending = [pool.submit([one]) for one in SAMPLES[:1]] + [pool.submit(SAMPLES[1:])]
    assert time.monotonic() - start < 0.1
    found = join_scores([one.result() for one in pending])
    assert time.monotonic() - start < 0.8  # one after the other: 1.7
    assert most[0] == 1 and equal(found.rewards, [[0, 1, 2, 3]] * 3)
    assert 0.55 < found.seconds["slower"] < 0.8


def test_async_functions_share_a_loop_and_run_at_the_same_time():
    met, loops = [], set()

    class Meets:
        def __init__(self, name):
            self.__name__ = name

        async def __call__(self, completions, **kwargs):
            met.append(self.__name__)
            loops.add(asyncio.get_running_loop())
            while len(met) < 2:
                await asyncio.sleep(0.001)
            return [None, 1, 2]

    found = score([Meets("x"), functools.partial(Meets("y"))], timeout=5)
    assert equal(found.rewards, [[NAN, NAN], [1, 1], [2, 2]]) and len(loops) == 1


def test_a_failing_call_costs_its_own_group():
    calls = []

    def fails_on_b(completions, log_extra, log_metric, **kwargs):
        calls.append(completions)
        log_metric("calls", len(completions))
        log_extra("seen", completions)
        if "bb" in completions:
            raise KeyError("no such answer")
        return length(completions)

    async def fails_too(completions, **kwargs):
        return fails_on_b(completions, **kwargs)

    for function in (fails_on_b, fails_too):
        calls.clear()
        found = score([function, length])
        assert calls == [["a", "bb", "ccc"], ["a", "bb"], ["ccc"]]
        assert equal(found.rewards, [[NAN, 1], [NAN, 2], [3, 3]])
        assert found.lost.tolist() == [[True, False], [True, False], [False, False]]
        assert found.failures == {function.__name__: 2} and "no such answer" in found.errors[function.__name__]
        assert found.metrics == {"calls": [1.0]} and found.columns == {"seen": [None, None, "ccc"]}
        found.check()


@pytest.mark.parametrize(
    "returned", [[1.0], [1.0] * 4, None, 3.0, ["many"] * 3, (x for x in "abc")], ids=lambda value: str(value)[:20]
)
def test_wrong_answers_are_failures_and_an_error_where_nothing_else_comes(returned):
    def wrong(**kwargs):
        return returned

    found = score([wrong, length])
    assert equal(found.rewards, [[NAN, 1], [NAN, 2], [NAN, 3]]) and found.failures == {"wrong": 1}
    with pytest.raises(RewardError, match="'wrong' failed on all 3 completions"):
        found.check()
    with pytest.raises(RewardError, match="'wrong' failed"):
        score([wrong, length], on_error="raise")


def test_a_function_that_ends_the_interpreter_does_not():
    def leaves(**kwargs):
        sys.exit(3)

    async def leaves_too(**kwargs):
        raise SystemExit(3)

    found = score([leaves, leaves_too, length], timeout=5)
    assert equal(found.rewards[:, 2], [1, 2, 3]) and found.failures == {"leaves": 3, "leaves_too": 3}


def test_nan_and_infinity_count_and_none_does_not():
    def odd(**kwargs):
        return [NAN, math.inf, 1.0]

    def unsure(**kwargs):
        return [None, None, None]

    found = score([odd, unsure])
    assert equal(found.rewards, [[NAN, NAN], [NAN, NAN], [1, NAN]])
    assert found.failures == {"odd": 1} and not found.lost.any()
    found.check()


def test_all_samples_without_a_score_are_warned_of(caplog):
    found = score([lambda completions: [None, 1.0, None]])
    found.check()
    assert "No reward function scored 2 of 3 completions" in caplog.text


def test_a_hanging_call_is_given_up_and_the_next_one_runs():
    release, threads = threading.Event(), []

    def hangs_on_a(completions, **kwargs):
        threads.append(threading.current_thread())
        if "a" in completions:
            release.wait(20)
        return length(completions)

    pool = RewardPool([hangs_on_a, length], timeout=0.3)
    start = time.monotonic()
    pending = [pool.submit(SAMPLES[:2]), pool.submit(SAMPLES[2:])]
    found = join_scores([one.result() for one in pending])
    assert 0.3 <= time.monotonic() - start < 2
    assert equal(found.rewards, [[NAN, 1], [NAN, 2], [3, 3]])
    assert found.failures == {"hangs_on_a": 1} and "time-out of 0.3 s" in found.errors["hangs_on_a"]
    assert len(set(threads)) == 2 and threads[0].daemon
    found.check()
    release.set()
    threads[0].join(5)
    assert equal(pending[0].result().rewards, [[NAN, 1], [NAN, 2]])  # what comes late changes nothing
    assert equal(pool.submit(SAMPLES[2:]).result().rewards, [[3, 3]])


def test_a_hang_in_the_second_attempt_keeps_what_was_scored():
    def hard(completions, **kwargs):
        if len(completions) > 2:
            raise ValueError("too many")
        if "ccc" in completions:
            time.sleep(20)
        return length(completions)

    found = score([hard], timeout=0.3)
    assert equal(found.rewards, [[1], [2], [NAN]]) and found.lost.flatten().tolist() == [False, False, True]
    assert found.failures == {"hard": 2}


def test_async_time_outs_and_a_blocked_loop():
    cancelled = []

    async def sleeps(completions, **kwargs):
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def fine(completions, **kwargs):
        return length(completions)

    async def blocks(completions, **kwargs):
        time.sleep(3 if "a" in completions else 0)
        return length(completions)

    found = score([sleeps, fine], timeout=0.2)
    assert equal(found.rewards, [[NAN, 1], [NAN, 2], [NAN, 3]]) and cancelled == [True]
    pool = RewardPool([blocks, fine], timeout=0.2)
    start = time.monotonic()
    found = pool.submit(SAMPLES).result()
    assert time.monotonic() - start < 2.5 and found.failures["blocks"] == 1
    assert equal(pool.submit(SAMPLES[2:]).result().rewards, [[3, 3]])  # on a loop of its own


def test_functions_that_need_the_main_thread_get_it():
    threads = []

    def alarmed(completions, **kwargs):
        threads.append(threading.current_thread())
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        return length(completions)

    def worded_by_math_verify(completions, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("Math-Verify 'parse' function doesn't support threaded environment due to signal.alarm()")
        return length(completions)

    pool = RewardPool([alarmed, worded_by_math_verify])
    for _ in range(2):
        found = pool.submit(SAMPLES).result()
        assert equal(found.rewards, [[1, 1], [2, 2], [3, 3]]) and found.failures == {} and not found.lost.any()
    assert [thread is threading.main_thread() for thread in threads] == [False, True, True]

    for asked in (RewardPool([alarmed, length]), pool):  # nobody is there to run it
        results = []
        asks = threading.Thread(target=lambda p=asked, r=results: r.append(p.submit(SAMPLES).result()))
        asks.start()
        asks.join(5)
        assert results[0].lost[:, 0].all() and "main thread" in results[0].errors["alarmed"]

    async def cannot_move(completions, **kwargs):
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    found = score([cannot_move, length])
    assert found.lost[:, 0].all() and "main thread" in found.errors["cannot_move"]


def test_logs_of_functions_are_aligned_with_samples(caplog):
    def logs(completions, log_extra, log_metric, **kwargs):
        log_extra("length", length(completions))
        log_extra("short", [1])
        log_metric("longest", max(length(completions)))
        completions.clear()  # changes its own list alone
        return [0.0] * 2 if caplog is None else [0.0] * len(kwargs["prompts"])

    def other(completions, log_extra):
        log_extra("other", completions)
        return length(completions)

    pool = RewardPool([logs, other])
    parts = [pool.submit(SAMPLES[:2]), pool.submit(SAMPLES[2:])]
    found = join_scores([part.result() for part in parts])
    assert found.columns == {"length": [1, 2, 3], "other": ["a", "bb", "ccc"], "short": [None, None, 1]}
    assert found.metrics == {"longest": [2.0, 3.0]}
    assert "got 1 values for 2 completions" in caplog.text
    assert equal(found.rewards, [[0, 1], [0, 2], [0, 3]])


def test_the_state_is_that_of_the_submission():
    go = threading.Event()

    def step(prompts, trainer_state):
        go.wait(5)
        return [trainer_state.global_step] * len(prompts)

    state = SimpleNamespace(global_step=1)
    pool = RewardPool(step)
    pending = pool.submit(SAMPLES, state)
    state.global_step = 2
    go.set()
    assert equal(pending.result().rewards, [[1]] * 3)


def test_joining_adds_up_in_order():
    def odd(completions, **kwargs):
        if completions == ["ccc"]:
            raise OSError("gone")
        return [-c for c in length(completions)]

    pool = RewardPool([odd, length])
    parts = [pool.submit(part) for part in (SAMPLES[2:], SAMPLES[:1], SAMPLES[2:], SAMPLES[1:2], [])]
    found = join_scores([part.result() for part in parts])
    assert equal(found.rewards, [[NAN, 3], [-1, 1], [NAN, 3], [-2, 2]])
    assert found.failures == {"odd": 2} and found.lost[:, 0].tolist() == [True, False, True, False]


def test_groups_are_neighbours_with_the_same_prompt():
    prompts = ["a", "a", "b", "a", [{"role": "user"}], [{"role": "user"}], "c"]
    assert split_groups(prompts) == [range(0, 2), range(2, 3), range(3, 4), range(4, 6), range(6, 7)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reward_weights": [1.0]}, "`reward_weights` has 1 numbers for 2"),
        ({"reward_processing_classes": [None]}, "`reward_processing_classes` has 1 entries for 2"),
        ({"timeout": 0}, "`reward_timeout` is 0"),
        ({"timeout": math.inf}, "`reward_timeout` is inf"),
        ({"on_error": "ignore"}, "allowed are 'skip' and 'raise'"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RewardPool([length, length], **options)
    with pytest.raises(ValueError, match="`reward_funcs` has 3"):
        RewardPool([length, 3])
