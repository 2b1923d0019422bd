"""The batch that every algorithm trains on: sequences back to back, and the positions whose next token is scored."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

READ_SHARE = 0.5  # of a batch's tokens at most are named to the last layer as the only ones that are read


@dataclass
class TokenBatch:
    """Sequences back to back (flat) or in padded rows, and the tokens that are scored.

    A *segment* is one sequence that attends only to itself. Flat: `input_ids` is (T,) and `cu_seqlens` gives the
    segment bounds. Padded (for models that cannot take packed input): `input_ids` is (B, L), `attention_mask` is
    (B, L), each padded row is one segment, and `source` points into the B*L flattened positions.
    Scored positions are listed, never masked: the hidden state at `source[i]` predicts `targets[i]`.

    Shared (flat only): several answers to one prompt are segments of their own behind one segment of the prompt.
    `prefix[s]` is the segment that all tokens of segment s see besides those before them in s, -1 where there is none;
    a segment that is a prefix has none. Positions of s then start at the length of its prefix, and the `source` of its
    first token is the last position of the prefix.

    `by_answer` (padded only): the rows are all first answers, then all second ones, and so on, so that the images of
    their prompts repeat as a whole; the numbers of `row` still count answer by answer of each prompt.
    """

    input_ids: Tensor  # (T,) or (B, L) int64
    position_ids: Tensor  # same shape as input_ids, int64; from 0 in each segment, from its length behind a prefix
    cu_seqlens: Tensor  # (S + 1,) int32, bounds of the segments (padded: of the real tokens of each row)
    source: Tensor  # (N,) int64, index of the hidden state that predicts targets[i]
    targets: Tensor  # (N,) int64
    row: Tensor  # (N,) int64, sequence of target i; non-decreasing; its segment where none is shared
    weight: Tensor  # (N,) fp32, weight of target i in a token-level loss
    max_seqlen: int  # longest segment, tokens
    num_tokens: int  # real tokens in the batch (padding not counted)
    attention_mask: Tensor | None = None  # (B, L) int64; None in flat batches
    prefix: Tensor | None = None  # (S,) int32, segment that segment s continues, or -1; None: no segment has a prefix
    max_shared: int = 0  # most tokens behind one prefix; 0: found from `prefix` where that is on the CPU
    model_inputs: dict[str, Tensor] = field(default_factory=dict)  # passed to the model (pixel_values, ...)
    extras: dict[str, Tensor] = field(default_factory=dict)  # for the loss alone (margins, labels, reference logps)
    by_answer: bool = False  # see above
    host_row: Tensor | None = None  # `row` as it was before the batch went to a device: reading it does not wait

    def __post_init__(self) -> None:
        if self.prefix is not None and self.prefix.device.type == "cpu" and not self.max_shared:
            behind = torch.zeros(self.num_segments + 2, dtype=torch.int64)  # one more, so that it is never empty
            behind.index_add_(0, self.prefix.long() + 1, self.cu_seqlens.diff().long())
            self.max_shared = int(behind[1:].amax())

    @property
    def num_scored(self) -> int:
        """Number of scored tokens N, known on the host."""
        return self.targets.shape[0]

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_rows(self) -> int:
        """Number of sequences, counted once each where several share a prefix."""
        return self.extras["lengths"].numel() if "lengths" in self.extras else self.num_segments

    @property
    def is_padded(self) -> bool:
        return self.attention_mask is not None

    def _map(self, fn) -> TokenBatch:
        names = [f.name for f in fields(self) if f.name != "host_row"]
        changed: dict = {name: fn(v) for name in names if isinstance(v := getattr(self, name), Tensor)}
        for name in ("model_inputs", "extras"):
            changed[name] = {k: fn(v) for k, v in getattr(self, name).items()}
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> TokenBatch:
        """The same batch on `device`; `host_row` keeps `row`."""
        moved = self._map(lambda t: t.to(device, non_blocking=non_blocking))
        return replace(moved, host_row=self.row if self.host_row is None else self.host_row)

    def pin_memory(self) -> TokenBatch:
        """The same batch in page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        return self._map(lambda t: t.pin_memory())


def name_read(batch: TokenBatch) -> TokenBatch:
    """`batch` with `extras["read"]`, the places (M,) of the tokens whose hidden states are read, where that saves."""
    extras = {name: value for name, value in batch.extras.items() if name != "read"}
    read = batch.source.unique()
    if not batch.is_padded and read.numel() <= READ_SHARE * batch.input_ids.numel():
        extras["read"] = read
    return replace(batch, extras=extras)
