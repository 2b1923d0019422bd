"""The matrix products of the head backward: gradients of its operands from dL/dlogits, summed over chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalign_kernels.head.products import Head
from fastalign_kernels.head.rows import Coefficients

if TYPE_CHECKING:
    from fastalign_kernels.head.offset_rows import RowScaled

# Chunks up to which a bf16 weight gradient on CPU is summed in bf16: error 3e-3 instead of 2e-3, and no fp32 copy.
BF16_SUM_CHUNKS = 8


def coefficients_of(grads: Mapping[str, Tensor | None]) -> Coefficients:
    """dL/d(statistic) by name, as the row kernels take it.

    f = dL/dlse adds f p_v to dL/dz_v, as -f of the mean log-probability and f of the mean logit do together.
    """
    given = {name: v for name, v in grads.items() if v is not None and name != "top1"}
    f = given.pop("lse", None)
    if f is not None:
        given["mean_logp"] = given["mean_logp"] - f if "mean_logp" in given else -f
        given["mean_logit"] = given["mean_logit"] + f if "mean_logit" in given else f
    return Coefficients(**given)


class FactorGradients:
    """Gradients of the factors of a product left right^T, left (N, K) and right (V, K), chunk by chunk.

    What is not needed is neither made nor allocated. The right factor's is added to `into` where that is given.
    """

    def __init__(
        self,
        factors: tuple[Tensor, Tensor],
        needs: tuple[bool, ...],
        sum_dtype: torch.dtype,
        wide: bool,
        into: Tensor | None = None,
    ):
        self._factors = left, right = factors
        self._wide: dict[str, Any] = {"out_dtype": torch.float32} if wide else {}
        self._started = into is not None
        self.left = torch.empty(left.shape, dtype=left.dtype, device=left.device) if needs[0] else None
        self.right = into if needs[1] else None
        if needs[1] and into is None:
            self.right = torch.empty(right.shape, dtype=sum_dtype, device=right.device)

    def add(self, span: slice, grad: Tensor | RowScaled, scale: Tensor | None) -> None:
        """Adds a chunk's dL/dlogits (C, V), which stands for `grad * scale` where the 0-dim `scale` is given."""
        left, right = self._factors
        if isinstance(grad, Tensor):
            matrix, rows = grad, left[span]
            if self.left is not None:
                torch.mm(grad, right, out=self.left[span])
        else:
            matrix, rows = grad.matrix, grad.hidden
            if self.left is not None:
                self.left[span] = grad.hidden_gradient(right)
        if self.right is not None:
            self._add_right(self.right, matrix.t(), rows, scale)

    def finish(self) -> None:
        """No more chunks come."""
        if self.right is not None and not self._started:
            self.right.zero_()

    def _add_right(self, right: Tensor, grad: Tensor, left: Tensor, scale: Tensor | None) -> None:
        """right += grad left; the first product is written, not added, so that nothing is cleared before."""
        first, self._started = not self._started, True
        if scale is None and (self._wide or right.dtype == left.dtype):
            if first:
                torch.mm(grad, left, **self._wide, out=right)
            else:
                torch.addmm(right, grad, left, **self._wide, out=right)
            return
        product = torch.mm(grad, left, **self._wide)
        if scale is not None:
            product = product.to(right.dtype).mul_(scale)
        if first:
            right.copy_(product)
        else:
            right.add_(product)


class HeadGradients:
    """Gradients of a head's operands, summed over chunks; what is not needed is neither made nor allocated.

    The weight's and the bias's are summed in fp32 (fp64 for fp64), but bf16 weights on CPU with few chunks in bf16.
    `main_grad` (V, D), usually fp32, takes the weight's gradient: at once where `direct` (nothing scales it later).
    """

    def __init__(self, head: Head, needs: tuple[bool, ...], main_grad: Tensor | None = None, direct: bool = False):
        dtype, weight_dtype, *_ = self._dtypes = head.grad_dtypes
        if main_grad is not None and main_grad.shape != head.weight.shape:
            raise ValueError(f"weight.main_grad {tuple(main_grad.shape)}: give {tuple(head.weight.shape)}, as weight")
        few = len(head.spans) <= BF16_SUM_CHUNKS and head.hidden.device.type == "cpu" and main_grad is None
        narrow = few and dtype == weight_dtype == torch.bfloat16
        sum_dtype = torch.bfloat16 if narrow else head.stats_dtype
        self._main_grad = main_grad if needs[1] else None
        into = main_grad if direct and main_grad is not None and main_grad.dtype == sum_dtype else None
        self._main = FactorGradients((head.hidden, head.weight), needs[:2], sum_dtype, head.wide_products, into)
        self._low = None
        if head.low_rank is not None:
            self._low = FactorGradients(head.low_rank, needs[3:], head.stats_dtype, head.wide_products)
        num_rows, device = head.weight.shape[0], head.hidden.device
        self._bias = torch.zeros(num_rows, dtype=head.stats_dtype, device=device) if needs[2] else None
        self._row_scale: Tensor | None = None  # (N,) fp16 only: what the stored rows of the hidden gradients lack
        self._num_tokens, self._shard = head.hidden.shape[0], head.shard

    def _pairs(self) -> list[FactorGradients]:
        return [self._main] if self._low is None else [self._main, self._low]

    def add(self, span: slice, grad: Tensor | RowScaled, scale: Tensor | None = None) -> None:
        """Adds a chunk's dL/dlogits (C, V), which stands for `grad * scale` where the 0-dim `scale` is given."""
        for pair in self._pairs():
            pair.add(span, grad, scale)
        if scale is not None:
            if self._row_scale is None:
                self._row_scale = torch.ones(self._num_tokens, dtype=torch.float32, device=scale.device)
            self._row_scale[span] = scale
        if self._bias is not None:
            total = grad.sum(0, dtype=self._bias.dtype) if isinstance(grad, Tensor) else grad.bias_gradient()
            self._bias += total if scale is None else total * scale

    def skip(self, span: slice) -> None:
        """A chunk whose loss does not depend on the head."""
        for pair in self._pairs():
            if pair.left is not None:
                pair.left[span] = 0

    def finish(self) -> HeadGradients:
        """No more chunks come."""
        for pair in self._pairs():
            pair.finish()
            if self._shard is not None and pair.left is not None:
                self._shard.sum(pair.left)
        return self

    def scaled(self, factor: Tensor | None = None, keep: bool = False) -> tuple[Tensor | None, ...]:
        """Gradients of the operands times the 0-dim `factor`, in their dtypes; None for what goes to `main_grad`.

        Scales in place, which spends this object, unless `keep`.
        """
        rows = factor if self._row_scale is None else self._row_scale.unsqueeze(1) * (1 if factor is None else factor)
        low = (None, None) if self._low is None else (self._low.left, self._low.right)
        weight = self._main.right
        if self._main_grad is not None and weight is not None:
            if weight is not self._main_grad:
                _add_scaled(self._main_grad, weight, factor)
            weight = None
        grads = (self._main.left, weight, self._bias, *low)
        factors = (rows, factor, factor, rows, factor)
        return tuple(
            None if grad is None else _scaled(grad, by, keep).to(dtype)
            for grad, by, dtype in zip(grads, factors, self._dtypes, strict=True)
        )


def _add_scaled(total: Tensor, part: Tensor, factor: Tensor | None) -> None:
    if factor is None:
        total.add_(part)
    else:
        total.addcmul_(part, factor)


def _scaled(grad: Tensor, factor: Tensor | None, keep: bool) -> Tensor:
    """grad * factor with the factor in fp32: a 0-dim factor would be rounded to the dtype of a 16-bit gradient."""
    if factor is None:
        return grad
    if grad.dtype.itemsize >= 4:
        return grad * factor if keep else grad.mul_(factor)
    out = torch.empty_like(grad) if keep else grad
    by_row = factor.expand(grad.shape[0], 1)
    for source, target, by in zip(grad.split(4096), out.split(4096), by_row.split(4096), strict=True):
        target.copy_(source.float().mul_(by))
    return out
