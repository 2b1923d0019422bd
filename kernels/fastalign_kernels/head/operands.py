"""What the logits of a head are made of, checked, and whole where it was spread over ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign_kernels.head.token_stats import OUTPUTS, LogitForm
from fastalign_kernels.head.vocabulary_parallel import VocabularyShard
from fastalign_kernels.head.whole_weights import whole


class Operands(NamedTuple):
    """hidden weight^T + bias + low_hidden low_weight^T; each may need a gradient."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    low_hidden: Tensor | None = None  # (N, r), u
    low_weight: Tensor | None = None  # (V, r), b

    @property
    def needs(self) -> tuple[bool, ...]:
        """Which of them need a gradient."""
        return tuple(t is not None and t.requires_grad for t in self)


def operands_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor] | None
) -> Operands:
    """The operands of one call. ValueError for what does not fit together, naming it; DTensors are gathered."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: give (N, D) and (V, D) with the same D"
        )
    if not hidden.dtype.is_floating_point or not weight.dtype.is_floating_point:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: both must be floating point")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)}: give ({weight.shape[0]},), one per row of weight")
    u, b = low_rank or (None, None)
    if u is not None and b is not None:
        rows = (hidden.shape[0], weight.shape[0])
        if u.dim() != 2 or b.dim() != 2 or u.shape[1] != b.shape[1] or (u.shape[0], b.shape[0]) != rows:
            raise ValueError(
                f"low_rank {tuple(u.shape)} and {tuple(b.shape)}: give ({rows[0]}, r) and ({rows[1]}, r) "
                "with the same r"
            )
    named = {"hidden": hidden, "weight": weight, "bias": bias, "low_rank[0]": u, "low_rank[1]": b}
    check_devices(**named)
    return Operands(*(whole(tensor, name) for name, tensor in named.items()))  # pyright: ignore[reportArgumentType]


def check_call(
    operands: Operands, targets: Tensor, form: LogitForm, outputs: tuple[str, ...], shard: VocabularyShard | None
) -> None:
    """Raises ValueError for targets, form or outputs that do not fit the operands, naming the one at fault."""
    num_tokens, vocabulary = operands.hidden.shape[0], operands.weight.shape[0]
    check_devices(hidden=operands.hidden, targets=targets)
    if targets.shape != (num_tokens,) or targets.dtype.is_floating_point or targets.dtype == torch.bool:
        raise ValueError(
            f"targets {tuple(targets.shape)} {targets.dtype}: give ({num_tokens},) int64, one per row of hidden"
        )
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise ValueError(f"outputs {unknown}: choose among {', '.join(OUTPUTS)}")
    if form.softcap is not None and form.softcap <= 0:
        raise ValueError(f"form.softcap={form.softcap}: give a positive number, or None for no soft-cap")
    check_temperature(form.temperature, targets.shape, "form.temperature")
    if targets.device.type != "cpu":
        return
    if shard is not None:
        vocabulary = int(shard.vocabulary(vocabulary, targets.device))
    check_targets(targets, vocabulary)


def check_devices(**tensors: Tensor | None) -> None:
    """ValueError for tensors on other devices than the first, naming both."""
    (first, device), *others = ((name, t.device) for name, t in tensors.items() if t is not None)
    for name, other in others:
        if other != device:
            raise ValueError(f"{name} is on {other}, {first} on {device}: move one of them")


def check_constant(name: str, value: object) -> None:
    """ValueError for a tensor that would get a gradient from elsewhere: losses of the head have none for it."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, and gets none here: pass {name}.detach()")


def check_temperature(temperature: float | Tensor, shape: tuple[int, ...], name: str = "temperature") -> None:
    """ValueError for a temperature that is neither a number nor of `shape`, is not positive, or wants a gradient.

    Tensors on a GPU are not read back.
    """
    if isinstance(temperature, Tensor):
        if temperature.dim() and temperature.shape != shape:
            raise ValueError(f"{name} {tuple(temperature.shape)}: give a number or {tuple(shape)}")
        check_constant(name, temperature)
        if temperature.device.type == "cpu" and not bool((temperature > 0).all()):
            raise ValueError(f"{name} holds {float(temperature.min())}: give positive numbers")
    elif temperature <= 0:
        raise ValueError(f"{name}={temperature}: give a positive number")


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """ValueError for targets on the CPU that are no columns; those on a GPU are not read back."""
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(x) for x in targets.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"targets hold {low if low < 0 else high}: allowed are 0 to {vocabulary - 1}; "
                "leave out what is not scored (such as -100)"
            )
