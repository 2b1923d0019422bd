"""The dataset formats the trainers take: how to recognise one from a row, and how to turn one into another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

AnyDataset = Dataset | IterableDataset
AnyDatasetOrDict = Dataset | IterableDataset | DatasetDict | IterableDatasetDict

CONVERSATION_COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages")
CHATML_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")
ROLES = ("system", "user", "assistant", "tool")
FORMATS = {  # format -> the columns that make it one; the first format whose columns are all there is taken
    "tokenized": ("input_ids",),
    "stepwise": ("prompt", "completions", "labels"),
    "unpaired_preference": ("prompt", "completion", "label"),
    "preference": ("chosen", "rejected"),  # with or without `prompt`
    "prompt_completion": ("prompt", "completion"),
    "language_modeling": ("messages",),
    "sharegpt": ("conversations",),
    "text": ("text",),
    "prompt_only": ("prompt",),
}


def column_names(dataset: AnyDataset) -> list[str]:
    """Names of the columns; a stream that does not declare them is asked for its first row."""
    return list(dataset.column_names or first_row(dataset))


def first_row(dataset: AnyDataset, name: str = "given") -> dict[str, Any]:
    """The first row as Python values (or as the dataset's transform gives it). ValueError when there is none."""
    has_transform = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    row = next(iter(dataset if has_transform else dataset.with_format(None)), None)
    if row is None:
        raise ValueError(f"The {name} dataset has no rows, it is empty. Check its split and its filters.")
    return row


def is_conversational(example: Mapping[str, Any]) -> bool:
    """Whether the row holds lists of messages (dicts with a `role`) and not plain strings."""
    for column in CONVERSATION_COLUMNS:
        if column in example:
            return _starts_with_keys(example[column], "role")
    return False


def is_conversational_from_value(example: Mapping[str, Any]) -> bool:
    """Whether the row is ShareGPT: a `conversations` list of `{"from": ..., "value": ...}`."""
    return _starts_with_keys(example.get("conversations"), "from", "value")


def _starts_with_keys(messages: Any, *keys: str) -> bool:
    if not isinstance(messages, list) or not messages:
        return False
    return isinstance(messages[0], dict) and all(key in messages[0] for key in keys)


def maybe_convert_to_chatml(example: dict[str, Any]) -> dict[str, Any]:
    """Rename `from`/`value` to `role`/`content` and `conversations` to `messages`, in place.

    The values of the roles (`human`, `gpt`) stay as they are: the chat template decides what it does with them.
    """
    for column in CHATML_COLUMNS:
        messages = example.get(column)
        for message in messages if isinstance(messages, list) else ():
            if isinstance(message, dict):
                if "from" in message:
                    message["role"] = message.pop("from")
                if "value" in message:
                    message["content"] = message.pop("value")
    if "conversations" in example:
        example["messages"] = example.pop("conversations")
    return example


def dataset_format(columns: Sequence[str] | Mapping[str, Any], text_column: str = "text") -> str:
    """Name of the format (a key of `FORMATS`) from the column names or from a row.

    ValueError listing what was found and what is allowed when no format fits.
    """
    found = set(columns)
    for name, needed in FORMATS.items():
        needed = (text_column,) if name == "text" else needed
        if found.issuperset(needed):
            return name
    allowed = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items())
    raise ValueError(
        f"No dataset format has the columns {sorted(found)}. Allowed are ({allowed}). Rename the columns with "
        "`dataset.rename_columns`, or name the text column in `dataset_text_field`."
    )


def has_images(columns: Sequence[str] | Mapping[str, Any]) -> bool:
    """Whether the dataset carries images (a column `image` or `images`), so that a processor must read it."""
    return "image" in columns or "images" in columns


def extract_prompt(example: Mapping[str, Sequence]) -> dict[str, Sequence]:
    """Split the prompt that `chosen` and `rejected` start with from both of them.

    The prompt is the longest common prefix, of messages or of characters; a space before the split goes to the
    completions, since tokenizers attach it to the word that follows.
    """
    chosen, rejected = example["chosen"], example["rejected"]
    shorter = min(len(chosen), len(rejected))
    split = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if split is None:
        split = max(shorter - 1, 0)  # as TRL: of two texts that are the same, the last element is the completion
    elif split and chosen[split - 1] == " ":
        split -= 1
    return {"prompt": chosen[:split], "chosen": chosen[split:], "rejected": rejected[split:]}


def maybe_extract_prompt(example: dict[str, Any]) -> dict[str, Any]:
    """`extract_prompt` where the prompt is implicit: absent, or a string beside conversational completions."""
    if "chosen" not in example or "rejected" not in example:
        return example
    if "prompt" in example and _starts_with_keys(example["chosen"], "role") == _starts_with_keys(
        example["prompt"], "role"
    ):
        return example
    return extract_prompt(example)


def unpair_preference_dataset(dataset: AnyDatasetOrDict, **map_kwargs: Any) -> AnyDatasetOrDict:
    """One row per completion, with `label` True for the chosen and False for the rejected; other columns repeat."""
    columns = _columns_of_any(dataset)
    missing = [name for name in ("chosen", "rejected") if name not in columns]
    if missing:
        raise ValueError(f"Unpairing needs the columns `chosen` and `rejected`; {missing} missing from {columns}.")
    return dataset.map(_unpair, batched=True, remove_columns=columns, **map_kwargs)


def _unpair(batch: Mapping[str, list]) -> dict[str, list]:
    rows = len(batch["chosen"])
    rest = {name: batch[name] + batch[name] for name in batch if name not in ("chosen", "rejected")}
    completions = {
        "completion": batch["chosen"] + batch["rejected"],
        "label": [True] * rows + [False] * rows,
    }
    return completions | rest


def maybe_unpair_preference_dataset(
    dataset: AnyDatasetOrDict, num_proc: int | None = None, desc: str | None = None
) -> AnyDatasetOrDict:
    """`unpair_preference_dataset` if the dataset is paired, else the dataset itself. Streams ignore both options."""
    columns = _columns_of_any(dataset)
    if "chosen" not in columns or "rejected" not in columns:
        return dataset
    if isinstance(dataset, IterableDataset | IterableDatasetDict):
        return unpair_preference_dataset(dataset)
    return unpair_preference_dataset(dataset, num_proc=num_proc, desc=desc)


def _columns_of_any(dataset: AnyDatasetOrDict) -> list[str]:
    return column_names(next(iter(dataset.values())) if isinstance(dataset, dict) else dataset)


def prepare_multimodal_messages(messages: list[dict[str, Any]], images: list | None = None) -> list[dict[str, Any]]:
    """Messages whose contents are lists of blocks, with `images` filled into the image blocks in order.

    String contents become one text block; images go in front of the first user message whose content is a string.
    The given messages are not changed. ValueError for an unknown role, and when the number of empty image blocks
    differs from the number of images.
    """
    images = images or []
    placed = False
    prepared = []
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"Unknown role {message['role']!r} in a message; allowed are {', '.join(ROLES)}.")
        content = message.get("content")
        if isinstance(content, str):
            blocks: list[dict[str, Any]] = [{"type": "text", "text": content}]
            if message["role"] == "user" and not placed:
                blocks = [{"type": "image"} for _ in images] + blocks
                placed = True
            message = {**message, "content": blocks}
        prepared.append(message)

    def is_open(block: dict[str, Any]) -> bool:
        return block["type"] == "image" and "image" not in block

    fillable = [m for m in prepared if m.get("content") and m["role"] != "tool"]
    places = sum(is_open(block) for message in fillable for block in message["content"])
    if places != len(images):
        raise ValueError(f"The row has {len(images)} images but its messages have {places} places for images.")
    supply = iter(images)
    return [
        {**m, "content": [{**b, "image": next(supply)} if is_open(b) else b for b in m["content"]]}
        if images and m.get("content") and m["role"] != "tool"
        else m
        for m in prepared
    ]
