"""What a model takes and how much of it a batch holds: dataset columns, tokens, its own loss on dictionaries."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.trainer_utils import unwrap_peft_model

from ..data.batch import TokenBatch


def signature_columns(model: Any, label_names: list[str]) -> list[str]:
    """Dataset columns that the model's forward takes, and the names of labels."""
    return [*inspect.signature(unwrap_peft_model(model).forward).parameters, "label", "label_ids", *label_names]


def accepts_loss_kwargs(model: Any) -> bool:
    """Whether the model's own loss can be normalised by `num_items_in_batch`."""
    model = unwrap_peft_model(model)
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def default_collator(processing_class):
    """transformers' collator for a trainer that is given none."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def model_loss(trainer: Any, model: nn.Module, inputs: dict, num_items: int | Tensor | None):
    """(loss, outputs) of a dictionary batch: the model's own loss, label smoothing, or the user's loss function."""
    kwargs = {}
    if num_items is not None and trainer.model_accepts_loss_kwargs:
        kwargs["num_items_in_batch"] = num_items
    labels = None
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
    outputs = model(**inputs, **kwargs)
    if trainer.compute_loss_func is not None:
        loss = trainer.compute_loss_func(outputs, labels, num_items_in_batch=num_items)
    elif labels is not None:
        assert trainer.label_smoother is not None
        loss = trainer.label_smoother(outputs, labels, shift_labels=True, num_items_in_batch=num_items)
    elif isinstance(outputs, dict) and "loss" not in outputs:
        raise ValueError(
            f"The model gave no loss, only {sorted(outputs)}, for the inputs {sorted(inputs)}: add labels."
        )
    else:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    if trainer.args.average_tokens_across_devices and num_items is not None:
        loss = loss * trainer.world  # num_items counts all ranks, and gradients are averaged over them
    return loss, outputs


def count_items(trainer, inputs: TokenBatch | dict) -> int | None:
    """Scored tokens of a micro-batch; None where the loss is a mean that nothing can normalise."""
    if isinstance(inputs, TokenBatch):
        return inputs.num_scored
    if "labels" not in inputs or not (trainer.compute_loss_func or trainer.model_accepts_loss_kwargs):
        return None
    labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
    return int((labels != -100).sum())


def count_tokens(trainer, inputs: TokenBatch | dict) -> tuple[int, int]:
    """(tokens for `include_num_input_tokens_seen`, positions that the model computes) of a micro-batch on the host."""
    real_only = trainer.args.include_num_input_tokens_seen == "non_padding"
    if isinstance(inputs, TokenBatch):
        positions = inputs.input_ids.numel()
        return (inputs.num_tokens if real_only else positions), positions
    ids = inputs.get(getattr(trainer.model, "main_input_name", "input_ids"))
    if not isinstance(ids, Tensor):
        return 0, 0
    if real_only and "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum()), ids.numel()
    pad = getattr(trainer.processing_class, "pad_token_id", None)
    return (int((ids != pad).sum()) if real_only and pad is not None else ids.numel()), ids.numel()


def flops_per_token(model: nn.Module) -> int:
    """6 floating-point operations per parameter outside the embeddings (transformers' estimate)."""
    known = model.__dict__.get("_flops_per_token")
    if known is None:
        count: Any = getattr(model, "num_parameters", lambda exclude_embeddings: 0)
        known = model.__dict__["_flops_per_token"] = 6 * count(exclude_embeddings=True)
    return known


def labels_of(batch: TokenBatch) -> Tensor:
    """Unshifted labels of a batch, (B, L), or (1, T) if flat; -100 where not scored, like each sequence's first."""
    labels = torch.full((batch.input_ids.numel(),), -100, device=batch.targets.device)
    labels[batch.source + 1] = batch.targets
    return labels.view(batch.input_ids.shape if batch.is_padded else (1, -1))
