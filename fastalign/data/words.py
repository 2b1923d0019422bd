"""Texts to token ids through a table of words, for byte-level tokenizers whose words are known to the native code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from fastalign._native import WordTable

from .masks import Tokens, flatten

MAX_BYTES = 64 * 1024 * 1024  # of the table; beyond, it starts anew
Spans = Sequence[Sequence[tuple[int, int]]]  # per text, in characters

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CL100K.replace("{1,3}", "")
_QWEN3_5 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_RULES = {"digits": 0, "lines": False, "by_case": False, "slashes": False}
PATTERNS = {  # expression -> rules of csrc/word_rules.hpp, which follow it on ASCII
    _CL100K: GPT2_RULES | {"digits": 3, "lines": True},
    _QWEN2: GPT2_RULES | {"digits": 1, "lines": True},
    _QWEN3_5: GPT2_RULES | {"digits": 1, "lines": True},
    _O200K: {"digits": 3, "lines": True, "by_case": True, "slashes": True},
}


def word_rules(tokenizer: Any, backend: Any) -> dict[str, Any] | None:
    """How a fast tokenizer splits a text, as arguments of `WordTable`; None where that is not known."""
    normalizer = _state(backend.normalizer)
    if normalizer not in (b"null", b'{"type":"NFC"}') or backend.encode_special_tokens:
        return None
    if getattr(backend.model, "dropout", None):
        return None
    tokens = tokenizer.added_tokens_decoder.values()
    if normalizer != b"null" and any(t.normalized and not t.content.isascii() for t in tokens):
        return None  # found where the text has been normalized only
    split = json.loads(_state(backend.pre_tokenizer)) or {}
    *before, last = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or last["use_regex"] == bool(before):
        return None
    if not before:
        return GPT2_RULES
    first = before[0]
    isolates = (first.get("behavior"), first.get("invert")) in (("Isolated", False), ("Removed", True))
    if len(before) > 1 or first["type"] != "Split" or not isolates:
        return None
    return PATTERNS.get(first["pattern"].get("Regex", ""))


def _state(part: Any) -> bytes:
    return b"null" if part is None else part.__getstate__()


def cutting_tokens(tokenizer: Any) -> dict[str, int]:
    """Added tokens that cut a text in two, with their ids: what is before and behind them is encoded apart.

    Such a token takes no whitespace along, lies in no other added token, and no other one can end inside it.
    """
    tokens = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.content}
    endings = {token.content[i:] for token in tokens.values() for i in range(1, len(token.content))}
    blob = "\0".join(token.content for token in tokens.values())
    return {
        text: i
        for i, token in tokens.items()
        if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        and blob.count(text := token.content) == 1
        and not any(text[:end] in endings for end in range(1, len(text)))
    }


class WordEncoder:
    """Token ids of texts; each distinct word, and each run of words with other than ASCII, is encoded once."""

    def __init__(self, tokenizer: Any, rules: dict[str, Any], max_bytes: int = MAX_BYTES):
        self.backend = tokenizer.backend_tokenizer
        cutting = cutting_tokens(tokenizer)
        other = [t.content for t in tokenizer.added_tokens_decoder.values() if t.content not in cutting]
        self.table = WordTable(**rules, cutting=[*cutting.items()], other=other, max_bytes=max_bytes)
        # Offsets that leave out blanks depend on what is before a word.
        self.has_offsets = b'"trim_offsets":true' not in _state(self.backend.post_processor)

    def __call__(
        self, texts: Sequence[str], special_tokens: bool = False, spans: Spans | None = None
    ) -> tuple[Tokens, np.ndarray | None]:
        """Tokens of the texts, and with `spans` (T,) uint8: 1 for those in the spans, as `assistant_mask` has it."""
        before, after = self._around() if special_tokens else ([], [])
        ids, lengths, mask = self.table.encode(list(texts), self._ask, before, after, spans)
        return Tokens(ids, lengths), mask

    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a text."""
        bare, whole = (self.backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:start], whole[start + len(bare) :]

    def _ask(self, words: list[str], edges: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        encode = self.backend.encode_batch if edges else self.backend.encode_batch_fast
        encodings = encode(words, add_special_tokens=False)
        ids, counts = flatten([encoding.ids for encoding in encodings])
        if not edges:
            return ids, counts, None
        pairs = chain.from_iterable(encoding.offsets for encoding in encodings)
        return ids, counts, np.fromiter(chain.from_iterable(pairs), np.int32, 2 * len(ids))
