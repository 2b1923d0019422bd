"""Selective activation checkpointing: attention outputs are kept, everything else is computed again in backward."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

ATTENTION_OPS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_flash_attention_forward",
)


def _keep_attention(ops: set, ctx, op, *args, **kwargs) -> CheckpointPolicy:
    if op in ops or "flash_attn" in str(op):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def enable_selective_checkpointing(model) -> None:
    """Make `model.gradient_checkpointing_enable` keep attention outputs, whoever calls it; twice is harmless."""
    enable = model.gradient_checkpointing_enable
    if getattr(enable, "keeps_attention", False):
        return
    ops = {packet.default for name in ATTENTION_OPS if (packet := getattr(torch.ops.aten, name, None)) is not None}
    contexts = partial(create_selective_checkpoint_contexts, partial(_keep_attention, ops))

    def gradient_checkpointing_enable(gradient_checkpointing_kwargs: dict | None = None, **kwargs):
        options = dict(gradient_checkpointing_kwargs or {})
        options.pop("selective", None)  # not an option of torch's checkpoint
        options |= {"use_reentrant": False, "context_fn": contexts}
        return enable(gradient_checkpointing_kwargs=options, **kwargs)

    gradient_checkpointing_enable.keeps_attention = True
    model.gradient_checkpointing_enable = gradient_checkpointing_enable
