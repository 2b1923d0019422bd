"""Padded dictionaries, as Transformers' collators make them, turned into token batches."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import TokenBatch

TEXT_KEYS = ("input_ids", "labels", "attention_mask", "position_ids")
PACKING_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class BatchAdapter:
    """Wraps a collator that returns a dictionary of tensors, so that it returns a TokenBatch (on the host).

    The dictionary needs `input_ids` (B, L); `labels` (B, L, unshifted, -100 = not scored; default: every real token)
    and `attention_mask` (B, L; default: all real) are optional; whatever else it holds is passed to the model. One
    row with restarting `position_ids` (1, T) is taken as several sequences. A result of another kind raises TypeError.
    """

    def __init__(self, collator, *, flat: bool):
        self.collator = collator
        self.flat = flat

    def __call__(self, rows) -> TokenBatch:
        made = self.collator(rows)
        if isinstance(made, TokenBatch):
            return made
        if not hasattr(made, "keys") or "input_ids" not in made:
            found = sorted(made) if hasattr(made, "keys") else type(made).__name__
            raise TypeError(f"`data_collator` must return a dictionary with `input_ids` or a TokenBatch, got {found}.")
        return token_batch(dict(made), flat=self.flat)


def token_batch(tensors: dict[str, Tensor], *, flat: bool) -> TokenBatch:
    """A TokenBatch from padded tensors (see `BatchAdapter`), flat where wanted and where no other inputs forbid it."""
    ids = torch.as_tensor(tensors["input_ids"])
    mask = tensors.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    labels = tensors.get("labels")
    labels = torch.where(mask.bool(), ids, -100) if labels is None else torch.as_tensor(labels)
    others = {k: v for k, v in tensors.items() if k not in TEXT_KEYS + PACKING_KEYS and v is not None}
    positions = tensors.get("position_ids")
    real = mask.bool()
    first = real & (real.cumsum(1) == 1)  # (B, L), first token of each segment
    packed_row = positions is not None and ids.shape[0] == 1 and "attention_mask" not in tensors
    if packed_row:
        first = torch.as_tensor(positions) == 0
    if packed_row or (flat and not others):
        return _flat_batch(ids[real], labels[real], first[real])
    return _padded_batch(ids, labels, mask, first, others)


def _segments(first: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds (S + 1,) and in-segment positions (T,) of tokens whose segment starts are marked in `first` (T,)."""
    starts = first.nonzero().flatten()
    bounds = torch.cat([starts, torch.tensor([first.numel()])])
    positions = torch.arange(first.numel()) - starts[first.cumsum(0) - 1]
    return bounds, positions


def _flat_batch(ids: Tensor, labels: Tensor, first: Tensor) -> TokenBatch:
    bounds, positions = _segments(first)
    target_at = ((labels != -100) & ~first).nonzero().flatten()
    return TokenBatch(
        input_ids=ids.long(),
        position_ids=positions,
        cu_seqlens=bounds.int(),
        source=target_at - 1,
        targets=labels[target_at].long(),
        row=(first.cumsum(0) - 1)[target_at],
        weight=torch.ones(target_at.numel()),
        max_seqlen=int(bounds.diff().max()) if ids.numel() else 0,
        num_tokens=ids.numel(),
    )


def _padded_batch(ids: Tensor, labels: Tensor, mask: Tensor, first: Tensor, others: dict) -> TokenBatch:
    scored = (labels != -100) & ~first & mask.bool()
    scored[:, 0] = False
    target_at = scored.flatten().nonzero().flatten()
    lengths = mask.sum(1)
    return TokenBatch(
        input_ids=ids.long(),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).long(),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]),
        source=target_at - 1,
        targets=labels.flatten()[target_at].long(),
        row=target_at // ids.shape[1],
        weight=torch.ones(target_at.numel()),
        max_seqlen=int(lengths.max()) if ids.numel() else 0,
        num_tokens=int(lengths.sum()),
        attention_mask=mask.long(),
        model_inputs=others,
    )
