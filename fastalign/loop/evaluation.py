"""Evaluation and prediction: losses, metrics, logits, over several sets and all ranks."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer, find_batch_size, nested_detach
from transformers.trainer_utils import (
    EvalLoopOutput,
    denumpify_detensorize,
    has_length,
    speed_metrics,
)

from ..data.batch import TokenBatch
from .batching import StepSampler, make_loader, reads_arrow
from .distributed import is_fsdp, prepare_model, use_precision
from .model_inputs import labels_of
from .optimization import watched_metric


def eval_loader(trainer, dataset, wants_logits: bool):
    """The loader of an evaluation set. Logits are wanted of padded rows, unless the rows are packed."""
    loaders, key = trainer._eval_loaders, (id(dataset), wants_logits)
    if key in loaders:
        return loaders[key][0]
    collator = trainer.data_collator
    packed = "seq_lengths" in (getattr(dataset, "column_names", None) or ())
    if wants_logits and reads_arrow(collator) and collator.flat and not packed:
        collator = copy.copy(collator)
        collator.flat = False
    gathered = wants_logits or bool(trainer.args.include_for_metrics)  # then all ranks' batches must be of one size
    size = trainer.args.eval_batch_size
    loader = make_loader(trainer, dataset, size, training=False, collator=collator, repeat=gathered)
    if trainer.args.dataloader_persistent_workers:
        loaders[key] = loader, dataset  # which keeps its id from being given to another
    return loader


def timed_loop(trainer, loader, loss_only: bool | None, ignore_keys, prefix: str) -> EvalLoopOutput:
    """`evaluation_loop`, with speed among its metrics."""
    start = time.time()
    output = evaluation_loop(trainer, loader, loss_only, ignore_keys, prefix)
    num_steps = math.ceil(output.num_samples / (trainer.args.eval_batch_size * trainer.world))
    speed = speed_metrics(prefix, start, num_samples=output.num_samples, num_steps=num_steps)
    return output._replace(metrics=(output.metrics or {}) | speed)


def evaluation_loop(trainer, loader, loss_only: bool | None, ignore_keys, prefix: str) -> EvalLoopOutput:
    """Run over `loader` without gradients.

    The loss is transformers': the mean over examples of their batch's loss. Rows that are taken once more, so that all
    ranks have equally many batches, count nowhere (transformers' count in the loss of their batch). Everything else
    goes through `trainer.prediction_step` and `trainer.compute_metrics`.
    """
    args = trainer.args
    loss_only = args.prediction_loss_only if loss_only is None else loss_only
    model = _ready_for_evaluation(trainer)
    trainer.callback_handler.eval_dataloader = loader
    was_training, trainer.metrics.training = trainer.metrics.training, False
    kept = _Kept(trainer, prefix)
    sums = torch.zeros(2, dtype=trainer.metrics.dtype, device=args.device)  # loss * examples, examples
    has_loss, num_seen = False, 0
    for number, (inputs, last) in enumerate(_mark_last(loader)):
        counts = _examples_per_rank(trainer, loader, number, inputs)
        num_seen += sum(counts)
        trainer.metrics.muted = not counts[trainer.rank]
        loss, logits, labels = trainer.prediction_step(model, inputs, loss_only, ignore_keys=ignore_keys)
        if loss is not None:
            has_loss = True
            sums += torch.stack(
                [loss.to(sums) * counts[trainer.rank], torch.ones_like(sums[0]) * counts[trainer.rank]]
            )
        held = _held(loader, counts)
        kept.add(loss, logits, labels, inputs, counts, held, last)
        if args.eval_accumulation_steps and (number + 1) % args.eval_accumulation_steps == 0:
            kept.to_cpu()
        trainer.control = trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
    trainer.metrics.muted = False
    if trainer.world > 1:
        sums = trainer._sum_over_ranks(sums)
    total, examples = sums.tolist()
    metrics = kept.metrics()
    if has_loss:
        metrics["loss"] = total / max(examples, 1.0)
    if hasattr(trainer, "model_preparation_time"):
        metrics["model_preparation_time"] = trainer.model_preparation_time
    metrics |= {name: value for name, value in trainer.metrics.collect().items() if name not in metrics}
    trainer.metrics.training = was_training
    metrics = {k if k.startswith(f"{prefix}_") else f"{prefix}_{k}": v for k, v in metrics.items()}
    dataset = getattr(loader, "dataset", None)
    num_samples = len(dataset) if has_length(dataset) else num_seen
    predictions, label_ids = kept.arrays()
    return EvalLoopOutput(predictions=predictions, label_ids=label_ids, metrics=metrics, num_samples=num_samples)


def _ready_for_evaluation(trainer):
    args, accelerator = trainer.args, trainer.accelerator
    use_precision(trainer)
    if not accelerator._models and trainer.model_wrapped is trainer.model:
        start = time.time()
        if is_fsdp(accelerator):
            prepare_model(trainer)
        else:
            trainer.model_wrapped = accelerator.prepare_model(trainer.model, evaluation_mode=True)
        trainer.model_preparation_time = round(time.time() - start, 4)
    model = trainer.model_wrapped
    if not trainer.is_in_train and (args.fp16_full_eval or args.bf16_full_eval):
        model = model.to(dtype=torch.float16 if args.fp16_full_eval else torch.bfloat16, device=args.device)
    model.eval()
    if callable(getattr(trainer.optimizer, "eval", None)):
        trainer.optimizer.eval()
    return model


def _mark_last(loader) -> Iterator[tuple[Any, bool]]:
    """(batch, whether it is the last)."""
    iterator = iter(loader)
    current = next(iterator, None)
    while current is not None:
        following = next(iterator, None)
        yield current, following is None
        current = following


def _examples_per_rank(trainer, loader, number: int, inputs: Any) -> list[int]:
    """How many examples of the set each rank's batch `number` holds, repeated ones not counted."""
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, StepSampler):
        size = sampler.batch_size
        starts = [(number * sampler.world + rank) * size for rank in range(sampler.world)]
        return [min(max(sampler.num_rows - start, 0), size) for start in starts]
    if isinstance(inputs, TokenBatch):  # of pairs and the like an example has several sequences
        size = inputs.num_rows // max(len(getattr(trainer.data_collator, "answers", ())), 1)
    else:
        size = find_batch_size(inputs)
    return [size or trainer.args.eval_batch_size] * trainer.world


def _held(loader, counts: list[int]) -> int:
    """How many examples each rank's batch has, those that only fill it up included."""
    sampler = getattr(loader, "batch_sampler", None)
    return sampler.batch_size if isinstance(sampler, StepSampler) and sampler.world > 1 else max(counts)


def predict_batch(trainer, model, inputs: Any, loss_only: bool, ignore_keys=None):
    """(loss, logits, labels) of one batch, each None where there is none; logits (B, L, V) of token batches."""
    inputs = trainer._prepare_inputs(inputs)
    if isinstance(inputs, TokenBatch):
        return _predict_tokens(trainer, model, inputs, loss_only)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        labels = tuple(inputs.get(name) for name in trainer.label_names)
        has_labels = bool(labels) and all(label is not None for label in labels)
        loss, outputs = None, None
        if has_labels:
            loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
            loss = loss.detach().mean()
        else:
            outputs = model(**inputs)
    if loss_only:
        return loss, None, None
    config = getattr(trainer.model, "config", None)
    ignored = ignore_keys or getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
    if isinstance(outputs, dict):
        logits = tuple(value for name, value in outputs.items() if name not in [*ignored, "loss"])
    else:
        logits = outputs[1:] if has_labels else outputs
    logits, labels = nested_detach(logits), nested_detach(labels) if has_labels else None
    return loss, _single(logits), _single(labels)


def _predict_tokens(trainer, model, inputs: TokenBatch, loss_only: bool):
    with torch.no_grad(), trainer.compute_loss_context_manager():
        if loss_only:
            return trainer.compute_loss(model, inputs).detach(), None, None
        loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    return loss.detach(), logits.detach().view(-1, *logits.shape[-2:]), labels_of(inputs)


def _single(values):
    return values[0] if values is not None and len(values) == 1 else values


class _Kept:
    """Losses, predictions, labels and inputs of an evaluation, gathered over ranks, for `compute_metrics`."""

    def __init__(self, trainer, prefix: str):
        self.trainer = trainer
        together = trainer.args.eval_do_concat_batches
        self.parts = {
            n: EvalLoopContainer(together, padding_index=-100) for n in ("loss", "logits", "labels", "inputs")
        }
        self.wanted = trainer.args.include_for_metrics
        self.in_batches = trainer.args.batch_eval_metrics and trainer.compute_metrics is not None
        self.of_batches: dict[str, float] = {}

    def add(self, loss, logits, labels, inputs: Any, counts: list[int], held: int, last: bool) -> None:
        """Take over one batch; with `batch_eval_metrics` hand it to `compute_metrics` at once.

        Each rank's batch has `held` examples, of which the first `counts[rank]` are no repetitions.
        """
        if logits is None and not self.wanted:
            return
        flat = isinstance(inputs, TokenBatch) and not inputs.is_padded
        rows = None if flat else (counts, held)
        name = getattr(self.trainer.model, "main_input_name", "input_ids")
        given = inputs.input_ids if isinstance(inputs, TokenBatch) else inputs.get(name)
        values = {"labels": self._pad(labels), "logits": self._pad(logits)}
        if "loss" in self.wanted and loss is not None:
            values["loss"] = loss.repeat(held)
        if "inputs" in self.wanted:
            values["inputs"] = self._pad(given)
        if logits is not None and self.trainer.preprocess_logits_for_metrics is not None:
            values["logits"] = self.trainer.preprocess_logits_for_metrics(values["logits"], values["labels"])
        values = {key: self._gather(value, rows) for key, value in values.items()}
        if self.in_batches and logits is not None and labels is not None:
            self.of_batches = self._compute(values, compute_result=last)
            return
        for key, value in values.items():
            if value is not None:
                self.parts[key].add(value)

    def _pad(self, value):
        if value is None or self.trainer.world == 1:
            return value
        value = self.trainer._prepare_inputs(value)
        return self.trainer.accelerator.pad_across_processes(value, dim=1, pad_index=-100)

    def _gather(self, value, rows: tuple[list[int], int] | None):
        if value is None or self.trainer.world == 1:
            return value
        value = self.trainer.accelerator.gather(value)
        by_answer = getattr(self.trainer, "predicts_answer_by_answer", False)
        return value if rows is None else _without_repeated(value, *rows, by_answer)

    def to_cpu(self) -> None:
        """Move what is kept to the host."""
        for part in self.parts.values():
            part.to_cpu_and_numpy()

    def arrays(self) -> tuple:
        """(predictions, labels) on the host."""
        return self.parts["logits"].get_arrays(), self.parts["labels"].get_arrays()

    def metrics(self) -> dict[str, float]:
        """What `compute_metrics` makes of everything."""
        if self.in_batches:
            return _plain(self.of_batches)
        values = {key: part.get_arrays() for key, part in self.parts.items()}
        if self.trainer.compute_metrics is None or values["logits"] is None or values["labels"] is None:
            return {}
        return _plain(self._compute(values))

    def _compute(self, values: dict, **kwargs) -> dict[str, float]:
        prediction = EvalPrediction(
            predictions=values["logits"],
            label_ids=values["labels"],
            inputs=values.get("inputs"),
            losses=values.get("loss"),
        )
        return self.trainer.compute_metrics(prediction, **kwargs)


def _plain(metrics: dict) -> dict[str, Any]:
    """Numbers instead of arrays and tensors."""
    return dict(denumpify_detensorize(metrics))  # pyright: ignore


def _without_repeated(value, counts: list[int], held: int, by_answer: bool):
    """The rows of the first `counts[r]` of each rank's `held` examples, K rows each.

    They lie one example after the other; `by_answer`: the first rows of all examples of a rank, then the second ones.
    Values that have no rows for each example are left as they are.
    """
    if not isinstance(value, Tensor):
        return type(value)(_without_repeated(part, counts, held, by_answer) for part in value)
    if value.shape[0] % (len(counts) * held):
        return value
    parts = []
    for count, part in zip(counts, value.chunk(len(counts)), strict=True):
        first = part.unflatten(0, (-1, held))[:, :count] if by_answer else part.unflatten(0, (held, -1))[:count]
        parts.append(first.flatten(0, 1))
    return torch.cat(parts)


def note_best(args, state, metrics: dict[str, float]) -> bool:
    """Whether this evaluation is the best so far by `metric_for_best_model`; then `state` remembers it."""
    if args.metric_for_best_model is None:
        return False
    value = watched_metric(args, metrics)
    better = np.greater if args.greater_is_better else np.less
    if state.best_metric is not None and not better(value, state.best_metric):
        return False
    if state.best_metric is None and math.isnan(value):
        return False
    state.best_metric = value
    if args.save_strategy != "no":
        state.best_global_step = state.global_step
    return True
