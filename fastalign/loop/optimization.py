"""Optimizer, parameter groups, learning-rate schedule and gradient norm: transformers' names, without its Trainer."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Trainer as TransformersTrainer
from transformers import get_scheduler
from transformers.optimization import GreedyLR
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_pt_utils import get_parameter_names

from .bf16_update import MasterWeights, check_has_bf16, stochastic_adamw

logger = logging.getLogger(__name__)

# parameters whose name matches are not decayed
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
WAITS_FOR_METRICS = (ReduceLROnPlateau, GreedyLR)  # schedules that step after an evaluation


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters with and without weight decay (biases and norms); split further by device mesh."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY))
    groups: dict[tuple, dict[str, Any]] = {}
    for wanted, decay in ((True, weight_decay), (False, 0.0)):
        groups[wanted, None] = {"params": [], "weight_decay": decay}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (name in decayed) == wanted:
                mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
                groups.setdefault((wanted, mesh), {"params": [], "weight_decay": decay})["params"].append(parameter)
    sharded = any(mesh is not None for _, mesh in groups)
    return [group for group in groups.values() if group["params"] or not sharded]


def create_optimizer(trainer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `args.optim` names, or `optimizer_cls_and_kwargs`; bf16 weights as `bf16_update` says."""
    args = trainer.args
    groups: Any = parameter_groups(model, args.weight_decay)
    if not any(group["params"] for group in groups):
        raise ValueError("The model has no trainable parameter: set requires_grad, or pass a peft_config.")
    bf16_update = getattr(args, "bf16_update", "plain")
    if bf16_update != "plain":
        check_has_bf16(groups, bf16_update)
    if bf16_update == "stochastic_rounding":
        return stochastic_adamw(groups, args)
    optimizer = _named_optimizer(trainer, model, groups)
    return MasterWeights(optimizer) if bf16_update == "fp32_master" else optimizer


def _named_optimizer(trainer, model: nn.Module, groups: Any) -> torch.optim.Optimizer:
    args = trainer.args
    if trainer.optimizer_cls_and_kwargs is not None:
        made_by, kwargs = trainer.optimizer_cls_and_kwargs
    else:
        made_by, kwargs = TransformersTrainer.get_optimizer_cls_and_kwargs(args, model)  # pyright: ignore
    kwargs = dict(kwargs)
    if is_optimizer_factory(made_by):
        return made_by()(model, **kwargs)
    for replacement in ("params", "model", "optimizer_dict"):  # GaLore, LOMO, layer-wise optimizers bring their own
        groups = kwargs.pop(replacement, groups)
    optimizer = made_by(groups, **kwargs)
    if "bitsandbytes" in str(made_by) and kwargs.get("optim_bits") == 8:
        _keep_embeddings_in_fp32(model)
    return optimizer


def _keep_embeddings_in_fp32(model: nn.Module) -> None:
    import bitsandbytes  # pyright: ignore

    overrides = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            overrides.register_module_override(module, "weight", {"optim_bits": 32})


def create_scheduler(args, optimizer: torch.optim.Optimizer, num_steps: int):
    """The learning-rate schedule that `args.lr_scheduler_type` names, over `num_steps` optimizer steps."""
    warmup, options = args.get_warmup_steps(num_steps), args.lr_scheduler_kwargs
    try:
        return get_scheduler(args.lr_scheduler_type, optimizer, warmup, num_steps, scheduler_specific_kwargs=options)
    except TypeError as error:
        name = f"lr_scheduler_type={args.lr_scheduler_type.value!r}"
        raise ValueError(f"lr_scheduler_kwargs={options!r} does not fit {name}: {error}.") from error


def learning_rate(trainer) -> float:
    """The rate of the first parameter group, as the next step will use it."""
    if isinstance(trainer.lr_scheduler, WAITS_FOR_METRICS):
        rate = trainer.optimizer.param_groups[0]["lr"]
    else:
        rate = trainer.lr_scheduler.get_last_lr()[0]
    return rate.item() if isinstance(rate, Tensor) else rate


def clip_gradients(trainer, model: nn.Module) -> Tensor:
    """Clip the gradients to `max_grad_norm` (not at all if it is 0); returns their norm before, 0-dim."""
    limit = trainer.args.max_grad_norm if trainer.args.max_grad_norm > 0 else float("inf")
    norm = trainer.accelerator.clip_grad_norm_(model.parameters(), limit)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return torch.as_tensor(norm if norm is not None else 0.0)


def step_on_metric(trainer, metrics: dict[str, float]) -> None:
    """Step a schedule that waits for a metric (reduce_lr_on_plateau, greedy) with `metric_for_best_model`."""
    if isinstance(trainer.lr_scheduler, WAITS_FOR_METRICS):
        trainer.lr_scheduler.step(watched_metric(trainer.args, metrics))


def watched_metric(args, metrics: dict[str, float]) -> float:
    """The value of `metric_for_best_model`; KeyError naming what there is if the evaluation did not give it."""
    name = args.metric_for_best_model
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        raise KeyError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not among the evaluation's metrics "
            f"{sorted(metrics)}: change it, or let compute_metrics return it."
        )
    return metrics[name]
