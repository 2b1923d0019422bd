"""Weights that are spread over ranks as DTensors, made whole for one call of the head."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import torch
from torch import Tensor

Operand = TypeVar("Operand", Tensor, Tensor | None)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Any):
        ctx.mesh, ctx.placements = weight.device_mesh, weight.placements
        return weight.full_tensor()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        from torch.distributed.tensor import DTensor, Partial

        partial = DTensor.from_local(grad / ctx.mesh.size(), ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return partial.redistribute(placements=ctx.placements)


def whole(tensor: Operand, name: str) -> Operand:
    """`tensor` itself, or all rows of a DTensor that is replicated or cut along them (FSDP2, tensor parallel).

    The gradient is the mean over the mesh, cut as the weight is: what FSDP2 gives for ranks with tokens of their own,
    and the gradient itself where ranks hold the same tokens. ValueError for other placements.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return tensor
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    if name == "hidden":
        raise ValueError("hidden is a DTensor: give this rank's tokens, hidden.to_local()")
    if not all(p.is_replicate() or p.is_shard(0) for p in tensor.placements):
        raise ValueError(
            f"{name} is a DTensor placed as {tensor.placements}: allowed are Replicate() and Shard(0); redistribute it"
        )
    with torch.autocast(tensor.device_mesh.device_type, enabled=False):
        return _Whole.apply(tensor)
