"""Batches of prompts with answers: worked by hand, against a plain construction, and the same in every layout."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from fastalign import DPOConfig
from fastalign.data.pair_batches import AnswerCollator, UnpairedCollator
from fastalign.pairs import group_lengths

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "margin": 0.5},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11], "margin": 2},
]
BOTH = ("chosen", "rejected")


def collator(*args, **options):
    return AnswerCollator(*(args or (BOTH,)), pad_token_id=0, **options)


def lists(batch, *names):
    return [getattr(batch, name).tolist() for name in names]


def table(rows):
    return pa.Table.from_pylist(rows)


def random_rows(num_rows, names=BOTH, seed=0, shortest=0):
    rng = np.random.default_rng(seed)
    return [
        {f"{name}_ids": rng.integers(5, 300, rng.integers(shortest, 9)).tolist() for name in ("prompt", *names)}
        for _ in range(num_rows)
    ]


def test_shared_by_hand():
    batch = collator(share=True)(table(PAIRS))
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 8, 9, 11]
    assert batch.prefix.tolist() == [-1, 0, 0, -1, 3, 3]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 2, 3]
    assert lists(batch, "source", "targets", "row") == [[2, 3, 2, 7, 7, 9], [4, 5, 6, 9, 10, 11], [0, 0, 1, 2, 3, 3]]
    assert batch.extras["margin"].tolist() == [0.5, 2.0]
    assert batch.extras["lengths"].tolist() == [2, 1, 1, 2]
    assert (batch.num_tokens, batch.max_seqlen, batch.num_rows) == (16, 5, 4)
    assert batch.prefix.dtype == batch.cu_seqlens.dtype == torch.int32
    assert {t.dtype for t in (batch.input_ids, batch.position_ids, batch.source, batch.targets, batch.row)} == {
        torch.int64
    }


def test_unshared_by_hand():
    batch = collator(share=False, pad_to_multiple_of=9)(PAIRS)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 7, 8, 10, 11, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 12, 16, 17, 18]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 0]
    assert lists(batch, "source", "targets", "row") == [
        [2, 3, 7, 10, 13, 14],
        [4, 5, 6, 9, 10, 11],
        [0, 0, 1, 2, 3, 3],
    ]
    assert batch.prefix is None
    assert (batch.num_tokens, batch.max_seqlen, batch.num_rows) == (16, 5, 4)


def test_padded_by_hand():
    batch = collator(flat=False, pad_to_multiple_of=3)(PAIRS[:1])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 0], [1, 2, 3, 6, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 3, 3]]
    assert lists(batch, "source", "targets", "row") == [[2, 3, 8], [4, 5, 6], [0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 5, 9]


def test_scored_prompts_by_hand():
    batch = collator(share=True, score_prompt=("chosen",))(PAIRS)
    assert batch.source.tolist() == [0, 1, 2, 3, 2, 6, 7, 7, 9]
    assert batch.targets.tolist() == [2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert batch.row.tolist() == [0, 0, 0, 0, 1, 2, 2, 3, 3]
    assert batch.extras["scored"].tolist() == [False, False, True, True, True, False, True, True, True]


def test_last_positions_by_hand():
    for share, positions in ((True, [4, 5, 8, 10]), (False, [4, 8, 11, 15])):
        batch = collator(share=share, read="last")(PAIRS)
        assert lists(batch, "source", "targets", "row") == [positions, [0] * 4, [0, 1, 2, 3]]
    assert collator(flat=False, read="last")(PAIRS).source.tolist() == [4, 8, 12, 18]
    whole = [{"chosen_ids": [1, 2, 3], "rejected_ids": [4]}]  # no column of prompts
    assert collator(read="last")(whole).source.tolist() == [2, 3]


def test_truncation_by_hand():
    rows = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8, 9, 10]}]
    start = collator(share=True, max_length=4)(rows)
    assert lists(start, "input_ids", "targets") == [[1, 2, 3, 4, 6], [4, 6]]
    end = collator(share=True, max_length=4, truncation_mode="keep_end")(rows)  # what is left of the prompt differs
    assert lists(end, "input_ids", "position_ids") == [[2, 3, 4, 5, 7, 8, 9, 10], [0, 1, 2, 3] * 2]
    assert lists(end, "source", "targets", "row") == [[1, 2, 4, 5, 6], [4, 5, 8, 9, 10], [0, 0, 1, 1, 1]]
    assert end.prefix is None
    full = collator(share=True, max_length=3)(rows)  # nothing is left of the answers
    assert lists(full, "input_ids", "targets") == [[1, 2, 3] * 2, []]
    assert full.extras["lengths"].tolist() == [0, 0]
    assert full.num_rows == 2


def test_unpaired_rows():
    rows = [
        {"prompt_ids": [1, 2], "completion_ids": [3], "label": True, "kl_completion_ids": [4, 5], "ref_logps": -1.5},
        {"prompt_ids": [6], "completion_ids": [4, 5], "label": False, "kl_completion_ids": [3], "ref_logps": -2},
    ]
    batch = UnpairedCollator(pad_token_id=0)(table(rows))
    assert lists(batch, "input_ids", "targets", "row") == [[1, 2, 3, 6, 4, 5], [3, 4, 5], [0, 1, 1]]
    assert batch.extras["label"].tolist() == [True, False]
    assert batch.extras["label"].dtype == torch.bool
    assert batch.extras["ref_logps"].tolist() == [-1.5, -2.0]
    both = UnpairedCollator(kl=True, pad_token_id=0, share=True)(rows)
    assert lists(both, "input_ids", "prefix") == [[1, 2, 3, 4, 5, 6, 4, 5, 3], [-1, 0, 0, -1, 3, 3]]
    assert lists(both, "targets", "row") == [[3, 4, 5, 4, 5, 3], [0, 1, 1, 2, 2, 3]]
    assert batch.num_tokens == both.num_tokens == 6


def sequences(batch):
    """Of every scored token: (row, target, ids it sees before, positions of those), followed through the prefixes."""
    if batch.is_padded:
        width = batch.input_ids.shape[1]
        starts = [(i // width) * width for i in batch.source.tolist()]
        before = [[*range(start, i + 1)] for start, i in zip(starts, batch.source.tolist(), strict=True)]
    else:
        bounds = batch.cu_seqlens.tolist()
        prefix = [-1] * (len(bounds) - 1) if batch.prefix is None else batch.prefix.tolist()
        before = []
        for i in batch.source.tolist():
            s = next(s for s in range(len(prefix)) if bounds[s] <= i < bounds[s + 1])
            own = [*range(bounds[s], i + 1)]
            before.append(own if prefix[s] < 0 else [*range(bounds[prefix[s]], bounds[prefix[s] + 1]), *own])
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    rows, targets = lists(batch, "row", "targets")
    return [(r, t, ids[b].tolist(), positions[b].tolist()) for r, t, b in zip(rows, targets, before, strict=True)]


@pytest.mark.parametrize("names", [("chosen",), BOTH, ("chosen", "rejected", "reference")])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("limit", [None, 9, 4])
def test_every_layout_scores_the_same(names, mode, limit):
    rows = [row for row in random_rows(40, names) if row["prompt_ids"] or all(row[f"{n}_ids"] for n in names)]
    expected = []
    for b, row in enumerate(rows):
        for j, name in enumerate(names):
            prompt, answer = row["prompt_ids"], row[f"{name}_ids"]
            whole, first = prompt + answer, 1 if j == 0 else len(prompt)
            cut = 0 if limit is None or mode == "keep_start" else max(len(whole) - limit, 0)
            whole, first = whole[cut : None if limit is None else cut + limit], max(first - (cut if j else 0), 1)
            expected += [(b * len(names) + j, whole[i], whole[:i], [*range(i)]) for i in range(first, len(whole))]
    options = {"max_length": limit, "truncation_mode": mode, "score_prompt": names[:1]}
    layouts = [{"share": True}, {"share": False}, {"flat": False}, {"pad_to_multiple_of": 64}]
    batches = [collator(names, **options, **layout)(rows) for layout in layouts]
    for batch in batches:
        assert sequences(batch) == expected
        for name, value in batches[0].extras.items():
            assert name == "read" or batch.extras[name].tolist() == value.tolist()
        if "read" in batch.extras:
            assert batch.extras["read"].tolist() == sorted({*batch.source.tolist()})
    assert len({batch.num_tokens for batch in batches}) == 1
    assert len(batches[3].input_ids) % 64 == 0
    if len(names) > 1 and limit != 4:
        assert len(batches[0].input_ids) < len(batches[1].input_ids)


def test_shared_where_it_pays():
    long = [{"prompt_ids": [*range(20)], "chosen_ids": [1] * 10, "rejected_ids": [2] * 10}]
    short = [{"prompt_ids": [*range(3)], "chosen_ids": [1] * 10, "rejected_ids": [2] * 10}]
    assert collator()(long).prefix.tolist() == [-1, 0, 0]  # 60 tokens or 40
    assert collator()(short).prefix is None  # 26 or 23, a factor of 1.13
    assert collator()(long + short).prefix.tolist() == [-1, 0, 0, -1, 3, 3]
    assert collator(("chosen",))(long).prefix is None
    assert collator(share=True)(
        [{"prompt_ids": [], "chosen_ids": [1, 2], "rejected_ids": [3]}, *long]
    ).prefix.tolist() == ([-1, -1, -1, 2, 2])


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.int16()])
def test_columns_of_any_integers_and_slices(kind):
    rows = random_rows(12, shortest=1)
    made = pa.table({name: pa.array([row[name] for row in rows], pa.list_(kind)) for name in rows[0]})
    expected = collator(share=True)(rows[4:9])
    for given in (made.slice(4, 5), pa.concat_tables([made.slice(4, 2), made.slice(6, 3)]), [made.slice(4, 5)]):
        batch = pickle.loads(pickle.dumps(collator(share=True)))(given)
        for name in ("input_ids", "position_ids", "cu_seqlens", "prefix", "source", "targets", "row", "weight"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name


def test_errors_name_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"Column `rejected_ids`, row 1, position 0: 99 is no token id; ids must be in"
    ):
        collator(vocab_size=90)([PAIRS[0], {**PAIRS[1], "rejected_ids": [99]}])
    with pytest.raises(ValueError, match=r"need the columns chosen_ids, rejected_ids .* rejected_ids missing"):
        collator()([{"prompt_ids": [1], "chosen_ids": [2]}])
    with pytest.raises(ValueError, match=r"Column `rejected_ids` is empty in row 1, and so is its prompt"):
        collator()([PAIRS[0], {"prompt_ids": [], "chosen_ids": [2], "rejected_ids": []}])
    with pytest.raises(ValueError, match=r"Column `prompt_ids` has no value in row 1"):
        collator()([PAIRS[0], {"chosen_ids": [2], "rejected_ids": [3]}])
    with pytest.raises(ValueError, match=r"Column `margin` must hold one number per row"):
        collator()([{**PAIRS[0], "margin": "much"}])


@pytest.mark.parametrize(("flat", "share"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.filterwarnings("ignore:.*keep_end")
def test_lengths_of_rows_are_what_the_collator_makes_of_them(flat, share, truncation_mode):
    rows = [row for row in random_rows(80, seed=3) if row["prompt_ids"] or all(row[f"{a}_ids"] for a in BOTH)]
    for max_length in (None, 4, 9):
        limits = DPOConfig("unused", use_cpu=True, max_length=max_length, truncation_mode=truncation_mode)
        collate = collator(flat=flat, share=share, max_length=max_length, truncation_mode=truncation_mode)
        expected = [collate([row]).input_ids.numel() for row in rows]
        found = group_lengths(Dataset.from_list(rows), BOTH, flat=flat, share=share, limits=limits)
        assert found.tolist() == expected
