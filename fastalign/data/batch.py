"""The batch that every algorithm trains on: sequences back to back, and the positions whose next token is scored."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass
class TokenBatch:
    """Sequences back to back (flat) or in padded rows, and the tokens that are scored.

    A *segment* is one sequence that attends only to itself. Flat: `input_ids` is (T,) and `cu_seqlens` gives the
    segment bounds. Padded (for models that cannot take packed input): `input_ids` is (B, L), `attention_mask` is
    (B, L), each padded row is one segment, and `source` points into the B*L flattened positions.
    Scored positions are listed, never masked: the hidden state at `source[i]` predicts `targets[i]`.
    """

    input_ids: Tensor  # (T,) or (B, L) int64
    position_ids: Tensor  # same shape as input_ids, int64; restarts at 0 in each segment
    cu_seqlens: Tensor  # (S + 1,) int32, bounds of the segments (padded: of the real tokens of each row)
    source: Tensor  # (N,) int64, index of the hidden state that predicts targets[i]
    targets: Tensor  # (N,) int64
    row: Tensor  # (N,) int64, segment that target i belongs to; non-decreasing
    weight: Tensor  # (N,) fp32, weight of target i in a token-level loss
    max_seqlen: int  # longest segment, tokens
    num_tokens: int  # real tokens in the batch (padding not counted)
    attention_mask: Tensor | None = None  # (B, L) int64; None in flat batches
    model_inputs: dict[str, Tensor] = field(
        default_factory=dict
    )  # passed to the model as they are (pixel_values, ...)

    @property
    def num_scored(self) -> int:
        """Number of scored tokens N, known on the host."""
        return self.targets.shape[0]

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def is_padded(self) -> bool:
        return self.attention_mask is not None

    def _map(self, fn) -> TokenBatch:
        changed = {f.name: fn(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **changed, model_inputs={k: fn(v) for k, v in self.model_inputs.items()})

    def to(self, device: torch.device | str, non_blocking: bool = True) -> TokenBatch:
        """The same batch on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenBatch:
        """The same batch in page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        return self._map(lambda t: t.pin_memory())
