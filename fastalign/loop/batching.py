"""Which examples make up an optimizer step, on which rank and in which micro-batch, and how they are read."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from transformers.trainer_utils import RemoveColumnsCollator, has_length, seed_worker

from ..data.collate import COLUMNS, MASKS, TokenCollator

logger = logging.getLogger(__name__)


class ArrowRows(Dataset):
    """A `datasets.Dataset` read as Arrow: a list of row numbers gives one `pyarrow.Table`, no Python lists."""

    def __init__(self, dataset: datasets.Dataset, columns: list[str] | None = None):
        if columns is not None:
            dataset = dataset.select_columns(columns)
        self.rows = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]):
        return self.rows[indices]

    def __getitem__(self, index: int):
        return self.rows[[index]]


def reads_arrow(collator) -> bool:
    """Whether the collator takes a `pyarrow.Table` (ours do, and say so with `reads_arrow = True`)."""
    return isinstance(collator, TokenCollator) or getattr(collator, "reads_arrow", False)


def random_order(num_rows: int, seed: int) -> Callable[[int], np.ndarray]:
    """Epoch -> permutation of the rows; the one that accelerate's seedable sampler draws for the same seed."""

    def order(epoch: int) -> np.ndarray:
        return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed + epoch)).numpy()

    return order


def grouped_order(lengths: np.ndarray, group: int, seed: int) -> Callable[[int], np.ndarray]:
    """Epoch -> random order in which each 50 * `group` rows are sorted by length, the longest row of all first."""
    shuffled = random_order(len(lengths), seed)
    span = min(len(lengths) // (group * 4), 50) * group or group  # as in transformers' LengthGroupedSampler

    def order(epoch: int) -> np.ndarray:
        rows = shuffled(epoch)
        parts = [rows[i : i + span] for i in range(0, len(rows), span)]
        parts = [part[np.argsort(-lengths[part], kind="stable")] for part in parts]
        longest = max(range(len(parts)), key=lambda i: lengths[parts[i][0]])
        parts[0][0], parts[longest][0] = parts[longest][0], parts[0][0]
        return np.concatenate(parts)

    return order


def share_of_rank(
    order: np.ndarray, batch_size: int, rank: int, world: int, drop_last: bool, even: bool, repeat: bool = True
) -> list:
    """The batches (lists of row numbers) of one rank: ranks take alternate batches of the common order.

    With `even` the order is continued from its beginning until every rank has equally many full batches (as
    accelerate does); a single process keeps its short last batch. Without `repeat` the last batches are short on
    several ranks, too, and a rank that has nothing left takes a single row once more.
    """
    stride, num_rows = batch_size * world, len(order)
    if drop_last:
        order = order[: num_rows // stride * stride]
    elif even and world > 1:
        order = np.resize(order, -(-num_rows // stride) * stride) if num_rows else order
    starts = range(rank * batch_size, len(order), stride)
    stops = [start + batch_size if repeat else min(start + batch_size, max(num_rows, start + 1)) for start in starts]
    return [order[start:stop].tolist() for start, stop in zip(starts, stops, strict=True)]


def fill_micro_batches(rows: list[int], lengths: np.ndarray, budget: int, padded: bool, at_least: int = 1) -> list:
    """Rows of one step in micro-batches of at most `budget` tokens: longest first, best fit, in ascending positions.

    `padded` counts the tokens of the padded rectangle. If fewer than `at_least` result, the fullest are halved.
    """
    by_length = sorted(range(len(rows)), key=lambda i: -lengths[rows[i]])
    filled: list[list[int]] = []  # positions in `rows`
    room: list[int] = []
    for position in by_length:
        length = int(lengths[rows[position]])
        costs = [int(lengths[rows[part[0]]]) if padded else length for part in filled]
        fitting = [i for i, left in enumerate(room) if left >= costs[i]]
        if fitting:
            best = min(fitting, key=lambda i: room[i] - costs[i])
            filled[best].append(position)
            room[best] -= costs[best]
        else:
            filled.append([position])
            room.append(budget - length)
    while len(filled) < at_least and (largest := max(filled, key=len)) and len(largest) > 1:
        filled.remove(largest)
        filled += [largest[::2], largest[1::2]]
    return [[rows[i] for i in sorted(part)] for part in filled]


def batches_by_length(lengths: np.ndarray, budget: int | None, size: int, *, padded: bool) -> list[np.ndarray]:
    """Row numbers of batches, longest rows first, of at most `budget` tokens.

    Without a budget it is what the `size` longest rows need, so that later batches hold more and none needs more.
    `padded` counts the padded rectangle.
    """
    order = np.argsort(-lengths, kind="stable")
    if budget is None:
        longest = lengths[order[:size]]
        budget = int(longest[0] * len(longest) if padded else longest.sum()) if len(order) else 0
    starts, used, first = [0], 0, 0
    for i, row in enumerate(order):
        cost = int(lengths[order[first]] if padded else lengths[row])
        if i > first and used + cost > budget:
            starts.append(i)
            first, used = i, 0
            cost = int(lengths[row])
        used += cost
    return np.split(order, starts[1:])


class StepSampler(BatchSampler):
    """Batch sampler that knows optimizer steps: yields micro-batches, and tells how many belong to each step.

    `order(epoch)` is the common order of all ranks. `sizes` receives, before a step's first micro-batch, the pair
    (micro-batches of the step, how many there would be without a token budget).
    """

    def __init__(
        self,
        order: Callable[[int], np.ndarray],
        num_rows: int,
        batch_size: int,
        accumulation: int = 1,
        *,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        even: bool = True,
        repeat: bool = True,
        lengths: np.ndarray | None = None,
        budget: int | None = None,
        padded: bool = False,
    ):
        self.order, self.num_rows, self.batch_size, self.accumulation = order, num_rows, batch_size, accumulation
        self.rank, self.world, self.drop_last, self.even, self.repeat = rank, world, drop_last, even, repeat
        self.lengths, self.budget, self.padded = lengths, budget, padded
        self.epoch = self.skip_steps = 0
        self.sizes: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        """Micro-batches per epoch on this rank, as if there were no token budget."""
        stride = self.batch_size * self.world
        if self.drop_last:
            return self.num_rows // stride
        if self.even or self.world == 1:
            return -(-self.num_rows // stride)
        return len(range(self.rank * self.batch_size, self.num_rows, stride))

    def seek(self, epoch: int, step: int = 0) -> None:
        """Start the next iteration at this optimizer step of this epoch, without reading what comes before."""
        self.epoch, self.skip_steps = epoch, step

    def steps(self) -> Iterator[tuple[list[list[int]], int]]:
        """(micro-batches, how many without a budget) of each step of the current epoch on this rank."""
        order = self.order(self.epoch)
        shares = [
            share_of_rank(order, self.batch_size, rank, self.world, self.drop_last, self.even, self.repeat)
            for rank in (range(self.world) if self.budget else [self.rank])
        ]
        own = shares[self.rank if self.budget else 0]
        for start in range(self.skip_steps * self.accumulation, len(own), self.accumulation):
            stop = start + self.accumulation
            nominal = own[start:stop]
            yield (nominal if self.budget is None else self._within_budget(shares, start, stop)), len(nominal)

    def _within_budget(self, shares: list, start: int, stop: int) -> list[list[int]]:
        # every rank runs equally many micro-batches: FSDP gathers weights in each
        assert self.lengths is not None and self.budget is not None
        fill = partial(fill_micro_batches, lengths=self.lengths, budget=self.budget, padded=self.padded)
        rows = [[row for batch in share[start:stop] for row in batch] for share in shares]
        most = max(len(fill(part)) for part in rows) if self.world > 1 else 1
        return fill(rows[self.rank], at_least=most)

    def __iter__(self) -> Iterator[list[int]]:
        self.sizes.clear()
        for batches, nominal in self.steps():
            self.sizes.append((len(batches), nominal))
            yield from batches
        self.skip_steps = 0


def knows_steps(sampler: Any) -> bool:
    """Whether a loader's batch sampler is a `StepSampler`, or has what one has for the loop: `seek` and `sizes`."""
    return hasattr(sampler, "seek") and hasattr(sampler, "sizes")


def batches_of_steps(iterator: Iterator, sampler, accumulation: int) -> Iterator[tuple[list[Any], int]]:
    """(batches of one optimizer step, how many there would be without a token budget); the last step may be shorter.

    `iterator` is that of a DataLoader; `sampler` its batch sampler, where it `knows_steps` the steps are its.
    """
    if knows_steps(sampler):
        while (first := next(iterator, None)) is not None:
            size, nominal = sampler.sizes.popleft()
            yield [first, *(next(iterator) for _ in range(size - 1))], nominal
        return
    while step := list(islice(iterator, accumulation)):
        yield step, len(step)


def list_lengths(dataset, column: str = "input_ids", chunk: int = 100_000) -> np.ndarray:
    """Tokens of each row, (rows,) int64: from Arrow offsets where there is Arrow, else by reading every row."""
    if not isinstance(dataset, datasets.Dataset):
        return np.array([len(dataset[i][column]) for i in range(len(dataset))], dtype=np.int64)
    from pyarrow import compute

    rows = dataset.select_columns([column]).with_format("arrow")
    parts = [
        compute.list_value_length(rows[i : i + chunk][column])  # pyright: ignore
        for i in range(0, len(rows), chunk)
    ]
    return np.concatenate([part.to_numpy() for part in parts]).astype(np.int64) if parts else np.zeros(0, np.int64)


def readable_rows(trainer, dataset, collator, description: str) -> tuple[Any, Any]:
    """(dataset, collator) as the DataLoader takes them: Arrow for our collators, rows as dicts for all others."""
    if isinstance(dataset, datasets.Dataset):
        if reads_arrow(collator) and dataset.format["type"] != "custom":  # a transform gives rows as dicts
            # mask columns without labels go to the collator, which refuses them
            wanted = getattr(collator, "columns", COLUMNS if "labels" in dataset.column_names else COLUMNS + MASKS)
            found = [name for name in wanted if name in dataset.column_names]
            if not found:
                raise _no_column(trainer, dataset, description, wanted)
            return ArrowRows(dataset, found), collator
        return _without_unused_columns(trainer, dataset, description), collator
    if trainer.args.remove_unused_columns and not reads_arrow(collator):
        trainer._set_signature_columns_if_needed()
        collator = RemoveColumnsCollator(
            data_collator=collator,
            signature_columns=trainer._signature_columns,
            logger=logger,
            description=description,
            model_name=type(trainer.model).__name__,
        )
    return dataset, collator


def _without_unused_columns(trainer, dataset: datasets.Dataset, description: str) -> datasets.Dataset:
    if not trainer.args.remove_unused_columns:
        return dataset
    trainer._set_signature_columns_if_needed()
    unused = sorted(set(dataset.column_names) - set(trainer._signature_columns))
    if len(unused) == len(dataset.column_names):
        raise _no_column(trainer, dataset, description, trainer._signature_columns)
    if unused:
        logger.info("The %s set's columns %s are not arguments of the model and are dropped.", description, unused)
    return dataset.remove_columns(unused)


def _no_column(trainer, dataset: datasets.Dataset, description: str, wanted) -> ValueError:
    return ValueError(
        f"The {description} set has the columns {sorted(dataset.column_names)}, none of which "
        f"{type(trainer).__name__} takes ({', '.join(wanted)}). Rename them, let the trainer prepare the data, or set "
        "remove_unused_columns=False."
    )


def make_loader(
    trainer, dataset, batch_size: int, *, training: bool, collator=None, repeat: bool = True
) -> DataLoader:
    """The DataLoader of one rank; see `StepSampler` for the order of rows, `share_of_rank` for `repeat`."""
    args = trainer.args
    description = "training" if training else "evaluation"
    rows, collate = readable_rows(trainer, dataset, collator or trainer.data_collator, description)
    options: dict[str, Any] = {
        "collate_fn": collate,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and args.device.type != "cpu",
        "persistent_workers": args.dataloader_persistent_workers,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "in_order": args.dataloader_in_order,
    }
    if training:
        options["worker_init_fn"] = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=trainer.rank)
    if isinstance(dataset, IterableDataset):
        if training and args.token_budget:
            raise ValueError(
                "token_budget needs a training dataset with a length: with a streaming one set "
                "per_device_train_batch_size, or pack the data."
            )
        return DataLoader(
            _stream_of_rank(trainer, rows, batch_size), batch_size, drop_last=args.dataloader_drop_last, **options
        )
    sampler = _sampler(trainer, dataset, batch_size, training, collate, repeat)
    return DataLoader(rows, batch_sampler=sampler, **options)


def _stream_of_rank(trainer, dataset: Any, batch_size: int) -> Any:
    if trainer.world == 1:
        return dataset
    if isinstance(dataset, datasets.IterableDataset) and dataset.n_shards >= trainer.world:
        return dataset.shard(num_shards=trainer.world, index=trainer.rank)
    return IterableDatasetShard(
        dataset,  # pyright: ignore
        batch_size=batch_size,
        drop_last=trainer.args.dataloader_drop_last,
        num_processes=trainer.world,
        process_index=trainer.rank,
    )


def _sampler(trainer, dataset, batch_size: int, training: bool, collator, repeat: bool) -> BatchSampler:
    args = trainer.args
    if not has_length(dataset):
        raise ValueError(
            f"{type(dataset).__name__} has no length and is no IterableDataset: cannot draw rows from it."
        )
    num_rows, seed = len(dataset), args.seed if args.data_seed is None else args.data_seed
    strategy = args.train_sampling_strategy if training else "sequential"
    accumulation = args.gradient_accumulation_steps if training else 1
    budget = args.token_budget if training else None
    needs_lengths = budget is not None or strategy in ("group_by_length", "batch_rebalance")
    lengths: Any = trainer.example_lengths(dataset) if needs_lengths else None
    if budget is not None and len(lengths) and lengths.max() > budget:
        raise ValueError(
            f"Row {int(lengths.argmax())} of the training set has {int(lengths.max())} tokens, more than "
            f"token_budget={budget}: raise token_budget, or cut the rows (max_length)."
        )
    if strategy == "batch_rebalance":
        return _rebalanced(trainer, lengths, batch_size, seed)
    if strategy == "group_by_length":
        order = grouped_order(lengths, batch_size * accumulation, seed)
    elif strategy == "random":
        order = random_order(num_rows, seed)
    else:
        order = lambda epoch: np.arange(num_rows)  # noqa: E731
    config = args.accelerator_config
    if config.split_batches:
        if batch_size % trainer.world:
            raise ValueError(
                f"accelerator_config.split_batches shares each batch among the {trainer.world} processes, so the "
                f"batch size must be a multiple of that; per_device_train_batch_size or per_device_eval_batch_size is "
                f"{batch_size}."
            )
        batch_size //= trainer.world
    return StepSampler(
        order,
        num_rows,
        batch_size,
        accumulation,
        rank=trainer.rank,
        world=trainer.world,
        drop_last=args.dataloader_drop_last,
        even=config.even_batches,
        repeat=repeat,
        lengths=lengths,
        budget=budget,
        padded=budget is not None and not getattr(collator, "flat", True),
    )


def _rebalanced(trainer, lengths: np.ndarray, batch_size: int, seed: int) -> Any:
    from transformers.trainer_pt_utils import BatchRebalanceSampler

    if trainer.args.token_budget:
        raise ValueError("token_budget and train_sampling_strategy='batch_rebalance' both form batches: set only one.")
    accumulation = trainer.args.gradient_accumulation_steps
    return BatchRebalanceSampler(
        lengths.tolist(),
        effective_batch_size=batch_size * accumulation * trainer.world,
        dp_size=trainer.world,
        grad_accum=accumulation,
        seed=seed,
        rank=trainer.rank,
        drop_last=trainer.args.dataloader_drop_last,
    )
