"""Batches of rows with a prompt and its answers to token ids: the step that preference data are prepared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fastalign import _native

from .bad_rows import CUT, EMPTY, EQUAL, LONG_PROMPT, MISSING, NO_TOKENS, OTHER_PROMPT, TOO_LONG, UNUSABLE, lists_at
from .encode import Encoder, row_settings
from .formats import column_names, extract_prompt, is_conversational, maybe_convert_to_chatml
from .masks import Tokens, bounds, common_prefix_lengths, flat_column

PASSED = ("margin", "ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_kl_logps")  # columns kept, fp32
KL_IDS = "kl_completion_ids"  # KTO's mismatched answers, which `ref_kl_logps` are of


@dataclass
class AnswerTokenizer:
    """Turns a batch of raw rows into the columns of the result and `NOTES`; called by `Dataset.map`."""

    encoder: Encoder
    kind: str  # tokens, text or messages
    answers: tuple[str, ...]
    prompt: str | None  # its column; None: the prompt is what the answers begin with
    columns: list[str]
    sharegpt: bool = False  # messages are `from`/`value`
    max_length: int | None = None  # tokens
    truncation_mode: str = "keep_start"
    bos_and_eos: bool = False
    unpaired: bool = False  # a row of the result has one answer and a label
    whole: bool = False  # answers are sequences that are read as a whole

    @classmethod
    def of(cls, dataset, row: dict[str, Any], processing_class, answers, chat_template, name: str) -> AnswerTokenizer:
        """For data that look like `row`."""
        encoder, columns = Encoder(processing_class, chat_template), column_names(dataset)
        if ids_column(columns, answers[0]):
            return cls(encoder, "tokens", answers, ids_column(columns, "prompt"), columns)
        answer = row[answers[0]]
        turn = answer[0] if isinstance(answer, list) and answer else answer
        sharegpt = isinstance(turn, dict) and "from" in turn
        messages = sharegpt or is_conversational({"chosen": answer})
        prompt = "conversations" if sharegpt and "prompt" not in row else "prompt"
        if prompt not in row or isinstance(row[prompt], list) != messages:
            prompt = None
        if len(answers) == 1 and prompt is None:
            raise ValueError(f"The {name} dataset needs a column `prompt` of the same kind as `{answers[0]}`.")
        if not messages and _tokenizer(encoder).eos_token is None:
            raise ValueError("The tokenizer has no `eos_token` to end the answers with. Set `tokenizer.eos_token`.")
        return cls(encoder, "messages" if messages else "text", answers, prompt, columns, sharegpt)

    def __call__(self, batch: Mapping[str, Any] | pa.Table, indices: list[int]) -> pa.Table:
        """Arrow table with as many rows as the batch, twice as many where pairs become unpaired."""
        problems = np.zeros(len(indices), np.int32)
        given = self._given_columns(batch, indices, problems)
        wholes, starts = (self._given if self.kind == "tokens" else self._encoded)(batch, problems)
        used = np.flatnonzero(problems & UNUSABLE == 0)
        if len(wholes) > 1 and not self.unpaired:
            problems[used] |= EQUAL * _equal(wholes[0], wholes[1])
        prompts = [_part(tokens, None, start) for tokens, start in zip(wholes, starts, strict=True)]
        answers = [_part(tokens, start, None) for tokens, start in zip(wholes, starts, strict=True)]
        if self.bos_and_eos and self.kind != "tokens":
            prompts, answers = [self._with_bos(p) for p in prompts], [self._with_eos(a) for a in answers]
        copies = len(wholes) if self.unpaired else 1
        columns = {name: pa.concat_arrays([column] * copies) for name, column in given.items()}
        if self.unpaired:
            problems = np.tile(problems, len(wholes))
            used = np.concatenate([used + i * len(indices) for i in range(len(wholes))])
            prompts, answers = [Tokens.joined(prompts)], [Tokens.joined(answers)]
            if copies > 1:
                columns["label"] = pa.array(np.repeat([True, False], len(indices)))
        answers = self._limited(prompts[0], answers, problems, used)
        names = ["completion"] if self.unpaired else self.answers
        for name, tokens in zip(["prompt", *names], [prompts[0], *answers], strict=True):
            columns[f"{name}_ids"] = lists_at(tokens, used, len(problems))
        columns["problems"] = pa.array(problems)
        columns["row"] = pa.array(np.tile(np.asarray(indices, np.int64), copies))
        return pa.table(columns)

    # Rows to whole sequences, and where the answers start in them; for the rows that are not unusable

    def _given(self, batch: Any, problems: np.ndarray) -> tuple[list[Tokens], list[np.ndarray]]:
        names = [self.prompt, *(ids_column(self.columns, name) for name in self.answers)]
        arrays = [_arrow(batch, name) for name in names if name]
        for array in arrays:
            problems[array.is_null().to_numpy(zero_copy_only=False)] |= MISSING
        there = pa.array(problems == 0)
        found = [Tokens(*flat_column(array.filter(there), "ids")) for array in arrays]
        if self.prompt is None:
            return found, self._common_starts(found)
        prompt, answers = found[0], found[1:]
        wholes = [_joined([prompt, answer]) for answer in answers]
        return wholes, self._common_starts(wholes) if self.whole else [prompt.lengths] * len(wholes)

    def _encoded(self, batch: Any, problems: np.ndarray) -> tuple[list[Tokens], list[np.ndarray]]:
        columns = [_values(batch, name) for name in self.answers]
        empty: Any = [] if self.kind == "messages" else ""
        prompts = _values(batch, self.prompt) if self.prompt else [empty] * len(problems)
        if self.sharegpt:
            prompts, *columns = ([_chatml(value) for value in column] for column in (prompts, *columns))
        self._mark_missing(prompts, columns, problems)
        if self.prompt is None and not self.whole:
            self._take_prompts(prompts, columns, problems)
        used = np.flatnonzero(problems & UNUSABLE == 0)
        for column in columns:
            problems[[i for i in used if _says_nothing(column[i])]] |= EMPTY
        prompts, *columns = ([column[i] for i in used] for column in (prompts, *columns))
        settings = None
        if self.kind == "messages":
            given = (_values(batch, c) if c in self.columns else None for c in ("tools", "chat_template_kwargs"))
            settings = row_settings(len(used), *([c[i] for i in used] if c else None for c in given))
        elif not self.bos_and_eos:
            end = _tokenizer(self.encoder).eos_token
            columns = [[text if text.endswith(end) else text + end for text in column] for column in columns]
        if not len(used):
            return [Tokens.of([]) for _ in columns], [np.zeros(0, np.int64) for _ in columns]
        return self._sequences(prompts, columns, settings)

    def _sequences(self, prompts: list, columns: list[list], settings) -> tuple[list[Tokens], list[np.ndarray]]:
        if not self.whole:
            made = self.encoder.completions(prompts, columns, settings, special_tokens=not self.bos_and_eos)
            starts = made.prompt_lengths
            if self.bos_and_eos:  # as TRL: merging across the border costs the prompt its last token, no more
                ends = made.prompts.lengths
                starts = [np.where(start < ends, ends - 1, start) for start in starts]
                starts += [common_prefix_lengths(made.wholes[0], other) for other in made.wholes[1:]]
            return made.wholes, starts if self.unpaired else [np.minimum.reduce(starts)] * len(made.wholes)
        joined = [[p + a for p, a in zip(prompts, column, strict=True)] for column in columns]
        if self.kind == "text":
            wholes = [self.encoder.texts(column) for column in joined]
        else:
            wholes = [self.encoder.conversations(column, settings)[0] for column in joined]
        return wholes, self._common_starts(wholes)

    @staticmethod
    def _common_starts(wholes: list[Tokens]) -> list[np.ndarray]:
        """Tokens that the sequences of a row begin with, of each at least one left over."""
        common = [common_prefix_lengths(wholes[0], other) for other in wholes[1:]]
        common += [tokens.lengths - 1 for tokens in wholes]
        return [np.maximum(np.minimum.reduce(common), 0)] * len(wholes)

    def _mark_missing(self, prompts: list, columns: list[list], problems: np.ndarray) -> None:
        if self.kind == "text":
            fits = [all(isinstance(value, str) for value in row) for row in zip(prompts, *columns, strict=True)]
        else:
            fits = [
                all(_are_messages(value) for value in row) and bool(row[0] or not self.prompt)
                for row in zip(prompts, *columns, strict=True)
            ]
        problems[~np.array(fits, bool)] |= MISSING

    def _take_prompts(self, prompts: list, columns: list[list], problems: np.ndarray) -> None:
        """Fill `prompts` with what the answers begin with, and take it off the answers, in place."""
        for i in np.flatnonzero(problems == 0):
            split = extract_prompt({"chosen": columns[0][i], "rejected": columns[1][i]})
            prompt: Any = split["prompt"]
            if (self.kind == "messages" and not prompt) or any(c[i][: len(prompt)] != prompt for c in columns):
                problems[i] |= OTHER_PROMPT
                continue
            prompts[i] = prompt
            for column in columns:
                column[i] = column[i][len(prompt) :]

    @property
    def keeps_mismatched(self) -> bool:
        """Whether given `ref_kl_logps` come with the answers that they are of."""
        return self.unpaired and len(self.answers) == 1 and {"ref_kl_logps", KL_IDS} <= {*self.columns}

    def _given_columns(self, batch: Any, indices: list[int], problems: np.ndarray) -> dict[str, pa.Array]:
        """What the result takes as it is; rows without one of the values are marked."""
        found = {}
        if self.unpaired and len(self.answers) == 1:
            found["label"] = pa.array(judgements(_values(batch, "label"), indices), pa.bool_())
        for name in PASSED:
            if name in self.columns:
                found[name] = pa.array(_values(batch, name)).cast(pa.float32())
        for name, column in found.items():
            if name != "margin" or self.whole:  # others do not read it
                problems[column.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)] |= MISSING
        if self.keeps_mismatched:
            found[KL_IDS] = _arrow(batch, KL_IDS).cast(pa.list_(pa.int32()))
        return found

    # Sequences to what fits

    def _with_bos(self, prompts: Tokens) -> Tokens:
        bos = _tokenizer(self.encoder).bos_token_id
        if bos is None:
            return prompts
        edges = bounds(prompts.lengths)[:-1]
        has = prompts.lengths > 0
        has[has] = prompts.ids[edges[has]] == bos
        return _joined([_constant(bos, ~has), prompts])

    def _with_eos(self, answers: Tokens) -> Tokens:
        eos = _tokenizer(self.encoder).eos_token_id
        ends = bounds(answers.lengths)[1:] - 1
        has = answers.lengths > 0
        has[has] = answers.ids[ends[has]] == eos
        return _joined([answers, _constant(eos, ~has)])

    def _limited(self, prompts: Tokens, answers: list[Tokens], problems: np.ndarray, used: np.ndarray) -> list[Tokens]:
        """The answers as `max_length` leaves them, and problems marked that show here."""
        for tokens in answers:
            problems[used] |= NO_TOKENS * (tokens.lengths == 0)
        if self.max_length is None:
            return answers
        longest = prompts.lengths + np.maximum.reduce([tokens.lengths for tokens in answers])
        over = longest > self.max_length
        if self.whole:
            problems[used] |= TOO_LONG * over
            return answers
        problems[used] |= CUT * over
        if self.truncation_mode == "keep_end":
            return answers
        room = np.maximum(self.max_length - prompts.lengths, 0)
        problems[used] |= LONG_PROMPT * (room == 0)
        if self.unpaired or not over.any():
            return answers
        return [_part(tokens, None, np.minimum(tokens.lengths, room)) for tokens in answers]


def ids_column(columns: list[str], name: str) -> str | None:
    return next((found for found in (f"{name}_ids", f"{name}_input_ids") if found in columns), None)


def judgements(values: list[Any], numbers: Iterable[int]) -> list[bool | None]:
    """Values of `label`, of the rows `numbers`, as truth values. ValueError for other than true, false, 1, 0, null."""
    found = []
    for number, value in zip(numbers, values, strict=False):
        if value is not None and value == value and value not in (0, 1):
            raise ValueError(
                f"Column `label` holds {value!r} in row {number}; allowed are true (a good completion) and false, or "
                "1 and 0. Turn the column into these with `dataset.map`."
            )
        found.append(None if value is None or value != value else bool(value))
    return found


def _tokenizer(encoder: Encoder) -> Any:
    return getattr(encoder.processing_class, "tokenizer", encoder.processing_class)


def _values(batch: Any, name: str) -> list[Any]:
    column = batch[name]
    return column.to_pylist() if isinstance(column, pa.ChunkedArray) else list(column)


def _arrow(batch: Any, name: str) -> pa.Array:
    column = batch[name]
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else pa.array(column)


def _chatml(value: Any) -> Any:
    """Messages of `from` and `value`, or one such message, as a list of `role` and `content`."""
    return maybe_convert_to_chatml({"messages": [value] if isinstance(value, dict) else value})["messages"]


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) and message.get("role") for message in value)


def _says_nothing(answer: Any) -> bool:
    if isinstance(answer, str):
        return not answer
    return not any(m.get("content") or m.get("tool_calls") for m in answer)


# Flat rows of tokens


def _joined(parts: list[Tokens]) -> Tokens:
    """Row r of every part, one behind the other."""
    starts = np.stack([bounds(part.lengths)[:-1] for part in parts], 1)
    lengths = np.stack([part.lengths for part in parts], 1)
    return _gathered(parts, starts, lengths)


def _part(tokens: Tokens, start: np.ndarray | None, stop: np.ndarray | None) -> Tokens:
    """Every row from `start` to `stop`, (R,) each."""
    first = np.zeros_like(tokens.lengths) if start is None else start
    lengths = (tokens.lengths if stop is None else stop) - first
    return _gathered([tokens], (bounds(tokens.lengths)[:-1] + first)[:, None], lengths[:, None])


def _gathered(parts: list[Tokens], starts: np.ndarray, lengths: np.ndarray) -> Tokens:
    """Row r: of each part p, (R, p) `lengths` of its ids from `starts`."""
    ids = np.empty(int(lengths.sum()), np.int32)
    part = np.tile(np.arange(len(parts), dtype=np.int32), len(lengths))
    _native.gather([p.ids for p in parts], part, starts.ravel(), lengths.ravel(), ids)
    return Tokens(ids, lengths.sum(1))


def _constant(token: int, where: np.ndarray) -> Tokens:
    """One token in the rows where `where`, none in the others."""
    return Tokens(np.full(int(where.sum()), token, np.int32), where.astype(np.int64))


def _equal(tokens: Tokens, other: Tokens) -> np.ndarray:
    """(R,) bool: rows that are the same."""
    same = tokens.lengths == other.lengths
    starts = [bounds(rows.lengths)[:-1][same][:, None] for rows in (tokens, other)]
    lengths = tokens.lengths[same]
    found = [_gathered([rows], start, lengths[:, None]) for rows, start in zip((tokens, other), starts, strict=True)]
    same[same] = common_prefix_lengths(*found) == lengths
    return same
