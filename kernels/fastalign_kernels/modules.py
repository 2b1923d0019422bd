"""The fused losses as `nn.Module`s that hold their settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, ClassVar

from torch import Tensor, nn

from fastalign_kernels.head import (
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
    linear_preference_loss,
)
from fastalign_kernels.head.preference import METHODS
from fastalign_kernels.losses.policy_gradient import PolicyObjective


def _names(fn: Callable[..., Any]) -> set[str]:
    """The arguments that `fn` names; "**" stands for any other."""
    found = inspect.signature(fn).parameters.values()
    return {"**" if p.kind is inspect.Parameter.VAR_KEYWORD else p.name for p in found}


class _Settled(nn.Module):
    """`op` with keyword arguments given once; further ones may be given, or given otherwise, in each call.

    TypeError for a name that the op does not take.
    """

    op: ClassVar[Callable[..., Any]]
    names: ClassVar[set[str]]  # of the op's own arguments

    def __init_subclass__(cls):
        cls.names = _names(cls.op)

    def __init__(self, **settings: Any):
        super().__init__()
        known = self._known(settings)
        for name in settings:
            if name not in known and "**" not in known:
                near = get_close_matches(name, known, 1)
                hint = f": did you mean {near[0]!r}?" if near else f"; it takes {', '.join(sorted(known))}"
                raise TypeError(f"{type(self).__name__} has no setting {name!r}{hint}")
        self.settings = settings

    def _known(self, settings: dict[str, Any]) -> set[str]:
        """Names that may be set."""
        return self.names

    def forward(self, *operands: Tensor, **more: Any) -> Any:
        """What the op returns."""
        return type(self).op(*operands, **{**self.settings, **more})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class LinearCrossEntropyLoss(_Settled):
    """`linear_cross_entropy` with its settings given once: ignore_index, reduction, label_smoothing, z_loss, ...

    `class_weights` (V,) is a buffer, which moves with the module. Call it as loss(hidden, head.weight, targets).
    """

    op = linear_cross_entropy
    class_weights: Tensor | None

    def __init__(self, class_weights: Tensor | None = None, **settings: Any):
        super().__init__(**settings)
        self.register_buffer("class_weights", class_weights)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **more: Any
    ) -> Tensor:
        """The loss of hidden (..., D) under weight (V, D), bias (V,) at targets (...) int64."""
        given = {"class_weights": self.class_weights, **({} if bias is None else {"bias": bias})}
        return linear_cross_entropy(hidden, weight, targets, **{**self.settings, **given, **more})


class LinearLogprobs(_Settled):
    """`linear_logprobs` with its settings: LinearLogprobs(temperature=0.7, entropy=True)(hidden, weight, targets)."""

    op = linear_logprobs


class LinearPreferenceLoss(_Settled):
    """`linear_preference_loss`: LinearPreferenceLoss(loss="dpo", beta=0.1)(hidden, weight, targets, rows,
    num_pairs=..., ref_logps=...)."""

    op = linear_preference_loss

    def _known(self, settings: dict[str, Any]) -> set[str]:
        loss = settings.get("loss", "dpo")
        if not callable(loss) and loss not in METHODS:
            raise ValueError(f"loss={loss!r}: choose among {', '.join(METHODS)} or give a function")
        return (self.names - {"**"}) | _names(loss if callable(loss) else METHODS[loss])


class LinearPolicyLoss(_Settled):
    """`linear_policy_loss`: LinearPolicyLoss(loss_type="dapo")(hidden, weight, targets, advantages, old_logp=...)."""

    op = linear_policy_loss

    def _known(self, settings: dict[str, Any]) -> set[str]:
        return (self.names - {"**"}) | _names(PolicyObjective)


class LinearDivergence(_Settled):
    """`linear_divergence`: LinearDivergence(divergence="jsd", beta=0.5)(hidden, weight, teacher_hidden,
    teacher_weight)."""

    op = linear_divergence
