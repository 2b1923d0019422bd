"""The training loop: micro-batches, clip, step, schedule, log, evaluate, save."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import DistributedType, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import (
    PredictionOutput,
    SaveStrategy,
    TrainerMemoryTracker,
    TrainOutput,
    compare_trainer_and_checkpoint_args,
    enable_full_determinism,
    find_executable_batch_size,
    set_seed,
    unwrap_peft_model,
)
from transformers.training_args import OptimizerNames
from transformers.utils.generic import find_labels

from ..config import AlignConfig
from ..data.batch import TokenBatch
from ..metrics import Metrics
from . import checkpoint, evaluation, hub, optimization, reporting, steps
from .arguments import check_arguments, check_inputs, warn_of_unused_hooks
from .batching import list_lengths, make_loader
from .checkpoint_files import rotate
from .distributed import make_accelerator, prepare_model, use_precision
from .health import Health
from .model_inputs import accepts_loss_kwargs, count_items, default_collator, model_loss, signature_columns
from .model_setup import place_model, ready_for_training
from .offload import offload_activations
from .outputs import RunOutputs
from .plan import TrainingPlan, plan_training, starting_batch_size
from .window import LoggingWindow

logger = logging.getLogger(__name__)


class Trainer(RunOutputs):
    """Trains a model: the contract of `transformers.Trainer` (arguments, callbacks, state, files) on our own loop.

    Algorithms override `compute_loss`. With `loss_is_normalized` it divides by `num_items_in_batch`, the scored tokens
    of the whole step; if `average_tokens_across_devices` these are those of all ranks, and it multiplies by the number
    of ranks, over which gradients are averaged. Without, it returns the mean over the micro-batch, and the loop
    averages the micro-batches.
    """

    loss_is_normalized: bool = True

    def __init__(
        self,
        model: nn.Module,
        args: AlignConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_loss_func=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        optimizer_cls_and_kwargs=None,
        preprocess_logits_for_metrics=None,
    ):
        args = AlignConfig("trainer_output") if args is None else args
        check_arguments(args)
        self.args = args
        enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
        self._memory_tracker = TrainerMemoryTracker(args.skip_memory_metrics)
        self._memory_tracker.start()
        transformers.logging.set_verbosity(args.get_process_log_level())
        self.accelerator = make_accelerator(args)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.model: Any = place_model(model, args, self.accelerator)
        self.model_wrapped: Any = self.model
        self.data_collator = default_collator(processing_class) if data_collator is None else data_collator
        self.train_dataset: Any = train_dataset
        self.eval_dataset: Any = eval_dataset
        self.processing_class = processing_class
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        check_inputs(self)
        warn_of_unused_hooks(type(self), Trainer)
        self.label_names = (
            find_labels(type(unwrap_peft_model(self.model))) if args.label_names is None else args.label_names
        )
        self.model_accepts_loss_kwargs = accepts_loss_kwargs(self.model)
        self.label_smoother = LabelSmoother(args.label_smoothing_factor) if args.label_smoothing_factor else None
        self.metrics = Metrics(args.device, self._sum_over_ranks if self.world > 1 else None, self.rank, self.world)
        self.health = Health(self)
        self._signature_columns: list[str] | None = None
        self._eval_loaders: dict[tuple[int, bool], tuple] = {}
        self._ignore_keys = None
        self.current_batch = None  # the micro-batch in the model, while training
        self._loss_share = 1.0  # its weight in the step, where losses are means
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        self._train_batch_size = args.train_batch_size
        self._created_lr_scheduler = False
        self.is_in_train = False
        self.hub_model_id: str | None = None
        self.control = TrainerControl()
        self.callback_handler = reporting.make_callbacks(self, callbacks)
        self.state = self._new_state()
        if args.push_to_hub:
            hub.init_repo(self)
        if args.should_save:
            os.makedirs(self.args.output_dir, exist_ok=True)
        self.control = self.callback_handler.on_init_end(args, self.state, self.control)
        if getattr(self.model, "config", None) is not None:
            self.model.config.use_cache = args.use_cache
        self._memory_tracker.stop_and_update_metrics()

    # Data

    def get_train_dataloader(self):
        """The loader of this rank's micro-batches; override it to bring your own (already sharded over ranks)."""
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset.")
        return make_loader(self, self.train_dataset, self._train_batch_size, training=True)

    def get_eval_dataloader(self, eval_dataset=None):
        """The loader of this rank's evaluation batches, in the order of the dataset (a name picks one of several)."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Evaluation needs an eval_dataset.")
        return evaluation.eval_loader(
            self, dataset, self.compute_metrics is not None and not self.args.prediction_loss_only
        )

    def get_test_dataloader(self, test_dataset):
        """The loader that `predict` uses."""
        return evaluation.eval_loader(self, test_dataset, not self.args.prediction_loss_only)

    def example_lengths(self, dataset) -> np.ndarray:
        """Tokens of each row, (rows,) int64; read by `group_by_length`, `batch_rebalance` and `token_budget`."""
        name = self.args.length_column_name
        if name in (getattr(dataset, "column_names", None) or ()):
            return np.asarray(dataset[name], dtype=np.int64)
        return list_lengths(dataset)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = signature_columns(self.model, self.label_names)

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make `self.optimizer` unless it was given."""
        if self.optimizer is None:
            self.optimizer = optimization.create_optimizer(self, self.model if model is None else model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Make `self.lr_scheduler` unless it was given."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = optimization.create_scheduler(self.args, optimizer, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Make both."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """Train; returns TrainOutput(global_step, training_loss, metrics).

        `resume_from_checkpoint`: a folder, or True for the last complete one in `output_dir`. Raises ValueError if
        there is none, FloatingPointError before the first update whose loss or gradient is not finite, HealthError
        after a run that a finding of `stop_on_health` stopped: its log is written, and a checkpoint if any are.
        """
        if trial is not None:
            raise NotImplementedError("hyperparameter_search (trial) is not supported: start one run per setting.")
        self._memory_tracker.start()
        use_precision(self)
        wish = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        wish = {"true": True, "false": False}.get(str(wish).lower(), wish)
        path = checkpoint.checkpoint_to_resume(self, wish)
        size = starting_batch_size(self.args, self._train_batch_size, path)
        run: Any = find_executable_batch_size(self._inner_training_loop, size, self.args.auto_find_batch_size)
        self.is_in_train = True
        try:
            with ready_for_training(self), hub.quiet_uploads(self.args):
                return run(path=path, ignore_keys=ignore_keys_for_eval)
        finally:
            self.is_in_train = False

    def _inner_training_loop(self, batch_size: int, path: str | None, ignore_keys) -> TrainOutput:
        self._train_batch_size = batch_size
        self._ignore_keys = ignore_keys
        loader = self.get_train_dataloader()
        plan = plan_training(self.args, loader, batch_size, self.world)
        self._begin(plan, loader, path)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.health.begin()
        if self.args.eval_on_start:
            self._evaluate(step_schedule=False)
        first, skip = plan.position(self.state, self.args.gradient_accumulation_steps)
        for epoch in range(first, plan.num_epochs):
            if self.control.should_training_stop or self.state.global_step >= plan.max_steps:
                break  # the data are bad, or the checkpoint is that of a finished run
            resumed = path if epoch == first else None
            steps.run_epoch(
                self, loader, plan, epoch, skip if resumed and not self.args.ignore_data_skip else 0, resumed
            )
            if self.control.should_training_stop:
                break
        metrics = self.window.finish(self.metrics, self.state.global_step, plan)
        reporting.update_counted_state(self)
        self._memory_tracker.stop_and_update_metrics(metrics)
        self.log(metrics)
        return self._end(metrics)

    def _begin(self, plan: TrainingPlan, loader, path: str | None) -> None:
        """Fresh state, wrapped model, optimizer and schedule; then whatever the checkpoint at `path` holds."""
        self.state = self._new_state()
        self.state.train_batch_size = self._train_batch_size
        self.state.compute_steps(self.args, plan.max_steps)
        self.metrics.reset()
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        prepare_model(self)
        self.create_scheduler(plan.max_steps)
        self.window = LoggingWindow(self.args.device)
        if path is not None:
            checkpoint.load_checkpoint(self, path)
            reporting.restore_counters(self)
            compare_trainer_and_checkpoint_args(self.args, self.state)  # warns of other batch sizes and intervals
        self.state.max_steps, self.state.num_train_epochs = plan.max_steps, plan.num_epochs
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.window.begin(self.state.global_step)
        self._initial_tokens = self.state.num_input_tokens_seen
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        handler.train_dataloader = loader
        self.model_wrapped.zero_grad()
        logger.info("Training: %s", plan)

    def training_step(self, model: nn.Module, inputs, num_items_in_batch=None) -> Tensor:
        """Forward and backward of one micro-batch; returns its share of the step's loss, 0-dim, detached."""
        self.current_batch = inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        del inputs
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        if not (self.loss_is_normalized and num_items_in_batch is not None) and self.compute_loss_func is None:
            loss = loss * self._loss_share
        kwargs: dict[str, Any] = {}
        if self.args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
            kwargs["learning_rate"] = optimization.learning_rate(self)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            kwargs["scale_wrt_gas"] = False
        self.accelerator.backward(loss, **kwargs)
        return loss.detach()

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None) -> Any:
        """The loss of a micro-batch, 0-dim; here the model's own on dictionaries, algorithms override it."""
        if isinstance(inputs, TokenBatch):
            raise TypeError(f"{type(self).__name__} must override compute_loss to train on token batches.")
        loss, outputs = model_loss(self, model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def num_items(self, inputs) -> int | None:
        """Scored tokens of a micro-batch on the host; None where the loss is a mean that nothing can normalise."""
        return count_items(self, inputs)

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager:
        """What `compute_loss` runs under (activation offloading)."""
        wanted = getattr(self.args, "activation_offloading", False)
        return offload_activations(self.model_wrapped) if wanted else contextlib.nullcontext()

    def _prepare_inputs(self, inputs):
        return send_to_device(inputs, self.args.device, non_blocking=self.args.accelerator_config.non_blocking)

    def _sum_over_ranks(self, tensor: Tensor) -> Any:
        return self.accelerator.reduce(tensor, reduction="sum")

    # Log, evaluate, save

    def _log_evaluate_save(self) -> None:
        if self.control.should_log and self.state.global_step > self.window.last_logged:
            logs = self.window.close(self.metrics, self.state.global_step)
            reporting.update_counted_state(self)
            self.log(self.health.judge(logs), self.window.start_time)
        metrics = self._evaluate() if self.control.should_evaluate else None
        if metrics is not None:
            is_best = evaluation.note_best(self.args, self.state, metrics)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_best
        if self.control.should_save:
            self._save_checkpoint(metrics)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _evaluate(self, step_schedule: bool = True) -> dict[str, float]:
        try:
            metrics = self.evaluate(ignore_keys=self._ignore_keys)
        except RuntimeError as error:
            if self.args.auto_find_batch_size and should_reduce_batch_size(error):
                raise RuntimeError(
                    "Evaluation ran out of memory, and auto_find_batch_size lowers the training batch only: lower "
                    "per_device_eval_batch_size."
                ) from error
            raise
        if step_schedule:
            optimization.step_on_metric(self, metrics)
        return metrics

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss, metrics and speed on `eval_dataset` (one, a name, or a dict of several), keys prefixed."""
        override = eval_dataset is not None
        dataset = eval_dataset if override else self.eval_dataset
        if isinstance(dataset, dict):
            merged: dict[str, float] = {}
            for name, part in dataset.items():
                merged |= self.evaluate(part if override else name, ignore_keys, f"{metric_key_prefix}_{name}")
            return merged
        self._memory_tracker.start()
        loss_only = True if self.compute_metrics is None else None
        loader = self.get_eval_dataloader(dataset)
        metrics: Any = evaluation.timed_loop(self, loader, loss_only, ignore_keys, metric_key_prefix).metrics
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        """PredictionOutput(predictions, label_ids, metrics) of `test_dataset`."""
        self._memory_tracker.start()
        loader = self.get_test_dataloader(test_dataset)
        output = PredictionOutput(*evaluation.timed_loop(self, loader, None, ignore_keys, metric_key_prefix)[:3])
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        self._memory_tracker.stop_and_update_metrics(output.metrics)
        return output

    def _end(self, metrics: dict[str, float]) -> TrainOutput:
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            checkpoint.load_best_model(self)
        if self.args.should_save and self.state.best_model_checkpoint is not None:
            # while training, the last checkpoint is kept besides the best
            rotate(self.args.output_dir, self.args.save_total_limit, [self.state.best_model_checkpoint])
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        hub.wait_for_uploads(self)
        self.health.end()
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """(loss, logits, labels) of one evaluation batch, without gradients."""
        return evaluation.predict_batch(self, model, inputs, prediction_loss_only, ignore_keys)

    # Saving

    def state_dict(self) -> dict:
        """What a checkpoint keeps of the loop itself on this rank: the open logging window."""
        return {"window": self.window.state_dict(), "metrics": self.metrics.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue the logging window of a checkpoint."""
        self.window.load_state_dict(state["window"])
        self.metrics.load_state_dict(state["metrics"])

    def _save_checkpoint(self, metrics: dict[str, float] | None = None) -> None:
        self.metrics.reduce_counts()
        reporting.update_counted_state(self)
        self.create_model_card()
        hub.push_checkpoint(self, checkpoint.save_checkpoint(self, metrics=metrics))

    def hyperparameter_search(self, *args, **kwargs):
        """Not supported: raises NotImplementedError."""
        raise NotImplementedError("hyperparameter_search is not supported: start one run per setting.")

    def _new_state(self) -> TrainerState:
        stateful = [*self.callback_handler.callbacks, self.control]
        return TrainerState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=[part for part in stateful if isinstance(part, ExportableState)],  # pyright: ignore
        )
