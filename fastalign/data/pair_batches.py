"""Rows of a prompt and its answers to the batch that is trained on; answers may share one copy of their prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastalign import _native

from .batch import TokenBatch, name_read
from .collate import check_ids, round_up
from .columns import Rows, read_rows

SHARE_GAIN = 1.15  # prompts are shared where that saves this factor of a batch's tokens
PROMPT, ANSWER = 0, 1  # the pieces of a sequence, last axis of the arrays below


class AnswerCollator:
    """B rows with K answers each (`prompt_ids` and, for every name in `answers`, `<name>_ids`) -> TokenBatch.

    Sequence k * b + j is answer j of row b; `row` of the batch has these numbers. Flat and shared: the prompt is a
    segment of its own, which the segments of its answers continue (`prefix`). Flat and not shared: a segment is a
    sequence. Padded (`flat=False`): rows of prompt and answer, padded on the right, never shared. `share`: "auto"
    where it saves 15 % of the tokens, True wherever a prompt has tokens and its answers have too, False never.

    Scored are the answers' tokens, and for answers in `score_prompt` also those of the prompt, which
    `extras["scored"]` (N,) bool then tells apart (False). `read="last"` lists the last position of every sequence
    instead, with target 0, for models that put a number on a sequence. `max_length` (tokens) cuts each sequence at the
    end or, with `truncation_mode="keep_end"`, at the beginning. `extras["lengths"]` (K * B,) int64 are the tokens of
    the answers that are left; further extras, (B,), are the columns that `extras` names.
    `num_tokens` counts a prompt once per answer.
    """

    reads_arrow = True

    def __init__(
        self,
        answers: tuple[str, ...],
        *,
        pad_token_id: int,
        flat: bool = True,
        share: bool | str = "auto",
        vocab_size: int | None = None,
        pad_to_multiple_of: int | None = None,
        score_prompt: tuple[str, ...] = (),
        read: str = "answers",
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
        extras: tuple[str, ...] = ("margin", "ref_chosen_logps", "ref_rejected_logps"),
    ):
        assert share in (True, False, "auto") and read in ("answers", "last") and set(score_prompt) <= {*answers}
        assert truncation_mode in ("keep_start", "keep_end")
        self.answers, self.pad_token_id, self.flat, self.share = tuple(answers), pad_token_id, flat, share
        self.vocab_size, self.pad_to_multiple_of = vocab_size, pad_to_multiple_of
        self.score_prompt, self.read, self.extras = tuple(score_prompt), read, tuple(extras)
        self.max_length, self.truncation_mode = max_length, truncation_mode
        self.num_counted = len(self.answers)  # answers whose tokens count in `num_tokens`
        self.columns = ("prompt_ids", *(f"{name}_ids" for name in self.answers), *self.extras)

    def __call__(self, rows: pa.Table | list[dict]) -> TokenBatch:
        """Raises ValueError for missing columns and for ids that are none, naming row, position and value."""
        found = _columns(rows, self.columns)
        prompts, answers = self._ids(found)
        cut = self._cut(prompts, answers)
        extras = {name: _numbers(name, found[name]) for name in self.extras if name in found}
        extras["lengths"] = torch.from_numpy(cut.answers.ravel())
        share = self._share(cut) if self.flat else np.zeros(len(cut.prompts), bool)
        width = 0 if self.flat else max(1, round_up(int(cut.totals.max(initial=0)), self.pad_to_multiple_of))
        layout = _Layout.of(cut, share, width)
        ids = self._gather([prompts, *answers], cut, layout)
        source, target_at, row, scored = self._scored(cut, layout)
        if scored is not None:
            extras["scored"] = torch.from_numpy(scored)
        shape = (-1, width) if width else (-1,)
        positions, cu_seqlens, prefix, mask = _padded(cut, width) if width else _flat(cut, share, layout, len(ids))
        targets = ids[target_at] if self.read == "answers" else np.zeros(len(source), np.int64)
        batch = TokenBatch(
            input_ids=torch.from_numpy(ids).view(shape),
            position_ids=torch.from_numpy(positions).view(shape),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            source=torch.from_numpy(source),
            targets=torch.from_numpy(targets),
            row=torch.from_numpy(row),
            weight=torch.ones(len(source)),
            max_seqlen=int(cut.totals.max(initial=0)),  # of prompt and answer also where they are two segments
            num_tokens=int(cut.totals[:, : self.num_counted].sum()),
            attention_mask=None if mask is None else torch.from_numpy(mask),
            prefix=None if prefix is None else torch.from_numpy(prefix),
            extras=extras,
        )
        return name_read(batch)

    def _ids(self, found: dict[str, Any]) -> tuple[Rows, list[Rows]]:
        names = [f"{name}_ids" for name in self.answers]
        if missing := [name for name in names if name not in found]:
            raise ValueError(
                f"Rows to collate need the columns {', '.join(names)} and mostly `prompt_ids`; {', '.join(missing)} "
                f"missing, found {sorted(found)}. Let the trainer prepare the dataset."
            )
        answers = [read_rows(name, found[name]) for name in names]
        none = Rows("prompt_ids", np.zeros(0, np.int32), np.zeros(len(answers[0]) + 1, np.int64))
        prompts = read_rows("prompt_ids", found["prompt_ids"]) if "prompt_ids" in found else none
        for rows in (prompts, *answers):
            check_ids(rows, self.vocab_size, ignored_allowed=False)
        return prompts, answers

    def _cut(self, prompts: Rows, answers: list[Rows]) -> _Cut:
        """What is left of prompts and answers within `max_length`."""
        of_answers = np.stack([rows.lengths for rows in answers], 1)
        of_prompts = np.repeat(prompts.lengths[:, None], len(answers), 1)
        starts = np.stack([np.broadcast_to(rows.bounds[:-1, None], (len(rows), 1)) for rows in answers], 1)[:, :, 0]
        prompt_starts = np.repeat(prompts.bounds[:-1, None], len(answers), 1)
        if self.max_length is not None:
            over = np.maximum(of_prompts + of_answers - self.max_length, 0)
            if self.truncation_mode == "keep_start":
                from_answers = np.minimum(over, of_answers)
                of_prompts = of_prompts - (over - from_answers)
            else:
                from_prompts = np.minimum(over, of_prompts)
                from_answers = over - from_prompts
                of_prompts, prompt_starts = of_prompts - from_prompts, prompt_starts + from_prompts
                starts = starts + from_answers
            of_answers = of_answers - from_answers
        cut = _Cut(of_prompts, of_answers, prompt_starts, starts)
        if (empty := np.argwhere(cut.totals == 0)).size:
            row, answer = empty[0]
            raise ValueError(
                f"Column `{self.answers[answer]}_ids` is empty in row {row}, and so is its prompt; drop such rows."
            )
        return cut

    def _share(self, cut: _Cut) -> np.ndarray:
        """(B,) bool: rows whose answers share one copy of their prompt."""
        same = (cut.prompts == cut.prompts[:, :1]).all(1) & (cut.prompt_starts == cut.prompt_starts[:, :1]).all(1)
        able = same & (cut.prompts[:, 0] > 0) & (cut.answers > 0).all(1)
        saved = int((cut.prompts[:, 1:].sum(1) * able).sum())
        total = int(cut.totals.sum())
        wanted = total > SHARE_GAIN * (total - saved) if self.share == "auto" else self.share
        return able if wanted and saved else np.zeros_like(able)

    def _gather(self, columns: list[Rows], cut: _Cut, layout: _Layout) -> np.ndarray:
        """(T,) int64, or (R * L,) of padded rows: the ids."""
        num_answers = len(self.answers)
        kind = np.result_type(*(rows.values for rows in columns))
        tokens = int(layout.ends.max(initial=0))
        tail = 0 if layout.width else round_up(tokens, self.pad_to_multiple_of) - tokens
        chunks = [np.ascontiguousarray(rows.values, kind) for rows in columns]
        chunk = np.zeros((*cut.prompts.shape, 3), np.int32)
        chunk[:, :, ANSWER] = np.arange(1, num_answers + 1)
        starts, lengths = np.zeros(chunk.shape, np.int64), np.zeros(chunk.shape, np.int64)
        starts[:, :, PROMPT], starts[:, :, ANSWER] = cut.prompt_starts, cut.answer_starts
        lengths[:, :, :2] = layout.lengths
        chunk[:, :, 2] = num_answers + 1  # what fills a padded row, or the end of a flat batch
        if layout.width:
            lengths[:, :, 2] = layout.width - cut.totals
        elif tail:
            lengths[-1, -1, 2] = tail
        chunks.append(np.full(int(lengths[:, :, 2].max(initial=0)), self.pad_token_id, kind))
        ids = np.empty(int(lengths.sum()), kind)
        _native.gather(chunks, chunk.ravel(), starts.ravel(), lengths.ravel(), ids)
        return ids.astype(np.int64, copy=False)

    def _scored(self, cut: _Cut, layout: _Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """(source, position of the target, row, whether it is of an answer or None), each (N,)."""
        if self.read == "last":
            last = layout.ends[:, :, ANSWER].ravel() - 1
            return last, last, np.arange(len(last)), None
        counts, first = np.zeros((*cut.prompts.shape, 2), np.int64), layout.starts.copy()
        first_token = cut.prompts == 0  # which nothing predicts
        counts[:, :, ANSWER] = np.maximum(cut.answers - first_token, 0)
        first[:, :, ANSWER] += first_token
        first[:, :, PROMPT] += 1
        for name in self.score_prompt:
            j = self.answers.index(name)
            counts[:, j, PROMPT] = np.maximum(cut.prompts[:, j] - 1, 0)
        per_piece = counts.ravel()
        begins = np.cumsum(per_piece) - per_piece
        target_at = np.arange(int(per_piece.sum())) + np.repeat(first.ravel() - begins, per_piece)
        source = target_at - 1
        if layout.is_shared:  # the answer is not behind its prompt
            has = (counts[:, :, ANSWER] > 0) & ~first_token
            source[begins.reshape(counts.shape)[:, :, ANSWER][has]] = layout.prompt_ends[has] - 1
        row = np.repeat(np.arange(cut.prompts.size), counts.sum(2).ravel())
        of_answer = np.repeat(np.tile([False, True], cut.prompts.size), per_piece) if self.score_prompt else None
        return source, target_at, row, of_answer


class UnpairedCollator(AnswerCollator):
    """B rows `prompt_ids`, `completion_ids`, `label` -> TokenBatch; `extras["label"]` is (B,) bool.

    With `kl` sequence 2b + 1 is the prompt of row b with `kl_completion_ids`, the answer to another prompt, which
    shares the prompt with sequence 2b; `num_tokens` does not count it. Other arguments as in `AnswerCollator`.
    """

    def __init__(self, *, kl: bool = False, **options: Any):
        answers = ("completion", "kl_completion") if kl else ("completion",)
        options.setdefault("extras", ("label", "ref_logps", "ref_kl_logps"))
        super().__init__(answers, **options)
        self.num_counted = 1


@dataclass
class _Cut:
    """The parts of B rows with K answers that are used: lengths and starts in their columns, each (B, K) int64."""

    prompts: np.ndarray
    answers: np.ndarray
    prompt_starts: np.ndarray
    answer_starts: np.ndarray

    @property
    def totals(self) -> np.ndarray:
        return self.prompts + self.answers


@dataclass
class _Layout:
    """Where pieces lie in the batch: (B, K, 2) int64 with PROMPT and ANSWER in the last axis."""

    lengths: np.ndarray  # 0 for prompts that are not there because another answer has them
    starts: np.ndarray  # of a shared prompt: that of its one copy
    ends: np.ndarray  # of the pieces that are there
    width: int  # of a padded row; 0: flat
    is_shared: bool
    prompt_ends: np.ndarray  # (B, K), of a shared prompt: that of its one copy

    @classmethod
    def of(cls, cut: _Cut, share: np.ndarray, width: int) -> _Layout:
        lengths = np.stack([cut.prompts, cut.answers], 2)
        lengths[share, 1:, PROMPT] = 0
        if width:
            begins = np.arange(cut.prompts.size).reshape(cut.prompts.shape) * width
            starts = np.stack([begins, begins + cut.prompts], 2)
            ends = starts + lengths
        else:
            ends = np.cumsum(lengths.ravel()).reshape(lengths.shape)
            starts = ends - lengths
        starts[share, 1:, PROMPT] = starts[share, :1, PROMPT]
        return cls(lengths, starts, ends, width, bool(share.any()), starts[:, :, PROMPT] + cut.prompts)


def _padded(cut: _Cut, width: int) -> tuple[np.ndarray, np.ndarray, None, np.ndarray]:
    """(position_ids, cu_seqlens, no prefix, attention_mask) of padded rows."""
    totals, columns = cut.totals.reshape(-1, 1), np.arange(width)
    mask = (columns < totals).astype(np.int64)
    return np.minimum(columns, totals - 1), _bounds(totals), None, mask


def _flat(cut: _Cut, share: np.ndarray, layout: _Layout, num_tokens: int) -> tuple:
    """(position_ids, cu_seqlens, prefix or None, no attention_mask) of a flat batch of `num_tokens` with its tail."""
    rows, num_answers = cut.prompts.shape
    lengths = np.empty((rows, num_answers + 1), np.int64)  # of segments: the prompt, and the sequences
    lengths[:, 0] = cut.prompts[:, 0]
    lengths[:, 1:] = cut.answers + np.where(share[:, None], 0, cut.prompts)
    there = np.ones(lengths.shape, bool)
    there[:, 0] = share
    number = np.cumsum(there).reshape(there.shape) - 1
    first_position = np.where(share[:, None], cut.prompts, 0)  # of a sequence's own segment
    offsets = np.concatenate([np.zeros((rows, 1), np.int64), first_position], 1)[there]
    lengths = lengths[there]
    tail = num_tokens - int(lengths.sum())
    if tail:  # unscored segments of one token
        lengths = np.append(lengths, np.ones(tail, np.int64))
        offsets = np.append(offsets, np.zeros(tail, np.int64))
    cu_seqlens = _bounds(lengths)
    positions = np.arange(num_tokens) - np.repeat(cu_seqlens[:-1] - offsets, lengths)
    if not layout.is_shared:
        return positions, cu_seqlens, None, None
    prefix = np.full(there.shape, -1, np.int32)
    prefix[:, 1:] = np.where(share[:, None], number[:, :1], -1)
    return positions, cu_seqlens, np.append(prefix[there], np.full(tail, -1, np.int32)), None


def _bounds(lengths: np.ndarray) -> np.ndarray:
    bounds = np.zeros(lengths.size + 1, np.int32)
    np.cumsum(lengths.ravel(), out=bounds[1:])
    return bounds


def _columns(rows: pa.Table | list[dict], names: tuple[str, ...]) -> dict[str, Any]:
    """The columns of `names` that the rows have."""
    table: Any = rows if isinstance(rows, pa.Table) else None
    if table is None and rows and isinstance(rows[0], pa.Table):
        table = pa.concat_tables(rows)
    if table is not None:
        return {name: table.column(name) for name in names if name in table.column_names}
    found = {name for row in rows for name in row}
    return {name: [row.get(name) for row in rows] for name in names if name in found}


def _numbers(name: str, column: Any) -> Tensor:
    """One number per row, (B,) fp32; bool for truth values."""
    values = column.to_numpy() if isinstance(column, pa.ChunkedArray) else np.asarray(column)
    if values.dtype.kind not in "biuf" or values.ndim != 1:
        raise ValueError(f"Column `{name}` must hold one number per row, got {values.dtype} in {values.ndim} axes.")
    return torch.from_numpy(values.astype(bool if name == "label" else np.float32))
