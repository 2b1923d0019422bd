"""Images with text: rows go through the processor batch by batch, and come out as padded token batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batch import TokenBatch
from .chat import apply_chat_template
from .dict_batches import token_batch
from .formats import is_conversational, prepare_multimodal_messages

TYPE_KEYS = ("token_type_ids", "mm_token_type_ids")  # per token, so they are cut and padded with the ids


class VisionCollator:
    """Rows with `image` or `images` and text -> padded TokenBatch; pixel tensors travel in `model_inputs`.

    Takes `messages`, a text column, or `prompt` and `completion` (text or messages). `max_length` is in tokens and
    keeps the start. Raises KeyError for rows of another form and ValueError for masks that the form does not have.
    """

    def __init__(
        self,
        processor,
        *,
        max_length: int | None = None,
        completion_only_loss: bool = False,
        assistant_only_loss: bool = False,
        pad_to_multiple_of: int | None = None,
        text_field: str = "text",
        chat_template: str | None = None,
    ):
        self.processor = processor
        self.max_length = max_length
        self.completion_only_loss = completion_only_loss
        self.assistant_only_loss = assistant_only_loss
        self.pad_to_multiple_of = pad_to_multiple_of
        self.text_field = text_field
        self.chat_template = chat_template

    def __call__(self, rows: list[dict[str, Any]]) -> TokenBatch:
        rows = image_rows(rows)
        first = rows[0]
        if self.assistant_only_loss and "messages" not in first:
            raise ValueError("`assistant_only_loss` needs conversational language-modelling rows (`messages`).")
        if "messages" in first or self.text_field in first:
            if self.completion_only_loss:
                raise ValueError("`completion_only_loss` needs prompt-completion rows; these are language modelling.")
            tensors = self._language_modeling(rows)
        elif "prompt" in first and "completion" in first:
            tensors = self._prompt_completion(rows)
        else:
            raise KeyError(
                f"Rows with images need 'messages', {self.text_field!r}, or 'prompt' and 'completion'; found "
                f"{sorted(first)}."
            )
        return token_batch(tensors, flat=False)

    def _language_modeling(self, rows: list[dict]) -> dict[str, Tensor]:
        options = {
            "padding": True,
            "padding_side": "right",
            "pad_to_multiple_of": self.pad_to_multiple_of,
            "truncation": self.max_length is not None,
            "max_length": self.max_length,
            "add_special_tokens": False,  # the template (or the text) has them
        }
        if "messages" in rows[0]:
            messages = [prepare_multimodal_messages(row["messages"], images=row["images"]) for row in rows]
            made = self.processor.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=self.assistant_only_loss,
                processor_kwargs=options,
            )
        else:
            texts = [row[self.text_field] for row in rows]
            made = self.processor(images=images_of(rows), text=texts, return_tensors="pt", **options)
        tensors = dict(made)
        labels = torch.where(tensors["attention_mask"].bool(), tensors["input_ids"], -100)
        if self.assistant_only_loss:
            labels[tensors.pop("assistant_masks") == 0] = -100
        return tensors | {"labels": labels}

    def _prompt_completion(self, rows: list[dict]) -> dict[str, Tensor]:
        images = images_of(rows)
        if is_conversational(rows[0]):
            for row in rows:
                row["prompt"] = prepare_multimodal_messages(row["prompt"], images=row["images"])
                row["completion"] = prepare_multimodal_messages(row["completion"])
            rows = [apply_chat_template(row, self.processor) for row in rows]
        options = {"padding": True, "padding_side": "right", "return_tensors": "pt", "add_special_tokens": False}
        prompts = self.processor(images=images, text=[row["prompt"] for row in rows], **options)
        completions = self.processor(text=[row["completion"] for row in rows], **options)
        tensors = {k: v for k, v in prompts.items() if k not in ("input_ids", "attention_mask", *TYPE_KEYS)}
        lengths = (prompts["attention_mask"].sum(1), completions["attention_mask"].sum(1))
        join = joiner(*lengths, limit=self.max_length, multiple=self.pad_to_multiple_of)
        pad = self.processor.tokenizer.pad_token_id
        ids = join(prompts["input_ids"], completions["input_ids"], pad)
        ones, zeros = torch.ones_like, torch.zeros_like
        tensors["input_ids"] = ids
        tensors["attention_mask"] = join(ones(prompts["input_ids"]), ones(completions["input_ids"]), 0)
        unscored = zeros(prompts["input_ids"]) if self.completion_only_loss else ones(prompts["input_ids"])
        scored = join(unscored, ones(completions["input_ids"]), 0)
        for key in TYPE_KEYS:
            if key in prompts:
                tail = completions[key] if key in completions else zeros(completions["input_ids"])
                tensors[key] = join(prompts[key], tail, 0)
        return tensors | {"labels": torch.where(scored.bool(), ids, -100)}


def image_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of rows with `image` or `images` (or neither) that have a list in `images`."""
    rows = [dict(row) for row in rows]
    for row in rows:
        images = row.pop("image", None) if "image" in row else row.get("images")
        row["images"] = [] if images is None else images if isinstance(images, list) else [images]
    return rows


def images_of(rows: list[dict]) -> list | None:
    """Images per row; None where no row has any (processors refuse a batch of empty lists)."""
    images = [row["images"] for row in rows]
    return images if any(images) else None


def joiner(prompt_lengths: Tensor, completion_lengths: Tensor, *, limit: int | None, multiple: int | None) -> Callable:
    """A function that joins right-padded (B, P) and (B, C) tensors row by row into (B, L), padded on the right."""
    total = prompt_lengths + completion_lengths
    if limit is not None:
        total = total.clamp(max=limit)
    width = int(total.max())
    if multiple:
        width = -(-width // multiple) * multiple

    def join(prompt: Tensor, completion: Tensor, fill: int) -> Tensor:
        joined = prompt.new_full((prompt.shape[0], width), fill)
        for i, length in enumerate(total.tolist()):
            row = torch.cat([prompt[i, : prompt_lengths[i]], completion[i, : completion_lengths[i]]])
            joined[i, :length] = row[:length]
        return joined

    return join
