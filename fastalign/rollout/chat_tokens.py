"""How prompts become token ids and sampled ids become what rewards read, for plain text and for messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import ProcessorMixin

from ..data.formats import is_conversational

Prompt = Any  # str | list[dict]: text or messages


class ChatTokens:
    """Token ids of prompts and messages of completions, as a tokenizer's chat template has them.

    `template_kwargs` go to the template at every rendering (`chat_template_kwargs`).
    """

    def __init__(self, processing_class: Any, template_kwargs: dict[str, Any] | None = None):
        self.processing_class = processing_class
        self.tokenizer = (
            processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
        )
        self.template_kwargs = dict(template_kwargs or {})
        self.chat_template: str | None = None  # in place of the tokenizer's own

    def prompt_ids(self, prompts: Sequence[Prompt], tools: Sequence[dict[str, Any]] = ()) -> list[list[int]]:
        """Ids of each prompt: of text with the tokenizer's special tokens, of messages with the generation prompt.

        A last message of the assistant is closed like any other, and a new turn opened behind it. ValueError for a
        prompt without tokens.
        """
        if not prompts:
            return []
        if is_conversational({"prompt": prompts[0]}):
            ids = self.processing_class.apply_chat_template(
                conversation=list(prompts),
                tools=list(tools) or None,  # Llama renders its tool preamble for an empty list
                chat_template=self.chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **self.template_kwargs,
            )["input_ids"]
        else:
            ids = self.processing_class(text=list(prompts))["input_ids"]
        if [] in ids:
            empty = prompts[ids.index([])]
            raise ValueError(f"The prompt {empty!r} has no tokens: give it text, or drop the row from the dataset.")
        return ids

    def completion(self, prompt: Prompt, prompt_ids: list[int], ids: list[int]) -> Any:
        """What rewards are given: text, or a list of one assistant message where the prompt is messages."""
        if is_conversational({"prompt": prompt}):
            return [self.message(prompt_ids, ids)]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def message(self, prefix: list[int], ids: list[int], tools: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """The assistant's turn that `ids` hold behind `prefix`; plain content where the tokenizer cannot parse."""
        return {"role": "assistant", "content": self.tokenizer.decode(ids, skip_special_tokens=True)}
