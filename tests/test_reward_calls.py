"""Calls of reward functions: what they get is their own, what they may not return, and what they leave behind."""

import asyncio
import functools
import gc
import threading
import time
import weakref

import pytest
from scripted_engine import ScriptedEngine
from tool_cases import END, Dialogue, call, chat_tokenizer, user

from fastalign.rollout.engine import Sampling
from fastalign.rollout.episodes import Rollouts
from fastalign.rollout.generation import ScoredRollouts
from fastalign.rollout.reward_calls import own_copy
from fastalign.rollout.rewards import RewardPool
from fastalign.rollout.samples import Group, Sample


def said(text: str, prompt: str = "q", **columns) -> Sample:
    messages = [{"role": "assistant", "content": text, "tool_calls": [{"function": {"name": "f"}}]}]
    return Sample({"prompt": [{"role": "user", "content": prompt}], **columns}, [1], [2, 3], None, "stop", messages)


def test_functions_change_neither_samples_nor_what_others_get():
    seen = []

    def changes(prompts, completions, completion_ids, **kwargs):
        prompts[0][0]["content"] = completions[0][0]["tool_calls"][0]["function"]["name"] = "changed"
        completions[1].clear()
        completion_ids[0].append(9)
        return [1.0, 2.0]

    def reads(**kwargs):
        seen.append([kwargs[name] for name in ("prompts", "completions", "completion_ids")])
        return [0.0, 0.0]

    samples = [said("a"), said("b")]
    pool = RewardPool([changes, reads])
    for _ in range(2):
        assert pool.submit(samples).result().rewards.tolist() == [[1, 0], [2, 0]]
    fresh = [said("a"), said("b")]
    assert samples == fresh
    assert seen == [[[one.row["prompt"] for one in fresh], [one.completion for one in fresh], [[2, 3], [2, 3]]]] * 2
    other = object()
    assert own_copy({"a": [[other], "text"]})["a"][0][0] is other


def plain(function):
    @functools.wraps(function)
    def call_it(*args, **kwargs):
        return function(*args, **kwargs)

    return call_it


@plain
async def decorated(completions, **kwargs):
    return [1.0] * len(completions)


def by_completion(completions, **kwargs):
    return {i: 1.0 for i, _ in enumerate(completions)}


def text(completions, **kwargs):
    return "1" * len(completions)


@pytest.mark.parametrize(
    "function, message",
    [
        (by_completion, "'by_completion' returned dict; it must return a list with one number or None per completion"),
        (text, "'text' returned str; it must return a list"),
        (decorated, "'decorated' returned coroutine.*Make it `async def`, and so the decorators around it"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_no_list_is_refused(function, message):
    found = RewardPool([function]).submit([said("a"), said("b")]).result()
    assert found.rewards.isnan().all() and found.lost.all()
    with pytest.raises(ValueError, match=message):
        raise ValueError(found.errors[function.__name__])


def test_a_row_that_fails_costs_its_own_group_where_all_prompts_are_equal():
    def fails_on_one(number, **kwargs):
        if 1 in number:
            raise KeyError("no such row")
        return [float(one) for one in number]

    class Engineless:
        def run(self, rows, count, seed):
            for index, row in enumerate(rows):
                yield Group(index, [said("x", "", **row) for _ in range(count)])

    wanted = [({"number": number}, 4 if number == 2 else 2) for number in range(24)]  # scored three rows at a time
    found = ScoredRollouts(Engineless(), RewardPool([fails_on_one]), wanted, 0, None).scores()
    assert found.lost[:, 0].nonzero().flatten().tolist() == [2, 3] and found.failures == {"fails_on_one": 2}
    assert found.rewards[:8, 0].nan_to_num(-1).tolist() == [0, 0, -1, -1, 2, 2, 2, 2]


def test_async_calls_are_timed_from_their_beginning():
    busy = threading.Event()

    async def blocks(number, **kwargs):
        if 0 in number:
            busy.set()
            time.sleep(0.6)
        else:
            await asyncio.sleep(0.6)
        return [1.0] * len(number)

    pool = RewardPool([blocks], timeout=0.9)
    first = pool.submit([said("a", number=0)])
    assert busy.wait(5)
    second = pool.submit([said("b", number=1)])  # begins 0.6 s from now, and takes as long
    assert [one.result().rewards.tolist() for one in (first, second)] == [[[1.0]], [[1.0]]]


class Guess:
    """An environment whose reward hangs in one object."""

    over = threading.Event()
    stuck = None

    def reset(self, **row):
        return None

    def step(self) -> str:
        """Does nothing."""
        return "done"

    def get_reward(self):
        if self is Guess.stuck:
            Guess.over.wait(20)
        return 1.0


def test_an_environment_whose_reward_hangs_is_not_used_again():
    runs = Rollouts(
        ScriptedEngine(Dialogue(chat_tokenizer(), {"go": [call("step"), "end"]})),
        chat_tokenizer(),
        Sampling(1000, stop_ids=(END,)),
        environment_factory=Guess,
    )
    pool = RewardPool(runs.reward_funcs, timeout=0.2)
    for stuck in (False, True):
        (group,) = runs.run([user("go ")], 1, seed=0)
        used = group.samples[0].environment
        Guess.stuck = used if stuck else None
        assert pool.submit(group.samples).result().lost.tolist() == [[stuck]]
        runs.release(group.samples)
        (group,) = runs.run([user("go ")], 1, seed=0)
        assert (group.samples[0].environment is used) != stuck
        runs.release(group.samples)
    Guess.over.set()
    runs.close()


def test_threads_end_with_what_started_them():
    class Owner:
        """Of a reward function, as a trainer is."""

        pool: RewardPool
        runs: Rollouts

        def score(self, completions, **kwargs):
            return [1.0] * len(completions)

        async def score_later(self, completions, **kwargs):
            return [2.0] * len(completions)

        async def nothing(self):
            return None

    gc.collect()
    before, owner = {*threading.enumerate()}, Owner()
    owner.pool = RewardPool([owner.score, owner.score_later])
    owner.runs = Rollouts(ScriptedEngine(lambda request: [END]), chat_tokenizer(), Sampling(9, stop_ids=(END,)))
    owner.runs.runner.start(owner.nothing(), lambda result: None).result(5)
    assert owner.pool.submit([said("a")]).result().rewards.tolist() == [[1.0, 2.0]]
    started = [thread for thread in threading.enumerate() if thread not in before]
    assert sorted(thread.name for thread in started) == ["fastalign-tools", "reward-loop", "reward-score"]
    owner.pool.close()
    assert owner.pool.submit([said("a")]).result().rewards.tolist() == [[1.0, 2.0]]  # they start again
    started = [thread for thread in threading.enumerate() if thread not in before]
    gone = weakref.ref(owner)
    del owner
    for _ in range(100):
        gc.collect()
        if gone() is None:
            break
        time.sleep(0.02)  # a thread lets go of its last call after that has returned
    assert gone() is None
    for thread in started:
        thread.join(5)
        assert not thread.is_alive()
