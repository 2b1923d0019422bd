"""Samples of prompts to the batches that are trained on: a prompt once for all its completions in a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batch import TokenBatch
from ..data.pair_batches import SHARE_GAIN
from .buffer import Experience
from .image_inputs import join_inputs


@dataclass
class GroupBatch(TokenBatch):
    """A batch whose sequence `row` is `experiences[row]`; scored are the learned tokens, `weight` is the loss's."""

    experiences: list[Experience] = field(default_factory=list)
    micro: list[int] = field(default_factory=list)  # nominal micro-batch of each sequence in the step
    step: Any = None  # of what it is a part (`loader.Step`), None for passes without a loss
    is_last: bool = True  # of the step


class GroupCollator:
    """Experiences -> GroupBatch.

    Flat and shared: neighbours of one group are segments behind one segment of their prompt. `share` None: where that
    saves 15 % of the tokens. What stands behind the last learned token of a sequence is left out, unless `whole`
    (balancing losses of experts see every token). ValueError for a prompt without tokens, and for a sequence above
    `longest` tokens (the model's table of positions).
    """

    reads_arrow = False

    def __init__(
        self,
        *,
        pad_token_id: int,
        flat: bool,
        share: bool | None = None,
        whole: bool = False,
        longest: int | None = None,
        pad_to_multiple_of: int | None = None,
    ):
        self.pad_token_id, self.flat, self.share, self.whole = pad_token_id, flat, share, whole
        self.longest, self.pad_to_multiple_of = longest, pad_to_multiple_of

    def length(self, experience: Experience) -> int:
        """Tokens behind the prompt that the model has to read."""
        if self.whole:
            return len(experience.completion_ids)
        return int(experience.learned_at[-1]) if experience.num_learned else 0

    def shares(self, experiences: Sequence[Experience]) -> bool:
        """Whether prompts are shared in batches made of these."""
        if self.share is not None or not self.flat:
            return self.flat and bool(self.share)
        total, once = 0, 0
        for group in _groups(experiences):
            lengths = [self.length(one) for one in group]
            total += len(group) * len(group[0].prompt_ids) + sum(lengths)
            once += len(group[0].prompt_ids) + sum(lengths)
        return total > SHARE_GAIN * once

    def __call__(self, experiences: Sequence[Experience], share: bool | None = None) -> GroupBatch:
        """One batch of all of them, in this order; `share` as `shares` decided for more than these."""
        share = self.shares(experiences) if share is None else share and self.flat
        for one in experiences:
            self._check(one)
        layout = _layout(experiences, [self.length(one) for one in experiences], share)
        counts = np.array([one.num_learned for one in experiences], np.int64)
        source, targets = _scored(experiences, layout)
        lengths = layout.lengths
        tensors = self._flat(layout) if self.flat else self._padded(layout)
        if not self.flat:
            inputs = [one.model_inputs for one in experiences]
            tensors["model_inputs"] = join_inputs(inputs, lengths.tolist(), tensors["input_ids"].shape[1])
            begins = np.cumsum(lengths) - lengths  # without padding
            source = source + np.repeat(np.arange(len(lengths)) * tensors["input_ids"].shape[1] - begins, counts)
        extras = _token_extras(experiences)
        extras["lengths"] = torch.from_numpy(counts)
        return GroupBatch(
            **tensors,
            source=torch.from_numpy(source),
            targets=torch.from_numpy(targets),
            row=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
            weight=torch.ones(len(targets)),
            max_seqlen=max(
                (len(one.prompt_ids) + self.length(one) for one in experiences), default=0
            ),  # of prompt and completion also where they are two segments
            num_tokens=sum(len(one.prompt_ids) + len(one.completion_ids) for one in experiences),
            extras=extras,
            experiences=list(experiences),
        )

    def _check(self, one: Experience) -> None:
        if not len(one.prompt_ids):
            raise ValueError("A prompt has no tokens, so nothing predicts the first one of its completion.")
        length = len(one.prompt_ids) + self.length(one)
        if self.longest is not None and length > self.longest:
            raise ValueError(
                f"A prompt with its completion has {length} tokens, but the model has positions for {self.longest}. "
                "Lower `max_completion_length`, or leave long prompts out."
            )

    def _flat(self, layout: _Layout) -> dict[str, Any]:
        lengths, offsets, prefix = layout.lengths, layout.offsets, layout.prefix
        ids = np.concatenate(layout.pieces) if layout.pieces else np.zeros(0, np.int64)
        tail = -len(ids) % (self.pad_to_multiple_of or 1)
        if tail:  # unscored segments of one token
            ids = np.append(ids, np.full(tail, self.pad_token_id))
            lengths, offsets = (
                np.append(lengths, np.ones(tail, np.int64)),
                np.append(offsets, np.zeros(tail, np.int64)),
            )
            prefix = np.append(prefix, np.full(tail, -1, np.int32))
        bounds = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=bounds[1:])
        positions = np.arange(len(ids)) - np.repeat(bounds[:-1] - offsets, lengths)
        return {
            "input_ids": torch.from_numpy(ids.astype(np.int64, copy=False)),
            "position_ids": torch.from_numpy(positions),
            "cu_seqlens": torch.from_numpy(bounds),
            "prefix": torch.from_numpy(prefix) if (prefix >= 0).any() else None,
        }

    def _padded(self, layout: _Layout) -> dict[str, Any]:
        multiple = self.pad_to_multiple_of or 1
        width = -(-int(layout.lengths.max(initial=1)) // multiple) * multiple
        ids = np.full((len(layout.pieces), width), self.pad_token_id, np.int64)
        for row, piece in zip(ids, layout.pieces, strict=True):
            row[: len(piece)] = piece
        columns, lengths = np.arange(width), layout.lengths[:, None]
        bounds = np.zeros(len(ids) + 1, np.int32)
        np.cumsum(layout.lengths, out=bounds[1:])
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(np.minimum(columns, np.maximum(lengths - 1, 0))),
            "cu_seqlens": torch.from_numpy(bounds),
            "attention_mask": torch.from_numpy((columns < lengths).astype(np.int64)),
        }


@dataclass
class _Layout:
    """Pieces of tokens, one segment each, and where the completions begin; R sequences, S segments."""

    pieces: list[np.ndarray]
    lengths: np.ndarray  # (S,) int64
    offsets: np.ndarray  # (S,) int64 position of a segment's first token
    prefix: np.ndarray  # (S,) int32
    starts: np.ndarray  # (R,) int64 place of a completion's first token among the pieces
    prompt_ends: np.ndarray  # (R,) int64


def _layout(experiences: Sequence[Experience], read: list[int], share: bool) -> _Layout:
    pieces: list[np.ndarray] = []
    offsets: list[int] = []
    prefix: list[int] = []
    starts, prompt_ends = np.zeros(len(experiences), np.int64), np.zeros(len(experiences), np.int64)
    done, row = 0, 0
    for group in _groups(experiences):
        prompt = group[0].prompt_ids
        shared = share and len(group) > 1
        segment = len(pieces)
        if shared:
            pieces.append(prompt)
            offsets.append(0)
            prefix.append(-1)
            done += len(prompt)
            prompt_ends[row : row + len(group)] = done
        for one in group:
            completion = one.completion_ids[: read[row]]
            if not shared:
                pieces.append(np.concatenate([prompt, completion]))
                offsets.append(0)
                prefix.append(-1)
                starts[row] = prompt_ends[row] = done + len(prompt)
                done += len(prompt) + len(completion)
            else:
                starts[row] = done
                if len(completion):
                    pieces.append(completion)
                    offsets.append(len(prompt))
                    prefix.append(segment)
                    done += len(completion)
            row += 1
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    return _Layout(pieces, lengths, np.array(offsets, np.int64), np.array(prefix, np.int32), starts, prompt_ends)


def _scored(experiences: Sequence[Experience], layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    """(source, targets), each (N,) int64; sources are places among the pieces."""
    sources, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for one, start, prompt_end in zip(experiences, layout.starts, layout.prompt_ends, strict=True):
        at = one.learned_at
        sources.append(np.where(at == 0, prompt_end, start + at) - 1)
        targets.append(one.completion_ids[at])
    return np.concatenate(sources), np.concatenate(targets)


def _token_extras(experiences: Sequence[Experience]) -> dict[str, Tensor]:
    """What is known of the learned tokens, (N,) each; NaN for sequences of which it is not known."""
    names = dict.fromkeys(name for one in experiences for name in one.tokens)
    extras: dict[str, Tensor] = {}
    for name in names:
        known = [one.tokens.get(name) for one in experiences]
        device = next(value.device for value in known if value is not None)
        parts = [
            torch.full((one.num_learned,), torch.nan, device=device) if value is None else value.to(device)
            for one, value in zip(experiences, known, strict=True)
        ]
        extras[name] = torch.cat(parts)
    return extras


def _groups(experiences: Sequence[Experience]) -> list[list[Experience]]:
    """Neighbours of one group with one prompt: environments may give the samples of a group different ones."""
    return [list(group) for _, group in groupby(experiences, key=lambda one: (one.group, one.prompt_ids.tobytes()))]


def cut(
    experiences: Sequence[Experience],
    collator: GroupCollator,
    *,
    size: int,
    budget: int | None = None,
    at_least: int = 1,
    share: bool = False,
    together: int = 1,
) -> list[list[Experience]]:
    """Micro-batches of `size` sequences, or of at most `budget` tokens: groups stay together where they fit.

    `together` neighbours of a group are never parted; above the budget they are alone. Where fewer than `at_least`
    result, the largest are halved.
    """
    if budget is None:
        batches = [list(experiences[i : i + size]) for i in range(0, len(experiences), size)]
    else:
        batches = _within(experiences, collator, budget, share, together)
    while len(batches) < at_least and len(largest := max(batches, key=len, default=[])) > together:
        place = next(i for i, batch in enumerate(batches) if batch is largest)
        middle = max(len(largest) // 2 // together, 1) * together
        batches[place : place + 1] = [largest[:middle], largest[middle:]]
    return batches


def _within(
    experiences: Sequence[Experience], collator: GroupCollator, budget: int, share: bool, together: int
) -> list[list[Experience]]:
    """Best fit of groups, largest first; padded rows count as the rectangle."""
    pieces: list[tuple[int, list[Experience]]] = []
    for group in _groups(experiences):
        piece: list[Experience] = []
        for one in group:
            if piece and len(piece) % together == 0 and _cost([*piece, one], collator, share) > budget:
                pieces.append((_cost(piece, collator, share), piece))
                piece = []
            piece.append(one)
        pieces.append((_cost(piece, collator, share), piece))
    batches: list[list[Experience]] = []
    room: list[int] = []
    for cost, piece in sorted(pieces, key=lambda entry: -entry[0]):
        if collator.flat:
            left = [space - cost for space in room]
        else:
            left = [budget - _cost([*batch, *piece], collator, share) for batch in batches]
        fitting = [i for i, space in enumerate(left) if space >= 0]
        if fitting:
            best = min(fitting, key=lambda i: left[i])
            batches[best] += piece
            room[best] = left[best]
        else:
            batches.append(list(piece))
            room.append(budget - cost)
    return batches


def _cost(experiences: list[Experience], collator: GroupCollator, share: bool) -> int:
    """Tokens of a batch."""
    lengths = [collator.length(one) for one in experiences]
    if not collator.flat:
        widths = [len(one.prompt_ids) + length for one, length in zip(experiences, lengths, strict=True)]
        return len(experiences) * max(widths)
    if not share:
        return sum(len(one.prompt_ids) for one in experiences) + sum(lengths)
    return sum(len(group[0].prompt_ids) for group in _groups(experiences)) + sum(lengths)
