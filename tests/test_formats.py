"""Dataset formats against TRL's functions of the same names and against cases worked by hand."""

import copy

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from fastalign.data import formats

trl_data = pytest.importorskip("trl.data_utils")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


EXAMPLES = [
    {"text": "The sky is blue."},
    {"messages": [user("Hi"), assistant("Hello")]},
    {"prompt": "The sky is"},
    {"prompt": [user("Hi")]},
    {"prompt": "The sky is", "completion": " blue."},
    {"prompt": [user("Hi")], "completion": [assistant("Hello")]},
    {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("No")]},
    {"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("No")]},
    {"chosen": "The sky is blue", "rejected": "The sky is green"},
    {"chosen": "The sky is blue", "rejected": "The sky was green"},
    {"chosen": "ab", "rejected": "abc"},
    {"chosen": "same", "rejected": "same"},
    {"prompt": "The", "chosen": " sky", "rejected": " sea"},
    {"prompt": "Hi", "chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("No")]},
    {"prompt": [user("Hi")], "completion": [assistant("Hello")], "label": True},
    {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"conversations": [user("Hi")]},
    {"conversations": "text"},
    {"messages": [{"from": "human", "value": "Hi"}]},
    {"messages": "text"},
    {"prompt": [{"from": "human", "value": "Hi"}], "completion": [{"from": "gpt", "value": "Hello"}]},
]
NAMES = [
    *("text", "language_modeling", "prompt_only", "prompt_only", "prompt_completion", "prompt_completion"),
    *("preference", "preference", "preference", "preference", "preference", "preference", "preference", "preference"),
    *("unpaired_preference", "stepwise", "sharegpt", "sharegpt", "sharegpt", "language_modeling", "language_modeling"),
    "prompt_completion",
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_rows_are_recognised_and_converted_as_trl_does(example):
    mixed = isinstance(example.get("prompt"), str) and isinstance(example.get("chosen"), list)
    if not mixed:  # of such a row TRL looks at an arbitrary column
        assert formats.is_conversational(example) == trl_data.is_conversational(example)
    assert formats.is_conversational_from_value(example) == trl_data.is_conversational_from_value(example)
    for name in ("maybe_convert_to_chatml", "maybe_extract_prompt"):
        ours, theirs = (getattr(module, name)(copy.deepcopy(example)) for module in (formats, trl_data))
        assert ours == theirs, name


def test_every_format_has_its_name():
    assert [formats.dataset_format(example) for example in EXAMPLES] == NAMES
    assert formats.dataset_format(["body", "id"], "body") == "text"
    assert formats.dataset_format(["input_ids", "prompt", "completion"]) == "tokenized"


def test_unknown_columns_are_listed_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"\['answer', 'question'\].*prompt_completion: prompt, completion"):
        formats.dataset_format(["question", "answer"])


def test_empty_message_lists_are_not_conversational():
    assert not formats.is_conversational({"messages": []})
    assert not formats.is_conversational_from_value({"conversations": []})


def test_prompt_that_is_empty_leaves_the_completions_whole():
    # the first characters differ and the text ends with a space, which is no space before the split
    assert formats.extract_prompt({"chosen": "a ", "rejected": "b "}) == {
        "prompt": "",
        "chosen": "a ",
        "rejected": "b ",
    }


PAIRS = {
    "prompt": ["The sky is", "The sun is"],
    "chosen": [" blue.", " in the sky."],
    "rejected": [" green.", " in the sea."],
    "extra": [1, 2],
}


@pytest.mark.parametrize("columns", [("prompt", "chosen", "rejected", "extra"), ("chosen", "rejected")])
def test_unpairing_equals_trl_for_every_kind_of_dataset(columns):
    plain = Dataset.from_dict({name: PAIRS[name] for name in columns})
    kinds = [plain, DatasetDict({"a": plain, "b": plain.select([1])}), plain.to_iterable_dataset()]
    kinds.append(IterableDatasetDict({"a": plain.to_iterable_dataset()}))
    for dataset in kinds:
        ours = formats.unpair_preference_dataset(dataset)
        theirs = trl_data.unpair_preference_dataset(dataset) if not isinstance(dataset, IterableDatasetDict) else None
        splits = [(ours, theirs)] if not isinstance(dataset, dict) else [(ours[k], theirs and theirs[k]) for k in ours]
        for mine, reference in splits:
            rows = list(mine)
            assert reference is None or rows == list(reference)
            half = len(rows) // 2
            assert [row["label"] for row in rows] == [True] * half + [False] * half
        assert type(formats.maybe_unpair_preference_dataset(dataset)) is type(dataset)
    assert [row["completion"] for row in formats.maybe_unpair_preference_dataset(kinds[2])] == [
        *PAIRS["chosen"],
        *PAIRS["rejected"],
    ]


def test_unpairing_leaves_other_datasets_alone_and_names_what_is_missing():
    dataset = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "label": [True]})
    assert formats.maybe_unpair_preference_dataset(dataset) is dataset
    with pytest.raises(ValueError, match="rejected"):
        formats.unpair_preference_dataset(Dataset.from_dict({"chosen": ["a"]}))


IMAGE_CASES = [
    ([user("What?"), assistant("A cat.")], ["i"]),
    ([user("What?"), assistant("A cat."), user("And?")], ["i", "j"]),
    ([user("What?")], None),
    ([{"role": "system", "content": "s"}, user([{"type": "image"}, {"type": "text", "text": "x"}])], ["i"]),
    ([user([{"type": "image", "image": "k"}, {"type": "text", "text": "x"}])], []),
    ([user("x"), {"role": "assistant", "tool_calls": [1]}, {"role": "tool", "content": "t"}], ["i"]),
    ([user("x"), {"role": "assistant", "content": None}, {"role": "tool", "content": [{"type": "image"}]}], ["i"]),
    ([user([{"type": "text", "text": "x"}]), user("y")], ["i"]),
]


@pytest.mark.parametrize("messages, images", IMAGE_CASES)
def test_images_go_where_trl_puts_them(messages, images):
    before = copy.deepcopy(messages)
    assert formats.prepare_multimodal_messages(messages, images) == trl_data.prepare_multimodal_messages(
        messages, images
    )
    assert messages == before


@pytest.mark.parametrize(
    "messages, images, message",
    [
        ([{"role": "judge", "content": "x"}], [], "judge"),
        ([user([{"type": "image"}])], ["i", "j"], "2 images .* 1 places"),
    ],
)
def test_wrong_images_and_roles_are_named(messages, images, message):
    with pytest.raises(ValueError, match=message):
        formats.prepare_multimodal_messages(messages, images)


def test_columns_of_a_stream_come_from_its_first_row():
    stream = IterableDataset.from_generator(lambda: iter([{"a": 1, "b": 2}]))
    assert formats.column_names(stream) == ["a", "b"]
    with pytest.raises(ValueError, match="train dataset has no rows"):
        formats.first_row(Dataset.from_dict({"text": []}), "train")
