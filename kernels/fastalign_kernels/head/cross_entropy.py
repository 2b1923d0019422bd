"""Cross-entropy of a linear head without its logits in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign_kernels.head.deferred import deferred
from fastalign_kernels.head.fused import fused
from fastalign_kernels.head.operands import check_constant, check_devices
from fastalign_kernels.head.positions import Scored, scored_positions
from fastalign_kernels.head.rows import _form_logits
from fastalign_kernels.head.token_stats import LogitForm, TokenStats
from fastalign_kernels.head.vocabulary_parallel import VocabularyShard
from fastalign_kernels.head.whole_weights import whole
from fastalign_kernels.losses.supervised import dft as dft_loss
from fastalign_kernels.losses.supervised import nll, smoothed_nll

Reduction = Literal["mean", "sum", "none"]
BLOCK_ROWS = 4096  # of a matrix that is cast to fp32 a part at a time


@dataclass
class _TokenLosses:
    """Loss of each scored token but for `column_term`, times 1 / divisor."""

    label_smoothing: float
    z_loss: float
    dft: bool
    class_weights: Tensor | None  # (V,)
    by_token: Tensor | None  # (N,) class weight of each target
    divisor: Tensor | int  # of the cross-entropy
    num_tokens: int  # divisor of the z-loss

    @property
    def outputs(self) -> tuple[str, ...]:
        """Statistics that are needed."""
        smooth = self.label_smoothing > 0
        lse = self.z_loss or (smooth and self.class_weights is not None)
        names = {"mean_logp": smooth and self.class_weights is None, "lse": lse}
        return ("logp", *(name for name, needed in names.items() if needed))

    def __call__(self, stats: TokenStats, span: slice = slice(None)) -> Tensor:
        """(C,) losses of a span."""
        if stats.mean_logp is not None:
            loss = smoothed_nll(stats.logp, stats.mean_logp, self.label_smoothing)
        else:
            loss = dft_loss(stats.logp) if self.dft else nll(stats.logp)
        if self.by_token is not None and self.class_weights is not None:
            loss = self.by_token[span] * loss
            if self.label_smoothing and stats.lse is not None:  # sum_v w_v log p_v = column_term - lse sum_v w_v
                share = self.label_smoothing / len(self.class_weights)
                loss = (1 - self.label_smoothing) * loss + share * self.class_weights.sum() * stats.lse
        loss = loss / self.divisor
        if self.z_loss and stats.lse is not None:
            loss = loss + self.z_loss / self.num_tokens * stats.lse.square()
        return loss

    def column_term(self, scored: Scored, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(N,) sum over the columns of class weight times logit, from W^T w: a linear function of the hidden state."""
        assert self.class_weights is not None
        w = self.class_weights
        with torch.autocast(w.device.type, enabled=False):
            total = _WeightedColumns.apply(scored.hidden, weight, w, getattr(weight, "main_grad", None))
            if bias is not None:
                total = total + bias.to(w.dtype) @ w
            if scored.low_rank is not None:
                total = total + _WeightedColumns.apply(*scored.low_rank, w, None)
        temperature = scored.form.temperature
        return total * scored.form.scale / (temperature.detach() if isinstance(temperature, Tensor) else temperature)


class _WeightedColumns(torch.autograd.Function):
    """left (N, K) right (V, K)^T w in the dtype of w (V,), fp32 or wider: a sum of V logits is beyond fp16."""

    @staticmethod
    def forward(ctx, left, right, w, main_grad):
        total = _row_sum(right, w)
        ctx.save_for_backward(left, right, w, total)
        ctx.main_grad = main_grad
        return torch.cat([rows.to(w.dtype) @ total for rows in left.split(BLOCK_ROWS)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        left, right, w, total = ctx.saved_tensors
        to_left = to_right = None
        if ctx.needs_input_grad[0]:
            to_left = torch.mul(grad.unsqueeze(1), total, out=torch.empty_like(left))
        if ctx.needs_input_grad[1]:
            with torch.autocast(w.device.type, enabled=False):
                factors = w.unsqueeze(1), _row_sum(left, grad)
            if ctx.main_grad is None:
                to_right = torch.mul(*factors, out=torch.empty_like(right))
            else:
                ctx.main_grad.addcmul_(*factors)
        return to_left, to_right, None, None


def _row_sum(matrix: Tensor, factors: Tensor) -> Tensor:
    """(K,) matrix^T factors of (M, K) and (M,), in the dtype of the factors, whatever the matrix has."""
    total = factors.new_zeros(matrix.shape[1])
    for rows, part in zip(matrix.split(BLOCK_ROWS), factors.split(BLOCK_ROWS), strict=True):
        total += part @ rows.to(factors.dtype)
    return total


def _check(reduction: str, label_smoothing: float, dft: bool, weights: Tensor | None, weight: Tensor, capped: bool):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: choose 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing}: give a number from 0 to 1")
    if dft and label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing} with dft=True: choose one")
    if weights is not None and weights.shape != weight.shape[:1]:
        raise ValueError(f"class_weights {tuple(weights.shape)}: give ({weight.shape[0]},), one per row of weight")
    if weights is not None and label_smoothing and capped:
        raise ValueError("softcap with both class_weights and label_smoothing: leave one of the three out")


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    class_weights: Tensor | None = None,
    z_loss: float = 0.0,
    dft: bool = False,
) -> Tensor:
    """The specification of `linear_cross_entropy`, from all logits in plain torch."""
    z = _form_logits(F.linear(hidden, weight, bias), LogitForm(logit_scale, softcap, temperature))[0].flatten(0, -2)
    flat, weights = targets.flatten(), None if class_weights is None else class_weights.to(z.dtype)
    counted = flat != (-100 if ignore_index is None else ignore_index)
    losses = F.cross_entropy(z, flat.where(counted, -100), weights, reduction="none", label_smoothing=label_smoothing)
    if dft:
        losses = losses * z.detach().softmax(-1).gather(1, flat.masked_fill(~counted, 0)[:, None])[:, 0]
    squares = z_loss * z.logsumexp(-1).square().where(counted, 0)
    if reduction == "mean":
        by = counted.to(z.dtype) if weights is None else weights[flat.masked_fill(~counted, 0)].where(counted, 0)
        return losses.sum() / by.sum().where(by.sum() > 0, 1) + squares.sum() / counted.sum().clamp(min=1)
    return (losses + squares).sum() if reduction == "sum" else (losses + squares).view(targets.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    class_weights: Tensor | None = None,
    z_loss: float = 0.0,
    dft: bool = False,
    low_rank: tuple[Tensor, Tensor] | None = None,
    shard: VocabularyShard | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy, in nats, of softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature.

    hidden (..., D), weight (V, D), targets (...) int64, temperature a number or (...). As
    `torch.nn.functional.cross_entropy` with `class_weights` (V,) as its `weight`, but the mean over nothing is 0, not
    NaN. 0-dim fp32, or (...) for reduction "none". Three products, four for "none".

    `z_loss` times the squared log-normaliser is added (arXiv:2204.02311 Sec. 5; its mean is over tokens). `dft`
    weights each token by its own probability (`losses.supervised.dft`). `low_rank` u (..., r) and b (V, r), `shard`
    and `weight.main_grad` as in `fused`. Targets equal to `ignore_index` are dropped before the first product and cost
    nothing; to find them, the targets are read back from a GPU once. None (all are scored) does without, as `fused` on
    listed positions does, which returns statistics too. Inside torch.compile this is one operator of the graph
    (`custom_ops.py`), where it takes plain weights and gives their gradients to autograd; `low_rank`, `shard`,
    reduction "none" break it. ValueErrors.
    """
    _check(reduction, label_smoothing, dft, class_weights, weight, softcap is not None)
    check_constant("class_weights", class_weights)
    check_constant("temperature", temperature)
    if class_weights is not None and shard is not None:
        raise ValueError("class_weights with shard: give per-token weights to a loss function of `fused` instead")
    form = LogitForm(logit_scale, softcap, temperature)
    if torch.compiler.is_compiling() and low_rank is None and shard is None and reduction != "none":
        from fastalign_kernels import custom_ops

        settings = (ignore_index, reduction, label_smoothing, z_loss, dft)
        return custom_ops.linear_cross_entropy(hidden, weight, targets, class_weights, form, settings, bias, chunk)
    weight, bias = whole(weight, "weight"), whole(bias, "bias")
    scored = scored_positions(hidden, targets, form, low_rank, ignore_index)
    check_devices(hidden=hidden, weight=weight, class_weights=class_weights)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = None if class_weights is None else class_weights.detach().to(wide)
    by_token = None if weights is None else weights[scored.targets]
    count = max(1, scored.targets.numel())
    divisor = 1
    if reduction == "mean":
        divisor = count if by_token is None else by_token.sum()
        divisor = divisor.where(divisor > 0, 1) if isinstance(divisor, Tensor) else divisor
    losses = _TokenLosses(
        label_smoothing, z_loss, dft, weights, by_token, divisor, count if reduction == "mean" else 1
    )
    options: dict[str, Any] = {"bias": bias, "form": scored.form, "outputs": losses.outputs, "chunk": chunk}
    options |= {"low_rank": scored.low_rank, "shard": shard}
    if reduction == "none":
        result = losses(deferred(scored.hidden, weight, scored.targets, **options))
    else:
        total = lambda stats, span: losses(stats, span).sum()  # noqa: E731
        result, _ = fused(scored.hidden, weight, scored.targets, total, **options)
    if weights is not None and label_smoothing:
        term = losses.column_term(scored, weight, bias) * (label_smoothing / len(weights))
        result = result - (term if reduction == "none" else term.sum() / divisor)
    return scored.spread(result) if reduction == "none" else result
