"""Datasets from wherever they are: a Hub name, a local folder, or jsonl, json, parquet, csv, text and arrow files."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset

BUILDERS = {  # file ending -> the loader of `datasets`
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

Columns = Sequence[str] | Mapping[str, str]


def load_rows(
    path: str,
    name: str | None = None,
    *,
    data_dir: str | None = None,
    data_files: Any = None,
    split: str | None = None,
    columns: Columns | None = None,
    streaming: bool = False,
) -> Any:
    """One split of a dataset, or a dict of all of them when `split` is None.

    `path`: a name on the Hub, a data file (or a pattern such as `data/*.jsonl`), a folder of files, or a folder made
    by `save_to_disk`. Files that `path` names are the split `train`. `columns`: the names to keep, or `{new: old}` to
    keep and rename, e.g. `{"prompt": "question", "completion": "answer"}`. ValueError for a file ending that is not
    known, a path that is not there, and a split or a column that the dataset does not have.
    """
    local = os.path.expanduser(path)
    if os.path.isfile(os.path.join(local, "state.json")) or os.path.isfile(os.path.join(local, "dataset_dict.json")):
        loaded = _from_disk(local, split, streaming)
    else:
        arguments: dict[str, Any] = {"path": path, "name": name, "data_dir": data_dir, "data_files": data_files}
        if files := _files(local, data_files):
            arguments = {"path": _builder(files), "data_files": {"train": files}}
            if files[0].split(".")[-1] == "tsv":
                arguments["sep"] = "\t"
        try:
            loaded = datasets.load_dataset(**arguments, split=split, streaming=streaming)
        except ValueError as error:
            raise ValueError(f"Cannot load split {split!r} of {path!r}: {error}") from error
    return loaded if columns is None else select_columns(loaded, columns, path)


def _files(path: str, data_files: Any) -> list[str]:
    """The data files that `path` itself names; empty if it is a folder or a name on the Hub."""
    if os.path.isfile(path):
        return [path]
    if any(mark in path for mark in "*?[") and data_files is None:
        files = sorted(glob.glob(path, recursive=True))
        if not files:
            raise ValueError(f"No file fits the pattern {path!r}.")
        return files
    looks_like_file = _ending(path) in BUILDERS or path.startswith(("/", "./", "../"))
    if looks_like_file and not os.path.isdir(path):
        folder = os.path.dirname(path) or "."
        names = os.listdir(folder) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(path), names, n=1)
        hint = f" Did you mean {os.path.join(folder, near[0])!r}?" if near else ""
        raise ValueError(f"There is no file or folder {path!r}.{hint}")
    return []


def _ending(path: str) -> str:
    root, ending = os.path.splitext(path)
    return os.path.splitext(root)[1] if ending in _COMPRESSED else ending


def _builder(files: list[str]) -> str:
    endings = {_ending(file) for file in files}
    builders = {BUILDERS.get(ending) for ending in endings}
    if len(builders) != 1 or None in builders:
        raise ValueError(
            f"Cannot read data files that end with {sorted(endings)}; allowed is one kind of {', '.join(BUILDERS)} "
            f"(also compressed: {', '.join(_COMPRESSED)})."
        )
    return str(builders.pop())


def _from_disk(path: str, split: str | None, streaming: bool) -> Any:
    loaded = datasets.load_from_disk(path)
    if isinstance(loaded, Dataset):
        loaded = DatasetDict({str(loaded.split or "train"): loaded})
    if split is not None and split not in loaded:
        raise ValueError(f"{path!r} has no split {split!r}; it has {', '.join(map(str, loaded))}.")
    if streaming:
        loaded = datasets.IterableDatasetDict({name: part.to_iterable_dataset() for name, part in loaded.items()})
    return loaded if split is None else loaded[split]


def select_columns(dataset: Any, columns: Columns, path: str = "given") -> Any:
    """The dataset (or each of its splits) with only `columns`: names, or `{new: old}` to rename as well."""
    if isinstance(dataset, dict):
        return type(dataset)({name: select_columns(part, columns, path) for name, part in dataset.items()})
    renames = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    assert isinstance(dataset, Dataset | IterableDataset)
    found = list(dataset.column_names or next(iter(dataset)))
    missing = [old for old in renames.values() if old not in found]
    if missing:
        raise ValueError(f"The dataset {path!r} has no column {missing}; it has {found}. Change `columns`.")
    if len({*renames.values()}) < len(renames):
        raise ValueError(f"`columns` takes one column of {path!r} twice: {renames}.")
    dataset = dataset.select_columns(list(renames.values()))
    changed = {old: new for new, old in renames.items() if new != old}
    return dataset.rename_columns(changed) if changed else dataset
