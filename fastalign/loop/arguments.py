"""What becomes of each `TrainingArguments` field: honoured (and where), or refused with its name."""

from __future__ import annotations

import dataclasses
import inspect
import logging

import torch
from transformers import Trainer as TransformersTrainer
from transformers import TrainingArguments, trainer_pt_utils
from transformers.trainer_utils import has_length

logger = logging.getLogger(__name__)

SAMPLING = ["random", "sequential", "group_by_length"]
if hasattr(trainer_pt_utils, "BatchRebalanceSampler"):  # TODO: drop with transformers < 5.19
    SAMPLING.append("batch_rebalance")

# group of fields -> the part of the library that reads them
HONOURED: dict[str, str] = {
    "seed full_determinism": "Trainer.__init__",
    "output_dir resume_from_checkpoint ignore_data_skip": "Trainer.train",
    "per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps": "plan",
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps": "optimization",
    "optim optim_args optim_target_modules": "optimization",
    "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm": "optimization",
    "average_tokens_across_devices logging_nan_inf_filter torch_empty_cache_steps": "steps, Trainer.training_step",
    "auto_find_batch_size": "Trainer.train",
    "label_smoothing_factor label_names": "model_inputs",
    "bf16 fp16 torch_compile torch_compile_backend torch_compile_mode": "distributed (accelerate)",
    "bf16_full_eval fp16_full_eval": "evaluation",
    "use_liger_kernel liger_kernel_config": "patch (Liger's layers; the loss stays with our head)",
    "gradient_checkpointing gradient_checkpointing_kwargs neftune_noise_alpha use_cache debug": "model_setup, Trainer",
    "logging_strategy logging_steps logging_first_step save_strategy save_steps": "DefaultFlowCallback",
    "eval_strategy eval_steps eval_delay": "DefaultFlowCallback",
    "include_num_input_tokens_seen": "steps, RunOutputs.log",
    "log_level log_level_replica log_on_each_node skip_memory_metrics": "Trainer.__init__",
    "disable_tqdm report_to run_name project": "reporting (transformers' integrations)",
    "trackio_space_id trackio_bucket_id trackio_static_space_id": "reporting (transformers' integrations)",
    "per_device_eval_batch_size prediction_loss_only eval_do_concat_batches eval_accumulation_steps": "evaluation",
    "include_for_metrics batch_eval_metrics eval_on_start": "evaluation",
    "save_only_model save_total_limit save_on_each_node restore_callback_states_from_checkpoint": "checkpoint",
    "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision": "hub",
    "load_best_model_at_end metric_for_best_model greater_is_better": "evaluation.note_best, checkpoint",
    "data_seed train_sampling_strategy length_column_name remove_unused_columns accelerator_config": "batching",
    "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers": "batching",
    "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order": "batching",
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph": "distributed (accelerate)",
    "fsdp fsdp_config": "distributed (accelerate)",
    "use_cpu ddp_backend ddp_timeout tf32 local_rank": "TrainingArguments itself, when it sets up the device",
    "do_train do_eval do_predict": "scripts: as in transformers, no trainer reads them",
}

# field -> (value that switches it off, what to do instead)
REFUSED: dict[str, tuple[object, str]] = {
    "enable_jit_checkpoint": (False, "use save_strategy='steps': a killed run resumes from the last checkpoint"),
    "eval_use_gather_object": (False, "predictions are padded to one shape and gathered as tensors"),
    "deepspeed": (None, "use FSDP2 (accelerate launch --use_fsdp --fsdp_version 2) or DDP"),
    "parallelism_config": (None, "only data parallelism is supported: DDP or FSDP2"),
}


def honoured_fields() -> dict[str, str]:
    """Field -> where it is honoured."""
    return {name: where for names, where in HONOURED.items() for name in names.split()}


def check_arguments(args) -> None:
    """Raise ValueError, naming the field, for what the loop does not do; warn once of fields it does not know."""
    if not hasattr(args, "token_budget"):
        args.token_budget = None  # plain TrainingArguments
    for name, (off, instead) in REFUSED.items():
        value = getattr(args, name, off)
        if value not in (off, None, "", False):
            raise ValueError(f"{name}={value!r} is not supported: {instead}.")
    if args.train_sampling_strategy not in SAMPLING:
        raise ValueError(f"train_sampling_strategy={args.train_sampling_strategy!r}; allowed: {', '.join(SAMPLING)}.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, found {getattr(args, name)}.")
    if args.max_grad_norm is None:
        raise ValueError("max_grad_norm=None: it must be a number; 0 switches clipping off.")
    _check_accelerator_config(args.accelerator_config)
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16=True needs a GPU: on the CPU set bf16=True, or neither for fp32.")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would mean nn.DataParallel. Start one process for "
            f"each (accelerate launch --num_processes {args.n_gpu} ...), or set CUDA_VISIBLE_DEVICES to one."
        )
    if any(str(getattr(option, "value", option)) == "tpu_metrics_debug" for option in args.debug):
        raise ValueError("debug='tpu_metrics_debug' is not supported: TPUs are not.")
    known = honoured_fields().keys() | REFUSED.keys()
    for field in dataclasses.fields(TrainingArguments):
        if field.name not in known and _differs_from_default(args, field):
            raise ValueError(
                f"{field.name}={getattr(args, field.name)!r}: this field is newer than fastalign, which does not know "
                "what it means. Leave it at its default."
            )


def _check_accelerator_config(config) -> None:
    if config.dispatch_batches:
        raise ValueError("accelerator_config.dispatch_batches=True is not supported: each rank reads its own batches.")
    if not config.use_seedable_sampler:
        raise ValueError(
            "accelerator_config.use_seedable_sampler=False is not supported: the order of the data follows data_seed "
            "or seed and the epoch alone, so that a resumed run sees the same data."
        )


def _differs_from_default(args, field: dataclasses.Field) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return default is not dataclasses.MISSING and getattr(args, field.name, default) != default


def warn_of_unused_hooks(cls: type, trainer: type) -> None:
    """Name what a subclass overrides of transformers' Trainer but our loop never calls."""
    own = {name for part in cls.__mro__[: cls.__mro__.index(trainer)] for name in vars(part)}
    called = set(dir(trainer)) - {"create_optimizer_and_scheduler"}
    if unused := sorted(own & set(dir(TransformersTrainer)) - called):
        logger.warning(
            "%s overrides %s of transformers.Trainer, which this trainer has not, or does not call: without effect.",
            cls.__name__,
            ", ".join(unused),
        )


def check_inputs(trainer) -> None:
    """Raise for constructor arguments that contradict each other or the config."""
    args = trainer.args
    if trainer.optimizer_cls_and_kwargs is not None and trainer.optimizer is not None:
        raise RuntimeError("Both optimizers and optimizer_cls_and_kwargs were passed: pass one of them.")
    takes = inspect.signature(trainer.compute_metrics).parameters if trainer.compute_metrics is not None else ()
    given = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    if given and getattr(args, "bf16_update", "plain") != "plain":
        raise ValueError(
            f"bf16_update={args.bf16_update!r} is for an optimizer that `optim` names, but one was passed: set it to "
            "'plain', or wrap yours in fastalign.loop.bf16_update.MasterWeights."
        )
    if args.batch_eval_metrics and trainer.compute_metrics is not None and "compute_result" not in takes:
        raise ValueError("With batch_eval_metrics=True compute_metrics must take a `compute_result` argument.")
    if args.eval_strategy != "no" and trainer.eval_dataset is None:
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r} needs an eval_dataset: pass one, or set it to 'no'."
        )
    if args.save_strategy == "best" and args.metric_for_best_model is None:
        raise ValueError("save_strategy='best' needs metric_for_best_model.")
    dataset = trainer.train_dataset
    if dataset is None:
        return
    if not has_length(dataset) and args.max_steps <= 0:
        raise ValueError("The train_dataset has no length (streaming), so max_steps must be set to a positive number.")
    if has_length(dataset) and len(dataset) == 0:
        raise ValueError("The train_dataset is empty: check the source, the split and the filters.")
    if isinstance(dataset, torch.utils.data.IterableDataset) and args.train_sampling_strategy != "random":
        logger.warning("train_sampling_strategy=%r has no effect on streamed data.", args.train_sampling_strategy)
