"""Environments: one object for each sample, prompts from `reset`, methods as tools, rewards of their own."""

import asyncio
import threading

import pytest
from scripted_engine import ScriptedEngine
from tool_cases import END, Dialogue, call, chat_tokenizer, user

from fastalign.rollout.engine import Sampling
from fastalign.rollout.environments import Environments, extended, tool_methods
from fastalign.rollout.episodes import Rollouts

TOKENIZER = chat_tokenizer()


class Counter:
    """A number that starts where the row says."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.number = None
        self.resets = 0

    def reset(self, start=0, **row):
        self.number, self.row = start, row
        self.resets += 1
        return f"at {start}"

    def step(self, by: int) -> str:
        """Moves on.

        Args:
            by: how far
        """
        self.number += by
        return f"now {self.number}"

    def get_reward(self):
        return float(self.number)

    def _hidden(self):
        raise AssertionError

    @property
    def wild(self):
        raise AssertionError("a property is no tool and must not run")


class Talker:
    def reset(self, **row):
        assert "environment" not in row
        return None

    async def say(self, word: str) -> str:
        """Says it.

        Args:
            word: it
        """
        await asyncio.sleep(0)
        return word * 2


def shout(word: str) -> str:
    """Louder.

    Args:
        word: it
    """
    return word.upper()


def rollouts(turns, factory, **settings):
    engine = ScriptedEngine(Dialogue(TOKENIZER, turns))
    return Rollouts(
        engine, TOKENIZER, Sampling(1000, stop_ids=(END,)), environment_factory=factory, **settings
    ), engine


def told(sample):
    return [message["content"] for message in sample.completion if message["role"] == "tool"]


def test_every_sample_has_its_own_environment():
    Counter.made = 0
    turns = {"go": [call("step", by=2) + call("step", by=3), call("shout", word="a"), "end"]}
    runs, _ = rollouts(turns, Counter, tools=[shout])
    rows = [user("go ") | {"start": 10, "id": "x"}, user("go ") | {"start": 20, "id": "y"}]
    groups = sorted(runs.run(rows, 2, seed=0), key=lambda group: group.index)
    samples = [sample for group in groups for sample in group.samples]
    assert [told(sample) for sample in samples] == [["now 12", "now 15", "A"]] * 2 + [["now 22", "now 25", "A"]] * 2
    assert [sample.row["prompt"][0]["content"] for sample in samples] == ["go at 10"] * 2 + ["go at 20"] * 2
    assert rows[0]["prompt"][0]["content"] == "go "  # the row of the user is as it was
    head = "<|im_start|>system\nshoutstep<|im_end|>\n<|im_start|>user\ngo at 10<|im_end|>\n<|im_start|>assistant\n"
    assert samples[0].prompt_ids == TOKENIZER(head)["input_ids"]
    assert samples[0].environment.row == {"prompt": rows[0]["prompt"], "id": "x"}
    assert len({id(sample.environment) for sample in samples}) == 4
    (reward,) = runs.reward_funcs
    assert reward.__name__ == "Counter"
    assert reward(environments=[sample.environment for sample in samples], prompts=[]) == [15.0, 15.0, 25.0, 25.0]
    made = Counter.made
    runs.release(samples)
    again = [sample for group in runs.run(rows, 2, seed=1) for sample in group.samples]
    assert Counter.made == made and {sample.environment.resets for sample in again} == {2}
    list(runs.run(rows[:1], 1, seed=1))  # nothing was released: the environments of `again` stay as they are
    assert Counter.made == made + 1 and {sample.environment.resets for sample in again} == {2}


def test_the_column_chooses_the_environment():
    turns = {"count": [call("step", by=1), call("say", word="x"), "end"], "talk": [call("say", word="ha"), "end"]}
    runs, engine = rollouts(turns, {"counter": Counter, "talker": Talker})
    rows = [user("count") | {"environment": "counter"}, user("talk") | {"environment": "talker"}]
    count, talk = sorted(runs.run(rows, 1, seed=0), key=lambda group: group.index)
    assert told(count.samples[0]) == ["now 1", "{'error': 'Tool say not found.'}"]
    assert told(talk.samples[0]) == ["haha"]
    heads = [TOKENIZER.decode(group.samples[0].prompt_ids).split("<|im_end|>")[0] for group in (count, talk)]
    assert heads == ["<|im_start|>system\nstep", "<|im_start|>system\nsay"]
    (reward,) = runs.reward_funcs
    assert reward(environments=[count.samples[0].environment, talk.samples[0].environment]) == [1.0, None]
    with pytest.raises(ValueError, match="environment='chess'; `environment_factory` knows"):
        next(runs.run([user("count") | {"environment": "chess"}], 1, seed=0))
    assert engine.pending == 0


def test_a_prompt_may_come_from_reset_alone():
    runs, _ = rollouts({"at 4": ["end"]}, Counter)
    (group,) = runs.run([{"start": 4}], 1, seed=0)
    assert group.samples[0].row["prompt"] == [{"role": "user", "content": "at 4"}]


def test_observations():
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    block = {"type": "text", "text": "o"}
    assert extended(prompt, None) is prompt
    assert extended(prompt, "o")[1] == {"role": "user", "content": "uo"}
    assert extended(prompt, [block])[1]["content"] == [{"type": "text", "text": "u"}, block]
    assert extended([{"role": "user", "content": [block]}], "p")[0]["content"] == [
        block,
        {"type": "text", "text": "p"},
    ]
    with pytest.raises(ValueError, match="need prompts of messages"):
        extended("text", "o")
    with pytest.raises(ValueError, match="a list without a method `reset`"):
        Environments(list)
    assert [method.__name__ for method in tool_methods(Counter())] == ["step"]


def test_resets_run_side_by_side_and_are_tried_again():
    barrier = threading.Barrier(3)

    class Slow(Counter):
        broken = 1

        def reset(self, **row):
            if type(self).broken:
                type(self).broken -= 1
                raise OSError("no container")
            barrier.wait(10)  # all three are here at the same time
            return super().reset(**row)

    runs, engine = rollouts({"go": ["end"]}, Slow)
    (group,) = runs.run([user("go ")], 3, seed=0)
    assert len(group.samples) == 3
    assert [len(request.prompt_ids) for request in engine.seen] == [len(group.samples[0].prompt_ids)] * 3
    Slow.broken = 2
    with pytest.raises(RuntimeError, match="The environment Slow could not be reset: no container"):
        next(runs.run([user("go ")], 1, seed=0))


def test_an_environment_that_hangs_answers_no_more():
    over = threading.Event()

    class Stuck(Counter):
        def hang(self) -> str:
            """Hangs."""
            over.wait(20)
            return "late"

    turns = {"go": [call("hang"), call("step", by=1), "end"]}
    runs, _ = rollouts(turns, Stuck, tool_timeout=0.2)
    (group,) = runs.run([user("go ")], 1, seed=0)
    (sample,) = group.samples
    assert told(sample)[0] == "{'error': 'timed out after 0.2 s'}"
    assert "still running" in told(sample)[1] and sample.tool_failures == 2
    stuck = sample.environment
    runs.release([sample])
    (group,) = runs.run([user("go ")], 1, seed=0)
    assert group.samples[0].environment is not stuck
    over.set()
