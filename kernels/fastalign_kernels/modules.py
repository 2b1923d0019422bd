"""The fused losses as `nn.Module`s that hold their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from fastalign_kernels.head import (
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_policy_loss,
    linear_preference_loss,
)


class _Settled(nn.Module):
    """`op` with keyword arguments given once; further ones may be given, or given otherwise, in each call."""

    op: ClassVar[Callable[..., Any]]

    def __init__(self, **settings: Any):
        super().__init__()
        self.settings = settings

    def forward(self, *operands: Tensor, **more: Any) -> Any:
        """What the op returns."""
        return type(self).op(*operands, **{**self.settings, **more})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class LinearCrossEntropyLoss(_Settled):
    """`linear_cross_entropy` with its settings given once: ignore_index, reduction, label_smoothing, z_loss, ...

    `class_weights` (V,) is a buffer, which moves with the module. Call it as loss(hidden, head.weight, targets).
    """

    class_weights: Tensor | None

    def __init__(self, class_weights: Tensor | None = None, **settings: Any):
        super().__init__(**settings)
        self.register_buffer("class_weights", class_weights)

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        """The loss of hidden (..., D) under weight (V, D), bias (V,) at targets (...) int64."""
        return linear_cross_entropy(
            hidden, weight, targets, bias=bias, class_weights=self.class_weights, **self.settings
        )


class LinearLogprobs(_Settled):
    """`linear_logprobs` with its settings: LinearLogprobs(temperature=0.7, entropy=True)(hidden, weight, targets)."""

    op = linear_logprobs


class LinearPreferenceLoss(_Settled):
    """`linear_preference_loss`: LinearPreferenceLoss(loss="dpo", beta=0.1)(hidden, weight, targets, rows,
    num_pairs=..., ref_logps=...)."""

    op = linear_preference_loss


class LinearPolicyLoss(_Settled):
    """`linear_policy_loss`: LinearPolicyLoss(loss_type="dapo")(hidden, weight, targets, advantages, old_logp=...)."""

    op = linear_policy_loss


class LinearDivergence(_Settled):
    """`linear_divergence`: LinearDivergence(divergence="jsd", beta=0.5)(hidden, weight, teacher_hidden,
    teacher_weight)."""

    op = linear_divergence
