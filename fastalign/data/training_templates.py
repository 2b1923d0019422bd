"""Chat templates that mark what the assistant says, and how the one that fits a tokenizer is found: by rendering.

A model's own template seldom has the `{% generation %}` marks that `assistant_only_loss` needs. A template of ours may
stand in for it when both render the same text for every probe conversation below. Families whose own text already
has the right places get the marks inserted there instead, and the result is held against the original in the same way.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

_FOLDER = Path(__file__).parent / "templates"
_QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def _switches(**values: str) -> str:
    return "".join("{%%- set %s = %s %%}" % item for item in values.items())  # noqa: UP031


FAMILIES = {  # family -> (file in templates/, switches in front of it)
    "llama3": ("llama3", ""),
    "qwen3": ("qwen", _switches(thinking="true")),
    "qwen3-instruct-2507": ("qwen", ""),
    "qwen2.5": ("qwen", _switches(plain="true", default_system=repr(_QWEN_SYSTEM))),
    "gemma": ("gemma", ""),
    "gemma3": ("gemma", _switches(system_in_user="true")),
    "phi3": ("phi3", ""),
    "phi3.5": ("phi3", _switches(skip_empty_system="true")),
    "cohere": ("cohere", ""),
    "deepseekv3": ("deepseekv3", ""),
    "glm4moe": ("glm4moe", ""),
    "chatml": ("chatml", ""),
    "qwen2": ("chatml", _switches(default_system="'You are a helpful assistant.'")),
    "smollm2": ("chatml", _switches(default_system=repr(_SMOL_SYSTEM))),
}

_LLAMA_HEADER = "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
_LLAMA_TURN = (
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + "
    "'<|eot_id|>' }}"
)
_TOOL_TURN = '{%- elif message.role == "tool" %}'
_LFM_TURN = (
    '{{- content + "<|im_end|>\\n" -}}',
    '{%- if message["role"] == "assistant" -%}{%- generation -%}{{- content + "<|im_end|>\\n" -}}{%- endgeneration -%}'
    '{%- else -%}{{- content + "<|im_end|>\\n" -}}{%- endif -%}',
)


def _qwen_thinking(condition: str) -> tuple[tuple[str, str], ...]:
    """Qwen 3.5 and later: in training every turn has its <think> block, as in templates/qwen.jinja."""
    header, block = "{{- '<|im_start|>' + message.role + '\\n' }}", "<think>\\n' + reasoning_content + '\\n</think>"
    return (
        ("{%- if " + condition + " %}", header + "{%- generation %}{%- if not as_shipped or " + condition + " %}"),
        ("{{- '<|im_start|>' + message.role + '\\n" + block, "{{- '" + block),
        ("{{- '<|im_start|>' + message.role + '\\n' + content }}", "{{- content }}"),
        (_TOOL_TURN, "{%- endgeneration %}" + _TOOL_TURN),
    )


INSERTIONS = {  # family -> (piece of the model's own template, what takes its place); each piece must occur
    "gptoss": (
        ("{%- if message.role == 'assistant' -%}", "{%- if message.role == 'assistant' -%}{%- generation %}"),
        ("{%- elif message.role == 'tool' -%}", "{%- endgeneration %}{%- elif message.role == 'tool' -%}"),
    ),
    "qwen3.5": _qwen_thinking("loop.index0 > ns.last_query_index"),
    "qwen3.6": _qwen_thinking(
        "(preserve_thinking is defined and preserve_thinking is true) or (loop.index0 > ns.last_query_index)"
    ),
    "qwen3.8": _qwen_thinking(
        "preserve_thinking is undefined or preserve_thinking is true or loop.index0 > ns.last_query_index"
    ),
    "qwen3-vl": (
        (
            "{{- '<|im_start|>' + message.role + '\\n' }}\n        {%- if message.content is string %}\n            "
            "{{- message.content }}\n        {%- else %}\n            {%- for content_item",
            "{{- '<|im_start|>' + message.role + '\\n' }}{%- generation %}{%- if message.content is string %}"
            "{{- message.content }}{%- else %}{%- for content_item",
        ),
        (_TOOL_TURN, "{%- endgeneration %}" + _TOOL_TURN),
    ),
    "lfm2.v2": (
        _LFM_TURN,
        ('{%- if content and content != "null" -%}', '{%- generation -%}{%- if content and content != "null" -%}'),
        ('{{- "<|im_end|>\\n" -}}', '{{- "<|im_end|>\\n" -}}{%- endgeneration -%}'),
    ),
    "lfm2": (_LFM_TURN,),  # behind lfm2.v2, which has this piece too
    "llama3.1": (  # and 3.2
        (_LLAMA_HEADER, ""),
        (
            "{%- set tool_call = message.tool_calls[0].function %}",
            "{%- set tool_call = message.tool_calls[0].function %}" + _LLAMA_HEADER + "{%- generation %}",
        ),
        ('{%- elif message.role == "tool" or', '{%- endgeneration %}{%- elif message.role == "tool" or'),
        (
            _LLAMA_TURN,
            "{%- if message['role'] == 'assistant' %}" + _LLAMA_HEADER + "{%- generation %}"
            "{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}{%- else %}"
            + _LLAMA_TURN
            + "{%- endif %}",
        ),
    ),
}


def _call(arguments: Any, name: str = "add") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _turns(*pairs: tuple[str, Any], **of_last: Any) -> list[dict[str, Any]]:
    messages = [{"role": role, "content": content} for role, content in pairs]
    messages[-1] |= of_last
    return messages


_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <é>.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "description": "first"}},
                "required": ["a"],
            },
        },
    }
]
_ASK, _SAY = ("user", " What\n<b>? "), ("assistant", " It is so.\n")
_THOUGHT = ("assistant", "<think>\nwell\n</think>\n\nyes")
_CALLED = [*_turns(_ASK, ("assistant", ""), tool_calls=[_call({"a": 1, "b": "é"}), _call({"a": 2})])]
PROBES: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [  # (messages, arguments of the rendering)
    (_turns(_ASK, _SAY), {}),
    (_turns(_ASK), {"add_generation_prompt": True}),
    (_turns(_ASK), {"add_generation_prompt": True, "enable_thinking": False}),
    (_turns(("system", " be kind "), _ASK, _SAY, _ASK, _SAY, _ASK), {"add_generation_prompt": True}),
    (_turns(("system", ""), _ASK, _SAY), {}),
    (_turns(_ASK, ("system", "later"), _ASK), {}),
    (_turns(_ASK, _ASK), {}),
    (_turns(_ASK, _THOUGHT, _ASK, _THOUGHT), {}),
    (_turns(_ASK, _SAY, _ASK, ("assistant", "yes"), reasoning_content="so\n"), {}),
    (_turns(("user", [{"type": "text", "text": " words "}])), {}),
    (_turns(_ASK), {"tools": _TOOLS, "add_generation_prompt": True}),
    (_turns(("system", "be kind"), _ASK, _SAY), {"tools": _TOOLS}),
    (_CALLED, {}),
    (_turns(_ASK, ("assistant", "see"), tool_calls=[_call({"a": [1.5, None]})]), {"tools": _TOOLS}),
    (_turns(_ASK, ("assistant", ""), tool_calls=[_call('{"a": 1}')]), {}),
    ([*_CALLED, *_turns(("tool", "3"), ("tool", "4"), _SAY, _ASK, _SAY)], {}),
    ([*_CALLED, *_turns(("tool", "3"))], {"add_generation_prompt": True}),
    ([*_CALLED[:-1], *_turns(("assistant", ""), tool_calls=[_call({"a": 1})]), *_turns(("tool", "3"), _SAY)], {}),
]


def same_rendering(own: str, ours: str, special_tokens: dict[str, Any]) -> bool:
    """Whether two templates agree on every probe: the same text, or an error of the template in both.

    Probes at which `own` fails for another reason (it adds a dict to a string, ...) say nothing.
    """
    for number, (messages, arguments) in enumerate(PROBES):
        arguments = special_tokens | arguments
        expected = render_template(own, messages, arguments)
        if isinstance(expected, TemplateError):
            if not isinstance(render_template(ours, messages, arguments), Exception):
                return False
        elif isinstance(expected, str):
            if render_template(ours, messages, arguments | {"as_shipped": True}) != expected:
                return False
        elif number < 2:
            return False
    return True


def render_template(template: str, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str | Exception:
    """The messages as text, or the error of the rendering."""
    try:
        return render_jinja_template(conversations=[messages], chat_template=template, **arguments)[0][0]
    except Exception as error:
        return error


def training_template(own: str, special_tokens: dict[str, Any]) -> tuple[str, str] | None:
    """The family and the marked template that renders as `own` does, or None where no family fits."""
    return _training_template(own, tuple(sorted((k, v) for k, v in special_tokens.items() if isinstance(v, str))))


@functools.lru_cache(maxsize=16)
def _training_template(own: str, special_tokens: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    for family, edits in INSERTIONS.items():
        if all(piece in own for piece, _ in edits):
            marked = own
            for piece, replacement in edits:
                marked = marked.replace(piece, replacement)
            if same_rendering(own, marked, dict(special_tokens)):
                return family, marked
    for family, (name, switches) in FAMILIES.items():
        ours = switches + (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        if same_rendering(own, ours, dict(special_tokens)):
            return family, ours
    return None
