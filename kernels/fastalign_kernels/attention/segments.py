"""Where the sequences of a flat row begin and end, and how their attention is cut into pieces."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

SMALL_PIECE = 64  # tokens; segments are taken together up to here, since a call costs as much as 64 x 64 scores
TILE_ROWS = 512  # queries of one tile where a mask or explicit scores are needed, so that none is long x long


class Tile(NamedTuple):
    """Queries [q_start, q_stop) of a piece against keys [k_start, q_stop); `mask` None: causal or full, as asked."""

    q_start: int
    q_stop: int
    k_start: int
    mask: Tensor | None  # (queries, keys) bool, True where a query sees a key


class Piece(NamedTuple):
    """`length` consecutive tokens that see no other piece: one segment, or several short ones and their block mask."""

    length: int
    tiles: tuple[Tile, ...]


@dataclass
class Segments:
    """The bounds of the segments of one flat row; what follows from them is computed once and kept for all layers."""

    cu_seqlens: Tensor  # (S + 1,) int32, from 0 to T
    max_seqlen: int  # longest segment, tokens
    _kept: dict = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each segment, on the host (one synchronisation where the bounds live on a device).

        Raises ValueError if the bounds do not start at 0 or decrease.
        """
        bounds = self.cu_seqlens.tolist()
        lengths = tuple(b - a for a, b in itertools.pairwise(bounds))
        if not bounds or bounds[0] != 0 or any(n < 0 for n in lengths):
            raise ValueError(f"cu_seqlens must start at 0 and never decrease, found {bounds[:8]}; check the collator.")
        return lengths

    def numbers(self, num_tokens: int) -> Tensor:
        """Segment number of each token, (T,) int32 on the device of `cu_seqlens`, without a synchronisation."""
        if "numbers" not in self._kept:
            positions = torch.arange(num_tokens, device=self.cu_seqlens.device)
            self._kept["numbers"] = torch.bucketize(positions, self.cu_seqlens[1:], right=True, out_int32=True)
        return self._kept["numbers"]

    def pieces(self, *, causal: bool, window: int | None, explicit: bool) -> tuple[Piece, ...]:
        """The row cut into pieces and tiles. `explicit`: scores are written out, so long segments are tiled too."""
        key = ("pieces", causal, window, explicit)
        if key not in self._kept:
            rows = TILE_ROWS if explicit and causal else None
            self._kept[key] = tuple(
                _piece(group, causal, window, rows, self.cu_seqlens.device) for group in _groups(self.lengths)
            )
        return self._kept[key]

    def block_mask(self, num_tokens: int, causal: bool, window: int | None):
        """The `BlockMask` of FlexAttention, made from the bounds alone: (T / 128)^2 small integers, no T x T mask."""
        key = ("block_mask", causal, window)
        if key not in self._kept:
            self._kept[key] = _block_mask(self.numbers(num_tokens), self.cu_seqlens, causal, window)
        return self._kept[key]


def _groups(lengths: tuple[int, ...]) -> list[list[int]]:
    """Neighbouring segments taken together while they stay within `SMALL_PIECE` tokens."""
    groups: list[list[int]] = []
    for n in lengths:
        if n == 0:
            continue
        if groups and sum(groups[-1]) + n <= SMALL_PIECE:
            groups[-1].append(n)
        else:
            groups.append([n])
    return groups


def _piece(group: list[int], causal: bool, window: int | None, rows: int | None, device: torch.device) -> Piece:
    length = sum(group)
    if len(group) > 1:
        number = torch.repeat_interleave(torch.arange(len(group)), torch.tensor(group))
        mask = (number[:, None] == number[None, :]).to(device)
        if causal:
            mask &= band(length, length, 0, window, device)
        return Piece(length, (Tile(0, length, 0, mask),))
    if window is None or length <= window:
        if rows is None or length <= rows:
            return Piece(length, (Tile(0, length, 0, None),))
        reach = length
    else:
        rows, reach = min(max(window, SMALL_PIECE), TILE_ROWS), window
    tiles = []
    for start in range(0, length, rows):
        stop, first = min(start + rows, length), max(0, start - reach + 1)
        tiles.append(Tile(start, stop, first, band(stop - start, stop - first, start - first, window, device)))
    return Piece(length, tuple(tiles))


@functools.lru_cache(maxsize=32)
def band(num_queries: int, num_keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """Causal band, (num_queries, num_keys) bool: query i stands at key `offset + i` and sees `window` keys back."""
    distance = torch.arange(offset, offset + num_queries, device=device)[:, None]
    distance = distance - torch.arange(num_keys, device=device)[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def _block_mask(numbers: Tensor, cu_seqlens: Tensor, causal: bool, window: int | None, size: int = 128):
    from torch.nn.attention.flex_attention import BlockMask

    num_tokens, device = numbers.shape[0], numbers.device
    num_blocks = -(-num_tokens // size)
    first = torch.arange(num_blocks, device=device) * size  # first token of each block of queries
    last = (first + size).clamp(max=num_tokens) - 1
    low = cu_seqlens[numbers[first].long()].long()  # start of the segment that the block's first query belongs to
    if window is not None:
        low = torch.maximum(low, first - window + 1)
    high = last if causal else cu_seqlens[numbers[last].long() + 1].long() - 1
    low, high = low // size, high // size
    count = (high - low + 1).to(torch.int32)
    index = (low[:, None] + torch.arange(num_blocks, device=device)).clamp(max=num_blocks - 1).to(torch.int32)

    def sees(b, h, q, k):
        seen = numbers[q] == numbers[k]
        if causal:
            seen = seen & (q >= k)
        return seen if window is None else seen & (q - k < window)

    return BlockMask.from_kv_blocks(
        count[None, None],
        index[None, None],
        BLOCK_SIZE=size,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
    )
