"""Where the sequences of a flat row begin and end, and how their attention is cut into pieces."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
SMALL_PIECE = 64  # tokens; segments are taken together up to here, since a call costs as much as 64 x 64 scores
SMALL_FAMILY = 128  # tokens of a prefix and what continues it; apart they would take three calls
TILE_ROWS = 512  # queries of one tile where a mask or explicit scores are needed, so that none is long x long


class Tile(NamedTuple):
    """Queries [q_start, q_stop) of a piece against its keys [k_start, k_stop); `mask` None: causal or full, as asked.

    Keys count from the first of `Piece.before` where a piece has that, else from the first of the piece.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    mask: Tensor | None  # (queries, keys) bool, True where a query sees a key


class Piece(NamedTuple):
    """`length` consecutive tokens: one segment, or several short ones and their block mask.

    They see no other piece, but for one segment behind a prefix: the keys `before` its own are those of the
    tokens [start, stop) of the piece of this number, (number, start, stop).
    """

    length: int
    tiles: tuple[Tile, ...]
    before: tuple[int, int, int] | None = None


@dataclass
class Segments:
    """The bounds of the segments of one flat row; what follows from them is computed once and kept for all layers.

    With `prefix`, all tokens of segment s also see segment prefix[s] (-1: none), which itself has no prefix, and stand
    behind it: their positions go on from its length.
    """

    cu_seqlens: Tensor  # (S + 1,) int32, from 0 to T
    max_seqlen: int  # longest segment, tokens
    prefix: Tensor | None = None  # (S,) int32
    max_shared: int = 0  # most tokens behind one prefix; 0: not known, CUDA then starts more blocks than it needs
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

    @functools.cached_property
    def parents(self) -> tuple[int, ...]:
        """The segment that each segment continues or -1, on the host; an empty one is as good as none.

        Raises ValueError if one is no segment of this row or has a prefix of its own.
        """
        if self.prefix is None:
            return (-1,) * len(self.lengths)
        found: list[int] = self.prefix.tolist()
        count = len(self.lengths)
        if len(found) != count:
            raise ValueError(f"prefix must have one number for each of the {count} segments, found {len(found)}.")
        for s, p in enumerate(found):
            if p >= count or p < -1 or (p >= 0 and found[p] != -1):
                raise ValueError(
                    f"prefix[{s}] is {p}; it must be -1 or one of the {count} segments that has no prefix itself."
                )
        return tuple(p if p >= 0 and self.lengths[p] else -1 for p in found)

    @functools.cached_property
    def longest_sequence(self) -> int:
        """Tokens of the longest segment together with its prefix, on the host."""
        lengths = self.lengths
        return max((n + (lengths[p] if p >= 0 else 0) for n, p in zip(lengths, self.parents, strict=True)), default=0)

    def reach(self, window: int | None) -> int | None:
        """`window`, or None where it is longer than every sequence with its prefix."""
        if window is None or self.prefix is None or window < self.max_seqlen:
            return window
        if self.cu_seqlens.is_cuda:  # without a synchronisation
            return None if window >= 2 * self.max_seqlen else window
        return None if window >= self.longest_sequence else window

    def tail(self, segment: int, window: int | None) -> int:
        """Tokens of its prefix that a segment sees, counted from the prefix's end."""
        parent = self.parents[segment]
        length = self.lengths[parent] if parent >= 0 else 0
        return length if window is None else min(length, window - 1)

    def kept(self, key, make: Callable[[], T]) -> T:
        """What `make` returned when it was asked for under `key` the first time."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def numbers(self, num_tokens: int) -> Tensor:
        """Segment number of each token, (T,) int32 on the device of `cu_seqlens`, without a synchronisation."""
        positions = functools.partial(torch.arange, num_tokens, device=self.cu_seqlens.device)
        return self.kept(
            "numbers", lambda: torch.bucketize(positions(), self.cu_seqlens[1:], right=True, out_int32=True)
        )

    def token_prefixes(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Of each token the segment that it sees before its own or -1, and its position, both (T,) on the device."""

        def make() -> tuple[Tensor, Tensor]:
            numbers = self.numbers(num_tokens).long()
            parent = torch.full_like(numbers, -1) if self.prefix is None else self.prefix.long()[numbers]
            before = torch.where(parent >= 0, self.cu_seqlens.diff()[parent], 0)
            return parent, torch.arange(num_tokens, device=numbers.device) - self.cu_seqlens[numbers] + before

        return self.kept("token_prefixes", make)

    def groups(self, *, apart: bool) -> list[list[int]]:
        """Neighbouring segments to take together, by number; empty ones are left out.

        A group has at most `SMALL_PIECE` tokens, or one segment, or a short prefix and what follows it.
        `apart`: a segment whose prefix is in another group is taken alone.
        """
        lengths, parents = self.lengths, self.parents
        groups: list[list[int]] = []
        total, closed = SMALL_PIECE, True
        for unit in _families(lengths, parents):
            size = sum(lengths[s] for s in unit)
            alone = apart and parents[unit[0]] >= 0
            if not (closed or alone) and total + size <= SMALL_PIECE:
                groups[-1] += unit
                total += size
            else:
                groups.append(list(unit))
                total = size
            closed = alone
        return groups

    def pieces(self, *, causal: bool, window: int | None, explicit: bool) -> tuple[Piece, ...]:
        """The row cut into pieces and tiles. `explicit`: scores are written out, so long segments are tiled too."""

        def make() -> tuple[Piece, ...]:
            rows = TILE_ROWS if explicit and causal else None
            groups = self.groups(apart=True)
            place = {
                s: (i, sum(self.lengths[x] for x in g[:j])) for i, g in enumerate(groups) for j, s in enumerate(g)
            }
            return tuple(self._piece(group, place, causal, window, rows) for group in groups)

        return self.kept(("pieces", causal, window, explicit), make)

    def _piece(self, group: list[int], place: dict, causal: bool, window: int | None, rows: int | None) -> Piece:
        if len(group) > 1:
            length = sum(self.lengths[s] for s in group)
            return Piece(length, (Tile(0, length, 0, length, self.group_mask(group, causal, window)),))
        length, parent = self.lengths[group[0]], self.parents[group[0]]
        tiles = _tiles(length, self.tail(group[0], window), window, rows, self.cu_seqlens.device)
        if parent < 0:
            return Piece(length, tiles)
        tail, (number, start) = self.tail(group[0], window), place[parent]
        stop = start + self.lengths[parent]
        return Piece(length, tiles, (number, stop - tail, stop) if tail else None)

    def group_mask(self, group: list[int], causal: bool, window: int | None) -> Tensor:
        """What the tokens of a group see of it, (tokens, tokens) bool."""
        lengths, parents = self.lengths, self.parents
        numbers, before, own = [], [], []
        for s in group:
            numbers += [s] * lengths[s]
            before += [parents[s] if parents[s] in group else -2] * lengths[s]
            first = lengths[parents[s]] if parents[s] in group else 0
            own += range(first, first + lengths[s])
        number, prefix, position = torch.tensor(numbers), torch.tensor(before), torch.tensor(own)
        distance = position[:, None] - position[None, :]
        mask = number[:, None] == number[None, :]
        if causal:
            mask &= distance >= 0
        mask |= prefix[:, None] == number[None, :]
        if window is not None:
            mask &= distance < window
        return mask.to(self.cu_seqlens.device)

    def block_mask(self, num_tokens: int, causal: bool, window: int | None):
        """The `BlockMask` of FlexAttention, made from the bounds alone: (T / 128)^2 small integers, no T x T mask."""
        return self.kept(("block_mask", causal, window), lambda: _block_mask(self, num_tokens, causal, window))

    def keys_with_prefixes(self, window: int | None) -> tuple[Tensor, Tensor, int]:
        """The tokens whose keys each segment sees, its prefix first: index (T',) int64, bounds (S + 1,), longest.

        Of a prefix no more than what the window reaches. Synchronises with the device, once for all layers.
        """

        def make() -> tuple[Tensor, Tensor, int]:
            starts = [0, *itertools.accumulate(self.lengths)]
            index, counts = [], []
            for s, p in enumerate(self.parents):
                tail = self.tail(s, window)
                index += [torch.arange(starts[p + 1] - tail, starts[p + 1]), torch.arange(starts[s], starts[s + 1])]
                counts.append(tail + self.lengths[s])
            bounds = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
            return torch.cat(index).to(self.cu_seqlens.device), bounds.to(self.cu_seqlens.device), max(counts)

        return self.kept(("keys", window), make)


def _families(lengths: tuple[int, ...], parents: tuple[int, ...]) -> list[list[int]]:
    """Units of grouping: a short prefix with the segments right behind it that continue it, else single segments."""
    units: list[list[int]] = []
    s = 0
    while s < len(lengths):
        stop, total = s + 1, lengths[s]
        while stop < len(lengths) and parents[stop] == s:
            total += lengths[stop]
            stop += 1
        stop = stop if total <= SMALL_FAMILY else s + 1
        unit = [i for i in range(s, stop) if lengths[i]]
        units += [unit] if unit else []
        s = stop
    return units


def _tiles(length: int, tail: int, window: int | None, rows: int | None, device: torch.device) -> tuple[Tile, ...]:
    """Tiles of `length` queries against `tail` keys before them and their own."""
    if tail == 0 and (window is None or length <= window):
        if rows is None or length <= rows:
            return (Tile(0, length, 0, length, None),)
        reach = length
    elif window is None or tail + length <= window:
        rows, reach = TILE_ROWS, tail + length
    else:
        rows, reach = min(max(window, SMALL_PIECE), TILE_ROWS), window
    tiles = []
    for start in range(0, length, rows):
        stop, first = min(start + rows, length), max(0, tail + start - reach + 1)
        mask = band(stop - start, tail + stop - first, tail + start - first, window, device)
        tiles.append(Tile(start, stop, first, tail + stop, mask))
    return tuple(tiles)


@functools.lru_cache(maxsize=32)
def band(num_queries: int, num_keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """Causal band, (num_queries, num_keys) bool: query i stands at key `offset + i` and sees `window` keys back."""
    distance = torch.arange(offset, offset + num_queries, device=device)[:, None]
    distance = distance - torch.arange(num_keys, device=device)[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def _block_mask(segments: Segments, num_tokens: int, causal: bool, window: int | None, size: int = 128):
    from torch.nn.attention.flex_attention import BlockMask

    bounds, numbers = segments.cu_seqlens.long(), segments.numbers(num_tokens).long()
    parent, position = segments.token_prefixes(num_tokens)
    token = torch.arange(num_tokens, device=numbers.device)
    low, high = bounds[numbers], token if causal else bounds[numbers + 1] - 1
    if window is not None:
        low = torch.maximum(low, token - window + 1)
    num_blocks = -(-num_tokens // size)
    # +1 where the keys that a query sees begin, -1 behind their end: the sum along a row counts who sees a block
    seen = torch.zeros(num_blocks, num_blocks + 1, dtype=torch.int32, device=numbers.device)
    spans = [(low, high, torch.ones_like(token))]
    if segments.prefix is not None:
        start, stop = bounds[parent], bounds[parent + 1]
        start = start if window is None else torch.maximum(start, stop - (window - 1 - (token - bounds[numbers])))
        spans.append((start.clamp(max=num_tokens - 1), stop - 1, ((parent >= 0) & (start < stop)).long()))
    for first, last, there in spans:
        for end, change in ((first // size, there), (last // size + 1, -there)):
            seen.index_put_((token // size, end), change.int(), accumulate=True)
    blocks = seen.cumsum(1)[:, :-1] > 0
    count = blocks.sum(1, dtype=torch.int32)
    index = blocks.int().argsort(dim=1, descending=True, stable=True).to(torch.int32)

    def sees(b, h, q, k):
        here = numbers[q] == numbers[k]
        if causal:
            here = here & (q >= k)
        if segments.prefix is not None:
            here = here | (parent[q] == numbers[k])
        return here if window is None else here & (position[q] - position[k] < window)

    return BlockMask.from_kv_blocks(
        count[None, None],
        index[None, None],
        BLOCK_SIZE=size,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
    )
