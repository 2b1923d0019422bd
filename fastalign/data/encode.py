"""Texts and conversations to token ids, a batch at a time, with each prompt encoded once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from .formats import prepare_multimodal_messages
from .masks import Tokens, common_prefix_lengths, flatten
from .texts import Encoded, TextEncoder

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
_NOT_FOR_ROWS = {"tokenize", "return_dict", "add_generation_prompt", "continue_final_message", "return_tensors"} | {
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
}
_ROWS_AT_ONCE = 250  # conversations that are rendered while the ones before them are encoded


@dataclass
class Completions:
    """B prompts, each with K completions."""

    prompts: Tokens  # B: the prompt alone, with the generation prompt
    wholes: list[Tokens]  # K of B: prompt and completion together
    prompt_lengths: list[np.ndarray]  # K of (B,): tokens that the prompt alone and the whole begin with
    assistant_masks: list[np.ndarray] | None  # K of (T,), 0/1; None if not asked for


class Encoder:
    """Token ids as `processing_class(text)` and `processing_class.apply_chat_template` make them, in batches.

    `settings` (one dict per row, or None) are arguments of the chat template: `tools` and the row's
    `chat_template_kwargs`. Tokenizers that are not plain fast ones, and processors, are called row by row.
    """

    def __init__(self, processing_class: Any, chat_template: str | None = None):
        self.processing_class = processing_class
        self.chat_template = chat_template
        self.is_fast = _is_plain_fast(processing_class)
        self._warned = False
        self._fast_texts = TextEncoder(processing_class) if self.is_fast else None
        if not self.is_fast:
            logger.info("%s is encoded row by row: it has its own way.", type(processing_class).__name__)

    # Texts

    def texts(self, texts: Sequence[str], special_tokens: bool = True) -> Tokens:
        """Ids of each text, with what the tokenizer puts around it (BOS, ...) unless not `special_tokens`."""
        if self._fast_texts:
            return self._fast_texts(texts, special_tokens=special_tokens)[0]
        options = {} if special_tokens else {"add_special_tokens": False}
        encoded = [self.processing_class(text=text, **options)["input_ids"] for text in texts]
        if isinstance(self.processing_class, ProcessorMixin):
            return Tokens.of([_plain(ids[0]) for ids in encoded])
        return Tokens.of(encoded)

    # Conversations

    def conversations(
        self,
        conversations: Sequence[Messages],
        settings: Sequence[dict[str, Any]] | None = None,
        generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[Tokens, np.ndarray | None]:
        """Ids of each conversation, and with `marks` (T,): 1 for what the assistant says."""
        check_conversations(conversations)
        if not self._fast_texts:
            return self._one_by_one(conversations, settings, generation_prompt, marks)
        encoded = self._by_parts(
            len(conversations),
            lambda part: self.render(conversations[part], settings and settings[part], generation_prompt, marks),
            marks,
        )
        masks: list[Any] = [mask for _, mask in encoded]
        return Tokens.joined([tokens for tokens, _ in encoded]), np.concatenate(masks) if marks else None

    def _by_parts(self, rows: int, render: Callable[[slice], Any], marks: bool = False) -> list[Encoded]:
        """What `render` makes of each part of the rows, encoded outside of Python while the next one is rendered."""
        encode: Any = self._fast_texts
        with ThreadPoolExecutor(1) as pool:
            running = []
            for start in range(0, max(rows, 1), _ROWS_AT_ONCE):
                texts, spans = render(slice(start, start + _ROWS_AT_ONCE))
                running.append(pool.submit(encode, texts, False, spans if marks else None))
            return [future.result() for future in running]

    def render(
        self,
        conversations: Sequence[Messages],
        settings: Sequence[dict[str, Any]] | None,
        generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """Text of each conversation, and with `marks` the character spans of its `{% generation %}` blocks."""
        texts = [""] * len(conversations)
        spans: list[list[tuple[int, int]]] = [[] for _ in conversations]
        for members, arguments in _groups(settings, len(conversations)):
            arguments: dict[str, Any] = {"chat_template": self.chat_template} | arguments
            tools = arguments.pop("tools", None)
            template = self.processing_class.get_chat_template(arguments.pop("chat_template"), tools)
            _flatten_globals(template)
            render: Callable[..., Any] = partial(
                render_jinja_template,
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=generation_prompt,
                **(self.processing_class.special_tokens_map | arguments),
            )
            try:
                output: Any = render([conversations[i] for i in members])
            except (TemplateError, TypeError):
                for i in members:
                    _render_alone(render, conversations[i])
                raise
            for i, text in zip(members, output[0], strict=True):
                texts[i] = text
            if marks:
                for i, where in zip(members, output[1], strict=True):
                    spans[i] = where
        return texts, spans

    def _one_by_one(self, conversations, settings, generation_prompt: bool, marks: bool):
        batched = isinstance(self.processing_class, ProcessorMixin)
        ids: list[list[int]] = []
        masks: list[list[int]] = []
        for i, messages in enumerate(conversations):
            arguments = {"chat_template": self.chat_template} | (settings[i] if settings else {})
            output = self.processing_class.apply_chat_template(
                prepare_multimodal_messages(messages) if batched else messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=marks,
                **({"add_generation_prompt": True} if generation_prompt else {}),
                **arguments,
            )
            ids.append(_plain(output["input_ids"][0] if batched else output["input_ids"]))
            if marks:
                masks.append(_plain(output["assistant_masks"][0] if batched else output["assistant_masks"]))
        return Tokens.of(ids), flatten(masks)[0] if marks else None

    # Prompts with completions

    def completions(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        settings: Sequence[dict[str, Any]] | None = None,
        marks: bool = False,
        special_tokens: bool = True,
    ) -> Completions:
        """Encode B prompts, and each of them followed by each of K completions (K lists of B).

        Messages, or texts (`special_tokens` as in `texts`). The completion starts where the ids of the prompt alone
        and of the whole part, which is not always behind the prompt; then a warning is given once.
        """
        is_text = bool(prompts) and isinstance(prompts[0], str)
        if not is_text:
            check_conversations(prompts)
        for column in completions:
            if wrong := [c for c in column if not isinstance(c, str if is_text else list)]:
                raise ValueError(
                    f"A completion is {wrong[0]!r}, but its prompt is {'text' if is_text else 'a list of messages'}; "
                    "both must be of one kind."
                )
        columns = [[p + c for p, c in zip(prompts, column, strict=True)] for column in completions]
        masks: list[Any] = []
        if is_text:
            alone, *wholes = (self.texts(column, special_tokens) for column in (prompts, *columns))
        elif marks or not self.is_fast:
            alone, _ = self.conversations(prompts, settings, generation_prompt=True)
            pairs = [self.conversations(column, settings, marks=marks) for column in columns]
            wholes, masks = [tokens for tokens, _ in pairs], [mask for _, mask in pairs]
        else:
            alone, *wholes = self._prompts_and_wholes(prompts, columns, settings)
        lengths = [common_prefix_lengths(alone, whole) for whole in wholes]
        self._warn_of_seams(alone, lengths)
        return Completions(alone, wholes, lengths, masks if marks and not is_text else None)

    def _prompts_and_wholes(self, prompts, columns, settings) -> list[Tokens]:
        """Prompts and columns of conversations that begin with them, so that a prompt need be encoded once only."""

        def render(part: slice) -> tuple[list[str], None]:
            of_rows = settings and settings[part]
            texts = self.render(prompts[part], of_rows, generation_prompt=True)[0]
            for column in columns:
                texts += self.render(column[part], of_rows)[0]
            return texts, None

        found: list[list[Tokens]] = [[] for _ in range(1 + len(columns))]
        for tokens, _ in self._by_parts(len(prompts), render):
            rows = len(tokens.lengths) // len(found)
            for i, column in enumerate(found):
                column.append(tokens.part(i * rows, (i + 1) * rows))
        return [*map(Tokens.joined, found)]

    def _warn_of_seams(self, prompts: Tokens, lengths: list[np.ndarray]) -> None:
        if self._warned:
            return
        for column in lengths:
            for row in np.flatnonzero(column < prompts.lengths)[:1]:
                self._warned = True
                tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
                logger.warning(
                    "The tokens of a prompt are not the beginning of those of prompt and completion: the chat "
                    "template renders the prompt alone differently, or tokens merge across the border. The "
                    "completion starts where they part, and this end of the prompt is left out: %r. The model "
                    "will meet another context when it is used. Said once, though it may concern every row.",
                    tokenizer.decode(prompts.part(row, row + 1).ids[column[row] :].tolist()),
                )
                return


def _flatten_globals(template: str) -> None:
    """Make the names that a template sees a plain dict: Jinja copies them each time, and a chain of maps slowly."""
    compiled = _compile_jinja_template(template)  # cached by Transformers, so this is the object that renders
    if not isinstance(compiled.globals, dict):
        compiled.globals = dict(compiled.globals)


def _render_alone(render: Callable, messages: Messages) -> None:
    """Raise ValueError with the conversation that the template fails on."""
    try:
        render([messages])
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"The chat template fails with {type(error).__name__}: {error}. Check roles, contents and "
            f"`chat_template_kwargs` of the conversation {str(messages)[:300]}."
        ) from error


def check_conversations(conversations: Sequence[Any]) -> None:
    """ValueError unless each row is a list of messages, dicts with a `role`, and not empty."""
    for messages in conversations:
        if messages is None or messages == []:
            raise ValueError("A row holds no messages; a conversation needs at least one. Filter such rows out.")
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise ValueError(f"A conversation must be a list of messages with a `role`, found {str(messages)[:200]}.")


def row_settings(rows: int, tools: Sequence[Any] | None, kwargs: Sequence[Any] | None):
    """Arguments of the chat template for each row, from the columns `tools` and `chat_template_kwargs`; or None.

    Both may be JSON text. ValueError for a key that is not the template's, and for text that is no JSON.
    """
    if tools is None and kwargs is None:
        return None
    settings = []
    for i in range(rows):
        merged = {"tools": _from_json(tools, i, "tools")} | (_from_json(kwargs, i, "chat_template_kwargs") or {})
        if wrong := _NOT_FOR_ROWS & merged.keys():
            raise ValueError(f"`chat_template_kwargs` of a row holds {sorted(wrong)}, which the trainer itself sets.")
        settings.append(merged)
    return settings


def _from_json(column: Sequence[Any] | None, row: int, name: str) -> Any:
    value = None if column is None else column[row]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` of a row is text that is no JSON ({error}): {value[:200]!r}.") from error


def _groups(settings: Sequence[dict[str, Any]] | None, rows: int) -> Iterator[tuple[Sequence[int], dict[str, Any]]]:
    """Rows with equal settings, together."""
    if not settings:
        yield range(rows), {}
        return
    groups: dict[str, list[int]] = {}
    for i, arguments in enumerate(settings):
        groups.setdefault(json.dumps(arguments, sort_keys=True, default=repr), []).append(i)
    for members in groups.values():
        yield members, dict(settings[members[0]])


def _is_plain_fast(processing_class: Any) -> bool:
    """Whether the class leaves encoding and templates as transformers has them for Rust tokenizers."""
    own, plain = type(processing_class), PreTrainedTokenizerFast

    def inherits(name: str) -> bool:
        found: Callable = getattr(own, name, None)  # type: ignore[assignment]
        return found is getattr(plain, name)

    names = ("__call__", "_encode_plus", "apply_chat_template", "get_chat_template")
    return isinstance(processing_class, PreTrainedTokenizerBase) and all(inherits(name) for name in names)


def _plain(ids: Any) -> list[int]:
    return ids if isinstance(ids, list) else [int(i) for i in ids]
