"""Which rows each rank and micro-batch gets: against accelerate's and transformers' samplers, and by hand."""

from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import make, tiny_rows
from torch.utils.data import BatchSampler, SequentialSampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from fastalign.data.collate import TokenCollator
from fastalign.loop.batching import (
    ArrowRows,
    StepSampler,
    batches_of_steps,
    fill_micro_batches,
    grouped_order,
    list_lengths,
    random_order,
    share_of_rank,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans())
def test_ranks_share_batches_as_accelerate_does(rows, size, world, drop_last, even):
    for rank in range(world):
        batches = BatchSampler(SequentialSampler(range(rows)), size, drop_last)
        if world > 1:
            batches = BatchSamplerShard(batches, world, rank, even_batches=even)
        mine = share_of_rank(np.arange(rows), size, rank, world, drop_last, even)
        if drop_last or even or world == 1:
            assert mine == list(batches)
        else:  # accelerate gives short rounds to some ranks only in this mode, too
            assert [b for b in mine if b] == list(batches)
        sampler = StepSampler(
            lambda _: np.arange(rows), rows, size, rank=rank, world=world, drop_last=drop_last, even=even
        )
        assert len(sampler) == len(mine)


@pytest.mark.parametrize("split", [2, 3])
def test_ranks_share_batches_as_accelerate_does_when_it_splits_them(split):
    for rank in range(split):
        batches = BatchSampler(SequentialSampler(range(23)), 6, False)
        theirs = list(BatchSamplerShard(batches, split, rank, split_batches=True))
        assert share_of_rank(np.arange(23), 6 // split, rank, split, False, True) == theirs


def test_random_order_is_that_of_the_seedable_sampler():
    sampler = SeedableRandomSampler(range(50), generator=torch.Generator(), data_seed=11)
    for epoch in (0, 1, 5):
        sampler.set_epoch(epoch)
        assert random_order(50, 11)(epoch).tolist() == list(sampler)


@pytest.mark.parametrize("rows", [7, 90, 1000])
def test_grouped_order_is_that_of_transformers(rows):
    lengths = np.random.default_rng(0).permutation(rows) + 1  # no ties, whose order is arbitrary
    theirs = get_length_grouped_indices(lengths.tolist(), 4, generator=torch.Generator().manual_seed(5 + 2))
    assert grouped_order(lengths, 4, 5)(2).tolist() == theirs


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=25), st.integers(30, 90), st.booleans(), st.integers(1, 6))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget, padded, at_least):
    rows = list(range(100, 100 + len(lengths)))
    table = np.zeros(200, dtype=np.int64)
    table[100 : 100 + len(lengths)] = lengths
    parts = fill_micro_batches(rows, table, budget, padded, at_least)
    assert sorted(row for part in parts for row in part) == rows
    assert len(parts) >= min(at_least, len(rows))
    for part in parts:
        assert part == sorted(part)
        longest = max(table[part])
        assert (longest * len(part) if padded else table[part].sum()) <= budget


def test_micro_batches_by_hand():
    lengths = np.array([5, 3, 4, 2, 6])
    # longest first: 6 | 5 -> new | 4 joins 6 (room 4) | 3 joins 5 (room 5, the only one) | 2 joins 5 + 3
    assert fill_micro_batches([0, 1, 2, 3, 4], lengths, 10, padded=False) == [[2, 4], [0, 1, 3]]
    # padded to the longest: 6 | 5, 4 cost 5 each = 10 | 3, 2 cost 3 each = 6
    assert fill_micro_batches([0, 1, 2, 3, 4], lengths, 10, padded=True) == [[4], [0, 2], [1, 3]]


def steps_of(sampler):
    return list(batches_of_steps(iter(sampler), sampler, sampler.accumulation))


def test_steps_seek_and_sizes():
    sampler = StepSampler(lambda epoch: np.arange(11) + 100 * epoch, 11, 2, accumulation=2)
    assert steps_of(sampler) == [([[0, 1], [2, 3]], 2), ([[4, 5], [6, 7]], 2), ([[8, 9], [10]], 2)]
    sampler.seek(1, 2)
    assert steps_of(sampler) == [([[108, 109], [110]], 2)]
    sampler.seek(2)
    assert len(steps_of(sampler)) == 3


@pytest.mark.parametrize("world", [1, 2, 3])
def test_budget_keeps_each_step_and_runs_ranks_in_lockstep(world):
    lengths = np.random.default_rng(1).integers(1, 50, 40)
    plain, budget = [], []
    for rank in range(world):
        common = {"accumulation": 2, "rank": rank, "world": world}
        order = random_order(40, 0)
        plain.append(steps_of(StepSampler(order, 40, 3, **common)))
        budget.append(steps_of(StepSampler(order, 40, 3, lengths=lengths, budget=64, **common)))
    for ours, theirs in zip(budget, plain, strict=True):
        for (filled, nominal), (batches, count) in zip(ours, theirs, strict=True):
            assert sorted(chain(*filled)) == sorted(chain(*batches)) and nominal == count
            assert all(lengths[part].sum() <= 64 for part in filled)
    for step in zip(*budget, strict=True):
        assert len({len(filled) for filled, _ in step}) == 1


def test_rows_longer_than_the_budget_are_named(tmp_path):
    trainer = make("ours", tmp_path, token_budget=12, data_collator=TokenCollator(pad_token_id=0))
    lengths = [len(ids) for ids in tiny_rows()["input_ids"]]
    with pytest.raises(ValueError, match=rf"Row {np.argmax(lengths)} .* 13 tokens.*token_budget=12"):
        trainer.get_train_dataloader()
    stream = make("ours", tmp_path, train=tiny_rows().to_iterable_dataset(), max_steps=2, token_budget=30)
    with pytest.raises(ValueError, match="token_budget needs"):
        stream.get_train_dataloader()


def test_rows_are_read_as_arrow_tables():
    rows = tiny_rows().add_column("extra", ["x"] * 22)
    table = ArrowRows(rows, ["input_ids", "labels"]).__getitems__([4, 1])
    assert isinstance(table, pa.Table) and table.column_names == ["input_ids", "labels"]
    assert table["input_ids"].to_pylist() == [rows[4]["input_ids"], rows[1]["input_ids"]]


def test_lengths_of_shuffled_and_plain_datasets(tmp_path):
    rows = tiny_rows().shuffle(seed=3)
    expected = [len(ids) for ids in rows["input_ids"]]
    assert list_lengths(rows, chunk=5).tolist() == expected
    assert list_lengths([rows[i] for i in range(22)]).tolist() == expected
    assert list_lengths(rows.select([])).tolist() == []
    trainer = make("ours", tmp_path, length_column_name="n")
    assert trainer.example_lengths(rows.add_column("n", list(range(22)))).tolist() == list(range(22))


def test_loader_options_arrive(tmp_path):
    options = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}
    options |= {"dataloader_in_order": False, "dataloader_multiprocessing_context": "spawn"}
    trainer = make("ours", tmp_path, eval_dataset=tiny_rows(5), **options)
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers, loader.in_order) == (
        2,
        3,
        True,
        False,
    )
    assert loader.multiprocessing_context.get_start_method() == "spawn" and loader.worker_init_fn is not None
    assert trainer.get_eval_dataloader() is trainer.get_eval_dataloader()  # its workers persist


def test_unused_columns(tmp_path):
    rows = tiny_rows().add_column("extra", [1] * 22)
    assert make("ours", tmp_path, train=rows).get_train_dataloader().dataset.column_names == ["input_ids", "labels"]
    kept = make("ours", tmp_path, train=rows, remove_unused_columns=False)
    assert "extra" in kept.get_train_dataloader().dataset.column_names
    useless = make("ours", tmp_path, train=rows.select_columns(["extra"]))
    with pytest.raises(ValueError, match=r"\['extra'\].*remove_unused_columns"):
        useless.get_train_dataloader()


def test_no_batch_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="22 examples, batch size 30"):
        make("ours", tmp_path, per_device_train_batch_size=30, dataloader_drop_last=True).train()
    with pytest.raises(ValueError, match="empty"):
        make("ours", tmp_path, train=tiny_rows().select([]))
