"""The innermost part of the loop: an epoch of optimizer steps, a step of micro-batches."""

from __future__ import annotations

import contextlib
import logging
from itertools import groupby

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from . import checkpoint, optimization
from .batching import batches_of_steps, knows_steps
from .model_inputs import count_tokens, flops_per_token
from .plan import TrainingPlan

logger = logging.getLogger(__name__)


def run_epoch(trainer, loader, plan: TrainingPlan, epoch: int, skip: int = 0, resumed: str | None = None) -> None:
    """One pass over the data, `skip` optimizer steps of which were done before the checkpoint `resumed`."""
    args, handler = trainer.args, trainer.callback_handler
    trainer.control = handler.on_epoch_begin(args, trainer.state, trainer.control)
    sampler = getattr(loader, "batch_sampler", None)
    _set_epoch(loader, epoch)
    if knows_steps(sampler):
        sampler.seek(epoch, skip)  # pyright: ignore[reportOptionalMemberAccess]
    if resumed is not None and skip == 0:
        checkpoint.load_rng_state(trainer, resumed)  # the checkpoint is older than the draw that the next line makes
    iterator = iter(loader)
    done = skip * args.gradient_accumulation_steps
    if not knows_steps(sampler):
        for _ in range(done):
            next(iterator, None)
    if resumed is not None and skip > 0:
        checkpoint.load_rng_state(trainer, resumed)
    for batches, nominal in batches_of_steps(iterator, sampler, args.gradient_accumulation_steps):
        done += nominal
        run_step(trainer, batches, epoch + done / plan.batches_per_epoch)
        if trainer.control.should_epoch_stop or trainer.control.should_training_stop:
            break
    if done == 0 and trainer.state.global_step == 0:
        raise ValueError(
            "The training data gave no batch. If it is a stream, its rows were all dropped or filtered out: raise "
            "`max_length`, or check the filters and masks."
        )
    if done == 0:
        logger.warning("The data gave no batch in epoch %d: training stops at %d.", epoch, trainer.state.global_step)
        trainer.control.should_training_stop = True
    trainer.control = handler.on_epoch_end(args, trainer.state, trainer.control)
    trainer._log_evaluate_save()


def _set_epoch(loader, epoch: int) -> None:
    sampler = getattr(loader, "batch_sampler", None)
    for part in (loader, getattr(loader, "dataset", None), sampler, getattr(sampler, "sampler", None)):
        if part is not None and hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def run_step(trainer, batches: list, epoch: float) -> None:
    """One step: its optimizer updates, schedule, log. Batches that name another `step` are an update of their own."""
    args, accelerator, handler = trainer.args, trainer.accelerator, trainer.callback_handler
    updates = [list(part) for _, part in groupby(batches, key=lambda batch: id(getattr(batch, "step", None)))]
    for update in updates:
        if not run_update(trainer, update, 1 / len(updates)):
            return
    trainer.window.learning_rate = optimization.learning_rate(trainer)
    waits = isinstance(trainer.lr_scheduler, optimization.WAITS_FOR_METRICS)
    if not accelerator.optimizer_step_was_skipped and not waits:
        trainer.lr_scheduler.step()
    trainer.state.global_step += 1
    trainer.state.epoch = epoch
    trainer.control = handler.on_step_end(args, trainer.state, trainer.control)
    trainer._log_evaluate_save()


def run_update(trainer, batches: list, share: float = 1.0) -> bool:
    """Forward and backward of micro-batches, clip, update; False if a callback stopped it. `share` of the step."""
    args, handler = trainer.args, trainer.callback_handler
    loss = accumulate_gradients(trainer, batches)
    if loss is None:
        return False
    trainer.window.grad_norm = optimization.clip_gradients(trainer, trainer.model_wrapped)
    refuse_non_finite(trainer, loss)
    trainer.window.loss += loss * share
    trainer.control = handler.on_pre_optimizer_step(args, trainer.state, trainer.control)
    trainer.optimizer.step()
    trainer.control = handler.on_optimizer_step(args, trainer.state, trainer.control)
    trainer.model_wrapped.zero_grad()
    return True


def accumulate_gradients(trainer, batches: list) -> Tensor | None:
    """Add up the gradients of a step; returns its loss, 0-dim, or None (none are left) if a callback stopped it."""
    model, accelerator, handler = trainer.model_wrapped, trainer.accelerator, trainer.callback_handler
    trainer.current_gradient_accumulation_steps = len(batches)
    num_items, shares = num_items_in_step(trainer, batches), mean_shares(trainer, batches)
    always_sync = accelerator.distributed_type == DistributedType.DEEPSPEED
    always_sync = always_sync or accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    loss = torch.zeros((), device=trainer.args.device)
    for i, inputs in enumerate(batches):
        last = i == len(batches) - 1
        accelerator.gradient_state._set_sync_gradients(last)
        if i == 0:
            trainer.control = handler.on_step_begin(trainer.args, trainer.state, trainer.control)
        _set_training_mode(trainer)
        with contextlib.nullcontext() if last or always_sync else accelerator.no_sync(model):
            trainer._loss_share = shares[i]
            loss += trainer.training_step(model, inputs, num_items)
        _count_inputs(trainer, inputs)
        if not last:
            trainer.control = handler.on_substep_end(trainer.args, trainer.state, trainer.control)
            if trainer.control.should_epoch_stop or trainer.control.should_training_stop:
                model.zero_grad()
                return None
    return loss


def _set_training_mode(trainer) -> None:
    """Back to training: a callback may have evaluated or generated since the last micro-batch."""
    if not (trainer.model.training and trainer.model_wrapped.training):
        trainer.model_wrapped.train()
    if callable(getattr(trainer.optimizer, "train", None)):
        trainer.optimizer.train()


def num_items_in_step(trainer, batches: list) -> int | Tensor | None:
    """Scored tokens of the step, over all ranks (then 0-dim on the device) if `average_tokens_across_devices`."""
    counts = [trainer.num_items(batch) for batch in batches]
    if any(count is None for count in counts):
        return None
    if trainer.world == 1 or not trainer.args.average_tokens_across_devices:
        return sum(counts)
    return trainer._sum_over_ranks(torch.full((1,), sum(counts), device=trainer.args.device))[0]


def mean_shares(trainer, batches: list) -> list[float]:
    """Weight of each micro-batch's mean loss: equal, or by sequences where the token budget makes them differ."""
    if trainer.args.token_budget is None:
        return [1 / len(batches)] * len(batches)
    rows = [batch.num_rows for batch in batches]
    return [n / sum(rows) for n in rows]


def refuse_non_finite(trainer, loss: Tensor) -> None:
    """Stop before a loss or gradient that is not finite reaches the weights: one sync per step.

    fp16 is exempt (its scaler skips such steps). `logging_nan_inf_filter=False` trains on and logs what comes.
    """
    if trainer.accelerator.scaler is not None or not trainer.args.logging_nan_inf_filter:
        return
    if torch.isfinite(trainer.window.grad_norm + loss).item():
        return
    trainer.model_wrapped.zero_grad()
    step = trainer.state.global_step
    raise FloatingPointError(
        f"Step {step + 1}: the loss ({loss.item():g}) or the gradient norm ({trainer.window.grad_norm.item():g}) is "
        f"not finite. The weights are unchanged, those of step {step}; last checkpoint: "
        f"{checkpoint.find_last_checkpoint(trainer.args.output_dir) or 'none'}. Lower learning_rate, look for broken "
        "examples in this step, train in bf16 or fp32, or set logging_nan_inf_filter=False to train on."
    )


def _count_inputs(trainer, inputs) -> None:
    tokens, positions = count_tokens(trainer, inputs)
    if trainer.args.include_num_input_tokens_seen != "no":
        trainer.metrics.count("num_input_tokens_seen", tokens, logged=False)
    trainer.metrics.count("total_flos", flops_per_token(trainer.model) * positions, logged=False)
