"""Updates of weights kept in bf16 that plain rounding would lose: rounded at random without bias, or held in fp32.

bf16 has 8 significant bits, so a weight moves only by an update of at least 1/512 of its size, which those of a small
learning rate are not. Stochastic rounding, arXiv:2010.06192: the 16 bits of an fp32 value that bf16 lacks are
the chance, in 1/65536, of rounding away from zero, so that the expectation is the fp32 value exactly.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

logger = logging.getLogger(__name__)


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """bf16 of fp32 `values`, rounded away from zero where their last 16 bits plus `noise` (int32 below 2^16) carry."""
    bits = (values.view(torch.int32) + noise).bitwise_and_(-65536)
    return torch.where(values.isnan(), values, bits.view(torch.float32)).bfloat16()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class StochasticAdamW(Optimizer):
    """AdamW, arXiv:1711.05101, in fp32 arithmetic; bf16 weights (and bf16 moments) are rounded stochastically.

    `state_dtype`: of the moments, fp32 or bf16. Weights of other dtypes are rounded as ever. The noise depends on
    `seed`, step and parameter alone: replicas stay equal, and a run that is resumed equals one that was not. Shards
    of a parameter draw the same noise, which correlates their errors and biases none.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        state_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})
        self.state_dtype = state_dtype
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None:
                    self._update(group, parameter, index)
        return loss

    def _update(self, group: dict[str, Any], parameter: Tensor, index: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self.state_dtype)
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"]
        generator = self._seeded(_local(parameter).device, group["seed"], step, index)
        gradient, value = _local(parameter.grad).float(), _local(parameter).float()  # pyright: ignore
        first, second = (_local(state[name]) for name in ("exp_avg", "exp_avg_sq"))
        mean = torch.lerp(first.float(), gradient, 1 - beta1)
        square = (second.float() * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        value = value * (1 - group["lr"] * group["weight_decay"])
        value -= mean / deviation * (group["lr"] / (1 - beta1**step))
        for target, result in ((_local(parameter), value), (first, mean), (second, square)):
            if target.dtype == torch.bfloat16:
                noise = torch.randint(
                    0, 65536, result.shape, dtype=torch.int32, device=result.device, generator=generator
                )
                result = round_stochastically(result, noise)
            target.copy_(result)

    def _seeded(self, device: torch.device, seed: int, step: int, index: int) -> torch.Generator:
        generator = self._generators.setdefault(device, torch.Generator(device))
        # odd constants spread neighbouring numbers over all 63 bits
        mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB
        return generator.manual_seed(mixed % 2**63)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments keep `state_dtype` where torch would give them that of the weights."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, values in state_dict["state"].items():
            own = self.state[parameters[index]]
            for name in ("exp_avg", "exp_avg_sq"):
                own[name] = values[name].to(parameters[index].device, self.state_dtype, copy=True)


class MasterWeights(Optimizer):
    """Any optimizer on fp32 copies of the bf16 weights it is given; after a step the weights are the rounded copies.

    Groups show the model's parameters, so gradient clipping, schedules and sharding see nothing new. The copies are
    made at the first step (or from a checkpoint, whose optimizer state holds them as "master") and follow nobody
    else: what another writes into the weights later is overwritten. Other parameters are updated where they are.
    """

    def __init__(self, optimizer: Optimizer):
        # torch's own __init__ is not called: groups, state and defaults are those of the optimizer inside
        self.optimizer = optimizer
        self._masters: dict[Tensor, Tensor] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.defaults

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the optimizer inside keeps: moments of a bf16 weight stand under its master."""
        return self.optimizer.state

    def _master(self, parameter: Tensor) -> Tensor:
        if parameter.dtype != torch.bfloat16:
            return parameter
        if parameter not in self._masters:
            self._masters[parameter] = parameter.detach().float().requires_grad_()
        return self._masters[parameter]

    @contextlib.contextmanager
    def _on_masters(self) -> Iterator[None]:
        """Inside, the groups hold the masters."""
        own = [group["params"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["params"] = [self._master(parameter) for parameter in group["params"]]
            yield
        finally:  # loading replaces the groups, not their order
            for group, params in zip(self.param_groups, own, strict=True):
                group["params"] = params

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimizer inside; `closure`, if any, runs before it, once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._on_masters():
            for parameter, master in self._masters.items():
                master.grad = None if parameter.grad is None else parameter.grad.float()
            self.optimizer.step()
        for parameter, master in self._masters.items():
            if master.grad is not None:
                parameter.copy_(master)
                master.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer inside, on the model's parameters."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the optimizer inside."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer inside, with each fp32 copy as "master" in the state of its weight."""
        if not self._masters:
            return self.optimizer.state_dict()
        with self._on_masters():
            state = self.optimizer.state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            if parameter in self._masters:
                values = state["state"].get(index, {})
                state["state"][index] = {**values, "master": self._masters[parameter].detach()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore optimizer and copies. KeyError where the state was saved without them."""
        if not state_dict["state"]:
            self.optimizer.load_state_dict(state_dict)
            return
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        states = {index: dict(values) for index, values in state_dict["state"].items()}
        saved = {index: values.pop("master", None) for index, values in states.items()}
        lacking = sum(p.dtype == torch.bfloat16 and i in states and saved[i] is None for i, p in enumerate(parameters))
        if lacking:
            raise KeyError(f"{lacking} weights have no fp32 copy: saved without bf16_update='fp32_master'")
        with self._on_masters():
            self.optimizer.load_state_dict(state_dict | {"state": {i: v for i, v in states.items() if v}})
        with torch.no_grad():
            for index, master in saved.items():
                if master is not None:
                    self._master(parameters[index]).copy_(master)


def check_has_bf16(groups: list[dict[str, Any]], bf16_update: str) -> None:
    """ValueError where no trainable weight is bf16, so that `bf16_update` would do nothing."""
    if not any(parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"]):
        raise ValueError(
            f"bf16_update={bf16_update!r}, but no trainable weight is bfloat16: load the model with "
            "model_init_kwargs={'dtype': 'bfloat16'}, or leave bf16_update at 'plain'."
        )


def stochastic_adamw(groups: list[dict[str, Any]], args) -> StochasticAdamW:
    """`StochasticAdamW` from a config; `optim_args` may say state_dtype=float32 (default) or bfloat16."""
    options: dict[str, str] = {}
    for part in (args.optim_args or "").replace(" ", "").split(","):
        if part:
            options[part.partition("=")[0]] = part.partition("=")[2]
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    state_dtype = options.pop("state_dtype", "float32")
    if options or state_dtype not in dtypes:
        raise ValueError(
            f"optim_args={args.optim_args!r}: with bf16_update='stochastic_rounding' it is state_dtype=float32 or "
            "state_dtype=bfloat16, or unset."
        )
    return StochasticAdamW(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        seed=args.seed,
        state_dtype=dtypes[state_dtype],
    )
