"""Packing: rows of a dataset put together into rows of at most `seq_length` tokens, planned over the whole dataset."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import update_fingerprint
from datasets.table import InMemoryTable, MemoryMappedTable

from fastalign import _native

logger = logging.getLogger(__name__)

STRATEGIES = {"bfd": "bfd", "bfd_split": "bfd_split", "bfd-requeue": "bfd_split", "wrapped": "wrapped"}
AnyDataset = datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict
LARGEST_CAPACITY = 2**24  # tokens; a plan keeps two queues of bins per possible space
TOKENS_PER_BATCH = 2**21  # of a record batch that is written: bounds the memory of packing
IN_MEMORY_BYTES = 2**30  # values of a result that is kept in memory and not written to a file
GATHERING_THREADS = 2  # more of them only wait for memory
SEQ_LENGTHS = datasets.List(datasets.Value("int32"))
# Arguments of `Dataset.map` that change how it runs and not what it makes; a plan over all rows has no use for them.
MAP_ONLY = ("num_proc", "desc", "batch_size", "writer_batch_size")


@dataclass(frozen=True)
class PackPlan:
    """Which piece of which row goes where: pack k holds the pieces `packs[k] : packs[k + 1]`, in that order."""

    row: np.ndarray  # (P,) int64, row that piece p is cut from
    start: np.ndarray  # (P,) int64, its first token in that row
    length: np.ndarray  # (P,) int64, tokens
    packs: np.ndarray  # (K + 1,) int64, bounds of the packs among the pieces
    capacity: int  # tokens

    def __len__(self) -> int:
        return len(self.packs) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.length.sum())

    @property
    def waste(self) -> float:
        """Share of the capacity of all packs that stays empty."""
        return 1 - self.num_tokens / (len(self) * self.capacity) if len(self) else 0.0

    @property
    def pack_bounds(self) -> np.ndarray:
        """(K + 1,) int64, bounds of the packs among the tokens."""
        return np.concatenate([[0], np.cumsum(self.length)])[self.packs]


def plan_packs(lengths, capacity: int, strategy: str = "bfd", *, seed: int | None = None) -> PackPlan:
    """Plan of packs of at most `capacity` tokens for rows of these lengths (N,), in O(N log capacity).

    bfd: best-fit decreasing (arXiv:2404.10830); of a row longer than `capacity` the first `capacity` tokens are kept.
    bfd_split (also bfd-requeue): the same, but a long row is cut into pieces and no token is lost. wrapped: all tokens
    back to back, cut at every `capacity`. Empty rows are in no pack. Equal lengths keep the order of their rows, so
    the plan is deterministic; `seed` shuffles its packs (not with wrapped). Raises ValueError for lengths that are no
    integers or negative, for a capacity that is not in [1, 2**24] and for an unknown strategy.
    """
    strategy = _strategy(strategy)
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu"):
        raise ValueError(f"`lengths` must be one row of integers, got {lengths.dtype} of shape {lengths.shape}.")
    if not isinstance(capacity, (int, np.integer)) or not 1 <= capacity <= LARGEST_CAPACITY:
        raise ValueError(f"`seq_length` must be an integer in [1, {LARGEST_CAPACITY}] tokens, got {capacity!r}.")
    lengths = np.ascontiguousarray(lengths, np.int64)
    if lengths.size and lengths.min() < 0:
        row = int(lengths.argmin())
        raise ValueError(f"Length of row {row} is {lengths[row]}; lengths must not be negative.")
    if seed is not None and strategy == "wrapped":
        raise ValueError(
            "`seed` shuffles the packs of 'bfd' and 'bfd_split'; shuffle the rows before 'wrapped' instead."
        )
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"`seed` must be in [0, 2**64), got {seed}.")
    return PackPlan(*_native.plan_packs(lengths, int(capacity), strategy, seed), capacity=int(capacity))


def pack_dataset(
    dataset: AnyDataset,
    seq_length: int,
    strategy: str = "bfd",
    map_kwargs: dict | None = None,
    *,
    seed: int | None = None,
) -> Any:
    """Pack the rows of a dataset (or of each split) into rows of at most `seq_length` tokens.

    Strategies as in `plan_packs`. All columns must be lists that are equally long in each row, and are packed alike;
    bfd and bfd_split add the column `seq_lengths`, the lengths of the sequences in each packed row. The plan is made
    over all rows of a `Dataset`, where TRL's sees windows of 1000, and over windows of `batch_size` rows (1000) of an
    `IterableDataset`. Up to IN_MEMORY_BYTES the result stays in memory, since making it again is faster than reading
    it; a larger one is cached beside the dataset's own cache files, by its fingerprint. `map_kwargs` are those of
    `datasets`: for a Dataset `load_from_cache_file`, `keep_in_memory`, `cache_file_name` and `new_fingerprint` count,
    arguments that only set the pace of `map` have no effect, others raise ValueError. Raises TypeError for a column
    that is no list, ValueError for lengths that differ between columns.
    """
    strategy, map_kwargs = _strategy(strategy), dict(map_kwargs or {})
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        packed: dict[Any, Any] = {
            name: pack_dataset(split, seq_length, strategy, map_kwargs, seed=seed) for name, split in dataset.items()
        }
        return type(dataset)(packed)
    if isinstance(dataset, datasets.IterableDataset):
        return _pack_stream(dataset, seq_length, strategy, map_kwargs, seed)
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"`dataset` must be a Dataset, an IterableDataset or a dict of these, got {type(dataset).__name__}."
        )
    for name in MAP_ONLY:
        map_kwargs.pop(name, None)
    return _pack_table(dataset, seq_length, strategy, seed, **_known_arguments(map_kwargs))


def _strategy(name: str) -> str:
    if name not in STRATEGIES:
        raise ValueError(f"Invalid packing strategy {name!r}, must be one of {tuple(STRATEGIES)}.")
    return STRATEGIES[name]


def _known_arguments(map_kwargs: dict) -> dict:
    known = ("load_from_cache_file", "keep_in_memory", "cache_file_name", "new_fingerprint")
    unknown = sorted(set(map_kwargs) - set(known))
    if unknown:
        raise ValueError(f"`map_kwargs` {unknown} have no meaning for packing; known are {known + MAP_ONLY}.")
    return map_kwargs


# Whole datasets


def _pack_table(
    dataset: datasets.Dataset,
    seq_length: int,
    strategy: str,
    seed: int | None,
    load_from_cache_file: bool | None = None,
    keep_in_memory: bool = False,
    cache_file_name: str | None = None,
    new_fingerprint: str | None = None,
) -> datasets.Dataset:
    arguments = {"seq_length": seq_length, "strategy": strategy, "seed": seed, "columns": dataset.column_names}
    features = _packed_features(dataset.features, strategy)
    fingerprint = new_fingerprint or update_fingerprint(dataset._fingerprint, "fastalign.pack_dataset", arguments)
    if load_from_cache_file is None:
        load_from_cache_file = datasets.is_caching_enabled()
    columns = _columns(dataset)
    is_large = sum(column.num_bytes for column in columns) > IN_MEMORY_BYTES
    if cache_file_name is None and dataset.cache_files and not keep_in_memory and is_large:
        cache_file_name = dataset._get_cache_file_path(fingerprint)
    if not (cache_file_name and load_from_cache_file and os.path.exists(cache_file_name)):
        plan = plan_packs(columns[0].lengths, seq_length, strategy, seed=seed)
        _report(plan, columns[0].lengths, strategy)
        batches = _packed_batches(columns, plan, features.arrow_schema)
        if cache_file_name:
            _write(batches, features.arrow_schema, cache_file_name)
    if cache_file_name and not keep_in_memory:
        table = MemoryMappedTable.from_file(cache_file_name)
    elif cache_file_name:
        table = InMemoryTable.from_file(cache_file_name)
    else:
        table = InMemoryTable(pa.Table.from_batches(list(batches), features.arrow_schema))
    info = dataset.info.copy()
    info.features = features
    packed = datasets.Dataset(table, info=info, split=dataset.split, fingerprint=fingerprint)
    return packed.with_format(**_format(dataset.format, strategy))


def _packed_features(features: datasets.Features, strategy: str) -> datasets.Features:
    if not features:
        raise ValueError("A dataset without columns cannot be packed.")
    if strategy == "wrapped":
        return features.copy()
    if "seq_lengths" in features:
        raise ValueError(
            "The dataset has a column `seq_lengths`: it is packed already. Drop the column to pack it again."
        )
    return datasets.Features(features | {"seq_lengths": SEQ_LENGTHS})


def _format(format: dict, strategy: str) -> dict:
    """Arguments of `with_format` for the packed dataset: `format`, with the new column where columns are named."""
    format = {**format, **format.get("format_kwargs", {})}
    format.pop("format_kwargs", None)
    if strategy != "wrapped" and format.get("columns") is not None:
        format["columns"] = [*format["columns"], "seq_lengths"]
    return format


def _report(plan: PackPlan, lengths: np.ndarray, strategy: str) -> None:
    logger.info(
        "Packed %d rows into %d of %d tokens, %.3f %% empty.", len(lengths), len(plan), plan.capacity, 100 * plan.waste
    )
    if strategy == "bfd" and (dropped := int(lengths.sum()) - plan.num_tokens):
        logger.warning(
            "Packing cut %d rows to %d tokens and dropped %d of %d tokens; the strategy 'bfd_split' keeps them all.",
            int((lengths > plan.capacity).sum()),
            plan.capacity,
            dropped,
            int(lengths.sum()),
        )


def _write(batches: Iterator[pa.RecordBatch], schema: pa.Schema, path: str) -> None:
    """Write an Arrow stream aside, then rename it, so that a half-written cache file is never read."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=folder, prefix="tmp-pack-")
    os.close(handle)
    try:
        with pa.OSFile(aside, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
    except BaseException:
        os.unlink(aside)
        raise
    umask = os.umask(0o666)
    os.umask(umask)
    os.chmod(aside, 0o666 & ~umask)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # renaming over a file would make ext4 write this one to the disk first
    os.replace(aside, path)


def _some_ahead(calls: Iterator[Callable[[], pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    """What the calls return, in their order; a few run in threads before their result is asked for."""
    with ThreadPoolExecutor(GATHERING_THREADS) as pool:
        running = deque(pool.submit(call) for call in islice(calls, 2 * GATHERING_THREADS))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(call) for call in islice(calls, 1))


# Columns and their rows


@dataclass
class ListColumn:
    """A chunked list column, with the place of each row in the chunks' values."""

    name: str
    type: pa.DataType
    chunks: list[pa.Array]  # values of each chunk
    chunk: np.ndarray  # (N,) int32, chunk of row r
    start: np.ndarray  # (N,) int64, first value of row r in its chunk
    lengths: np.ndarray  # (N,) int64

    @property
    def num_bytes(self) -> int:
        """Size of all rows' values (of strings and the like, an estimate)."""
        kind = self.type.value_type
        return int(self.lengths.sum()) * (kind.bit_width // 8 if pa.types.is_primitive(kind) else 16)

    def gather(self, row: np.ndarray, start: np.ndarray, length: np.ndarray) -> pa.Array:
        """Values of these pieces of rows, back to back."""
        chunk, start = self.chunk[row], self.start[row] + start
        if self._bytes is None:
            return self._take(chunk, start, length)
        out = np.empty(int(length.sum()), self._bytes[0].dtype if self._bytes else "V1")
        _native.gather(self._bytes, chunk, start, length, out)
        return pa.Array.from_buffers(self.type.value_type, len(out), [None, pa.py_buffer(out)])

    @cached_property
    def _bytes(self) -> list[np.ndarray] | None:
        """The values of each chunk as items of their width; None where they are not a plain run of bytes."""
        kind = self.type.value_type
        plain = pa.types.is_primitive(kind) and not pa.types.is_boolean(kind)
        if not plain or any(values.null_count for values in self.chunks):
            return None
        width = f"V{kind.bit_width // 8}"
        runs = [np.frombuffer(values.buffers()[1] or b"", width) for values in self.chunks]
        return [run[values.offset :][: len(values)] for run, values in zip(runs, self.chunks, strict=True)]

    def _take(self, chunk: np.ndarray, start: np.ndarray, length: np.ndarray) -> pa.Array:
        """The same for bits, strings and missing values."""
        first = np.cumsum([0, *(len(values) for values in self.chunks)])[chunk] + start  # in the chunks put together
        steps = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
        taken = pa.chunked_array(self.chunks, self.type.value_type).take(pa.array(np.repeat(first, length) + steps))
        return taken.combine_chunks() if taken.num_chunks != 1 else taken.chunk(0)


def _columns(dataset: datasets.Dataset) -> list[ListColumn]:
    """All columns of a dataset, rows in its order (after `select`, `shuffle`, ...)."""
    order = None if dataset._indices is None else dataset._indices.column(0).to_numpy()
    return _list_columns(dataset.data, order)


def _list_columns(table, order: np.ndarray | None = None) -> list[ListColumn]:
    columns = [_list_column(name, table.column(name), order) for name in table.column_names]
    for column in columns[1:]:
        different = np.flatnonzero(column.lengths != columns[0].lengths)
        if different.size:
            row = int(different[0])
            raise ValueError(
                f"All columns must have values of the same length: row {row} has {columns[0].lengths[row]} in "
                f"`{columns[0].name}` and {column.lengths[row]} in `{column.name}`."
            )
    return columns


def _list_column(name: str, column: pa.ChunkedArray, order: np.ndarray | None) -> ListColumn:
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise TypeError(f"Packing requires all columns to be lists, but `{name}` is {column.type}; remove the column.")
    if column.null_count:
        row = column.combine_chunks().is_null().index(True).as_py()
        raise ValueError(f"Column `{name}` has no value in row {row}; give every row a list or drop the row.")
    offsets = [chunk.offsets.to_numpy().astype(np.int64) for chunk in column.chunks]
    chunk = np.repeat(np.arange(column.num_chunks, dtype=np.int32), [len(chunk) for chunk in column.chunks])
    start = np.concatenate([bounds[:-1] for bounds in offsets] or [np.empty(0, np.int64)])
    lengths = np.concatenate([np.diff(bounds) for bounds in offsets] or [np.empty(0, np.int64)])
    if order is not None:
        chunk, start, lengths = chunk[order], start[order], lengths[order]
    return ListColumn(name, column.type, [chunk.values for chunk in column.chunks], chunk, start, lengths)


def _packed_batches(columns: list[ListColumn], plan: PackPlan, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The packed rows, in record batches of about TOKENS_PER_BATCH tokens."""
    packs_at_once = max(1, TOKENS_PER_BATCH // plan.capacity)
    pack_bounds = plan.pack_bounds

    def batch_from(first: int) -> pa.RecordBatch:
        last = min(len(plan), first + packs_at_once)
        pieces = slice(plan.packs[first], plan.packs[last])
        piece = plan.row[pieces], plan.start[pieces], plan.length[pieces]
        bounds = pack_bounds[first : last + 1] - pack_bounds[first]
        arrays = [_list_array(bounds, column.gather(*piece), column.type) for column in columns]
        if "seq_lengths" in schema.names:
            lengths = pa.array(piece[2].astype(np.int32))
            arrays.append(_list_array(plan.packs[first : last + 1] - pieces.start, lengths, pa.list_(pa.int32())))
        arrays = [array.cast(field.type) for array, field in zip(arrays, schema, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    return _some_ahead(partial(batch_from, first) for first in range(0, len(plan), packs_at_once))


def _list_array(bounds: np.ndarray, values: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_large_list(kind):
        return pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), values)
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), values)


# Streams


def _pack_stream(
    dataset: datasets.IterableDataset, seq_length, strategy, map_kwargs, seed
) -> datasets.IterableDataset:
    """Packs of windows of rows; the last pack of a window is as full as the window allows."""
    plan_packs([], seq_length, strategy, seed=seed)  # raises now, and not in the first step of training
    formatting = dataset._formatting
    format = {"type": formatting.format_type if formatting is not None else None}
    if dataset.features is not None:
        map_kwargs.setdefault("features", _packed_features(dataset.features, strategy))
    pack = partial(_pack_window, seq_length=seq_length, strategy=strategy, seed=seed)
    return dataset.with_format("arrow").map(pack, batched=True, **map_kwargs).with_format(**format)


def _pack_window(table: pa.Table, seq_length: int, strategy: str, seed: int | None) -> pa.Table:
    columns = _list_columns(table)
    fields = [pa.field(column.name, column.type) for column in columns]
    if strategy != "wrapped":
        fields.append(pa.field("seq_lengths", pa.list_(pa.int32())))
    plan = plan_packs(columns[0].lengths, seq_length, strategy, seed=seed)
    return pa.Table.from_batches(_packed_batches(columns, plan, pa.schema(fields)), pa.schema(fields))
