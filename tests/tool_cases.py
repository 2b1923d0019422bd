"""A chat template with tool calls, its tokenizer, and ways to write turns, for the tests of tools."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

from tiny import tiny_tokenizer

TEMPLATE = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }}{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content if message.content is string else message.content | map(attribute='text') | join }}
{%- for call in message.tool_calls or [] %}<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
END = 4  # <|im_end|>


def chat_tokenizer(template: str = TEMPLATE, *special: str, end: str = "<|im_end|>"):
    """The tiny tokenizer with a chat template, whose turns end with `end`."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": [*special]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = template
    tokenizer.eos_token = end
    return tokenizer


@functools.cache
def _letters():
    """Ids of single bytes: how the tokenizer itself would never write a word."""
    vocabulary = tiny_tokenizer().get_vocab()
    return {letter: vocabulary[tiny_tokenizer().tokenize(letter)[0]] for letter in map(chr, range(32, 127))} | {
        "\n": vocabulary["Ċ"]
    }


def spelled(text: str) -> list[int]:
    """Text in single letters, and the end of the turn."""
    return [*(_letters()[letter] for letter in text), END]


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def user(text: str) -> dict:
    return {"prompt": [{"role": "user", "content": text}]}


def trl_template(name: str) -> str:
    """A published chat template, as TRL ships it."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


class Dialogue:
    """A script for the engine: the turns of each sample, by the text of its prompt and the number of its turn."""

    def __init__(self, tokenizer, turns: dict[str, list[str]]):
        self.tokenizer = tokenizer
        self.turns = turns
        self.asked: list[str] = []

    def __call__(self, request) -> list[int]:
        text = self.tokenizer.decode(request.prompt_ids)
        self.asked.append(text)
        (word,) = [word for word in self.turns if f"user\n{word}" in text]
        return spelled(self.turns[word][text.count("<|im_start|>assistant\n") - 1])
