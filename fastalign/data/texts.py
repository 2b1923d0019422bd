"""Texts to token ids in batches, the quickest way that gives what a fast tokenizer makes of each text alone."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from .masks import Tokens, assistant_mask, flatten
from .words import Spans, WordEncoder, cutting_tokens, word_rules

logger = logging.getLogger(__name__)

Encoded = tuple[Tokens, np.ndarray | None]
_CHECKED_ROWS = 32  # rows on which another way is held against the direct one before it is trusted


class TextEncoder:
    """Token ids as `tokenizer(text)` makes them, for many texts: by words, else by pieces, else one after another."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._ways: dict[tuple[bool, bool], list[Callable[..., Encoded]]] = {}  # the first one is taken
        self._trusted: set[tuple[bool, bool]] = set()
        self._words: WordEncoder | None = None
        self._cut: tuple[re.Pattern, dict[str, list[int]]] | tuple[()] | None = None  # None: not looked for yet

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer}  # another process finds its own way

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokenizer"])

    def __call__(
        self, texts: Sequence[str], special_tokens: bool = False, spans: Spans | None = None
    ) -> tuple[Tokens, np.ndarray | None]:
        """Tokens of the texts. `special_tokens` adds what the tokenizer puts around a text (BOS, ...).

        With `spans` of characters, one list per text, also (T,): 1 for tokens in a span, as `assistant_mask` has it.
        """
        task = special_tokens, spans is not None
        if task not in self._ways:
            self._ways[task] = self._find_ways(*task)
        ways = self._ways[task]
        while True:
            found = ways[0](texts, special_tokens, spans)
            if len(ways) == 1 or task in self._trusted or self._agrees(found, texts, special_tokens, spans):
                if len(texts):
                    self._trusted.add(task)
                return found
            logger.info("The tokenizer does not encode the parts of a text on their own; another way is taken.")
            del ways[0]

    def _find_ways(self, special_tokens: bool, marks: bool) -> list[Callable[..., Encoded]]:
        ways: list[Callable[..., Encoded]] = [self._whole]
        if not special_tokens and not marks:
            ways.insert(0, self._by_pieces)
        rules = word_rules(self.tokenizer, self._backend())
        if rules is None:
            logger.info("The native code does not know how this tokenizer splits words; it encodes all texts itself.")
        else:
            self._words = self._words or WordEncoder(self.tokenizer, rules)
            if self._words.has_offsets or not marks:
                ways.insert(0, self._words)
        return ways

    def _agrees(self, found: Encoded, texts: Sequence[str], special_tokens: bool, spans: Spans | None) -> bool:
        few = None if spans is None else spans[:_CHECKED_ROWS]
        tokens, mask = self._whole(texts[:_CHECKED_ROWS], special_tokens, few)
        ours = found[0].part(0, len(tokens.lengths))
        same = np.array_equal(tokens.lengths, ours.lengths) and np.array_equal(tokens.ids, ours.ids)
        return same and (mask is None or np.array_equal(mask, found[1][: len(mask)]))  # type: ignore[index]

    def _backend(self) -> Any:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        if backend.encode_special_tokens != self.tokenizer.split_special_tokens:
            backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return backend

    def _whole(self, texts: Sequence[str], special_tokens: bool = False, spans: Spans | None = None) -> Encoded:
        backend = self._backend()
        encode = backend.encode_batch_fast if spans is None else backend.encode_batch
        encodings = encode(texts, add_special_tokens=special_tokens)
        with _paused_gc():  # a list of ints per row sets the collector off again and again
            tokens = Tokens.of([encoding.ids for encoding in encodings])
        if spans is None:
            return tokens, None
        return tokens, flatten([*map(assistant_mask, encodings, spans)])[0]

    def _by_pieces(self, texts: Sequence[str], special_tokens: bool = False, spans: Spans | None = None) -> Encoded:
        """Encodes a piece that occurs again (a prompt, a system text, tools) once, between tokens that cut texts."""
        if self._cut is None:
            self._cut = self._find_cut(texts)
        if not self._cut:
            return self._whole(texts)
        pattern, token_ids = self._cut
        pieces = [pattern.split(text) for text in texts]
        unique = [*dict.fromkeys(chain.from_iterable(row[::2] for row in pieces))]
        known = dict(zip(unique, self._whole(unique)[0].lists(), strict=True)) | token_ids
        return Tokens.of([[*chain.from_iterable(map(known.__getitem__, row))] for row in pieces]), None

    def _find_cut(self, texts: Sequence[str]) -> tuple[re.Pattern, dict[str, list[int]]] | tuple[()]:
        """Pattern of the tokens that cut `texts`, and their ids; empty where they hold none."""
        backend, sample = self._backend(), "\0".join(texts)
        cutting = {text: [i] for text, i in cutting_tokens(self.tokenizer).items() if text in sample}
        first_is_special = "prepend_scheme=first" in repr(backend.pre_tokenizer)
        if not cutting or first_is_special or backend.encode_special_tokens:
            return ()
        return re.compile("(" + "|".join(map(re.escape, cutting)) + ")"), cutting


@contextlib.contextmanager
def _paused_gc() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
