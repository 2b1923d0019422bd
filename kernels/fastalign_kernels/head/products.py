"""The matrix products of the head: logits of a chunk into one reused buffer, and the gradients that follow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from fastalign_kernels.head.chunks import chunk_size, chunk_spans
from fastalign_kernels.head.rows import Coefficients, RowStats, empty_stats, row_gradient, row_stats, slice_form
from fastalign_kernels.head.rows import stats_dtype as stats_dtype_of
from fastalign_kernels.head.token_stats import OUTPUTS, LogitForm

P = ParamSpec("P")
R = TypeVar("R")

# Chunks up to which a bf16 weight gradient on CPU is summed in bf16: error 3e-3 instead of 2e-3, and no fp32 copy.
BF16_SUM_CHUNKS = 8


def as_one_op(fn: Callable[P, R]) -> Callable[P, R]:
    """Makes `fn(hidden, ...)` opaque: autocast off (dtypes are the caller's choice), not traced by torch.compile."""

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        hidden = args[0] if args else kwargs["hidden"]
        assert isinstance(hidden, Tensor)
        with torch.autocast(hidden.device.type, enabled=False):
            return fn(*args, **kwargs)

    return torch._disable_dynamo(run)  # pyright: ignore[reportPrivateImportUsage]


def _product_ready(tensor: Tensor) -> Tensor:
    """The matrix in a layout that a BLAS takes: copies once rather than in each product."""
    rows, columns = tensor.shape
    fits = (tensor.stride(1) == 1 and tensor.stride(0) >= columns) or (
        tensor.stride(0) == 1 and tensor.stride(1) >= rows
    )
    return tensor if fits else tensor.contiguous()


def check_arguments(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, form: LogitForm, outputs: tuple[str, ...]
) -> None:
    """Raises ValueError for arguments that do not fit together, naming the one at fault."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: give (N, D) and (V, D) with the same D"
        )
    if not hidden.dtype.is_floating_point or not weight.dtype.is_floating_point:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: both must be floating point")
    if targets.shape != hidden.shape[:1] or targets.dtype.is_floating_point or targets.dtype == torch.bool:
        raise ValueError(
            f"targets {tuple(targets.shape)} {targets.dtype}: give ({hidden.shape[0]},) int64, one per row of hidden"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)}: give ({weight.shape[0]},), one per row of weight")
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise ValueError(f"outputs {unknown}: choose among {', '.join(OUTPUTS)}")
    if form.softcap is not None and form.softcap <= 0:
        raise ValueError(f"form.softcap={form.softcap}: give a positive number, or None for no soft-cap")
    temperature = form.temperature
    if isinstance(temperature, Tensor):
        if temperature.dim() > 1 or (temperature.dim() == 1 and temperature.shape != targets.shape):
            raise ValueError(f"form.temperature {tuple(temperature.shape)}: give a number or ({targets.shape[0]},)")
    elif temperature <= 0:
        raise ValueError(f"form.temperature={temperature}: give a positive number")
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(x) for x in targets.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"targets hold {low if low < 0 else high}: allowed are 0 to {weight.shape[0] - 1}; "
                "leave out what is not scored (such as -100)"
            )


class Head:
    """The operands of one call in the dtype that the products run in (the hidden states'), cut into chunks.

    The logits buffer has that dtype, but fp32 on CUDA, where products of bf16 and fp16 can be written in fp32.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        form: LogitForm,
        chunk: int | None = None,
        groups: Tensor | None = None,
    ):
        dtype = hidden.dtype
        self.hidden = _product_ready(hidden.detach())
        self.weight = _product_ready(weight.detach().to(dtype))  # one cast per call where the dtypes differ
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.targets = targets.to(torch.int64)
        self.grad_dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        cuda = hidden.is_cuda and torch.version.hip is None
        self.wide_products = cuda and dtype in (torch.bfloat16, torch.float16)
        self.logits_dtype = torch.float32 if self.wide_products else dtype
        self.stats_dtype = stats_dtype_of(dtype)
        temperature = form.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.detach().to(self.stats_dtype)
        self.form = LogitForm(form.scale, form.softcap, temperature)
        num_tokens, vocabulary = hidden.shape[0], weight.shape[0]
        if chunk is None:
            chunk = chunk_size(vocabulary, self.logits_dtype.itemsize, hidden.device)
        self.spans = chunk_spans(num_tokens, chunk, groups)
        longest = max((s.stop - s.start for s in self.spans), default=0)
        self._buffer = torch.empty(longest, vocabulary, dtype=self.logits_dtype, device=hidden.device)

    def logits(self, span: slice) -> Tensor:
        """W h + bias of a span (C, V), in the buffer that the next call overwrites."""
        hidden, out = self.hidden[span], self._buffer[: span.stop - span.start]
        if self.wide_products:
            torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=out)
            return out if self.bias is None else out.add_(self.bias)
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def empty_stats(self, outputs: tuple[str, ...]) -> RowStats:
        """Room for the statistics of all tokens."""
        return empty_stats(self.hidden.shape[0], outputs, self.stats_dtype, self.hidden.device)

    def stats(self, logits: Tensor, span: slice, outputs: tuple[str, ...], out: RowStats) -> None:
        """Statistics of the span's logits, written into the statistics of all tokens."""
        row_stats(logits, self.targets[span], slice_form(self.form, span), outputs, out.slice(span))

    def gradient(self, logits: Tensor, span: slice, rows: RowStats, coefficients: Coefficients) -> Tensor:
        """dL/d(W h + bias) of the span, in the memory of its logits; `rows` and `coefficients` are of the span."""
        form = slice_form(self.form, span)
        return row_gradient(logits, self.targets[span], form, rows, coefficients, self.hidden.dtype)


class HeadGradients:
    """Gradients of hidden, weight and bias, summed over chunks; what is not needed is neither made nor allocated.

    The weight's and the bias's are summed in fp32 (fp64 for fp64), but bf16 weights on CPU with few chunks in bf16.
    """

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]):
        need_hidden, need_weight, need_bias = needs
        self.dtypes = head.grad_dtypes
        dtype, weight_dtype, _ = self.dtypes
        few = len(head.spans) <= BF16_SUM_CHUNKS and head.hidden.device.type == "cpu"
        narrow = few and dtype == weight_dtype == torch.bfloat16
        self._sum_dtype = dtype if narrow else head.stats_dtype
        device = head.hidden.device
        self.hidden = torch.empty(head.hidden.shape, dtype=dtype, device=device) if need_hidden else None
        self.weight = torch.empty(head.weight.shape, dtype=self._sum_dtype, device=device) if need_weight else None
        self.bias = torch.zeros(head.weight.shape[0], dtype=head.stats_dtype, device=device) if need_bias else None
        self._row_scale: Tensor | None = None  # (N,) fp16 only: what the stored rows of `hidden` lack
        self._weight_started = False

    def add(self, head: Head, span: slice, grad: Tensor, scale: Tensor | None = None) -> None:
        """Adds a chunk's dL/dlogits (C, V), which stands for `grad * scale` where the 0-dim `scale` is given."""
        if self.hidden is not None:
            torch.mm(grad, head.weight, out=self.hidden[span])
            if scale is not None:
                if self._row_scale is None:
                    self._row_scale = torch.ones(self.hidden.shape[0], dtype=torch.float32, device=grad.device)
                self._row_scale[span] = scale
        if self.bias is not None:
            total = grad.sum(0, dtype=self.bias.dtype)
            self.bias += total if scale is None else total * scale
        if self.weight is not None:
            wide = {"out_dtype": torch.float32} if head.wide_products else {}
            self._add_weight(self.weight, grad.t(), head.hidden[span], scale, wide)

    def skip(self, span: slice) -> None:
        """A chunk whose loss does not depend on the head."""
        if self.hidden is not None:
            self.hidden[span] = 0

    def finish(self) -> HeadGradients:
        """No more chunks come."""
        if self.weight is not None and not self._weight_started:
            self.weight.zero_()
        return self

    def _add_weight(self, weight: Tensor, grad: Tensor, hidden: Tensor, scale: Tensor | None, wide: dict) -> None:
        """weight += grad hidden; the first product is written, not added, so that nothing is cleared before."""
        first, self._weight_started = not self._weight_started, True
        if scale is None and (wide or weight.dtype == hidden.dtype):
            if first:
                torch.mm(grad, hidden, **wide, out=weight)
            else:
                torch.addmm(weight, grad, hidden, **wide, out=weight)
            return
        product = torch.mm(grad, hidden, **wide)
        if scale is not None:
            product = product.to(weight.dtype).mul_(scale)
        if first:
            weight.copy_(product)
        else:
            weight.add_(product)

    def scaled(self, factor: Tensor | None = None, keep: bool = False) -> tuple[Tensor | None, ...]:
        """(hidden, weight, bias) gradients times the 0-dim `factor`, in the dtypes of the inputs.

        Scales in place, which spends this object, unless `keep`.
        """
        rows = factor if self._row_scale is None else self._row_scale.unsqueeze(1) * (1 if factor is None else factor)
        factors = (rows, factor, factor)
        grads = (self.hidden, self.weight, self.bias)
        return tuple(
            None if grad is None else _scaled(grad, by, keep).to(dtype)
            for grad, by, dtype in zip(grads, factors, self.dtypes, strict=True)
        )


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
