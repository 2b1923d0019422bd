"""Texts and conversations to token ids, a batch at a time, with each prompt encoded once."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from .formats import prepare_multimodal_messages
from .masks import assistant_mask, common_prefix_length

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Ids = list[list[int]]
_NOT_FOR_ROWS = {"tokenize", "return_dict", "add_generation_prompt", "continue_final_message", "return_tensors"} | {
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
}
_CHECKED_ROWS = 8  # rows on which the piecewise encoding is held against the direct one before it is trusted
_ROWS_AT_ONCE = 250  # conversations that are rendered while the ones before them are encoded


@dataclass
class Completions:
    """B prompts, each with K completions."""

    prompt_ids: Ids  # B: the prompt alone, with the generation prompt
    ids: list[Ids]  # K x B: prompt and completion together
    prompt_lengths: list[list[int]]  # K x B: tokens that the prompt alone and the whole begin with
    assistant_masks: list[Ids] | None  # K x B x tokens, 0/1; None if not asked for


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
        self._cut: tuple[re.Pattern, dict[str, list[int]]] | tuple[()] | None = None  # None: not looked for yet
        self._cut_is_checked = False
        if not self.is_fast:
            logger.info("%s is encoded row by row: it has its own way.", type(processing_class).__name__)

    # Texts

    def texts(self, texts: Sequence[str], special_tokens: bool = True) -> Ids:
        """Ids of each text; `special_tokens` adds what the tokenizer puts around a text (BOS, ...)."""
        if self.is_fast:
            encodings = self._backend().encode_batch_fast(texts, add_special_tokens=special_tokens)
            with _paused_gc():  # a list of ints per row sets the collector off again and again
                return [encoding.ids for encoding in encodings]
        if isinstance(self.processing_class, ProcessorMixin):
            return [_plain(self.processing_class(text=text)["input_ids"][0]) for text in texts]
        return [self.processing_class(text=text, add_special_tokens=special_tokens)["input_ids"] for text in texts]

    def _backend(self) -> Any:
        backend = self.processing_class.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        if backend.encode_special_tokens != self.processing_class.split_special_tokens:
            backend.encode_special_tokens = self.processing_class.split_special_tokens
        return backend

    # Conversations

    def conversations(
        self,
        conversations: Sequence[Messages],
        settings: Sequence[dict[str, Any]] | None = None,
        generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[Ids, Ids | None]:
        """Ids of each conversation, and with `marks` the 0/1 masks of what the assistant says."""
        check_conversations(conversations)
        if not self.is_fast:
            return self._one_by_one(conversations, settings, generation_prompt, marks)
        encode = self._marked if marks else self._unmarked
        parts = [slice(i, i + _ROWS_AT_ONCE) for i in range(0, len(conversations), _ROWS_AT_ONCE)]
        with ThreadPoolExecutor(1) as pool:  # the tokenizer works outside of Python while the next rows are rendered
            running = []
            for part in parts:
                of_rows = None if settings is None else settings[part]
                running.append(
                    pool.submit(encode, *self.render(conversations[part], of_rows, generation_prompt, marks))
                )
            encoded = [future.result() for future in running]
        ids = [row for part in encoded for row in part[0]]
        return ids, [row for part in encoded for row in part[1]] if marks else None

    def _unmarked(self, texts: list[str], spans: list) -> tuple[Ids]:
        return (self._rendered(texts),)

    def _marked(self, texts: list[str], spans: list[list[tuple[int, int]]]) -> tuple[Ids, Ids]:
        """Ids of rendered conversations, and which of them lie in the character `spans`."""
        encodings = self._backend().encode_batch(texts, add_special_tokens=False)
        masks = [assistant_mask(encoding, found) for encoding, found in zip(encodings, spans, strict=True)]
        return [encoding.ids for encoding in encodings], masks

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

    def _one_by_one(self, conversations, settings, generation_prompt: bool, marks: bool) -> tuple[Ids, Ids | None]:
        batched = isinstance(self.processing_class, ProcessorMixin)
        ids, masks = [], []
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
        return ids, masks if marks else None

    # Prompts with completions

    def completions(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        settings: Sequence[dict[str, Any]] | None = None,
        marks: bool = False,
    ) -> Completions:
        """Encode B prompts, and each of them followed by each of K completions (K lists of B).

        Texts or messages. The completion starts where the ids of the prompt alone and of the whole part, which is not
        always behind the prompt; then a warning is given once.
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
        wholes = [[p + c for p, c in zip(prompts, column, strict=True)] for column in completions]
        masks = None
        if is_text:
            prompt_ids, ids = self.texts(prompts), [self.texts(column) for column in wholes]
        elif marks or not self.is_fast:
            prompt_ids, _ = self.conversations(prompts, settings, generation_prompt=True)
            pairs = [self.conversations(column, settings, marks=marks) for column in wholes]
            ids, masks = [pair[0] for pair in pairs], [pair[1] for pair in pairs] if marks else None
        else:
            texts = self.render(prompts, settings, generation_prompt=True)[0]
            for column in wholes:
                texts += self.render(column, settings)[0]
            encoded, rows = self._rendered(texts), len(prompts)
            prompt_ids, *ids = (encoded[i : i + rows] for i in range(0, len(encoded), rows))
        lengths = [[*map(common_prefix_length, prompt_ids, column)] for column in ids]
        self._warn_of_seams(prompt_ids, lengths)
        return Completions(prompt_ids, ids, lengths, masks)  # type: ignore[arg-type]

    def _rendered(self, texts: list[str]) -> Ids:
        """Ids of rendered conversations; a piece that occurs again (a prompt, a system text, tools) is encoded once.

        A special token that takes no whitespace along cuts a text for the tokenizer: what stands before and behind it
        is encoded apart. So the texts are cut at such tokens, and equal pieces share their ids.
        """
        if self._cut is None:
            self._cut = self._find_cut(texts)
        if not self._cut:
            return self.texts(texts, special_tokens=False)
        pattern, token_ids = self._cut
        pieces = [pattern.split(text) for text in texts]
        unique = [*dict.fromkeys(chain.from_iterable(row[::2] for row in pieces))]
        known = dict(zip(unique, self.texts(unique, special_tokens=False), strict=True)) | token_ids
        ids = [[*chain.from_iterable(map(known.__getitem__, row))] for row in pieces]
        if not self._cut_is_checked:
            self._cut_is_checked = True
            if self.texts(texts[:_CHECKED_ROWS], special_tokens=False) != ids[:_CHECKED_ROWS]:
                logger.info(
                    "The tokenizer does not encode the pieces of a text on their own; texts are encoded whole."
                )
                self._cut = ()
                return self.texts(texts, special_tokens=False)
        return ids

    def _find_cut(self, texts: list[str]) -> tuple[re.Pattern, dict[str, list[int]]] | tuple[()]:
        """Pattern of the tokens that cut a text in two, and their ids; empty where `texts` hold no such token.

        Such a token takes no whitespace along, lies in no other added token, and no other one can end inside it.
        """
        backend = self._backend()
        tokens = self.processing_class.added_tokens_decoder.values()
        every = [token.content for token in tokens]
        endings = {text[i:] for text in every for i in range(1, len(text))}
        blob, sample = "\0".join(every), "\0".join(texts)
        cutting = [
            text
            for token in tokens
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
            and (text := token.content) in sample
            and blob.count(text) == 1
            and not any(text[:i] in endings for i in range(1, len(text)))
        ]
        first_is_special = "prepend_scheme=first" in repr(backend.pre_tokenizer)
        if not cutting or first_is_special or backend.encode_special_tokens:
            return ()
        pattern = re.compile("(" + "|".join(map(re.escape, cutting)) + ")")
        return pattern, {text: [backend.token_to_id(text)] for text in cutting}

    def _warn_of_seams(self, prompt_ids: Ids, lengths: list[list[int]]) -> None:
        if self._warned:
            return
        for column in lengths:
            for row, length in enumerate(column):
                if length < len(prompt_ids[row]):
                    self._warned = True
                    tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
                    logger.warning(
                        "The tokens of a prompt are not the beginning of those of prompt and completion: the chat "
                        "template renders the prompt alone differently, or tokens merge across the border. The "
                        "completion starts where they part, and this end of the prompt is left out: %r. The model "
                        "will meet another context when it is used. Said once, though it may concern every row.",
                        tokenizer.decode(prompt_ids[row][length:]),
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


@contextlib.contextmanager
def _paused_gc() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
