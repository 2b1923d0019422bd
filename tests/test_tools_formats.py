"""Formats of tool calls, on turns as models write them (the published examples of each format)."""

import pytest
from tool_cases import TEMPLATE
from transformers.utils.chat_parsing import parse_response

from fastalign.data.call_formats import CALL_FORMATS, response_template

SCHEMA = {
    "type": "function",
    "function": {
        "name": "search",
        "parameters": {"properties": {"query": {"type": "string"}, "limit": {"type": "integer"}}},
    },
}
WRITTEN = [  # format, turn without its stop token, message
    (
        "json in tags",
        '<think>\nhm\n</think>\n\nSee.\n<tool_call>\n{"name": "search", "arguments": {"query": "a", "limit": 3}}\n'
        "</tool_call>",
        {"reasoning_content": "hm", "content": "See.", "calls": [{"query": "a", "limit": 3}]},
    ),
    ("json in tags", "no call, only <tags>", {"content": "no call, only <tags>", "calls": []}),
    (
        "parameter tags",
        "Now\n\n<tool_call>\n<function=search>\n<parameter=query>\ntwo\n  lines\n</parameter>\n<parameter=limit>\n3\n"
        "</parameter>\n</function>\n</tool_call>",
        {"content": "Now", "calls": [{"query": "two\n  lines", "limit": 3}]},
    ),
    (
        "key and value tags",
        "\n<think>x</think>\n<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>75001</arg_value>\n"
        "<arg_key>limit</arg_key>\n<arg_value>75001</arg_value>\n</tool_call>",
        {"reasoning_content": "x", "calls": [{"query": "75001", "limit": 75001}]},
    ),
    (
        "bare json",
        '<|python_tag|>{"name": "search", "parameters": {"query": "a {b}", "limit": 3}}',
        {"calls": [{"query": "a {b}", "limit": 3}]},
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.search "
        '<|constrain|>json<|message|>{"query": "a", "limit": 3}',
        {"thinking": "hm", "calls": [{"query": "a", "limit": 3}]},
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>It is so.",
        {"thinking": "hm", "content": "It is so.", "calls": []},
    ),
    (
        "gemma",
        '<|tool_call>call:search{query:<|"|>a, b<|"|>,limit:3}<tool_call|>',
        {"calls": [{"query": "a, b", "limit": 3}]},
    ),
    (
        "python",
        "<|tool_call_start|>[search(query='f(x), g(y)', limit=3), search(query='[b]')]<|tool_call_end|>Soon, so(on).",
        {"content": "Soon, so(on).", "calls": [{"query": "f(x), g(y)", "limit": 3}, {"query": "[b]"}]},
    ),
]


@pytest.mark.parametrize(("name", "turn", "expected"), WRITTEN)
def test_turns_as_models_write_them(name, turn, expected):
    template = {"defaults": {"role": "assistant"}, "start_anchor": "none", "fields": CALL_FORMATS[name]}
    message = parse_response(turn, template, prefix="", tools=[SCHEMA])
    calls = [call["function"] for call in message.pop("tool_calls", [])]
    assert {call["name"] for call in calls} <= {"search"}
    assert message | {"calls": [call["arguments"] for call in calls]} == {"role": "assistant"} | expected


def test_the_format_is_found_by_reading_back():
    name, template = response_template(TEMPLATE, {})
    assert name == "json in tags"
    opened = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    turn = '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>'
    call = {"type": "function", "function": {"name": "search", "arguments": {}}}
    assert parse_response(turn, template, prefix=opened)["tool_calls"] == [call]
    assert response_template(TEMPLATE.replace("call.function.arguments", "'lost'"), {}) is None
    assert response_template("{{ messages[0].content }}", {}) is None
