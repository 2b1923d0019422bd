"""How models write tool calls, and how the format of a chat template is found: by reading back what it renders.

A format is a response template of Transformers (`tokenizer.response_template`) without the end of the turn: whoever
parses takes the stop token away first. The published ones: JSON in tags (Hermes, Qwen2.5, Qwen3), functions and
parameters as tags (Qwen3.5, Qwen3-Coder, Nemotron 3), keys and values as tags (GLM-4.5), bare JSON (Llama 3.1, 3.2),
harmony channels (gpt-oss), Gemma 4's own, and calls as in Python (LFM2).
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.utils.chat_parsing import parse_response

from .chat import shared_start
from .training_templates import render_template

_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_THOUGHT = {"open": "<think>", "close_pattern": r"</think>\s*"}
_TEXT = {"content": "text"}


def _tagged(open_pattern: str, tag_pattern: str, close_pattern: str, **parser: Any) -> dict[str, Any]:
    """Calls whose arguments are tags of key and value; the schema of the tool says which values are no text."""
    arguments = {"tag_pattern": tag_pattern, **parser}
    return {
        "open_pattern": open_pattern,
        "close_pattern": close_pattern,
        "repeats": True,
        "content": "xml-inline",
        "content_args": arguments,
        "transform": _NAMED,
    }


def _json(open_pattern: str, close_pattern: str, transform: Any = None, **parser: Any) -> dict[str, Any]:
    """Calls whose arguments are JSON, with the name in front of it."""
    return {
        "open_pattern": open_pattern,
        "close_pattern": close_pattern,
        "repeats": True,
        "content": "json",
        "content_args": parser,
        "transform": transform or _NAMED,
    }


_OUTSIDE_TEXT = r"<\|tool_call_start\|>(?:'[^']*'|[^'])*"  # up to a place that is in no string
_PYTHON_VALUE = r"'[^']*'|(?P<nest>[\[{](?:[^\[\]{}]|(?&nest))*[\]}])|[^,)]*"

CALL_FORMATS: dict[str, dict[str, dict[str, Any]]] = {  # format -> fields of the message
    "json in tags": {
        "reasoning_content": _THOUGHT,
        "tool_calls": _json(
            "<tool_call>", r"</tool_call>\s*", transform={"type": "function", "function": "{content}"}
        ),
        "content": _TEXT,
    },
    "parameter tags": {
        "reasoning_content": _THOUGHT,
        "tool_calls": _tagged(
            r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>",
            r"</tool_call>\s*",
        ),
        "content": _TEXT,
    },
    "key and value tags": {
        "reasoning_content": _THOUGHT,
        "tool_calls": _tagged(
            r"<tool_call>(?P<name>[^\s<{]+)",
            r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
            r"</tool_call>\s*",
        ),
        "content": _TEXT,
    },
    "bare json": {
        "tool_calls": _json(
            r'(?:<\|python_tag\|>)?\{"name":\s*"(?P<name>[^"]+)",\s*"(?:parameters|arguments)":\s*', r"\}\s*$"
        ),
        "content": _TEXT,
    },
    "harmony": {
        "thinking": {"open": "<|channel|>analysis<|message|>", "close": "<|end|>"},
        "content": {"open": "<|channel|>final<|message|>", "close": "<|return|>"},
        "tool_calls": _json(  # the name before or behind the channel: as templates render it, and as models write it
            r"(?:<\|channel\|>commentary\s+)?to=functions\.(?P<name>[^\s<]+)\s*(?:<\|channel\|>commentary\s*)?"
            r"(?:<\|constrain\|>)?(?:json)?<\|message\|>",
            r"<\|call\|>",
        ),
    },
    "gemma": {
        "reasoning_content": {"open": "<|channel>thought\n", "close_pattern": r"<channel\|>\s*"},
        "tool_calls": _json(
            r"<\|tool_call>call:(?P<name>[^\s{]+)",
            r"<tool_call\|>\s*",
            string_delims=[['<|"|>', '<|"|>']],
            unquoted_keys=True,
        ),
        "content": _TEXT,
    },
    "python": {
        "thinking": _THOUGHT,
        "tool_calls": _tagged(
            r"(?:<\|tool_call_start\|>\[|(?<=\)),\s*)(?P<name>[\w.]+)\(",
            rf"(?P<key>\w+)=(?P<value>{_PYTHON_VALUE})",
            rf"(?<={_OUTSIDE_TEXT})\)(?:\]<\|tool_call_end\|>\s*|(?=,\s*[\w.]+\())",
            value_parser={"name": "json", "args": {"string_delims": [["'", "'"]], "allow_non_json": True}},
        ),
        "content": _TEXT,
    },
}
_ALSO_AHEAD_OF_A_TURN = {"gemma": r"|<tool_response\|>"}  # the turn goes on behind the tool's answer


def _call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look_up", "arguments": arguments}}


_TYPES = {"word": "string", "number": "integer", "code": "string", "list": "array"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {key: {"type": value} for key, value in _TYPES.items()}},
    },
}
_USER = {"role": "user", "content": "zero?"}
_MARK = "one plain word"
_PROBES = (  # tool calls of one turn; a template may refuse all but the first
    [_call(word="two words", number=3)],
    [_call()],
    [_call(code="75001", list=[1, 2])],
    [_call(word="a"), _call(number=-4)],
)


def response_template(chat_template: str, special_tokens: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The format that reads back the tool calls which `chat_template` renders, as (name, response template).

    The response template parses an assistant's turn without its stop token. None where no format fits.
    """
    return _response_template(
        chat_template, tuple(sorted((k, v) for k, v in special_tokens.items() if isinstance(v, str)))
    )


@functools.lru_cache(maxsize=16)
def _response_template(
    chat_template: str, special_tokens: tuple[tuple[str, str], ...]
) -> tuple[str, dict[str, Any]] | None:
    def render(*messages: dict[str, Any], **arguments: Any) -> str | Exception:
        return render_template(chat_template, [_USER, *messages], dict(special_tokens) | arguments)

    asked, opened = render(), render(add_generation_prompt=True)
    said = render({"role": "assistant", "content": _MARK})
    if not (isinstance(asked, str) and isinstance(opened, str) and isinstance(said, str)):
        return None
    header = opened[len(shared_start(asked, opened)) :].split("<think>")[0]
    end = said.partition(_MARK)[2]
    turns = []
    for calls in _PROBES:
        turn = render({"role": "assistant", "content": "", "tool_calls": calls})
        if isinstance(turn, str) and header and header in turn[len(shared_start(asked, turn)) :]:
            turn = turn[len(shared_start(asked, turn)) :].partition(header)[2].removesuffix(end)
            turns.append((turn, calls))
    if not turns or turns[0][1] is not _PROBES[0]:
        return None
    for name, fields in CALL_FORMATS.items():
        template = {
            "defaults": {"role": "assistant"},
            "start_anchor_pattern": _escaped(header) + _ALSO_AHEAD_OF_A_TURN.get(name, ""),
            "fields": fields,
        }
        if all(_reads(template, turn, calls) for turn, calls in turns):
            return name, template
    return None


def _escaped(text: str) -> str:
    import regex  # what Transformers compiles the patterns with

    return regex.escape(text)


def _reads(template: dict[str, Any], turn: str, calls: list[dict[str, Any]]) -> bool:
    try:
        read = parse_response(turn, template, prefix="", tools=[_TOOL]).get("tool_calls")
    except (ValueError, TypeError):
        return False
    return bool(read) and read == calls[: len(read)]  # gpt-oss renders the first call and drops the others
