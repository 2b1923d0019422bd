"""Packing against a slow best-fit-decreasing oracle, against TRL, and every error of it."""

import itertools
import logging
import os

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, LargeList, List, Value, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.data import packing
from fastalign.data.packing import pack_dataset, plan_packs

LENGTHS = st.lists(st.integers(0, 40), max_size=60)
CAPACITY = st.integers(1, 25)


def packs_of(plan):
    """The plan as lists of (row, start, length)."""
    pieces = list(zip(plan.row.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True))
    return [pieces[a:b] for a, b in zip(plan.packs[:-1], plan.packs[1:], strict=True)]


def oracle(lengths, capacity, strategy):
    """Packs by scanning all bins for each piece."""
    if strategy == "wrapped":
        tokens = [(row, i) for row, n in enumerate(lengths) for i in range(n)]
        cut = [tokens[i : i + capacity] for i in range(0, len(tokens), capacity)]
        packs = []
        for pack in cut:
            rows = dict.fromkeys(row for row, _ in pack)
            starts = [[i for r, i in pack if r == row] for row in rows]
            packs.append([(row, own[0], len(own)) for row, own in zip(rows, starts, strict=True)])
        return packs
    pieces = [
        (row, start, min(capacity, n - start)) for row, n in enumerate(lengths) for start in range(0, n, capacity)
    ]
    if strategy == "bfd":
        pieces = [piece for piece in pieces if piece[1] == 0]
    bins = []  # [space, when it got this space, pieces]
    for clock, piece in enumerate(sorted(pieces, key=lambda piece: -piece[2])):
        fitting = [b for b in bins if b[0] >= piece[2]]
        best = min(fitting, key=lambda b: b[:2]) if fitting else None
        if best is None:
            best = [capacity, clock, []]
            bins.append(best)
        best[:] = [best[0] - piece[2], clock, [*best[2], piece]]
    return [b[2] for b in bins]


@settings(max_examples=300, deadline=None)
@given(LENGTHS, CAPACITY, st.sampled_from(["bfd", "bfd_split", "wrapped"]))
def test_plan_equals_oracle(lengths, capacity, strategy):
    plan = plan_packs(np.array(lengths, np.int64), capacity, strategy)
    assert packs_of(plan) == oracle(lengths, capacity, strategy)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, CAPACITY, st.sampled_from(["bfd", "bfd_split", "bfd-requeue", "wrapped"]), st.integers(0, 2**64 - 1))
def test_every_token_once_within_capacity(lengths, capacity, strategy, seed):
    seed = None if strategy == "wrapped" else seed
    plan = plan_packs(np.array(lengths, np.int64), capacity, strategy, seed=seed)
    tokens = [
        (row, start + i) for row, start, n in zip(plan.row, plan.start, plan.length, strict=True) for i in range(n)
    ]
    kept = [min(n, capacity) for n in lengths] if strategy == "bfd" else lengths
    assert sorted(tokens) == [(row, i) for row, n in enumerate(kept) for i in range(n)]
    assert all(1 <= sum(piece[2] for piece in pack) <= capacity for pack in packs_of(plan))
    assert plan.num_tokens == sum(kept)
    again = plan_packs(np.array(lengths, np.int32), capacity, strategy, seed=seed)
    assert packs_of(again) == packs_of(plan)
    if seed is not None:
        unshuffled = plan_packs(np.array(lengths, np.int64), capacity, strategy)
        assert sorted(packs_of(plan)) == sorted(packs_of(unshuffled))


def test_seed_shuffles_the_packs():
    lengths = np.random.default_rng(0).integers(1, 30, 500)
    orders = [packs_of(plan_packs(lengths, 40, seed=seed)) for seed in (None, 0, 1)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    order, state, mask = list(range(50)), 3, 2**64 - 1  # Fisher-Yates on splitmix64, started at 3
    for i in range(49, 0, -1):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        j = (z ^ (z >> 31)) % (i + 1)
        order[i], order[j] = order[j], order[i]
    packs = packs_of(plan_packs(np.full(50, 9), 9, seed=3))
    assert [packs[place][0][0] for place in order] == list(range(50))


def test_waste_of_a_large_plan():
    """Log-normal lengths with mean 360: best-fit decreasing over everything leaves less than 0.05 % empty."""
    lengths = np.random.default_rng(0).lognormal(np.log(360) - 0.5, 1.0, 100_000).astype(np.int64)
    plan = plan_packs(lengths, 2048)
    bounds = plan.pack_bounds
    assert np.diff(bounds).max() <= 2048
    assert np.array_equal(np.sort(plan.row), np.flatnonzero(lengths > 0))
    waste = 1 - np.minimum(lengths, 2048).sum() / (len(plan) * 2048)
    assert plan.waste == pytest.approx(waste)
    assert waste < 5e-4


@pytest.mark.parametrize("capacity", [63, 64, 65, 4096, 4097, 300_000])
def test_capacities_around_the_levels_of_the_set(capacity):
    lengths = np.random.default_rng(capacity).integers(1, capacity + 1, 200)
    assert packs_of(plan_packs(lengths, capacity)) == oracle(lengths.tolist(), capacity, "bfd")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([3, -2], 8), {}, "row 1 is -2"),
        (([3.0, 2.0], 8), {}, "must be one row of integers, got float64"),
        (([[3, 2]], 8), {}, r"shape \(1, 2\)"),
        (([3], 0), {}, "`seq_length` must be an integer in"),
        (([3], 8.5), {}, "got 8.5"),
        (([3], 2**24 + 1), {}, "16777216"),
        (([3], 8, "ffd"), {}, "Invalid packing strategy 'ffd', must be one of"),
        (([3], 8, "wrapped"), {"seed": 1}, "shuffle the rows before 'wrapped'"),
        (([3], 8), {"seed": -1}, "`seed` must be in"),
    ],
)
def test_plan_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        plan_packs(*arguments, **options)


# Datasets


def make_dataset(lengths, *, large=False, label_type="int64"):
    generator = np.random.default_rng(len(lengths))
    kind = LargeList if large else List
    features = Features({"input_ids": kind(Value("int32")), "labels": kind(Value(label_type))})
    rows = [generator.integers(0, 1000, n).astype(np.int32) for n in lengths]
    labels = [(row % 2 if label_type == "bool" else row * 3).astype(label_type) for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels}, features=features)


def packed_by_hand(dataset, capacity, strategy):
    rows = dataset.with_format(None)[:]
    packs = oracle([len(row) for row in rows["input_ids"]], capacity, strategy)
    packed = {
        name: [[v for row, start, n in pack for v in values[row][start : start + n]] for pack in packs]
        for name, values in rows.items()
    }
    if strategy != "wrapped":
        packed["seq_lengths"] = [[piece[2] for piece in pack] for pack in packs]
    return packed


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("label_type", ["int64", "int8", "bool", "float32"])
@pytest.mark.parametrize("large", [False, True])
def test_dataset_equals_oracle(strategy, label_type, large, monkeypatch):
    monkeypatch.setattr(packing, "TOKENS_PER_BATCH", 100)  # several record batches
    lengths = np.random.default_rng(1).integers(0, 30, 200)
    dataset = make_dataset(lengths, large=large, label_type=label_type)
    packed = pack_dataset(dataset, 16, strategy)
    assert packed[:] == packed_by_hand(dataset, 16, strategy)
    extra = {} if strategy == "wrapped" else {"seq_lengths": List(Value("int32"))}
    assert packed.features == Features(dataset.features | extra)


def test_selected_shuffled_and_concatenated_rows():
    from datasets import concatenate_datasets

    parts = [make_dataset(np.random.default_rng(seed).integers(0, 30, 50)) for seed in range(3)]
    dataset = concatenate_datasets([parts[0], parts[1].select(range(5, 40)), parts[2]])
    for view in (dataset, dataset.shuffle(seed=1), dataset.select([7, 3, 3, 90]), dataset.select(range(60, 100))):
        assert pack_dataset(view, 32)[:] == packed_by_hand(view, 32, "bfd")


def test_strings_and_missing_values_are_packed_too():
    dataset = Dataset.from_dict({"words": [["a", None], [], ["bcd", "", "e"]], "ids": [[1, None], [], [2, 3, 4]]})
    assert pack_dataset(dataset, 5)[:] == {
        "words": [["bcd", "", "e", "a", None]],
        "ids": [[2, 3, 4, 1, None]],
        "seq_lengths": [[3, 2]],
    }


@pytest.mark.parametrize("lengths", [[], [0, 0], [1]])
def test_small_datasets(lengths):
    packed = pack_dataset(make_dataset(lengths), 8)
    assert len(packed) == sum(lengths)
    assert packed.column_names == ["input_ids", "labels", "seq_lengths"]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_same_packs_as_trl_in_one_of_its_windows(strategy):
    trl = pytest.importorskip("trl")
    dataset = make_dataset(np.random.default_rng(5).lognormal(3, 1, 900).astype(int))
    for view in (dataset, dataset.shuffle(seed=0).with_format("torch", columns=["input_ids"])):
        ours, theirs = pack_dataset(view, 64, strategy), trl.pack_dataset(view, 64, strategy)
        assert ours.format == theirs.format
        assert ours.features == theirs.features
        assert ours.with_format(None)[:] == theirs.with_format(None)[:]
    stream, their_stream = (
        pack(dataset.to_iterable_dataset(), 64, strategy) for pack in (pack_dataset, trl.pack_dataset)
    )
    assert list(stream) == list(their_stream)
    windows = {"batch_size": 100}
    stream = pack_dataset(dataset.to_iterable_dataset(), 64, strategy, windows)
    assert list(stream) == list(trl.pack_dataset(dataset.to_iterable_dataset(), 64, strategy, windows))
    assert stream.column_names == ours.column_names


def test_fewer_packs_than_trl_over_many_windows():
    trl = pytest.importorskip("trl")
    dataset = make_dataset(np.random.default_rng(5).lognormal(3, 1, 5000).astype(int))
    ours, theirs = pack_dataset(dataset, 128), trl.pack_dataset(dataset, 128)
    assert sorted(itertools.chain(*ours["seq_lengths"])) == sorted(itertools.chain(*theirs["seq_lengths"]))
    assert len(ours) < len(theirs)


def test_splits_of_a_dict_are_packed_one_by_one():
    splits = DatasetDict(a=make_dataset([3, 4, 5]), b=make_dataset([9, 1]))
    packed = pack_dataset(splits, 8)
    assert isinstance(packed, DatasetDict)
    assert {name: split[:] for name, split in packed.items()} == {
        name: packed_by_hand(split, 8, "bfd") for name, split in splits.items()
    }
    streams = pack_dataset(splits_to_streams(splits), 8)
    assert list(streams["b"]) == packed["b"].to_list()


def splits_to_streams(splits):
    from datasets import IterableDatasetDict

    return IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})


def test_stream_without_known_features():
    stream = IterableDataset.from_generator(lambda: ({"input_ids": [i] * i} for i in range(1, 6)))
    assert [row["seq_lengths"] for row in pack_dataset(stream, 6)] == [[5, 1], [4, 2], [3]]


def test_result_is_cached_by_content(tmp_path, monkeypatch):
    make_dataset([3, 4, 5, 6]).save_to_disk(tmp_path / "data")
    dataset = load_from_disk(tmp_path / "data")
    small = pack_dataset(dataset, 8)
    assert small.cache_files == []
    monkeypatch.setattr(packing, "IN_MEMORY_BYTES", 4 * 18 - 1)  # the values of the 18 tokens do not fit
    packed = pack_dataset(dataset, 8)
    assert small[:] == packed[:] and small._fingerprint == packed._fingerprint
    files = [file["filename"] for file in packed.cache_files]
    assert [os.path.dirname(file) for file in files] == [str(tmp_path / "data")]
    assert not [name for name in os.listdir(tmp_path / "data") if name.startswith("tmp-")]
    expected = packed_by_hand(dataset, 8, "bfd")

    def planned_again(*_, **__):
        raise AssertionError("planned again")

    with monkeypatch.context() as patch:
        patch.setattr(packing, "plan_packs", planned_again)
        again = pack_dataset(load_from_disk(tmp_path / "data"), 8)
        for changed in (
            {"seq_length": 7},
            {"strategy": "bfd_split"},
            {"seed": 1},
            {"map_kwargs": {"load_from_cache_file": False}},
        ):
            with pytest.raises(AssertionError, match="planned again"):
                pack_dataset(dataset, **{"seq_length": 8} | changed)
    assert again._fingerprint == packed._fingerprint
    assert again[:] == packed[:] == expected
    in_memory = pack_dataset(dataset, 8, map_kwargs={"keep_in_memory": True, "num_proc": 2})
    assert in_memory.cache_files == []
    assert in_memory[:] == expected


def test_dropped_tokens_are_reported(caplog):
    with caplog.at_level(logging.WARNING):
        pack_dataset(make_dataset([10, 3, 12]), 8)
    assert "cut 2 rows to 8 tokens and dropped 6 of 25 tokens" in caplog.text


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"input_ids": [[1, 2]], "text": ["a"]}, TypeError, "lists, but `text` is string"),
        (
            {"input_ids": [[1], [2, 3]], "labels": [[1], [2]]},
            ValueError,
            "row 1 has 2 in `input_ids` and 1 in `labels`",
        ),
        ({"input_ids": [[1], None]}, ValueError, "`input_ids` has no value in row 1"),
        ({"input_ids": [[1]], "seq_lengths": [[1]]}, ValueError, "packed already"),
        ({}, ValueError, "without columns"),
    ],
)
def test_dataset_errors(columns, error, message):
    with pytest.raises(error, match=message):
        pack_dataset(Dataset.from_dict(columns), 8)


def test_argument_errors():
    dataset = make_dataset([3])
    with pytest.raises(ValueError, match="Invalid packing strategy 'ffd'"):
        pack_dataset(dataset, 8, "ffd")
    with pytest.raises(ValueError, match=r"\['input_columns'\] have no meaning for packing"):
        pack_dataset(dataset, 8, map_kwargs={"input_columns": ["input_ids"]})
    with pytest.raises(ValueError, match="`seq_length` must be"):
        pack_dataset(dataset.to_iterable_dataset(), 0)
    with pytest.raises(TypeError, match="must be a Dataset"):
        pack_dataset([[1, 2]], 8)


def test_packed_rows_train_like_the_rows_they_hold():
    """Collating packed rows scores exactly the targets of the unpacked rows."""
    from fastalign.data.collate import TokenCollator

    dataset = make_dataset([5, 9, 2, 7, 1, 8])
    collate = TokenCollator(pad_token_id=0)
    packed = collate(pack_dataset(dataset, 16).with_format("arrow")[:])
    plain = collate(dataset.with_format("arrow")[:])
    assert sorted(packed.targets.tolist()) == sorted(plain.targets.tolist())
    assert packed.num_segments == len(dataset)
    assert pa.types.is_list(pack_dataset(dataset, 16).data.schema.field("seq_lengths").type)
