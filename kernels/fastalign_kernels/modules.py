"""The fused losses as `nn.Module`s that hold their settings."""

from __future__ import annotations

from torch import Tensor, nn

from fastalign_kernels.head import linear_cross_entropy


class LinearCrossEntropyLoss(nn.Module):
    """`linear_cross_entropy` with its settings given once: ignore_index, reduction, label_smoothing, z_loss, ...

    `class_weights` (V,) is a buffer, which moves with the module. Call it as loss(hidden, head.weight, targets).
    """

    class_weights: Tensor | None

    def __init__(self, class_weights: Tensor | None = None, **settings):
        super().__init__()
        self.register_buffer("class_weights", class_weights)
        self.settings = settings

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        """The loss of hidden (..., D) under weight (V, D), bias (V,) at targets (...) int64."""
        return linear_cross_entropy(
            hidden, weight, targets, bias=bias, class_weights=self.class_weights, **self.settings
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
