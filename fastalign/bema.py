"""Callbacks that move the reference: towards the policy, or to an average of its weights without lag (BEMA)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from .loop.weights import like, whole
from .policy import unwrap

logger = logging.getLogger(__name__)


class SyncRefModelCallback(TrainerCallback):
    """TR-DPO, arXiv:2404.09656: every `ref_model_sync_steps` the reference moves towards the policy.

    reference <- alpha * policy + (1 - alpha) * reference with alpha = `ref_model_mixup_alpha`.
    """

    def __init__(self, ref_model: nn.Module | None, accelerator):
        self.ref_model, self.accelerator = ref_model, accelerator

    @staticmethod
    @torch.no_grad()
    def sync_target_model(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        """Move the parameters of `target_model` towards those of `model`; both in the same order, any types."""
        for target, source in zip(_parameters(target_model).values(), model.parameters(), strict=True):
            target.mul_(1.0 - alpha).add_(source.to(target.dtype), alpha=alpha)

    def on_step_end(self, args, state, control, model: Any = None, **kwargs):
        """Called by the loop."""
        if self.ref_model is not None and state.global_step % args.ref_model_sync_steps == 0:
            inner = self.accelerator.unwrap_model(model) if self.accelerator else model
            self.sync_target_model(inner, self.ref_model, args.ref_model_mixup_alpha)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the reference's weights."""
        return {} if self.ref_model is None else _parameters(self.ref_model)

    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """Continue with the reference of a checkpoint."""
        _copy(state, self.tensors())


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, spread over ranks where they are sharded."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # a forward without backward leaves the outermost weights gathered
    return {name: parameter.detach() for name, parameter in unwrap(model).named_parameters()}


def _copy(state: dict[str, Tensor], into: dict[str, Tensor]) -> None:
    """Whole tensors into tensors of the same names, which may be spread over ranks."""
    for name, target in into.items():
        target.copy_(like(state[name].to(target.dtype), target))


class BEMACallback(TrainerCallback):
    """BEMA, arXiv:2508.00180: weights alpha_t (theta_t - theta_0) + EMA_t, saved to `output_dir/bema` at the end.

    With t the step, alpha_t = (lag + multiplier t)^-bias_power, and EMA_t = (1 - beta_t) EMA + beta_t theta_t with
    beta_t = (lag + multiplier t)^-ema_power, at least `min_ema_multiplier`. They change every `update_freq` steps;
    theta_0 are the weights after step `update_after`. The averages are kept on `device`. With `update_ref_model` the
    trainer's reference model takes them over every `ref_model_update_freq` steps from `ref_model_update_after` on
    (ValueError where the trainer has no second model). Only trained parameters are averaged.
    """

    def __init__(
        self,
        update_freq: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
        update_after: int = 0,
        multiplier: float = 1.0,
        min_ema_multiplier: float = 0.0,
        device: str = "cpu",
        update_ref_model: bool = False,
        ref_model_update_freq: int = 400,
        ref_model_update_after: int = 0,
    ):
        if min(update_freq, ref_model_update_freq) < 1 or lag < 1:
            raise ValueError(
                f"update_freq={update_freq}, ref_model_update_freq={ref_model_update_freq}, lag={lag}: all must be at "
                "least 1."
            )
        self.update_freq, self.update_after, self.device = update_freq, update_after, device
        self.ema_power, self.bias_power, self.lag = ema_power, bias_power, lag
        self.multiplier, self.min_ema_multiplier = multiplier, min_ema_multiplier
        self.update_ref_model = update_ref_model
        self.ref_model_update_freq, self.ref_model_update_after = ref_model_update_freq, ref_model_update_after
        self.ref_model: Any = None  # set by a trainer that has a second model
        self._start: dict[str, Tensor] = {}  # theta_0
        self._ema: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}  # the bias-corrected average, by name of parameter
        self._loaded: dict[str, Tensor] = {}  # what a checkpoint had of all three

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        """Take the weights that training starts from."""
        if self.update_ref_model and self.ref_model is None:
            raise ValueError(
                "BEMACallback(update_ref_model=True) needs a trainer with a reference model of its own; adapters and "
                "`precompute_ref_log_probs` have none. Set it to False, or pass a `ref_model`."
            )
        self._restart(model)
        if self._loaded:
            _copy(self._loaded, self._averages())
            self._loaded = {}

    def _averages(self) -> dict[str, Tensor]:
        kinds = {"start": self._start, "ema": self._ema, "weights": self.weights}
        return {f"{kind} {name}": value for kind, values in kinds.items() for name, value in values.items()}

    def _reference(self) -> dict[str, Tensor]:
        if not self.update_ref_model or self.ref_model is None:
            return {}
        return {f"reference {name}": value for name, value in _parameters(self.ref_model).items()}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the averages, and the reference that they may have become."""
        return self._averages() | self._reference()

    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """Continue with the reference of a checkpoint, and when training begins with its averages."""
        self._loaded = dict(state)
        _copy(state, self._reference())

    def _current(self, model) -> dict[str, Tensor]:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return {n: p.clone() if isinstance(p, DTensor) else p.to(self.device, copy=True) for n, p in trained.items()}

    def _restart(self, model) -> None:
        self._start = self._current(model)
        self._ema = {name: value.clone() for name, value in self._start.items()}
        self.weights = {name: value.clone() for name, value in self._start.items()}

    def _update(self, model, step: int) -> None:
        age = self.lag + self.multiplier * step
        beta, alpha = max(age**-self.ema_power, self.min_ema_multiplier), age**-self.bias_power
        for name, value in self._current(model).items():
            self._ema[name].lerp_(value, beta)
            self.weights[name] = self._ema[name] + alpha * (value - self._start[name])

    def on_step_end(self, args, state, control, model: Any = None, **kwargs):
        """Average, and hand the average to the reference, when it is time."""
        step = state.global_step
        if step == self.update_after:
            self._restart(model)
        elif step > self.update_after and (step - self.update_after) % self.update_freq == 0:
            self._update(model, step)
        since = step - self.ref_model_update_after
        if self.update_ref_model and since >= 0 and since % self.ref_model_update_freq == 0:
            self._give_to_reference()

    @torch.no_grad()
    def _give_to_reference(self) -> None:
        for name, parameter in _parameters(self.ref_model).items():
            if name in self.weights:
                parameter.copy_(self.weights[name])

    def on_train_end(self, args, state, control, model: Any = None, **kwargs):
        """Save the model (or adapter) with the averaged weights; all ranks take part where it is sharded."""
        averaged = {name: whole(value, True) for name, value in self.weights.items()}
        names = {id(p): name for name, p in model.named_parameters()}  # tied weights have several
        state_dict = {name: whole(value, True) for name, value in model.state_dict().items()}
        for name, p in model.named_parameters(remove_duplicate=False):
            if names[id(p)] in averaged:
                state_dict[name] = averaged[names[id(p)]]
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / "bema"
            model.save_pretrained(folder, state_dict=state_dict)
            logger.info("Averaged weights are in %s.", folder)
