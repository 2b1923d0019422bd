"""Fingerprints of prepared data: the same rows, tokenizer content and options give the same name of a cache file."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

import tokenizers
import transformers
from datasets import Dataset
from datasets.fingerprint import Hasher, generate_random_fingerprint
from transformers import ProcessorMixin

logger = logging.getLogger(__name__)

LAYOUT = 3  # counted up when the same input gives other columns or values


def tokenizer_hash(processing_class: Any) -> str:
    """Digest of everything that decides which ids a text gets: vocabulary, rules, special tokens, chat template."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        backend.no_truncation()
        backend.no_padding()
        content = backend.to_str()
    else:
        content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs], default=repr)
    parts = [
        type(processing_class).__qualname__,
        content,
        repr(sorted(tokenizer.special_tokens_map.items())),
        repr(getattr(tokenizer, "split_special_tokens", False)),
        repr(processing_class.chat_template),
        processing_class.to_json_string() if isinstance(processing_class, ProcessorMixin) else "",
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def preparation_fingerprint(dataset: Dataset, processing_class: Any, options: dict[str, Any]) -> str:
    """Name of the prepared dataset; a random one, said in the log, if an option cannot be hashed."""
    try:
        hashed = Hasher.hash(options)
    except Exception as error:
        logger.warning("The prepared dataset is not cached: its options cannot be hashed (%s).", error)
        return generate_random_fingerprint()
    versions = f"{LAYOUT} {transformers.__version__} {tokenizers.__version__}"
    text = "\0".join([dataset._fingerprint, tokenizer_hash(processing_class), hashed, versions])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
