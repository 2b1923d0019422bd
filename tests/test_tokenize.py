"""Preparation for supervised fine-tuning: equal to TRL 1.16's row by row, and cases worked by hand."""

import copy
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from test_chat import GENERATION_MARKS
from tiny import CHATML, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from fastalign.data import encode, texts
from fastalign.data.masks import Rows, Tokens, common_prefix_lengths
from fastalign.data.tokenize import prepare_sft_dataset

trl = pytest.importorskip("trl")


def by_trl(dataset, tokenizer, *, max_length=None, packing=False, **options):
    """The same through TRL: `SFTTrainer._prepare_dataset` on a stand-in that holds what it reads of a trainer."""
    from accelerate import PartialState

    PartialState()
    row = next(iter(dataset))
    completion_only = options.get("completion_only_loss")
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=options.get("chat_template"),
        completion_only_loss=("prompt" in row and "completion" in row) if completion_only is None else completion_only,
    )
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field=options.get("dataset_text_field", "text"),
        assistant_only_loss=options.get("assistant_only_loss", False),
        max_length=max_length,
        truncation_mode=options.get("truncation_mode", "keep_start"),
        shuffle_dataset=False,
    )
    assert not packing
    formatting = options.get("formatting_func")
    return trl.SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, False, formatting, "train")


def values(dataset):
    rows = list(dataset)
    return [[list(map(int, row[name])) for row in rows] for name in ("input_ids", "labels")]


def tokenizer_of(kind="plain", template=CHATML):
    fresh = copy.deepcopy(tiny_tokenizer())
    backend = fresh.backend_tokenizer
    if kind == "bos":
        ids = [("<s>", 1), ("</s>", 2)]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    elif kind == "greedy":  # added tokens that take whitespace along, or that hold another one
        fresh.add_tokens([AddedToken("<|im_start|>assistant", normalized=False)])
        fresh.add_tokens([AddedToken("<|im_end|>", rstrip=True, normalized=False, special=True)])
    elif kind == "merging":  # "\n" before a completion that starts with "\n" becomes one token
        fresh.add_tokens([AddedToken("\n\n", normalized=False), AddedToken(" the", normalized=True)])
    elif kind == "first":
        fresh = _metaspace_tokenizer()
    elif kind == "slow":
        fresh.__class__ = type("OwnWay", (PreTrainedTokenizerFast,), {"__call__": _own_call})
    fresh.chat_template = template
    return fresh


def _own_call(self, *args, **kwargs):
    return PreTrainedTokenizerFast.__call__(self, *args, **kwargs)


def _metaspace_tokenizer():
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    texts = ["user assistant system what is two and two four the sky blue \n"] * 3
    backend.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


WORDS = ["the quick fox", "", " four ", "\nfox", "12 + 2\n\n", "é ü <b>", "the <|im_end|> end", "dog"]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CHATS = [[user(a), assistant(b), user(b), assistant(a + "!")] for a in WORDS for b in WORDS]
PROMPTS = [
    [{"role": "system", "content": a}, user(b)] if i % 2 else [user(b)]
    for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)
]
TEXTS = [a + b for a in WORDS for b in WORDS]
ENDS = [w + e for w in WORDS for e in ("", "</s>")] * 4
DATA = {
    "text": {"text": [*TEXTS[1:], "ends already</s>"]},
    "messages": {"messages": CHATS, "id": list(range(64))},
    "sharegpt": {"conversations": [[{"from": m["role"], "value": m["content"]} for m in chat] for chat in CHATS]},
    "prompt_completion": {"prompt": TEXTS, "completion": ENDS},
    "chat_completion": {"prompt": PROMPTS, "completion": [[assistant(w)] for w in WORDS] * 8},
    "tools": {"messages": CHATS, "tools": [TOOLS if i % 3 else None for i in range(64)]},
    "json_tools": {"prompt": PROMPTS, "completion": [[assistant("x")]] * 64, "tools": [json.dumps(TOOLS)] * 64},
    "kwargs": {
        "prompt": PROMPTS,
        "completion": [[assistant("x")]] * 64,
        "chat_template_kwargs": [{"greeting": w} for w in WORDS] * 8,
    },
    "ids": {"input_ids": [[3, 4, 5], [6], [], [7, 8, 9, 10, 11]]},
    "ids_labels": {"input_ids": [[3, 4, 5], [6], [7, 8]], "labels": [[-100, 4, 5], [-100], [7, -100]]},
    "ids_masks": {
        "input_ids": [[3, 4, 5], [6, 7], [8, 9]],
        "completion_mask": [[0, 0, 1], [0, 1], [0, 0]],
        "assistant_masks": [[0, 1, 1], [1, 0], [1, 1]],
    },
}
CUT = {"text": 9, "prompt_completion": 9, "ids": 3, "ids_labels": 2, "ids_masks": 3, "formatting": 9}
CUT |= {"tools": 110, "json_tools": 110}
TOOL_TEMPLATE = "{{ greeting }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML
MARKED = ["messages", "sharegpt", "chat_completion", "tools", "kwargs"]
MARKED_TEMPLATE = "{{ greeting }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + GENERATION_MARKS


def dataset(name):
    return Dataset.from_dict(DATA[name])


@pytest.mark.parametrize("kind", ["plain", "bos", "greedy", "merging", "first", "slow"])
@pytest.mark.parametrize("name", DATA)
def test_equal_to_trl(name, kind):
    tokenizer = tokenizer_of(kind, TOOL_TEMPLATE)
    cut = CUT.get(name, 60)
    every = [
        {"max_length": None},
        {"max_length": cut},
        {"max_length": cut - 1, "truncation_mode": "keep_end"},
        {"max_length": cut, "completion_only_loss": False},
        {"max_length": cut, "completion_only_loss": True},
    ]
    for options in every if kind == "plain" else every[1:2]:
        expected = values(by_trl(dataset(name), tokenizer, **options))
        expected = [[row for row in column if row] for column in expected]  # TRL keeps rows without any token
        assert values(prepare_sft_dataset(dataset(name), tokenizer, **options)) == expected, options


@pytest.mark.parametrize("kind", ["plain", "greedy", "slow"])
@pytest.mark.parametrize("name", MARKED)
def test_assistant_masks_equal_trl(name, kind):
    data = dataset(name).filter(lambda row: all(m.get("content", m.get("value")) for m in next(iter(row.values()))))
    if name == "chat_completion":
        data = data.filter(lambda row: row["completion"][0]["content"] != "")
    for template in (None, MARKED_TEMPLATE):
        tokenizer = tokenizer_of(kind, MARKED_TEMPLATE if template is None else TOOL_TEMPLATE)
        for completion_only in (None, False):
            options = {
                "max_length": 40,
                "assistant_only_loss": True,
                "chat_template": template,
                "completion_only_loss": completion_only,
            }
            expected = values(by_trl(data, tokenizer, **options))
            assert any(label == -100 for row in expected[1] for label in row)
            assert values(prepare_sft_dataset(data, tokenizer, **options)) == expected


@pytest.mark.parametrize("name", [*DATA, "formatting"])
def test_streams_give_the_same_rows(name):
    tokenizer = tokenizer_of("plain", TOOL_TEMPLATE)
    options = {"max_length": CUT.get(name, 60)}
    if name == "formatting":
        options["formatting_func"] = lambda row: f"{row['q']} = {row['a']}"
    rows = {"q": ["1+1", "2+2"], "a": [2, 4]} if name == "formatting" else DATA[name]
    expected = values(prepare_sft_dataset(Dataset.from_dict(rows), tokenizer, **options))
    stream = prepare_sft_dataset(Dataset.from_dict(rows).to_iterable_dataset(), tokenizer, **options)
    assert values(stream) == expected
    assert stream.column_names == ["input_ids", "labels"]
    if name == "formatting":
        assert expected[0] == tokenizer(["1+1 = 2</s>", "2+2 = 4</s>"])["input_ids"]
        assert expected == values(by_trl(Dataset.from_dict(rows), tokenizer, **options))


def test_labels_by_hand():
    tokenizer = tokenizer_of("plain", GENERATION_MARKS)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    head, tail = ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"), ids("yes<|im_end|>\n")
    data = Dataset.from_dict({"prompt": [[user("hi")]], "completion": [[assistant("yes")]]})
    row = prepare_sft_dataset(data, tokenizer, max_length=None)[0]
    assert row == {"input_ids": head + tail, "labels": [-100] * len(head) + tail}
    chat = Dataset.from_dict({"messages": [[user("hi"), assistant("yes")]]})
    assert prepare_sft_dataset(chat, tokenizer, max_length=None, assistant_only_loss=True)[0] == row
    assert prepare_sft_dataset(chat, tokenizer, max_length=None)[0]["labels"] == head + tail
    text = Dataset.from_dict({"prompt": ["the fox"], "completion": [" dog"]})
    parts = ids("the fox"), ids(" dog</s>")
    row = prepare_sft_dataset(text, tokenizer, max_length=None)[0]
    assert row == {"input_ids": parts[0] + parts[1], "labels": [-100] * len(parts[0]) + parts[1]}
    tokenizer.eos_token = "<|im_end|>"
    ended = prepare_sft_dataset(text, tokenizer, max_length=None)[0]
    assert ended["input_ids"][-1] == 4 and 2 not in ended["input_ids"]


def test_columns_types_and_repetition():
    tokenizer = tokenizer_of()
    once = prepare_sft_dataset(dataset("chat_completion"), tokenizer, max_length=60)
    assert {name: str(feature) for name, feature in once.features.items()} == {
        "input_ids": "List(Value('int32'))",
        "labels": "List(Value('int32'))",
    }
    again = prepare_sft_dataset(once, tokenizer, max_length=60)
    assert values(again) == values(once) and again.features == once.features
    assert once.format["type"] is None


def test_rows_without_tokens_are_dropped():
    rows = Dataset.from_dict({"input_ids": [[3], [], [4, 5]], "labels": [[3], [], [4, 5]]})
    for options in ({"max_length": 3}, {"max_length": None}, {"max_length": 2, "packing": True}):
        for data in (rows, rows.to_iterable_dataset()):
            kept = [row["input_ids"] for row in prepare_sft_dataset(data, tokenizer_of(), **options)]
            assert kept == [[3], [4, 5]]


def test_packing_neither_cuts_nor_drops():
    data = Dataset.from_dict({"prompt": ["the quick brown fox"], "completion": ["dog"]})
    whole = prepare_sft_dataset(data, tokenizer_of(), max_length=None)
    assert values(prepare_sft_dataset(data, tokenizer_of(), max_length=1, packing=True)) == values(whole)


def test_formatting_wins_over_other_columns_and_sees_them():
    tokenizer = tokenizer_of()
    rows = dataset("chat_completion").select(range(3))
    make = lambda row: row["prompt"][-1]["content"] + "|" + row["completion"][0]["content"]  # noqa: E731
    ours = prepare_sft_dataset(rows, tokenizer, max_length=None, completion_only_loss=False, formatting_func=make)
    assert values(ours)[0] == tokenizer([make(row) + "</s>" for row in rows])["input_ids"]


def test_jsonl_with_uneven_tool_calls(tmp_path):
    calls = [{"a": 1}, {"b": "x"}]
    chats = [
        [user("hi"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": c}}]}] for c in calls
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    template = "{% for m in messages %}{{ m.content or m.tool_calls[0].function.arguments | tojson }}{% endfor %}"
    tokenizer = tokenizer_of("plain", template)
    ours = values(prepare_sft_dataset(data, tokenizer, max_length=None))
    assert ours == values(by_trl(data, tokenizer))
    assert [tokenizer.decode(ids) for ids in ours[0]] == ['hi{"a": 1}', 'hi{"b": "x"}']


def test_cache_follows_the_content(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    encoded = []
    own = texts.TextEncoder.__call__
    monkeypatch.setattr(texts.TextEncoder, "__call__", lambda self, *a: encoded.append(1) or own(self, *a))

    def prepare(tokenizer, **options):
        encoded.clear()
        result = prepare_sft_dataset(data, tokenizer, **({"max_length": 20} | options))
        return bool(encoded), values(result)

    fresh, first = prepare(tokenizer_of())
    assert fresh
    other = tokenizer_of("plain", GENERATION_MARKS)  # renders the same, but is another template
    assert prepare(tokenizer_of()) == (False, first)
    assert prepare(other) == (True, first)
    assert prepare(tokenizer_of(), max_length=19)[0]
    assert prepare(tokenizer_of(), chat_template=GENERATION_MARKS)[0]
    assert prepare(tokenizer_of("merging"))[0]
    called = tokenizer_of()
    called("some text", padding="max_length", truncation=True, max_length=3)  # leaves its settings in the backend
    assert prepare(called) == (False, first)


def test_workers_give_the_same_rows():
    data = Dataset.from_dict(DATA["chat_completion"])
    one = prepare_sft_dataset(data, tokenizer_of(), max_length=70)
    assert values(prepare_sft_dataset(data, tokenizer_of(), max_length=70, num_proc=2)) == values(one)


def test_prompts_are_encoded_once_for_any_number_of_completions(monkeypatch):
    tokenizer = tokenizer_of()
    prompts = [[user(f"question {i} of the quick fox")] for i in range(40)]
    chosen, rejected = ([[assistant(f"{word} {i}")] for i in range(40)] for word in ("yes", "no"))
    monkeypatch.setattr(texts, "word_rules", lambda *_: None)  # words are encoded once anyway
    encoder = encode.Encoder(tokenizer)
    first = encoder.completions(prompts, [chosen, rejected])
    characters = []
    own = texts.TextEncoder._whole
    monkeypatch.setattr(
        texts.TextEncoder,
        "_whole",
        lambda self, texts, *a: characters.extend(map(len, texts)) or own(self, texts, *a),
    )
    encoder.completions(prompts, [chosen, rejected])
    apply = lambda messages, **more: tokenizer.apply_chat_template(messages, tokenize=False, **more)  # noqa: E731
    alone = [apply(prompt, add_generation_prompt=True) for prompt in prompts]
    both = [apply(p + c) for column in (chosen, rejected) for p, c in zip(prompts, column, strict=True)]
    longer = sum(map(len, both)) - sum(map(len, alone))  # prompts once, completions twice
    assert sum(characters) <= longer + len("assistant\n") * (len(prompts) + 1)
    assert first.prompts.lists() == tokenizer(alone, add_special_tokens=False)["input_ids"]
    assert Tokens.joined(first.wholes).lists() == tokenizer(both, add_special_tokens=False)["input_ids"]
    assert [column.tolist() for column in first.prompt_lengths] == [first.prompts.lengths.tolist()] * 2


def test_seam_is_warned_of_once(caplog):
    data = Dataset.from_dict({"prompt": ["the qui", "the qui"], "completion": ["ck fox", "ck dog"]})
    with caplog.at_level(logging.WARNING, "fastalign.data.encode"):
        prepare_sft_dataset(data, tokenizer_of(), max_length=None)
    assert sum("are not the beginning" in record.message for record in caplog.records) == 1


def test_cut_and_dropped_rows_are_logged(caplog):
    data = Dataset.from_dict({"prompt": ["a", "the quick brown fox jumps"], "completion": ["b" * 30, "b"]})
    with caplog.at_level(logging.INFO, "fastalign.data.tokenize"):
        assert len(prepare_sft_dataset(data, tokenizer_of(), max_length=5)) == 1
    assert "2 rows, 2 truncated to 5 tokens, 1 dropped" in caplog.text


PLAIN = {"text": ["a"]}
WRONG = [
    ({"question": ["a"], "answer": ["b"]}, {}, ValueError, "No dataset format has the columns"),
    ({"prompt": ["a"]}, {}, ValueError, "prompt_only data .* add a `completion` column"),
    ({"chosen": ["a"], "rejected": ["b"]}, {}, ValueError, "preference data"),
    ({"text": []}, {}, ValueError, "train dataset has no rows"),
    ({"text": [[user("x")]]}, {}, ValueError, "must hold strings, found list"),
    ({"text": ["a", None]}, {}, ValueError, "must hold strings; a row of the train dataset holds None"),
    (PLAIN, {"assistant_only_loss": True}, ValueError, "needs conversations"),
    (PLAIN, {"formatting_func": lambda row: ["a"]}, ValueError, r"formatting_func.* must hold strings.*\['a'\]"),
    (PLAIN, {"formatting_func": str, "completion_only_loss": True}, ValueError, "no completion to score alone"),
    ({"prompt": ["the quick"], "completion": ["b"]}, {"max_length": 1}, ValueError, "1 rows, 1 dropped"),
    ({"input_ids": [[3]], "labels": [[-100]]}, {"max_length": None}, ValueError, "scored token"),
    ({"input_ids": [[3, 4]], "labels": [[3]]}, {}, ValueError, "2 `input_ids` but 1 `labels`"),
    ({"input_ids": [[0.5]]}, {}, ValueError, "`input_ids` must hold integers, got double"),
    ({"input_ids": ["ab"]}, {}, ValueError, "`input_ids` must be a list of numbers per row, got type"),
    ({"input_ids": [[3], [4, 2**32 + 5]]}, {}, ValueError, "row 1, position 1: 4294967301 is no token id"),
    ({"messages": [[user("a")], []]}, {}, ValueError, "holds no messages"),
    ({"messages": ["[]"]}, {}, ValueError, "list of messages with a `role`, found"),
    ({"messages": [[{"content": "a"}]]}, {}, ValueError, "list of messages with a `role`, found"),
    ({"messages": [[user("a")], [user(None)]]}, {}, ValueError, "template fails with TypeError.*'content': None"),
    ({"prompt": ["a", None], "completion": ["b", "c"]}, {}, ValueError, "column 'prompt' must hold strings.*None"),
    ({"prompt": [[user("a")]], "completion": ["b"]}, {}, ValueError, "completion is 'b'.*a list of messages"),
    ({"messages": [[user("a")]], "tools": ["[{"]}, {}, ValueError, "`tools` of a row is text that is no JSON"),
    ({"messages": [[user("a"), assistant("b")]]}, {"assistant_only_loss": True}, RuntimeError, "generation"),
    (
        {"messages": [[user("a")]], "chat_template_kwargs": [{"padding": True}]},
        {},
        ValueError,
        "padding.*which the trainer itself sets",
    ),
]


@pytest.mark.parametrize("rows, options, error, message", WRONG)
def test_errors_say_what_to_do(rows, options, error, message):
    with pytest.raises(error, match=message):
        prepare_sft_dataset(Dataset.from_dict(rows), tokenizer_of(), **({"max_length": 8} | options))


def test_transform_and_missing_end_token_are_refused():
    with pytest.raises(ValueError, match="with_transform"):
        prepare_sft_dataset(dataset("text").with_transform(lambda b: b), tokenizer_of(), max_length=8)
    tokenizer = tokenizer_of()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no `eos_token`"):
        prepare_sft_dataset(dataset("text"), tokenizer, max_length=8)
    chats = prepare_sft_dataset(dataset("messages"), tokenizer, max_length=8)  # conversations end by template
    assert len(chats) == 64


def test_ragged_rows_by_hand():
    rows = Rows(np.arange(6, dtype=np.int32), np.array([-100, 1, 2, -100, -100, 5], np.int32), np.array([3, 0, 2, 1]))
    assert rows.scored().tolist() == [True, False, False, True]
    assert rows.take(rows.scored()).ids.tolist() == [0, 1, 2, 5]
    assert rows.truncated(1, "keep_start").ids.tolist() == [0, 3, 5]
    assert rows.truncated(1, "keep_end").ids.tolist() == [2, 4, 5]
    assert rows.table().to_pydict()["labels"] == [[-100, 1, 2], [], [-100, -100], [5]]
    these, others = [[1, 2, 3], [1, 2, 3], [], [1, 2, 3], [1, 2, 3]], [[1, 2, 4], [], [5], [1, 2, 3, 4], [9]]
    assert common_prefix_lengths(Tokens.of(these), Tokens.of(others)).tolist() == [2, 0, 0, 3, 0]
