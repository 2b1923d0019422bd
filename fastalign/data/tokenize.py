"""One batched pass from raw rows of any format that supervised fine-tuning takes to `input_ids` and `labels`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.features.features import require_decoding

from .cache import preparation_fingerprint
from .encode import Encoder, row_settings
from .formats import (
    column_names,
    dataset_format,
    first_row,
    is_conversational,
    is_conversational_from_value,
    maybe_convert_to_chatml,
)
from .masks import Rows, Tokens, after_prompt, any_of_rows, build_labels, flat_column

logger = logging.getLogger(__name__)

_KINDS = {  # dataset format -> how a row becomes tokens
    "unpaired_preference": "prompt_completion",
    "prompt_completion": "prompt_completion",
    "language_modeling": "messages",
    "sharegpt": "messages",
}


def prepare_sft_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: Any,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
    dataset_text_field: str = "text",
    chat_template: str | None = None,
    num_proc: int | None = None,
    packing: bool = False,
    name: str = "train",
) -> Dataset | IterableDataset:
    """Tokenize a dataset: columns `input_ids` and `labels`, lists of int32, labels -100 where nothing is scored.

    `max_length` is in tokens (None: rows stay as long as they are; with `packing` the packer cuts). Rows that
    truncation leaves without a scored token are dropped, not so when packing. `completion_only_loss` None: true for
    prompt-completion data. The tokenizer's end token ends every plain text, never a conversation. Data that is
    tokenized already is truncated and masked only. The result is cached by content beside the dataset's own files.
    ValueError for what cannot be used, RuntimeError for a conversation without a marked token under
    `assistant_only_loss`.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            "The dataset uses `with_transform`, which preparing it would apply once and freeze. Pass "
            "`dataset_kwargs={'skip_prepare_dataset': True}` and let the transform return `input_ids` and `labels`, "
            "or apply it with `dataset.map` first."
        )
    row, columns = first_row(dataset, name), column_names(dataset)
    if completion_only_loss is None:
        completion_only_loss = "prompt" in row and "completion" in row
    kind = _kind(row, dataset_text_field, formatting_func)
    if kind == "tokens" and formatting_func is not None:
        logger.warning("The %s dataset has `input_ids` already: `formatting_func` is not used.", name)
    _check_choice(kind, row, name, completion_only_loss, assistant_only_loss, formatting_func)
    conversational = kind == "messages" or (kind == "prompt_completion" and is_conversational(row))
    ends = kind in ("text", "prompt_completion") and not conversational
    step = SFTTokenizer(
        kind=kind,
        encoder=Encoder(processing_class, chat_template),
        conversational=conversational,
        sharegpt=is_conversational_from_value(row) or "messages" not in row,
        completion_only=completion_only_loss,
        assistant_only=assistant_only_loss,
        max_length=None if packing else max_length,
        truncation_mode=truncation_mode,
        text_column=dataset_text_field,
        formatting_func=formatting_func,
        eos_token=_end_token(processing_class) if ends else "",
        columns=columns,
        name=name,
    )
    return _run(dataset, step, num_proc)


def _kind(row: dict[str, Any], text_column: str, formatting_func: Callable | None) -> str:
    if "input_ids" in row:
        return "tokens"
    if formatting_func is not None:
        return "text"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    found = dataset_format(row, text_column)
    if found == "text" and not isinstance(row[text_column], str):
        raise ValueError(f"The column {text_column!r} must hold strings, found {type(row[text_column]).__name__}.")
    if found in _KINDS or found == "text":
        return _KINDS.get(found, found)
    hint = "add a `completion` column" if found == "prompt_only" else "use the trainer for that format or convert it"
    raise ValueError(
        f"Supervised fine-tuning cannot use {found} data (columns {sorted(row)}). Allowed: `messages`, "
        f"`conversations`, `prompt` with `completion`, the text column {text_column!r}, or `input_ids`; {hint}."
    )


def _check_choice(kind, row, name, completion_only: bool, assistant_only: bool, formatting_func) -> None:
    if formatting_func is not None and completion_only and kind != "tokens":
        raise ValueError(
            "`formatting_func` makes one text of each row, so there is no completion to score alone. Set "
            "`completion_only_loss=False`, or drop `formatting_func` and give `prompt` and `completion` columns."
        )
    if assistant_only and kind in ("text", "prompt_completion") and (kind == "text" or not is_conversational(row)):
        raise ValueError(
            f"`assistant_only_loss=True` needs conversations, but the {name} dataset holds plain text. Give "
            "`messages`, or set `assistant_only_loss=False`."
        )
    if completion_only and kind in ("text", "messages"):
        logger.warning("The %s dataset has no completions: `completion_only_loss=True` scores every token.", name)


def _end_token(processing_class: Any) -> str:
    eos_token = getattr(processing_class, "tokenizer", processing_class).eos_token
    if eos_token is None:
        raise ValueError(
            "The tokenizer has no `eos_token`, so no text could teach the model where to stop. Set `eos_token` in the "
            "config or `tokenizer.eos_token`."
        )
    return eos_token


@dataclass
class SFTTokenizer:
    """Turns a batch of raw rows into `Rows`; called by `Dataset.map`."""

    kind: str  # tokens, text, messages or prompt_completion
    encoder: Encoder
    conversational: bool
    sharegpt: bool  # messages may be `from`/`value`, in a column `conversations`
    completion_only: bool
    assistant_only: bool
    max_length: int | None  # tokens
    truncation_mode: str
    text_column: str
    formatting_func: Callable | None
    eos_token: str  # empty for conversations
    columns: list[str]
    name: str
    counts: dict[str, int] = field(default_factory=lambda: {"truncated": 0})

    def __call__(self, batch: Mapping[str, Any] | pa.Table) -> pa.Table:
        """Arrow table with the columns of the result."""
        rows: Rows = getattr(self, f"_{self.kind}")(batch)
        keep = rows.lengths > 0
        if self.max_length is not None:
            self.counts["truncated"] += int((rows.lengths > self.max_length).sum())
            rows = rows.truncated(self.max_length, self.truncation_mode)
            keep = rows.scored()
        return rows.take(keep).table()

    def lists(self, batch: Mapping[str, Any]) -> dict[str, list]:
        """The same as lists, which streams want."""
        return self(batch).to_pydict()

    def _tokens(self, batch: Any) -> Rows:
        """Rows that come as ids, with labels or with masks to make them from."""
        ids, lengths = flat_column(batch["input_ids"], "input_ids")
        used = ["assistant_masks", "completion_mask"] if self.completion_only else ["assistant_masks"]
        used = ["labels"] if "labels" in self.columns else [column for column in used if column in self.columns]
        parts = {}
        for column in used:
            parts[column], found = flat_column(batch[column], column)
            if (wrong := np.flatnonzero(found != lengths)).size:
                i = wrong[0]
                raise ValueError(
                    f"A row of the {self.name} dataset has {lengths[i]} `input_ids` but {found[i]} `{column}` (row "
                    f"{i} of its batch); they must be equally long."
                )
        labels = parts["labels"] if "labels" in parts else build_labels(ids, parts.values())
        return Rows(ids, labels, lengths)

    def _text(self, batch: Any) -> Rows:
        if self.formatting_func is None:
            texts = values_of(batch, self.text_column)
        else:
            names = list(batch.keys())
            rows = zip(*(batch[name] for name in names), strict=True)
            texts = [self.formatting_func(dict(zip(names, row, strict=True))) for row in rows]
        source = f"column {self.text_column!r}" if self.formatting_func is None else "result of `formatting_func`"
        tokens = self.encoder.texts(self._ended(texts, source))
        return Rows(tokens.ids, tokens.ids.copy(), tokens.lengths)

    def _ended(self, texts: list[Any], source: str) -> list[str]:
        """The texts, each with the end token behind it."""
        self._check_texts(texts, source)
        return [text if text.endswith(self.eos_token) else text + self.eos_token for text in texts]

    def _check_texts(self, texts: list[Any], source: str) -> None:
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"The {source} must hold strings; a row of the {self.name} dataset holds {wrong[0]!r}.")

    def _settings(self, batch: Any, rows: int) -> list[dict[str, Any]] | None:
        tools, kwargs = (values_of(batch, c) if c in self.columns else None for c in ("tools", "chat_template_kwargs"))
        return row_settings(rows, tools, kwargs)

    def _messages(self, batch: Any) -> Rows:
        conversations = values_of(batch, "messages" if "messages" in self.columns else "conversations")
        if self.sharegpt:
            conversations = [maybe_convert_to_chatml({"messages": turns})["messages"] for turns in conversations]
        settings = self._settings(batch, len(conversations))
        tokens, mask = self.encoder.conversations(conversations, settings, marks=self.assistant_only)
        return self._rows(tokens, [] if mask is None else [mask], mask)

    def _prompt_completion(self, batch: Any) -> Rows:
        prompts, completions = values_of(batch, "prompt"), values_of(batch, "completion")
        settings = None
        if self.conversational:
            settings = self._settings(batch, len(prompts))
        else:
            self._check_texts(prompts, "column 'prompt'")
            completions = self._ended(completions, "column 'completion'")
        marked = self.assistant_only and self.conversational
        encoded = self.encoder.completions(prompts, [completions], settings, marks=marked)
        tokens, mask = encoded.wholes[0], encoded.assistant_masks[0] if encoded.assistant_masks else None
        masks = [] if mask is None else [mask]
        if self.completion_only:
            masks.append(after_prompt(tokens.lengths, encoded.prompt_lengths[0]))
        return self._rows(tokens, masks, mask)

    def _rows(self, tokens: Tokens, masks: list[np.ndarray], assistant: np.ndarray | None) -> Rows:
        if assistant is not None and not any_of_rows(assistant, tokens.lengths).all():
            raise RuntimeError(
                "`assistant_only_loss=True`, but a row has no token that the assistant says. Either it has no "
                "assistant turn, or the chat template lacks `{% generation %}...{% endgeneration %}` around "
                "the assistant's text (see `get_training_chat_template`)."
            )
        return Rows(tokens.ids, build_labels(tokens.ids, masks), tokens.lengths)


def values_of(batch: Mapping[str, Any] | pa.Table, name: str) -> list[Any]:
    """A column as Python values."""
    column = batch[name]
    return column.to_pylist() if isinstance(column, pa.ChunkedArray) else list(column)


def _run(dataset: Dataset | IterableDataset, step: SFTTokenizer, num_proc: int | None) -> Dataset | IterableDataset:
    """The dataset through `step`; cached."""
    features = Features({column: List(Value("int32")) for column in ("input_ids", "labels")})
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None).map(step.lists, batched=True, remove_columns=step.columns, features=features)
    as_arrow = step.formatting_func is None and not require_decoding(dict(dataset.features))
    source = dataset.with_format("arrow" if step.kind == "tokens" or as_arrow else None)
    options = {k: v for k, v in vars(step).items() if k not in ("encoder", "counts", "name", "columns")}
    options["chat_template"] = step.encoder.chat_template
    result = source.map(
        step,
        batched=True,
        num_proc=num_proc,
        remove_columns=step.columns,
        features=features,
        new_fingerprint=preparation_fingerprint(dataset, step.encoder.processing_class, options),
        desc=f"Tokenizing {step.name} dataset",
    ).with_format(None)
    _check_result(result, step, len(dataset))
    return result


def _check_result(result: Dataset, step: SFTTokenizer, rows: int) -> None:
    """Log what was cut and dropped. ValueError when no token is left to learn from."""
    dropped = rows - len(result)
    if step.counts["truncated"] or dropped:
        logger.info(
            "%s dataset: %d rows, %d truncated to %s tokens, %d dropped (no scored token left).",
            step.name,
            rows,
            step.counts["truncated"],
            step.max_length,
            dropped,
        )
    batches: Any = result.with_format("arrow").iter(1000)
    if not any((flat_column(batch["labels"], "labels")[0] != -100).any() for batch in batches):
        raise ValueError(
            f"No row of the {step.name} dataset has a scored token ({rows} rows, {dropped} dropped because truncation "
            f"to max_length={step.max_length} left none). Raise `max_length`, check `completion_only_loss` and "
            "`assistant_only_loss`, or the `labels` column (-100 means not scored)."
        )
