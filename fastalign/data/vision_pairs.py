"""Prompts with images and their answers: through the processor batch by batch, into padded token batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .answers import judgements
from .batch import TokenBatch
from .chat import apply_chat_template
from .encode import row_settings
from .formats import is_conversational, maybe_extract_prompt, prepare_multimodal_messages
from .pair_batches import AnswerCollator
from .vision import TYPE_KEYS, image_rows, images_of, joiner

MISMATCHED = "kl_completion"  # the answer that every prompt takes from the row before it


class VisionAnswerCollator:
    """B rows with `image` or `images`, a prompt and K answers -> padded TokenBatch, its rows answer by answer.

    What `collator` makes of the processor's ids (answers, scored tokens, `max_length`, extras), with the pixel tensors
    in `model_inputs`: each image is processed once, and its tensors come once per answer. Prompt and answers are texts
    (with the processor's image token, taken as they are) or messages; pairs may go without `prompt`. The answer
    `MISMATCHED` is the completion of the row before, the first row's that of the last.

    ValueError for rows of another form, and where `max_length` cuts off image tokens.
    """

    flat = False

    def __init__(self, processor, collator: AnswerCollator):
        self.processor, self.collator, self.answers = processor, collator, collator.answers
        self.columns = ("prompt", *(name for name in self.answers if name != MISMATCHED))
        collator.vocab_size = None  # models give the image token an embedding that is not in the table

    def __call__(self, rows: list[dict[str, Any]]) -> TokenBatch:
        rows = [self._texts(row, number) for number, row in enumerate(image_rows(rows))]
        options = {"padding": True, "padding_side": "right", "return_tensors": "pt", "add_special_tokens": False}
        prompts = self.processor(images=images_of(rows), text=[row["prompt"] for row in rows], **options)
        texts = [row[name] for name in self.columns[1:] for row in rows]
        answers = self.processor(text=texts, **options)
        taken = torch.arange(len(texts)).view(-1, len(rows))  # (K, B), the answers by place in `texts`
        if MISMATCHED in self.answers:
            taken = torch.cat([taken, taken.roll(1, 1)])
        columns = {name: [row[name] for row in rows] for name in self.collator.extras if name in rows[0]}
        if "label" in columns:
            columns["label"] = judgements(columns["label"], range(len(rows)))
        columns["prompt_ids"], ids = _id_lists(prompts), _id_lists(answers)
        for name, places in zip(self.answers, taken.tolist(), strict=True):
            columns[f"{name}_ids"] = [ids[place] for place in places]
        batch = self.collator([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
        batch = by_answer(batch, len(taken))
        self._check_images(batch, prompts)
        return replace(batch, model_inputs=self._model_inputs(prompts, answers, taken))

    def _texts(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        """The row, of this number in its batch, with texts for its messages."""
        missing = [name for name in self.columns[1:] if row.get(name) is None]
        row |= {} if missing else maybe_extract_prompt(row)
        if missing or row.get("prompt") is None:
            raise ValueError(
                f"Row {number} of a batch with images has no value in {missing or 'prompt'}; it has {sorted(row)}. "
                "Leave such rows out with `dataset.filter`."
            )
        if is_conversational(row):
            [settings] = row_settings(1, [row.get("tools")], [row.get("chat_template_kwargs")]) or [{}]
            messages = {name: prepare_multimodal_messages(row[name]) for name in self.columns[1:]}
            messages["prompt"] = prepare_multimodal_messages(row["prompt"], images=row["images"])
            row |= apply_chat_template(messages, self.processor, **settings)
        if others := [name for name in self.columns if not isinstance(row[name], str)]:
            found = {name: type(row[name]).__name__ for name in others}
            raise ValueError(
                f"Row {number} of a batch with images needs texts or lists of messages in {self.columns}, got {found}"
                ". Mend such rows with `dataset.map`, or leave them out with `dataset.filter`."
            )
        return row

    def _model_inputs(self, prompts: Any, answers: Any, taken: Tensor) -> dict[str, Tensor]:
        """The processor's further tensors, for the rows of the batch."""
        times, taken = len(taken), taken.flatten()
        inputs = {k: v for k, v in prompts.items() if k not in ("input_ids", "attention_mask", *TYPE_KEYS)}
        inputs = {name: torch.cat([value] * times) for name, value in inputs.items()}
        lengths = prompts["attention_mask"].sum(1).repeat(times), answers["attention_mask"].sum(1)[taken]
        join = joiner(*lengths, limit=self.collator.max_length, multiple=self.collator.pad_to_multiple_of)
        for key in TYPE_KEYS:
            if key in prompts:
                tail = answers[key] if key in answers else torch.zeros_like(answers["input_ids"])
                inputs[key] = join(prompts[key].repeat(times, 1), tail[taken], 0)
        return inputs

    def _check_images(self, batch: TokenBatch, prompts: Any) -> None:
        token, limit = getattr(self.processor, "image_token_id", None), self.collator.max_length
        if token is None or limit is None:
            return
        there = (prompts["input_ids"] == token).sum(1)
        cut = (batch.input_ids == token).sum(1).view(-1, len(there)).amin(0) < there
        if cut.any():
            longest = int(prompts["attention_mask"].sum(1)[cut].max())
            raise ValueError(
                f"`max_length={limit}` cuts image tokens off, and their pixels stay: a prompt has {longest} tokens. "
                "Raise it above that, set it to None, or make the images smaller."
            )


def by_answer(batch: TokenBatch, per_row: int) -> TokenBatch:
    """`batch` (padded, row by row) with all first answers before all second ones, and so on, numbered as before."""
    assert batch.is_padded and not batch.model_inputs
    width = batch.input_ids.shape[1]
    order = torch.arange(len(batch.input_ids)).view(-1, per_row).t().flatten()  # place -> sequence
    place = order.argsort()
    assert batch.attention_mask is not None
    return replace(
        batch,
        input_ids=batch.input_ids[order],
        position_ids=batch.position_ids[order],
        attention_mask=batch.attention_mask[order],
        cu_seqlens=torch.nn.functional.pad(batch.cu_seqlens.diff()[order].cumsum(0), (1, 0)).to(torch.int32),
        source=place[batch.source // width] * width + batch.source % width,
        by_answer=True,
    )


def _id_lists(made: Any) -> list[list[int]]:
    """The real ids of each row that a processor made."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(made["input_ids"], made["attention_mask"], strict=True)]


def number_by_answer(batch: TokenBatch, per_row: int) -> TokenBatch:
    """`batch` (padded) of which all first answers lie before all second ones, and so on, numbered row by row."""
    num_rows = len(batch.input_ids) // per_row
    number = batch.row % num_rows * per_row + batch.row // num_rows
    order = number.argsort(stable=True)
    places = {"source": batch.source[order], "targets": batch.targets[order], "weight": batch.weight[order]}
    return replace(batch, row=number[order], by_answer=True, **places)
