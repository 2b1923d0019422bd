"""Tools in rollouts: the very ids and masks of a conversation, failures, limits, and no waiting for one another."""

import asyncio
import math
import threading
import time

import pytest
from scripted_engine import ScriptedEngine
from tool_cases import END, Dialogue, call, chat_tokenizer, spelled, user

from fastalign.rollout.engine import Sampling
from fastalign.rollout.episodes import Rollouts
from fastalign.rollout.tools import tool_schemas

TOKENIZER = chat_tokenizer()


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one
        b: other
    """
    return a + b


def fail(a: int) -> int:
    """Fails.

    Args:
        a: any
    """
    raise KeyError(a)


async def later(word: str) -> str:
    """Says it later.

    Args:
        word: what to say
    """
    await asyncio.sleep(0.01)
    return f"later {word}"


def answer_ids(*contents: str) -> list[int]:
    """What stands between the end token of a turn and the next turn."""
    turns = "".join(f"<|im_start|>tool\n{content}<|im_end|>\n" for content in contents)
    return TOKENIZER(f"\n{turns}<|im_start|>assistant\n")["input_ids"]


def rollouts(turns, tools=(add, fail, later), *, length=1000, **settings):
    script = Dialogue(TOKENIZER, turns)
    engine = ScriptedEngine(script)
    return Rollouts(engine, TOKENIZER, Sampling(length, stop_ids=(END,)), tools=tools, **settings), engine


def one(turns, *args, **settings):
    """The one sample of the first prompt."""
    runs, engine = rollouts(turns, *args, **settings)
    (group,) = runs.run([user(next(iter(turns)))], 1, seed=0)
    return group.samples[0], engine


def test_the_ids_of_a_conversation():
    first, second = f"so {call('add', a=2, b=5)}", "it is 7"
    sample, engine = one({"what": [first, second]})
    prompt = "<|im_start|>system\naddfaillater<|im_end|>\n<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n"
    assert sample.prompt_ids == TOKENIZER(prompt)["input_ids"]
    drawn, told, last = spelled(first), answer_ids("7"), spelled(second)
    assert TOKENIZER(first)["input_ids"] != drawn[:-1]  # tokenised again it would be something else
    assert sample.completion_ids == drawn + told + last
    assert sample.mask == [True] * len(drawn) + [False] * len(told) + [True] * len(last)
    assert [math.isnan(logp) for logp in sample.logps] == [not mine for mine in sample.mask]
    logps = [logp for logp in sample.logps if not math.isnan(logp)]
    assert logps == [-0.01 * token for token in drawn + last]
    tool_call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 5}}}
    assert sample.completion == [
        {"role": "assistant", "content": "so", "tool_calls": [tool_call]},
        {"role": "tool", "name": "add", "content": "7"},
        {"role": "assistant", "content": "it is 7"},
    ]
    assert (sample.tool_calls, sample.tool_failures, sample.finish_reason) == (1, 0, "stop")
    assert engine.seen[1].prompt_ids == sample.prompt_ids + drawn + told
    assert engine.seen[1].seed != engine.seen[0].seed
    assert engine.seen[1].sampling.max_new_tokens == 1000 - len(drawn + told)


def test_answers_come_in_the_order_of_the_calls():
    turn = call("later", word="a") + call("add", a=1, b=1) + call("nothing") + call("fail", a=3) + call("add", a=1)
    sample, _ = one({"what": [turn, "done"]})
    contents = [message["content"] for message in sample.completion if message["role"] == "tool"]
    assert contents[:4] == ["later a", "2", "{'error': 'Tool nothing not found.'}", "{'error': '3'}"]
    assert "missing 1 required positional argument: 'b'" in contents[4]
    assert (sample.tool_calls, sample.tool_failures) == (5, 3)
    assert sample.completion_ids[len(spelled(turn)) :][: -len(spelled("done"))] == answer_ids(*contents)


def test_a_malformed_call_is_content():
    sample, _ = one({"what": ['<tool_call>\n{"name": "add", \n</tool_call>']})
    assert sample.completion == [{"role": "assistant", "content": '<tool_call>\n{"name": "add", \n</tool_call>'}]
    assert sample.mask is None and sample.tool_calls == 0


def test_rounds_are_bounded():
    turns = [call("add", a=1, b=1)] * 4
    assert one({"what": turns}, max_tool_calling_iterations=2)[0].tool_calls == 2
    assert one({"what": turns}, max_tool_calling_iterations=0)[0].completion_ids == spelled(turns[0])
    sample, _ = one({"what": [*turns, "done"]})
    assert sample.tool_calls == 4 and sample.completion[-1] == {"role": "assistant", "content": "done"}


@pytest.mark.parametrize("room", [-1, 0, 3])
def test_a_completion_ends_at_its_length(room):
    """Answers that do not fit are dropped whole; the turn behind them is cut."""
    turn = call("add", a=2, b=5)
    drawn, told = spelled(turn), answer_ids("7")
    sample, engine = one({"what": [turn, "it is 7"]}, length=len(drawn + told) + room)
    assert sample.completion_ids == drawn + (told if room >= 0 else []) + spelled("it ")[: max(room, 0)]
    roles = [message["role"] for message in sample.completion]
    assert roles == {-1: ["assistant"], 0: ["assistant", "tool"], 3: ["assistant", "tool", "assistant"]}[room]
    assert sample.finish_reason == ("stop" if room < 0 else "length")
    assert (sample.tool_calls, len(engine.seen)) == (1, 2 if room > 0 else 1)


def test_a_conversation_ends_at_the_context():
    turn = call("add", a=2, b=5)
    whole = len(one({"what": [turn, "it is 7"]})[0].prompt_ids) + len(spelled(turn) + answer_ids("7"))
    kept, _ = one({"what": [turn, "it is 7"]}, max_model_length=whole + 2)
    assert (
        kept.completion_ids == spelled(turn) + answer_ids("7") + spelled("it")[:2] and kept.finish_reason == "length"
    )
    dropped, _ = one({"what": [turn, "it is 7"]}, max_model_length=whole)
    assert dropped.completion_ids == spelled(turn)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nobody_waits_for_the_tool_of_another(asynchronous):
    """The slow tool returns only when the quick samples are through: with a barrier it would never."""
    through = threading.Event()

    async def wait() -> str:
        """Waits."""
        while not through.is_set():
            await asyncio.sleep(0.005)
        return "here"

    def block() -> str:
        """Waits."""
        return "here" if through.wait(20) else "barrier"

    slow = wait if asynchronous else block
    turns = {"slow": [call(slow.__name__), "end"], "quick": [call("add", a=1, b=1)] * 3 + ["end"]}
    runs, _ = rollouts(turns, (slow, add))
    run = runs.run([user("slow"), user("quick")], 2, seed=0)
    assert next(run).index == 1
    through.set()
    (last,) = run
    assert [message["content"] for message in last.samples[1].completion] == ["", "here", "end"]
    runs.close()


def test_a_tool_that_hangs_loses_its_call_only():
    over = threading.Event()

    def hang() -> str:
        """Hangs."""
        return str(over.wait(20))

    started = time.monotonic()
    sample, _ = one({"what": [call("hang") + call("add", a=1, b=1), "end"]}, (hang, add), tool_timeout=0.2)
    over.set()
    assert time.monotonic() - started < 10
    contents = [message["content"] for message in sample.completion if message["role"] == "tool"]
    assert contents == ["{'error': 'timed out after 0.2 s'}", "2"] and sample.tool_failures == 1


def test_threads_are_bounded():
    active, most = [0], [0]
    lock = threading.Lock()

    def count() -> str:
        """Counts."""
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
        time.sleep(0.02)
        with lock:
            active[0] -= 1
        return "x"

    runs, _ = rollouts({"what": [call("count"), "end"]}, (count,), num_tool_threads=2)
    assert len(next(runs.run([user("what")], 6, seed=0)).samples) == 6
    assert most[0] == 2


def test_a_closed_run_leaves_nothing_behind():
    runs, engine = rollouts({"slow": [call("later", word="x"), "end"], "quick": ["end"]})
    run = runs.run([user("quick"), user("slow"), user("quick")], 1, seed=0)
    assert next(run).index == 0
    with pytest.raises(RuntimeError, match="another run"):
        next(runs.run([user("quick")], 1, seed=0))
    run.close()
    assert engine.pending == 0
    assert [group.index for group in runs.run([user("quick")], 1, seed=0)] == [0]


def test_what_cannot_be_a_tool():
    def bare(a):
        """No type."""

    with pytest.raises(ValueError, match="'bare' has no schema"):
        tool_schemas([bare])
    with pytest.raises(ValueError, match="which is no function"):
        tool_schemas([len])
    with pytest.raises(ValueError, match=r"more than one tool named \['add'\]"):
        tool_schemas([add, add])
    with pytest.raises(ValueError, match="need prompts of messages"):
        next(rollouts({"what": ["x"]})[0].run([{"prompt": "what"}], 1, seed=0))
    for wrong in ({"tool_timeout": 0.0}, {"num_tool_threads": 0}, {"max_tool_calling_iterations": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is"):
            rollouts({}, **wrong)
    with pytest.raises(ValueError, match="shows no tool calls"):
        Rollouts(ScriptedEngine(spelled), chat_tokenizer("{{ messages[0].content }}"), Sampling(4), tools=[add])
    strange = TOKENIZER.chat_template.replace("tool_call>", "call>")
    with pytest.raises(ValueError, match="a format that we do not know"):
        Rollouts(ScriptedEngine(spelled), chat_tokenizer(strange), Sampling(4), tools=[add])
