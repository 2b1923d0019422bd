"""The same conversations through TRL's GRPO: the same prompts, ids, masks, messages and counts."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from scripted_engine import ScriptedEngine
from tool_cases import TEMPLATE, call, chat_tokenizer, spelled, trl_template, user

from fastalign.data.call_formats import response_template
from fastalign.rollout.chat_tokens import ChatTokens
from fastalign.rollout.engine import Sampling
from fastalign.rollout.episodes import Rollouts

trl = pytest.importorskip("trl")

QWEN = ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_8"]
SPECIAL = {  # template -> special tokens, the end of a turn first
    "llama3_1": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "glm4moe": ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|observation|>", "[gMASK]", "<sop>"],
    "gptoss": ["<|return|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>"],
    "lfm2_2_5": ["<|im_end|>", "<|im_start|>", "<|tool_call_start|>", "<|tool_call_end|>"],
    "gemma4": ["<turn|>", "<|turn>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'],
    "nemotron_3_nano": ["<|im_end|>", "<|im_start|>"],
}


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one
        b: other
    """
    return a + b


def look_up(word: str) -> str:
    """Looks it up.

    Args:
        word: it
    """
    if word == "bad":
        raise ValueError("no such word")
    return f"{word} is a <word> of {len(word)}"


def tokenizer_for(name: str):
    special = SPECIAL.get(name, ["<|im_end|>", "<|im_start|>"])
    return chat_tokenizer(trl_template(name), *special, end=special[0])


class TRLTools:
    """TRL's own tool loop on a scripted policy, without a trainer or a model."""

    def __init__(self, tokenizer, tools, script, max_completion_length, max_iterations=None):
        from trl import GRPOTrainer
        from trl.chat_template_utils import (
            add_response_schema,
            get_training_chat_template,
            is_chat_template_prefix_preserving,
        )

        if getattr(tokenizer, "response_template", None) is None:
            add_response_schema(tokenizer)
        steady = is_chat_template_prefix_preserving(tokenizer)
        config = SimpleNamespace(max_position_embeddings=10_000)
        accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda value: value)
        functions = {tool.__name__: tool for tool in tools}
        me = SimpleNamespace(
            processing_class=tokenizer,
            _tokenizer=tokenizer,
            chat_template=None if steady else get_training_chat_template(tokenizer),
            chat_template_kwargs={},
            tools=tools,
            environment_factories=None,
            rollout_func=None,
            use_vllm=False,
            _is_vlm=False,
            model=SimpleNamespace(training=True, config=config),
            accelerator=accelerator,
            state=SimpleNamespace(num_input_tokens_seen=0, global_step=0),
            num_generations=1,
            max_completion_length=max_completion_length,
            max_tool_calling_iterations=max_iterations or 10**6,
            eos_token_ids=[tokenizer.eos_token_id],
            _metrics={"train": defaultdict(list)},
        )
        for name in ("_tokenize_prompts", "_get_tool_suffix_ids", "_tool_call_loop", "_generate"):
            setattr(me, name, getattr(GRPOTrainer, name).__get__(me))

        def single_turn(prompt_ids, *_, **__):
            turns = [script(SimpleNamespace(prompt_ids=ids))[:max_completion_length] for ids in prompt_ids]
            return turns, [[-0.01 * token for token in turn] for turn in turns]

        me._generate_single_turn = single_turn
        self.me, self.functions = me, functions

    def generate(self, prompts):
        self.me._sync_tool_dicts = [self.functions] * len(prompts)
        self.me._async_tool_dicts = [{}] * len(prompts)
        prompt_ids, ids, mask, completions, logps, *_ = self.me._generate(prompts)
        metrics = {key: values[-1] for key, values in self.me._metrics["train"].items()}
        return prompt_ids, ids, mask, completions, logps, metrics


def scripted(tokenizer, turns, opening):
    """Turns by the word in the prompt and the number of answers behind it, spelled in letters."""

    def script(request):
        text = tokenizer.decode(request.prompt_ids)
        word = next(word for word in turns if f"\n{word}" in text)
        return spelled(turns[word][text[text.rindex(f"\n{word}") :].count(opening) - 1])

    return script


TURNS = {
    "plain": ["nothing to do"],
    "once": [f"so {call('add', a=2, b=5)}", "it is 7"],
    "twice": [call("add", a=1, b=1) + "\n" + call("look_up", word="fox"), call("look_up", word="bad"), "done"],
    "wrong": [call("nothing", x=1) + call("add", a=1), '<tool_call>\n{"name": \n</tool_call>'],
    "endless": [call("add", a=number, b=1) for number in range(4)],
    "think": [f"<think>\nwell\n</think>\n\n{call('add', a=3, b=3)}", "<think>\nsix\n</think>\n\nyes"],
}


@pytest.mark.parametrize("length", [2000, 420, 150])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_conversations_equal_those_of_trl(name, length):
    rows = [user(word) for word in TURNS]
    opening = "<|im_start|>assistant\n"
    tokenizer = tokenizer_for(name)
    script = scripted(tokenizer, TURNS, opening)
    theirs = TRLTools(tokenizer_for(name), [add, look_up], script, length, max_iterations=3)
    prompt_ids, ids, mask, completions, logps, metrics = theirs.generate([row["prompt"] for row in rows])

    sampling = Sampling(length, stop_ids=(tokenizer.eos_token_id,))
    ours = Rollouts(
        ScriptedEngine(script), tokenizer, sampling, tools=[add, look_up], max_tool_calling_iterations=3
    ).run(rows, 1, seed=0)
    samples = [group.samples[0] for group in sorted(ours, key=lambda group: group.index)]
    assert [sample.prompt_ids for sample in samples] == prompt_ids
    assert [sample.completion_ids for sample in samples] == ids
    drawn = [[int(own) for own in sample.mask or [True] * len(sample.completion_ids)] for sample in samples]
    assert drawn == mask
    assert [sample.completion for sample in samples] == completions
    for sample, own, expected in zip(samples, drawn, logps, strict=True):
        known = [logp if mine else 0.0 for logp, mine in zip(sample.logps, own, strict=True)]
        assert known == expected
    calls = sum(sample.tool_calls for sample in samples)
    assert calls / len(samples) == pytest.approx(metrics["tools/call_frequency"])
    assert sum(sample.tool_failures for sample in samples) / calls == pytest.approx(metrics["tools/failure_frequency"])
    truncated = sum(sample.finish_reason == "length" for sample in samples) / len(samples)
    assert truncated == pytest.approx(metrics["completions/clipped_ratio"])


def _tools_of(name):
    call_ = lambda function, arguments: {"type": "function", "function": {"name": function, "arguments": arguments}}  # noqa: E731
    one = [call_("look_up", {"word": "two words"})]
    return [
        {"content": "only words"},
        {"content": "", "tool_calls": one},
        {"content": "", "tool_calls": [call_("add", {"a": 2, "b": -5})]},
        {"content": "", "tool_calls": [*one, call_("add", {"a": 0, "b": 1})]},
        {"content": "see", "tool_calls": one},
        {"content": "", "reasoning_content": "think of it", "tool_calls": one},
        {"content": "yes", "reasoning_content": "think of it"},
    ]


@pytest.mark.parametrize("name", [*QWEN, *SPECIAL])
def test_turns_are_read_as_trl_reads_them(name):
    """What the template renders for a turn, cut behind its header, is parsed to the same message."""
    from trl.chat_template_utils import add_response_schema, parse_response

    ours, theirs = tokenizer_for(name), add_response_schema(tokenizer_for(name))
    ends = ours.convert_tokens_to_ids([ours.eos_token, *(["<|tool_response>"] if name == "gemma4" else [])])
    tokens = ChatTokens(ours, ends, calls_tools=True)
    ask = [{"role": "user", "content": "zero?"}]
    prefix = tokens.prompt_ids(ask)
    read = 0
    for turn in _tools_of(name):
        try:
            ids = ours.apply_chat_template([*ask, {"role": "assistant", **turn}], tokenize=True, return_dict=False)
        except Exception:
            continue  # Llama refuses two calls in a turn
        if ids[: len(prefix)] != prefix:
            continue  # the template's history has no place where this generation starts
        written = ids[len(prefix) :]
        if ours.eos_token_id in written:
            written = written[: written.index(ours.eos_token_id) + 1]
        tools = [add, look_up]
        expected = parse_response(theirs, written, prefix=prefix, tools=tools)
        assert tokens.message(prefix, written, _schemas(tools)) == expected
        read += bool(expected.get("tool_calls"))
    assert read >= 1


@pytest.mark.parametrize("name", [*QWEN, *sorted(SPECIAL.keys() - {"gemma4"})])
def test_answers_are_tokenised_as_trl_does(name):
    tokenizer = tokenizer_for(name)
    theirs = TRLTools(tokenizer_for(name), [add, look_up], None, 100)
    tokens = ChatTokens(tokenizer, [tokenizer.eos_token_id], calls_tools=True)
    answers = [
        {"role": "tool", "name": "add", "content": "7"},
        {"role": "tool", "name": "look_up", "content": "a <b>"},
    ]
    for few in (answers[:1], answers):
        ids = tokens.answer_ids(few, tokenizer.eos_token_id)
        assert ids == theirs.me._get_tool_suffix_ids(few)
        assert "7" in tokenizer.decode(ids)


@pytest.mark.parametrize(("name", "stop"), [("glm4moe", "<|observation|>"), ("gemma4", "<|tool_response>")])
def test_a_stop_token_that_opens_the_answer_is_not_repeated(name, stop):
    """The conversation as sampled is the conversation as rendered; TRL writes the token twice."""
    tokenizer = tokenizer_for(name)
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    tokens = ChatTokens(tokenizer, [tokenizer.eos_token_id, stop_id], calls_tools=True)
    messages = [{"role": "user", "content": "dummy"}, {"role": "assistant", "content": ""}]
    messages[1]["tool_calls"] = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    messages.append({"role": "tool", "name": "add", "content": "7"})
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    sampled = whole[: whole.index(stop_id) + 1] if stop_id in whole else tokens._render(messages[:2])
    answer = tokens.answer_ids(messages[2:], sampled[-1])
    assert answer[0] != stop_id
    if stop_id in whole:
        assert sampled + answer == whole


def _schemas(tools):
    from fastalign.rollout.tools import tool_schemas

    return tool_schemas(tools)


def test_templates_without_a_known_format():
    assert response_template(trl_template("phi3"), {}) is None
    assert response_template(trl_template("cohere2"), {}) is None
    assert response_template(TEMPLATE, {})[0] == "json in tags"
