"""How prompts become token ids and sampled ids become what rewards read, for plain text and for messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import ProcessorMixin
from transformers.utils.chat_parsing import parse_response

from ..data.call_formats import response_template
from ..data.chat import get_training_chat_template, is_chat_template_prefix_preserving, supports_tool_calling
from ..data.formats import has_images, is_conversational, prepare_multimodal_messages
from .image_inputs import placed_images

OPENING_TOKENS = 64  # of a prompt at most, from which a turn's opening is read
Prompt = Any  # str | list[dict]: text or messages
Message = dict[str, Any]


class ChatTokens:
    """Token ids of prompts and messages of completions, as a tokenizer's chat template has them.

    `stop_ids` end a turn (none: the tokenizer's end token); `template_kwargs` go to the template at every rendering
    (`chat_template_kwargs`). With `calls_tools`, turns are parsed for tool calls: by the tokenizer's own
    `response_template`, else by the published format that reads back what the chat template renders; a template that
    changes a turn when its answer arrives is replaced by one that does not. ValueError where the template shows no
    tool calls, or in a format that we do not know.
    """

    def __init__(
        self,
        processing_class: Any,
        stop_ids: Sequence[int] = (),
        template_kwargs: dict[str, Any] | None = None,
        *,
        calls_tools: bool = False,
    ):
        self.processing_class = processing_class
        self.takes_parts = isinstance(processing_class, ProcessorMixin)  # content as blocks, no plain strings
        self.tokenizer: Any = processing_class.tokenizer if self.takes_parts else processing_class
        self.template_kwargs = dict(template_kwargs or {})
        self.ends = {*stop_ids} or {self.tokenizer.eos_token_id}
        self.calls_tools = calls_tools
        self.chat_template: str | None = None  # in place of the tokenizer's own
        self._response_template: dict[str, Any] | None = None  # of ours, without the end of the turn
        self._ahead_of_answers: dict[str, list[int]] = {}  # tool -> ids of the dummy conversation up to the answer
        self._parses = getattr(self.tokenizer, "response_template", None) is not None
        if calls_tools:
            self._prepare_for_tools()

    def _prepare_for_tools(self) -> None:
        if not supports_tool_calling(self.processing_class):
            raise ValueError(
                "The chat template shows no tool calls or no answers of tools, so `tools` and `environment_factory` "
                "cannot be used with it. Take a model whose template does, or set `tokenizer.chat_template`."
            )
        if not self._parses:
            own = self.processing_class.chat_template
            own = own["default"] if isinstance(own, dict) else own
            found = response_template(own, self.tokenizer.special_tokens_map)
            if found is None:
                raise ValueError(
                    "The chat template writes tool calls in a format that we do not know. Set "
                    "`tokenizer.response_template` to one that parses them (Transformers' documentation, "
                    "'Response parsing')."
                )
            self._response_template = found[1]
        if not is_chat_template_prefix_preserving(self.processing_class):
            self.chat_template = get_training_chat_template(self.processing_class)

    def _render(self, messages: list[Message], **arguments: Any) -> list[int]:
        return self._processed(messages, **arguments)["input_ids"][0]

    def _processed(self, messages: list[Message], **arguments: Any) -> Any:
        return self.processing_class.apply_chat_template(
            [prepare_multimodal_messages(messages) if self.takes_parts else messages],
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            **arguments,
            **self.template_kwargs,
        )

    def prompt_ids(self, prompt: Prompt, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of a prompt: of text with the tokenizer's special tokens, of messages with the generation prompt.

        A last message of the assistant is closed like any other, and a new turn opened behind it. ValueError for a
        prompt without tokens, for one of text where there are tools, and for one with images.
        """
        if is_conversational({"prompt": prompt}):
            parts = [part for message in prompt if isinstance(message["content"], list) for part in message["content"]]
            if kinds := {part["type"] for part in parts} - {"text"}:
                raise ValueError(f"A prompt has content of type {sorted(kinds)}; rollouts take text only.")
            # `None` for no tools: Llama renders its tool preamble for an empty list
            ids = self._render(prompt, tools=list(tools) or None, add_generation_prompt=True)
        elif self.calls_tools:
            raise ValueError(
                f"Tools need prompts of messages; found the text {prompt[:50]!r}. Write it as "
                "[{'role': 'user', 'content': ...}]."
            )
        else:
            ids = self.tokenizer(text=[prompt])["input_ids"][0]
        if not ids:
            raise ValueError(f"The prompt {prompt!r} has no tokens: give it text, or drop the row from the dataset.")
        return ids

    def with_images(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
        """A row with `image` or `images` (or neither): the row with the images in its messages, the prompt's ids, and
        what else the processor made of it (tensors, the first axis of one prompt)."""
        if not has_images(row):
            return row, self.prompt_ids(row["prompt"]), {}
        if not self.takes_parts:
            raise ValueError("A row has images, and the processing class is a plain tokenizer: drop the column.")
        [row] = placed_images([row])
        made = dict(self._processed(row["prompt"], add_generation_prompt=True, return_tensors="pt"))
        del made["attention_mask"]
        return row, made.pop("input_ids")[0].tolist(), made

    def message(self, prefix: list[int], ids: list[int], tools: Sequence[dict[str, Any]] = ()) -> Message:
        """The assistant's turn that `ids` hold behind `prefix`: `content`, and `tool_calls` where there are any.

        Where nothing can be parsed, or a call is malformed, all of it is content.
        """
        try:
            if self._response_template is not None:
                text = self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.ends else ids)
                before = self.tokenizer.decode(prefix[-OPENING_TOKENS:])
                parsed = parse_response(text, self._response_template, prefix=before, tools=list(tools))
            elif self._parses:
                parsed = self.tokenizer.parse_response(ids, prefix=prefix, tools=list(tools))
                if isinstance(parsed.get("content"), str):
                    parsed["content"] = parsed["content"].removesuffix(self.tokenizer.eos_token)
            else:
                return self._plain(ids)
            parsed["content"] = parsed.get("content") or ""
            _check_calls(parsed.get("tool_calls"))
        except (ValueError, TypeError):
            return self._plain(ids)
        return parsed

    def _plain(self, ids: list[int]) -> Message:
        return {"role": "assistant", "content": self.text(ids)}

    def text(self, ids: list[int]) -> str:
        """Sampled ids as text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def answer_ids(self, answers: list[Message], last_id: int) -> list[int]:
        """Ids of tool messages and of the next turn's opening, to follow a turn that ended with `last_id`.

        They are what the template adds to a dummy conversation, so that nothing the policy sampled is tokenised again.
        A stop token that opens the answer too (GLM) is not repeated.
        """
        name = answers[0]["name"]
        call = {"type": "function", "function": {"name": name, "arguments": {}}}
        dummy = [{"role": "user", "content": "dummy"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        ahead = self._ahead_of_answers.get(name)
        if ahead is None:
            ahead = self._ahead_of_answers[name] = self._up_to_end(self._render(dummy))
        whole = self._render(dummy + answers, add_generation_prompt=True)
        if whole[: len(ahead)] != ahead:
            raise ValueError(
                "The chat template tokenises a turn otherwise when the answer of a tool follows; set "
                "`tokenizer.chat_template` to one whose turns stay as they are."
            )
        added = whole[len(ahead) :]
        return added[1:] if last_id in self.ends and added[:1] == [last_id] else added

    def _up_to_end(self, ids: list[int]) -> list[int]:
        """Without the white space that a template puts behind the stop token: the policy does not write it."""
        ends = self.ends | {self.tokenizer.eos_token_id}
        last = max((place for place, token in enumerate(ids) if token in ends), default=None)
        if last is None or self.tokenizer.decode(ids[last + 1 :]).strip():
            return ids
        return ids[: last + 1]


def _check_calls(calls: Any) -> None:
    """ValueError where a call lacks its name; absent arguments become {}."""
    if calls is None:
        return
    if not isinstance(calls, list):
        raise ValueError("no list of tool calls")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("a tool call without a name")
        if function.get("arguments") is None:
            function["arguments"] = {}
