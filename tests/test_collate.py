"""Collation against a token-by-token oracle, and every error of it."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.data.collate import TokenCollator, collate_flat, collate_padded

VOCAB = 1000
INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]


@st.composite
def batches(draw):
    """Rows of ids with labels (some ignored, some unlike the ids), weights and a cut of each row into segments."""
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        n = draw(st.integers(1, 12))
        ids = draw(st.lists(st.integers(0, 120), min_size=n, max_size=n))
        labels = [draw(st.sampled_from([i, i, -100, 7])) for i in ids]
        weight = [draw(st.integers(0, 8)) / 4 for _ in ids]
        cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=3))) if n > 1 else []
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
        rows.append({"input_ids": ids, "labels": labels, "weight": weight, "seq_lengths": lengths})
    return rows


def oracle(rows, *, packed, labelled, weighted, width=None):
    """The scored positions (source, target, row, weight) and the position ids, one token at a time."""
    scored, positions, segment, start = [], [], 0, 0
    for r, row in enumerate(rows):
        at = 0
        for length in row["seq_lengths"] if packed else [len(row["input_ids"])]:
            for j in range(length):
                positions.append(j)
                label = row["labels"][at + j] if labelled else row["input_ids"][at + j]
                if j > 0 and label != -100:
                    first = r * width if width else start
                    scored.append((first + at + j - 1, label, segment, row["weight"][at + j] if weighted else 1.0))
            at += length
            segment += 1
        start += at
    return scored, positions


def scored_of(batch):
    return list(
        zip(batch.source.tolist(), batch.targets.tolist(), batch.row.tolist(), batch.weight.tolist(), strict=True)
    )


def arrow_column(rows, name, kind, large, chunked, sliced):
    """The column as Arrow data that carries an offset, large offsets or several chunks."""
    values = [row[name] for row in rows]
    list_type = pa.large_list(kind) if large else pa.list_(kind)
    if sliced:
        array = pa.array([[1], *values, [2, 3]], list_type).slice(1, len(values))
    else:
        array = pa.array(values, list_type)
    return pa.chunked_array([array.slice(0, 1), array.slice(1)]) if chunked else array


@settings(max_examples=150, deadline=None)
@given(
    batches(),
    st.sampled_from(INTEGERS),
    st.tuples(*[st.booleans()] * 3),
    st.tuples(*[st.booleans()] * 3),
    st.sampled_from([None, 1, 4, 16]),
)
def test_flat_equals_oracle(rows, kind, layout, present, multiple):
    labelled, weighted, packed = present
    batch = collate_flat(
        arrow_column(rows, "input_ids", kind, *layout),
        arrow_column(rows, "labels", pa.int32() if kind == pa.int32() else pa.int64(), *layout) if labelled else None,
        arrow_column(rows, "seq_lengths", pa.int32(), *layout) if packed else None,
        arrow_column(rows, "weight", pa.float64(), *layout) if weighted else None,
        vocab_size=VOCAB,
        pad_to_multiple_of=multiple,
        pad_token_id=5,
    )
    scored, positions = oracle(rows, packed=packed, labelled=labelled, weighted=weighted)
    ids = [i for row in rows for i in row["input_ids"]]
    lengths = [n for row in rows for n in (row["seq_lengths"] if packed else [len(row["input_ids"])])]
    pad = -len(ids) % (multiple or 1)
    assert batch.input_ids.tolist() == ids + [5] * pad
    assert batch.position_ids.tolist() == positions + [0] * pad
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths, *[1] * pad]).tolist()
    assert scored_of(batch) == scored
    assert (batch.num_tokens, batch.max_seqlen, batch.num_scored) == (len(ids), max(lengths), len(scored))
    assert batch.attention_mask is None
    assert batch.input_ids.dtype == batch.source.dtype == torch.int64
    assert (batch.cu_seqlens.dtype, batch.weight.dtype) == (torch.int32, torch.float32)


@settings(max_examples=80, deadline=None)
@given(
    batches(),
    st.sampled_from(INTEGERS),
    st.tuples(*[st.booleans()] * 3),
    st.booleans(),
    st.sampled_from([None, 8]),
)
def test_padded_equals_oracle(rows, kind, layout, labelled, multiple):
    longest = max(len(row["input_ids"]) for row in rows)
    width = longest + (-longest % (multiple or 1))
    batch = collate_padded(
        arrow_column(rows, "input_ids", kind, *layout),
        arrow_column(rows, "labels", pa.int64(), *layout) if labelled else None,
        pad_token_id=3,
        vocab_size=VOCAB,
        pad_to_multiple_of=multiple,
        weight=arrow_column(rows, "weight", pa.float32(), *layout),
    )
    scored, _ = oracle(rows, packed=False, labelled=labelled, weighted=True, width=width)
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch.input_ids.tolist() == [
        row["input_ids"] + [3] * (width - n) for row, n in zip(rows, lengths, strict=True)
    ]
    assert batch.attention_mask.tolist() == [[1] * n + [0] * (width - n) for n in lengths]
    assert batch.position_ids.tolist() == [[*range(n), *[n - 1] * (width - n)] for n in lengths]
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    assert scored_of(batch) == scored
    assert (batch.num_tokens, batch.max_seqlen) == (sum(lengths), longest)


def equal_batches(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("input_ids", "position_ids", "cu_seqlens", "source", "targets", "row", "weight")
    )


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from([list, np.array, torch.tensor, lambda row: np.array(row, np.uint16)]))
def test_python_rows_equal_arrow_rows(rows, convert):
    expected = TokenCollator(pad_token_id=0)(pa.Table.from_pylist(rows))
    ids_converted = [{**row, "input_ids": convert(row["input_ids"])} for row in rows]
    collator = pickle.loads(pickle.dumps(TokenCollator(pad_token_id=0)))
    assert equal_batches(collator(ids_converted), expected)
    assert equal_batches(collator([pa.Table.from_pylist([row]) for row in rows]), expected)


def test_datasets_rows_and_columns_that_are_left_alone():
    from datasets import Dataset

    data = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5], [6]], "text": ["a", "b", "c"]})
    batch = TokenCollator(pad_token_id=0)(data.with_format("arrow")[[2, 1]])
    assert batch.input_ids.tolist() == [6, 3, 4, 5]
    assert batch.targets.tolist() == [4, 5]


def test_no_rows():
    batch = collate_flat(pa.array([], pa.list_(pa.int32())), pa.array([], pa.list_(pa.int64())))
    assert (batch.num_tokens, batch.num_scored, batch.cu_seqlens.tolist()) == (0, 0, [0])


def column(rows, kind=None):
    return pa.array(rows, pa.list_(kind or pa.int64()))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([column([[1], [2, -3]])], {}, r"`input_ids`, row 1, position 1: -3 .* not negative"),
        ([column([[1, 2], [2, 9]])], {"vocab_size": 9}, r"`input_ids`, row 1, position 1: 9 .* in \[0, 9\)"),
        ([column([[1, 2]] * 4000 + [[7, 2, 9]])], {"vocab_size": 9}, r"row 4000, position 2: 9"),
        ([column([[1, 2]]), column([[1, 9]])], {"vocab_size": 9}, r"`labels`, row 0, position 1: 9 .* or -100"),
        ([column([[1, 2]]), column([[1, -1]])], {}, r"`labels`, row 0, position 1: -1"),
        ([column([[1, 2], None])], {}, "`input_ids` has no value in row 1"),
        ([column([[1, 2], [3, None]])], {}, "`input_ids` has no value at row 1, position 1"),
        ([column([[1, 2], []])], {}, "`input_ids` is empty in row 1"),
        ([column([[1.0, 2.0]], pa.float32())], {}, "must hold integers, got float"),
        ([column([[True, False]], pa.bool_())], {}, "must hold integers, got bool"),
        ([column([["a"]], pa.string())], {}, "must hold integers, got string"),
        ([pa.array([1, 2])], {}, "must be a list of numbers per row, got type int64"),
        ([column([[2**63]], pa.uint64())], {}, "no int64 can hold"),
        ([[[1.5, 2]]], {}, "`input_ids`, row 0: must hold integers, got float64"),
        ([[np.array([2**63], np.uint64)]], {}, "`input_ids`, row 0: must hold integers, got uint64"),
        ([[[1, 2], None]], {}, "`input_ids` has no value in row 1"),
        ([[[[1, 2]]]], {}, "got 2 dimensions"),
        ([[[1, [2]]]], {}, "got a ragged one"),
        ([column([[1, 2], [3]]), column([[1, 2], [3, 4]])], {}, "`labels` has 2 values in row 1, `input_ids` has 1"),
        ([column([[1, 2]]), column([[1, 2], [3]])], {}, "`labels` has 2 rows, `input_ids` has 1"),
        ([column([[1, 2, 3]]), None, column([[2, 2]])], {}, "adds up to 4 in row 0, but the row has 3 tokens"),
        ([column([[1, 2], [3]]), None, column([[1], [2]])], {}, "adds up to 1 in row 0, but the row has 2"),
        ([column([[1, 2]]), None, column([[3, -1]])], {}, "`seq_lengths`, row 0, position 1: .* positive"),
        ([column([[1, 2]]), None, column([[2], [1]])], {}, "`seq_lengths` has 2 rows, `input_ids` has 1"),
        ([column([[1, 2]]), None, None, column([[1.0]], pa.float32())], {}, "`weight` has 1 values in row 0"),
        ([column([[1, 2]]), None, None, [[1.0, float("nan")]]], {}, "`weight` is not finite at row 0, position 1"),
        ([column([[1, 2]]), None, None, column([["a", "b"]], pa.string())], {}, "`weight` must hold numbers"),
        ([column([[1, 2]])], {"pad_to_multiple_of": 0}, "`pad_to_multiple_of` must be at least 1 or None, got 0"),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        collate_flat(*arguments, **options)


def test_collator_errors():
    padded = TokenCollator(pad_token_id=0, flat=False)
    with pytest.raises(ValueError, match="need flat batches"):
        padded([{"input_ids": [1, 2], "seq_lengths": [2]}])
    with pytest.raises(ValueError, match=r"need a column `input_ids`, found \['text'\]"):
        padded([{"text": "a"}])
    with pytest.raises(ValueError, match=r"\['completion_mask'\] but no `labels`"):
        padded(pa.table({"input_ids": [[1, 2]], "completion_mask": [[0, 1]]}))
    with pytest.raises(ValueError, match="`labels` has no value in row 1"):
        padded([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2]}])
    with pytest.raises(ValueError, match=r"row 1, position 0: 8 .* in \[0, 8\)"):
        TokenCollator(pad_token_id=0, vocab_size=8)([{"input_ids": [1, 2]}, {"input_ids": [8, 2]}])


def test_same_targets_as_trl():
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    generator = np.random.default_rng(0)
    rows = []
    for n in (5, 1, 9, 4):
        ids = generator.integers(1, 50, n)
        labels = np.where(generator.random(n) < 0.4, -100, ids)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    theirs = sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    ours = TokenCollator(pad_token_id=0)(rows)
    shifted = theirs["labels"][0, 1:]
    at = (shifted != -100).nonzero().flatten()
    assert torch.equal(ours.input_ids, theirs["input_ids"][0])
    assert torch.equal(ours.source, at)
    assert torch.equal(ours.targets, shifted[at])
    assert torch.equal(ours.position_ids, theirs["position_ids"][0])
    assert torch.equal(ours.cu_seqlens, theirs["cu_seq_lens_q"])
    padded = sft.DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    ours = TokenCollator(pad_token_id=0, flat=False)(rows)
    labels = torch.full_like(padded["labels"], -100).flatten()
    labels[ours.source + 1] = ours.targets
    first = padded["labels"].clone()
    first[:, 0] = -100
    assert torch.equal(labels.view_as(first), first)
    assert torch.equal(ours.attention_mask, padded["attention_mask"])
