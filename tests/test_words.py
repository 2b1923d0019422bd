"""Encoding through the table of words: the same ids and masks as the `tokenizers` library, for any text."""

import logging

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from fastalign.data import texts as texts_module
from fastalign.data.texts import TextEncoder
from fastalign.data.words import PATTERNS, WordEncoder, word_rules

CORPUS = [
    "The quick brown fox doesn't jump; they'll say we've I'm he'd you're it's DON'T WE'LL HelloWorld isn't",
    'for (int i = 0; i < 12345; ++i) {\n\tprintf("%d\\n", i);\r\n}\n\n    return x/y; // path/to/file\n\n\n   \t end',
    "naïve café – “quoted” words’ ends… 世界 привет мир ١٢٣ é́  ﬃ ſo",
] * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
NAMES = ["gpt2", "cl100k", "qwen2", "qwen3.5", "o200k"]


def tokenizer_of(name="gpt2", **changes):
    """A byte-level tokenizer with one of the known expressions, or with parts of it changed."""
    backend = Tokenizer(models.BPE(ignore_merges=name == "cl100k"))
    if name == "gpt2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = split_by([*PATTERNS][NAMES.index(name) - 1])
    if name.startswith("qwen"):
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    for part, value in changes.items():
        setattr(backend, part, value)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def split_by(pattern, behavior="isolated", invert=False):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), byte_level])


TOKENIZERS = {name: tokenizer_of(name) for name in NAMES}
ADDED = [
    AddedToken("<tool>", normalized=False),
    AddedToken(" fox", normalized=True),
    AddedToken("<wide>", rstrip=True, lstrip=True, normalized=False),
    AddedToken("word", single_word=True, normalized=False),
    AddedToken("<wi", normalized=False),
]
WITH_ADDED = {name: tokenizer_of(name) for name in ("gpt2", "qwen2")}
for _tokenizer in WITH_ADDED.values():
    _tokenizer.add_tokens(ADDED)

BITS = ["'", "'s", "'S", "'ll", "'LL", "'lL", "'re", "'vE", "'m", "'d", "'T", "'l", "'r", "'v", " ", "  ", "   "]
BITS += [
    "\n",
    "\r\n",
    "\r",
    "\n\n",
    "\t",
    "\v",
    "\f",
    "\x1c",
    "\x85",
    "\x00",
    "\x7f",
    "/",
    "//",
    "_",
    "!?",
    "...",
    "<",
]
BITS += ["a", "I", "word", "Word", "WORD", "helloWorld", "ABc", "don't", "1", "12", "1234", "3.14", " fox", "x1y2"]
WIDE = [
    "é",
    "e\u0301",
    "\u0301",
    "ſ",
    "'ſ",
    "\u2019s",
    "\u00a0",
    "\u3000",
    "世界",
    "١٢",
    "Ⅷ",
    "ǅ",
    "ʰ",
    "🙂",
    "\u0338",
    "K",
]
MARKS = ["<|im_start|>", "<|im_end|>", "<|im_", "</s>", "<tool>", "<wide>", "<wi", "de>", " word ", "|>"]
ascii_text = st.one_of(
    st.text(st.characters(max_codepoint=127), max_size=40), st.lists(st.sampled_from(BITS), max_size=14).map("".join)
)
mixed_text = st.lists(st.sampled_from(BITS + WIDE + MARKS), max_size=14).map("".join)


def direct(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def words_of(tokenizer, **options):
    rules = word_rules(tokenizer, tokenizer.backend_tokenizer)
    assert rules is not None
    return WordEncoder(tokenizer, rules, **options)


WORDS = {name: words_of(tokenizer) for name, tokenizer in TOKENIZERS.items()}
WORDS_ADDED = {name: words_of(tokenizer) for name, tokenizer in WITH_ADDED.items()}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(ascii_text, min_size=1, max_size=6))
@example(
    texts=["a  b", " \n a", "\n\n  x", "a \n", "it's 'S'sab 'llx", "12345 678", "a/\n/b", "\r\n\r\n\ta", "ABcDE's"]
)
def test_ascii_as_the_library(name, texts):
    assert WORDS[name](texts)[0].lists() == direct(TOKENIZERS[name], texts)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(mixed_text, min_size=1, max_size=6))
@example(
    texts=["a\u0301 b", "'s\u0301", "  é", " \u3000\n", "12١", "don'ſ x", "<|im_end|>\u0338", "x \u0301y", "ſo é b"]
)
def test_other_characters_and_special_tokens_as_the_library(name, texts):
    assert WORDS[name](texts)[0].lists() == direct(TOKENIZERS[name], texts)


@pytest.mark.parametrize("name", WITH_ADDED)
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(mixed_text, min_size=1, max_size=6))
@example(texts=["a  <wide>  b<tool>", "the fox <|im_end|> word", "swords<wi<wide>", " word <|im_start|> foxes"])
def test_added_tokens_as_the_library(name, texts):
    assert WORDS_ADDED[name](texts)[0].lists() == direct(WITH_ADDED[name], texts)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "o200k"])
@settings(max_examples=200, deadline=None)
@given(data=st.data(), texts=st.lists(st.one_of(ascii_text, mixed_text), min_size=1, max_size=4))
def test_masks_as_the_library(name, data, texts):
    spans = []
    for text in texts:
        places = st.integers(0, len(text) + 1)
        found = data.draw(st.lists(st.tuples(places, places), max_size=3))
        spans.append([(min(pair), max(pair)) for pair in found if max(pair) > 0])
    tokens, mask = WORDS[name](texts, spans=spans)
    expected_tokens, expected = TextEncoder(TOKENIZERS[name])._whole(texts, spans=spans)
    assert tokens.lists() == expected_tokens.lists()
    assert mask.tolist() == expected.tolist()


def test_mask_by_hand():
    mask = WORDS["gpt2"](["The fox<|im_end|>", "a"], spans=[[(3, 7)], []])[1]
    sizes = [len(ids) for ids in direct(TOKENIZERS["gpt2"], ["The", " fox"])]
    assert mask.tolist() == [0] * sizes[0] + [1] * sizes[1] + [0, 0]


@pytest.mark.parametrize("max_bytes", [0, 20_000])
def test_full_table_starts_anew(max_bytes):
    tokenizer, rng = TOKENIZERS["cl100k"], np.random.default_rng(0)
    words = words_of(tokenizer, max_bytes=max_bytes)
    sizes = []
    for _ in range(30):
        texts = ["".join(chr(c) for c in row) + " <|im_end|> é" for row in rng.integers(32, 127, (4, 30))]
        spans = [[(3, 20)]] * 4
        expected, mask = TextEncoder(tokenizer)._whole(texts, spans=spans)
        assert words(texts)[0].lists() == expected.lists()  # the words are asked for again, with offsets
        assert words(texts, spans=spans)[1].tolist() == mask.tolist()
        sizes.append(len(words.table))
    assert max(sizes) < 400 and (max_bytes == 0 or min(np.diff(sizes)) < 0 < max(np.diff(sizes)))


def test_words_are_asked_for_once_and_failures_leave_nothing(monkeypatch):
    words, asked = words_of(TOKENIZERS["gpt2"]), []
    own = words._ask
    words._ask = lambda texts, edges: asked.extend(texts) or own(texts, edges)
    words(["the fox the fox", " the fox's"])
    assert asked == ["the", " fox", " the", "'s"]
    words._ask = lambda texts, edges: 1 / 0
    with pytest.raises(ZeroDivisionError):
        words(["the fox jumps"])
    words._ask = own
    assert words(["the fox jumps"])[0].lists() == direct(TOKENIZERS["gpt2"], ["the fox jumps"])
    words._ask = lambda texts, edges: (np.zeros(1, np.int32), np.ones(2, np.int64), None)
    with pytest.raises(ValueError, match="a count for each word"):
        words(["unheard"])


def test_tokens_around_a_text():
    around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = tokenizer_of("qwen2", post_processor=around)
    texts = ["the fox", "", "é", "a</s>"]
    assert TextEncoder(tokenizer)(texts, special_tokens=True)[0].lists() == tokenizer(texts)["input_ids"]
    assert words_of(tokenizer)(texts, special_tokens=True)[0].lists() == tokenizer(texts)["input_ids"]


CL100K = next(iter(PATTERNS))
UNKNOWN = {
    "other expression": {"pre_tokenizer": split_by(CL100K.replace("1,3", "1,2"))},
    "other behaviour": {"pre_tokenizer": split_by(CL100K, "merged_with_next")},
    "blank before": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    "whitespace": {"pre_tokenizer": pre_tokenizers.Whitespace()},
    "none": {"pre_tokenizer": None},
    "lower case": {"normalizer": normalizers.Lowercase()},
    "dropout": {"model": models.BPE(dropout=0.1)},
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_other_tokenizers_encode_themselves(case, caplog):
    tokenizer = tokenizer_of(**UNKNOWN[case])
    assert word_rules(tokenizer, tokenizer.backend_tokenizer) is None
    if case == "dropout":
        return
    encoder, texts = TextEncoder(tokenizer), ["The  fox 12345", "I'm<|im_end|>\n\nA", "The  fox<|im_end|>"]
    with caplog.at_level(logging.INFO, "fastalign.data.texts"):
        found = [encoder(texts)[0].lists() for _ in range(2)]
    assert found == [direct(tokenizer, texts)] * 2
    assert sum("does not know how this tokenizer" in record.message for record in caplog.records) == 1


def test_removed_and_inverted_is_the_same_split():
    tokenizer = tokenizer_of(pre_tokenizer=split_by(CL100K, "removed", True))
    texts = ["The  fox's 12345\n\n it", "é  x"]
    assert words_of(tokenizer)(texts)[0].lists() == direct(tokenizer, texts)


def test_wrong_rules_are_found_out(monkeypatch, caplog):
    """The first texts are held against the library, and the table of words is dropped where it differs."""
    tokenizer, rules = TOKENIZERS["gpt2"], [*PATTERNS.values()][1]
    monkeypatch.setattr(texts_module, "word_rules", lambda *_: rules)
    encoder, texts = TextEncoder(tokenizer), ["for 12345 words<|im_end|>"] * 3
    assert WordEncoder(tokenizer, rules)(texts)[0].lists() != direct(tokenizer, texts)
    with caplog.at_level(logging.INFO, "fastalign.data.texts"):
        found = encoder(texts)[0].lists(), encoder(texts, spans=[[(0, 3)]] * 3)[0].lists(), encoder(texts)[0].lists()
    assert found == (direct(tokenizer, texts),) * 3
    assert sum("another way is taken" in record.message for record in caplog.records) == 2  # with masks and without


def test_trimmed_offsets_are_left_to_the_library():
    trimming = tokenizer_of(post_processor=processors.ByteLevel(trim_offsets=True))
    texts, spans = ["The quick fox", " fox"], [[(3, 9)], [(0, 2)]]
    expected = TextEncoder(trimming)._whole(texts, spans=spans)[1].tolist()
    assert not words_of(trimming).has_offsets
    assert TextEncoder(trimming)(texts, spans=spans)[1].tolist() == expected
    exact = tokenizer_of(post_processor=processors.ByteLevel(trim_offsets=False))
    assert words_of(exact).has_offsets
    expected = TextEncoder(exact)._whole(texts, spans=spans)[1].tolist()
    assert words_of(exact)(texts, spans=spans)[1].tolist() == expected
