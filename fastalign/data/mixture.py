"""Mixtures of datasets, as the command line and YAML files describe them."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, field, fields
from typing import Any

import datasets
from datasets import DatasetDict, IterableDatasetDict

from .load import load_rows

logger = logging.getLogger(__name__)


@dataclass
class DatasetConfig:
    """One dataset of a mixture; the fields are arguments of `fastalign.data.load.load_rows`.

    `columns` may also rename: `{new: old}`. `fraction` is the dataset's share of the rows of the mixture, given for
    all datasets or for none (then every row of each is taken); shares are scaled to sum to one, and the mixture is as
    large as it can be without taking a row twice. The first rows of each dataset are taken.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | dict[str, str] | None = None
    fraction: float | None = None


@dataclass
class DatasetMixtureConfig:
    """A mixture of datasets."""

    datasets: list[DatasetConfig] = field(
        default_factory=list,
        metadata={"help": "The datasets of the mixture: path, name, data_dir, data_files, split, columns, fraction."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the datasets as streams."})
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Share (or number, if 1 or more) of the rows to hold out as split `test`; None: none."},
    )

    def __post_init__(self) -> None:
        self.datasets = [_dataset_config(entry) if isinstance(entry, dict) else entry for entry in self.datasets]


def _dataset_config(entry: dict[str, Any]) -> DatasetConfig:
    known = [f.name for f in fields(DatasetConfig)]
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"A dataset of the mixture has the field {key!r}{hint} Allowed are {', '.join(known)}.")
    if "path" not in entry:
        raise ValueError(f"A dataset of the mixture has no `path`: {entry}.")
    return DatasetConfig(**entry)


def get_dataset(mixture_config: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """Load and join the datasets of a mixture: split `train`, and `test` where `test_split_size` is set.

    ValueError for an empty mixture, for shares that are not given to all, not positive in sum, or set for streams.
    """
    entries = mixture_config.datasets
    if not entries:
        raise ValueError("`datasets` of the mixture is empty; give at least one entry with a `path`.")
    _check(mixture_config)
    parts = []
    for entry in entries:
        logger.info("Loading dataset %s (name %s, split %s).", entry.path, entry.name, entry.split)
        part = load_rows(
            entry.path,
            entry.name,
            data_dir=entry.data_dir,
            data_files=entry.data_files,
            split=entry.split,
            columns=entry.columns,
            streaming=mixture_config.streaming,
        )
        parts.append(part)
    if entries[0].fraction is not None:
        shares = [float(entry.fraction or 0.0) for entry in entries]
        weights = [share / sum(shares) for share in shares]
        total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True) if weight > 0)
        parts = [part.select(range(round(w * total))) for part, w in zip(parts, weights, strict=True)]
    joined = datasets.concatenate_datasets(parts)
    if mixture_config.streaming:
        return IterableDatasetDict({"train": joined})
    logger.info("The mixture has %d rows.", len(joined))
    if mixture_config.test_split_size is None:
        return DatasetDict({"train": joined})
    return joined.train_test_split(test_size=mixture_config.test_split_size)


def _check(config: DatasetMixtureConfig) -> None:
    fractions = [entry.fraction for entry in config.datasets]
    given = [fraction for fraction in fractions if fraction is not None]
    if config.streaming and config.test_split_size is not None:
        raise ValueError(
            "`test_split_size` cannot be used with `streaming`: a stream has no length. Give a test split."
        )
    if not given:
        return
    if len(given) != len(fractions):
        raise ValueError(f"`fraction` must be given for all datasets of the mixture or for none; found {fractions}.")
    if config.streaming:
        raise ValueError("`fraction` cannot be used with `streaming`: a stream has no length.")
    if min(given) < 0 or sum(given) <= 0:
        raise ValueError(f"`fraction` must not be negative, and one must be above 0; found {fractions}.")
