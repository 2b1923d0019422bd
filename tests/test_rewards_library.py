"""The reward functions that come with the library against TRL's, on drawn inputs."""

import importlib.util
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastalign.rewards as ours
from fastalign.rewards import accuracy, math_worker
from fastalign.rewards.names import REWARDS, find_rewards
from fastalign.rewards.texts import answer_text

theirs = pytest.importorskip("trl.rewards")

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)
fast = settings(max_examples=200, deadline=None)

TAGS = st.sampled_from(["<think>", "</think>", "<think", "x", "\n", " ", "< think>", "é"])
THOUGHTS = st.one_of(st.text(max_size=20), st.lists(TAGS, max_size=8).map("".join))
IDS = st.lists(st.lists(st.integers(0, 3), max_size=30), max_size=4)


def messages(texts: list[str]) -> list:
    return [[{"role": "assistant", "content": text}] for text in texts]


@fast
@given(st.lists(THOUGHTS, max_size=5))
def test_think_format(texts):
    assert ours.think_format_reward(messages(texts)) == theirs.think_format_reward(messages(texts))
    assert ours.think_format_reward(texts, prompts=texts) == theirs.think_format_reward(messages(texts))


@fast
@given(IDS, st.integers(1, 5), st.sampled_from([-1.0, -0.3, 0.0]))
def test_repetition(ids, size, penalty):
    expected = theirs.get_repetition_penalty_reward(size, penalty)(ids)
    assert ours.get_repetition_penalty_reward(size, penalty)(completion_ids=ids, prompts=[]) == expected


def test_repetition_by_hand_and_wrong_penalty():
    assert ours.get_repetition_penalty_reward(2)([[5] * 5, [1, 2, 3]]) == [-0.75, 0.0]
    with pytest.raises(ValueError, match=r"`max_penalty` is 0\.5"):
        ours.get_repetition_penalty_reward(3, 0.5)


@fast
@given(IDS, st.integers(1, 25), st.integers(0, 10))
def test_overlong(ids, most, cache):
    expected = theirs.get_soft_overlong_punishment(most, cache)(ids)
    assert ours.get_soft_overlong_punishment(most, cache)(completion_ids=ids, prompts=[]) == expected


ANSWERS = [
    r"\boxed{\frac{1}{3}}",
    r"so it is $\frac{2}{6}$",
    r"\boxed{0.5}",
    "<think>is it \\boxed{3}?</think> \\boxed{4}",
    "<think>\\boxed{4}",
    "a</think>b</answer> \\boxed{4}</answer>$4$",
    r"\boxed{x^2 + 2x + 1}",
    r"$(x+1)^2$",
    "no answer",
    "",
    r"\boxed{\{1,2\}}",
    r"\boxed{5\text{ km}}",
    r"\boxed{\frac{1}{",
]
GOLD = [r"\frac{1}{3}", "$1/2$", "4", "$(x+1)^2$", "nothing", r"$\{2, 1\}$", "$5$", ""]


@needs_math_verify
def test_accuracy_of_all_answers_against_all_solutions():
    pairs = [(answer, gold) for gold in GOLD for answer in ANSWERS]
    completions, solution = messages([answer for answer, _ in pairs]), [gold for _, gold in pairs]
    for name, more in [
        ("accuracy_reward", {}),
        ("reasoning_accuracy_reward", {}),
        ("reasoning_accuracy_reward", {"reasoning_delimiters": ["</answer>", "</think>"]}),
    ]:
        logged: tuple[dict, dict] = ({}, {})
        found = [
            getattr(library, name)(completions, solution, log_extra=log.__setitem__, answer=solution, **more)
            for library, log in zip((ours, theirs), logged, strict=True)
        ]
        assert found[0] == found[1] and {0.0, 1.0, None} == {*found[0]}
        assert logged[0] == logged[1]
    lengths = [[1] * (i % 60) for i in range(len(pairs))]
    options = {"max_len": 40, "min_value_wrong": -2.0, "max_value_correct": 3.0}
    expected = theirs.get_cosine_scaled_reward(**options)(completions, solution, lengths)
    assert ours.get_cosine_scaled_reward(**options)(completions, solution, lengths) == expected


@needs_math_verify
def test_cosine_by_hand():
    reward = ours.get_cosine_scaled_reward(100)
    completions = messages([r"\boxed{3}", r"\boxed{4}"])
    assert reward(completions, ["3", "3"], [[1] * 50] * 2) == pytest.approx([0.75, -0.75])
    assert reward(completions, ["3", "3"], [[1] * 999] * 2) == pytest.approx([0.5, -0.5])
    assert reward(completions, ["3", "3"], [[]] * 2) == pytest.approx([1.0, -1.0])


@needs_math_verify
def test_an_answer_that_cannot_be_computed_is_wrong_and_holds_up_nothing(monkeypatch):
    monkeypatch.setattr(accuracy, "SECONDS", 3.0)
    answers = [r"\boxed{3}"] * 2
    accuracy._pool.ask([{"answer": answers[0], "solution": "3"}], 60)  # the processes run
    requests = accuracy._pool.ask

    def slow(asked, seconds):
        return requests(asked, seconds if len(asked) > 1 else 0.0)

    monkeypatch.setattr(accuracy._pool, "ask", slow)
    assert accuracy.accuracy_reward([answers[0]], ["3"]) == [0.0]
    monkeypatch.setattr(accuracy, "SECONDS", 60.0)
    assert accuracy.accuracy_reward(answers, ["3", "4"]) == [1.0, 0.0]  # a new process took over


def test_without_math_verify_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for function in (ours.accuracy_reward, ours.reasoning_accuracy_reward, ours.get_cosine_scaled_reward(5)):
        with pytest.raises(ImportError, match=r"pip install 'fastalign\[math\]'"):
            function(completions=messages(["1"]), solution=["1"], completion_ids=[[1]])


def test_the_text_of_an_answer():
    turns = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": [{"type": "text", "text": "it is "}, {"type": "text", "text": "7"}]},
        {"role": "tool", "content": "late"},
    ]
    assert [answer_text(c) for c in ("plain", turns, turns[:1], [{"content": "no role"}])] == [
        "plain",
        "it is 7",
        "",
        "no role",
    ]


def test_functions_can_be_pickled_and_are_named_as_trl_names_them():
    made = {
        "get_repetition_penalty_reward": (2, -1.0),
        "get_soft_overlong_punishment": (9, 3),
        "get_cosine_scaled_reward": (5,),
    }
    for name, arguments in made.items():
        function = getattr(ours, name)(*arguments)
        assert function.__name__ == getattr(theirs, name)(*arguments).__name__
        assert pickle.loads(pickle.dumps(function)) == function
    assert pickle.loads(pickle.dumps(ours.code_execution_reward)).limits == ours.code_execution_reward.limits
    assert {name for name in dir(theirs) if name.endswith(("_reward", "_punishment"))} <= {*ours.__all__}


def test_rewards_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def exact(completions, **kwargs):\n    return [2.0]\n")
    monkeypatch.chdir(tmp_path)
    found = find_rewards(["think_format_reward", "get_soft_overlong_punishment", "my_own_rewards.exact"])
    assert found[0] is ours.think_format_reward and found[2](completions=[""]) == [2.0]
    assert found[1]([[0] * 1152]) == [-0.5]  # TRL's 1280 and 256
    assert [callable(make()) for make in REWARDS.values()] == [True] * len(REWARDS)
    for name, message in [
        ("acuracy_reward", "did you mean accuracy_reward"),
        ("my_own_rewards.inexact", "cannot be imported"),
        ("no_such_module.f", "cannot be imported"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_rewards([name])


@needs_math_verify
def test_one_comparison_by_hand():
    found = math_worker.compare({"solution": r"\frac{1}{2}", "answer": r"\boxed{0.5}"})
    assert found["reward"] == 1.0 and "1/2" in found["gold"] and "0.5" in found["answer"]
    assert math_worker.compare({"solution": "words", "answer": "1"})["reward"] is None
