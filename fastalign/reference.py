"""The frozen side of a trainer: log-probabilities of a reference policy, at no second model's cost where possible."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, is_caching_enabled
from datasets.config import HF_DATASETS_CACHE
from fastalign_kernels.head.answers import Answers
from torch import Tensor, nn
from tqdm.auto import tqdm

from .adapters import is_peft_model
from .bema import BEMACallback, SyncRefModelCallback
from .config import arg
from .data.batch import TokenBatch
from .data.pair_batches import AnswerCollator
from .free_tokens import reading
from .loop.batching import batches_by_length, readable_rows
from .loop.distributed import is_fsdp, use_precision
from .loop.weights import content_hash
from .models import is_quantized
from .policy import token_stats
from .reference_models import adapter, copy_adapter, evaluating, prepare_reference, resolve_reference

logger = logging.getLogger(__name__)
CACHE_LAYOUT = 2  # counted up when the same model and data give other numbers
LEFT_OUT = ("_name_or_path", "base_model_name_or_path", "use_cache", "transformers_version")  # say nothing of numbers


@dataclass
class MovingReferenceArgs:
    """How the reference follows the policy."""

    sync_ref_model: bool = arg(False, "Move the reference towards the policy while training (arXiv:2404.09656).")
    ref_model_mixup_alpha: float = arg(0.6, "Share of the policy in the new reference when they are synchronised.")
    ref_model_sync_steps: int = arg(512, "Optimizer steps between two synchronisations.")
    kl_drift_bound: float = arg(
        1.0, "Nats per token, |log ratio| of answers to the reference on average, from which `kl_drift` is found."
    )

    def check_reference_args(self) -> None:
        """Refuse values that make no sense (ValueError)."""
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"`ref_model_mixup_alpha` is {self.ref_model_mixup_alpha}; it must be from 0 to 1.")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"`ref_model_sync_steps` is {self.ref_model_sync_steps}; it must be at least 1.")


@dataclass
class ReferenceArgs(MovingReferenceArgs):
    """Where the reference's log-probabilities come from."""

    precompute_ref_log_probs: bool = arg(
        False, "Compute the reference's log-probabilities once, before training, and keep them on disk."
    )
    precompute_ref_batch_size: int | None = arg(
        None, "Examples in a batch of that pass; unset: the batch size of training or evaluation."
    )

    def check_reference_args(self) -> None:
        """Refuse values that make no sense (ValueError)."""
        super().check_reference_args()
        if self.precompute_ref_batch_size is not None and self.precompute_ref_batch_size < 1:
            raise ValueError(
                f"`precompute_ref_batch_size` is {self.precompute_ref_batch_size}; it must be at least 1."
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "`sync_ref_model=True` changes the reference while training, so `precompute_ref_log_probs=True` would "
                "hold numbers of an old one. Set one of them to False."
            )


class Reference:
    """Log-probabilities of the frozen policy that a trainer compares with.

    `mode`: "adapter_off" (the model without its new adapter), "ref_adapter" (a frozen copy of the adapter that is
    trained further), "model" (a second model) or "cached" (columns of the dataset, no model while training).
    `columns` name what the cached mode keeps of each row, one for each answer in the order of the batch's sequences.
    """

    def __init__(self, trainer, source: str, model: nn.Module | None, columns: tuple[str, ...], content: str = ""):
        self.trainer, self.model, self.columns = trainer, model, columns
        self.mode = "cached" if content else source
        self._source, self._content = source, content  # what fills the cache, and a digest of its weights

    @classmethod
    def make(
        cls,
        trainer,
        ref_model,
        columns: tuple[str, ...] = ("ref_chosen_logps", "ref_rejected_logps"),
        *,
        has_new_adapter: bool = False,
        quantization_config=None,
    ) -> Reference:
        """The reference of a trainer that is set up, from its `ref_model` argument (None, a name or a model).

        Computes `columns` of its datasets under `precompute_ref_log_probs`, adds the callback of `sync_ref_model`.
        ValueError where `ref_model` is the trained model itself, and for adapters with `sync_ref_model`.
        """
        args, model = trainer.args, trainer.model
        source = "model"
        if is_peft_model(model) and ref_model is None:
            source = "adapter_off" if has_new_adapter else "ref_adapter"
        if args.sync_ref_model and is_peft_model(model):
            raise ValueError(
                "`sync_ref_model=True` is not supported with adapters: their reference is the model without the "
                "adapter, which nothing may change. Set it to False, or train all weights."
            )
        cached, sharded = getattr(args, "precompute_ref_log_probs", False), is_fsdp(trainer.accelerator)
        if cached and sharded and source != "model":
            raise ValueError(
                "`precompute_ref_log_probs=True` is not supported for adapters under FSDP, which shards the model "
                "when training starts. Set it to False: with adapters the reference needs no second model."
            )
        if source == "ref_adapter":
            copy_adapter(model)
        own = None
        if cached and source == "model" and ref_model is None and not sharded:
            source = "policy"  # it is still what training starts from
        elif source == "model":
            own = resolve_reference(trainer, ref_model, quantization_config)
        content = _content(model if own is None else own, source) if cached else ""
        reference = cls(trainer, source, None if own is None else prepare_reference(trainer, own), columns, content)
        if args.sync_ref_model:
            trainer.add_callback(SyncRefModelCallback(reference.model, trainer.accelerator))
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, BEMACallback):
                callback.ref_model = reference.model if reference.mode == "model" else None
        reference._complete_datasets()
        if cached and ref_model is None:
            reference.model = None
        return reference

    def logps(self, model: nn.Module, batch: TokenBatch, ld_alpha: float | None = None) -> Tensor:
        """(R,) fp64 (cached: fp32), one for each answer of `batch` as its `row` numbers them, in nats: sums, no graph.

        `ld_alpha`: LD-DPO's weight of the tokens beyond the shorter answer of a pair.
        """
        if self.mode != "cached":
            return answer_logps(batch, self.token_logps(model, batch), ld_alpha)
        if missing := [name for name in self.columns if name not in batch.extras]:
            raise ValueError(
                f"`precompute_ref_log_probs=True`, but the batch has no {', '.join(missing)}: prepare the dataset "
                "with the trainer, or let a collator of your own keep these columns."
            )
        return torch.stack([batch.extras[name].float() for name in self.columns], 1).flatten()

    def token_logps(self, model: Any, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
        """(N,) fp32 log-probabilities of the scored tokens, one forward without gradient; not from a cache."""
        with self.active(model) as reference, self.trainer.accelerator.autocast(), reading(batch):
            return token_stats(reference, batch, temperature=temperature).stats.logp

    @contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        """Inside, the reference is a model to call: the second one, or the policy with its adapter off or replaced."""
        if self._source == "model":
            assert self.model is not None
            yield self.model
            return
        inner = self.trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
        with evaluating(inner), adapter(inner, self._source):
            yield self.trainer.model

    # Cached log-probabilities

    def _complete_datasets(self) -> None:
        """Replace the trainer's datasets by ones with the columns."""
        trainer = self.trainer
        trainer.train_dataset = self.complete(trainer.train_dataset, "train")
        given = trainer.eval_dataset
        if isinstance(given, dict):
            trainer.eval_dataset = {name: self.complete(part, name) for name, part in given.items()}
        else:
            trainer.eval_dataset = self.complete(given, "eval")

    def complete(self, dataset, name: str):
        """`dataset` with `columns` under `precompute_ref_log_probs`: those it has, those on disk, or computed now.

        All ranks must call it. ValueError for a stream, and once the policy that was the reference has been trained.
        """
        if self.mode != "cached" or not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        if set(self.columns) <= {*(dataset.column_names or ())}:
            return dataset
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "`precompute_ref_log_probs=True` needs a dataset with a length, not a stream. Set it to False, or "
                f"bring the columns {', '.join(self.columns)}."
            )
        gone = self.trainer.state.global_step > 0 if self._source == "policy" else False
        if gone or (self._source == "model" and self.model is None):
            raise ValueError(
                "`precompute_ref_log_probs=True` without `ref_model`: the reference was the policy before training, "
                f"which is gone, so the {name} dataset cannot be scored now. Give it to the constructor as "
                "`eval_dataset`, or pass a `ref_model`."
            )
        file = self._file(dataset)
        own = isinstance(self.trainer.data_collator, AnswerCollator)  # what another makes of the rows may change
        values = np.load(file) if own and file.is_file() else None
        known = values is not None and values.shape == (len(dataset), len(self.columns))
        if not self._on_all_ranks(known) or values is None:
            self._move(self.trainer.args.device)
            values = self._compute(dataset, name)
            if own:
                self._write(file, values)
        self._move("cpu")  # it takes no part in training, but another dataset may need it
        for column, logps in zip(self.columns, values.T, strict=True):
            dataset = dataset.remove_columns([column]) if column in dataset.column_names else dataset
            dataset = dataset.add_column(column, logps)  # pyright: ignore
        return dataset

    def _move(self, device: torch.device | str) -> None:
        if self.model is not None and not is_fsdp(self.trainer.accelerator) and not is_quantized(self.model):
            self.model.to(device)

    def _on_all_ranks(self, known: bool) -> bool:
        """Whether every rank knows: machines may have caches of their own, and all ranks must compute together."""
        trainer = self.trainer
        if trainer.world == 1:
            return known
        return int(trainer._sum_over_ranks(torch.full((1,), int(known), device=trainer.args.device))) == trainer.world

    def _file(self, dataset: Dataset) -> Path:
        """Where these rows' log-probabilities under this model and these settings are kept."""
        args = self.trainer.args
        names = ("mixed_precision", "fp8", "ld_alpha", "max_length", "truncation_mode")
        settings = (CACHE_LAYOUT, self._source, self.columns, *(getattr(args, name, None) for name in names))
        key = hashlib.sha256(repr((dataset._fingerprint, self._content, settings)).encode()).hexdigest()[:32]
        return Path(HF_DATASETS_CACHE) / "fastalign_reference" / f"{key}.npy"

    def _write(self, file: Path, values: np.ndarray) -> None:
        if not (is_caching_enabled() and self.trainer.accelerator.is_local_main_process):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{self.trainer.rank}-{os.getpid()}")
        with part.open("wb") as stream:
            np.save(stream, values)
        os.replace(part, file)
        logger.info("Log-probabilities of the reference are kept in %s.", file)

    def _compute(self, dataset: Dataset, name: str) -> np.ndarray:
        """(rows, answers) fp32, every rank its share of batches of about equally long rows."""
        trainer, args = self.trainer, self.trainer.args
        use_precision(trainer)
        size = args.precompute_ref_batch_size
        size = size or (args.per_device_train_batch_size if name == "train" else args.per_device_eval_batch_size)
        lengths = trainer.example_lengths(dataset)
        batches = batches_by_length(lengths, args.token_budget, size, padded=not trainer.policy.flat)
        rounds = -(-len(batches) // trainer.world)  # every rank runs as many: FSDP gathers weights in each
        rows, collator = readable_rows(trainer, dataset, trainer.data_collator, name)
        found = torch.zeros(len(dataset), len(self.columns), device=args.device)
        options = {"unit": "row", "disable": args.disable_tqdm or trainer.rank > 0}
        with tqdm(total=len(dataset), desc=f"Reference log-probabilities of {name}", **options) as progress:
            for number in range(trainer.rank, rounds * trainer.world, trainer.world):
                chosen = batches[min(number, len(batches) - 1)]
                batch = trainer._prepare_inputs(collator(rows.__getitems__(chosen.tolist())))
                sums = answer_logps(batch, self.token_logps(trainer.model, batch), getattr(args, "ld_alpha", None))
                if number < len(batches):
                    found[torch.from_numpy(chosen).to(args.device)] = sums.view(len(chosen), -1).to(found)
                progress.update(len(chosen) * trainer.world)
        return (trainer._sum_over_ranks(found) if trainer.world > 1 else found).cpu().numpy()


def answer_logps(batch: TokenBatch, logp: Tensor, ld_alpha: float | None = None) -> Tensor:
    """(R,) sums of logp (N,) over each answer of `batch`; with `ld_alpha` its answers are pairs (LD-DPO)."""
    rows = batch.row if batch.host_row is None else batch.host_row
    per_group = 1 if ld_alpha is None else 2
    answers = Answers(logp[:, None], rows, batch.num_rows // per_group, per_group, False, None)
    if ld_alpha is not None:
        answers.fade_tails(ld_alpha)
    return answers.logps(logp, slice(None), slice(None), False)


def _content(model: Any, source: str) -> str:
    """Digest of what the log-probabilities of `model` depend on: its weights and config, those of its adapters."""
    adapters = getattr(model, "peft_config", {})
    skip = tuple(f".{name}" for name in adapters) if source == "adapter_off" else ()
    configs = [model.config] if source == "adapter_off" else [model.config, *(adapters[n] for n in sorted(adapters))]
    kept = [{k: v for k, v in c.to_dict().items() if k not in LEFT_OUT} for c in configs if hasattr(c, "to_dict")]
    said = json.dumps(kept, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    return hashlib.sha256(f"{content_hash(model, skip)} {said}".encode()).hexdigest()
