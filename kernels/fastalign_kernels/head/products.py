"""The matrix products of the head forward: logits of a chunk into one reused buffer, statistics, their gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastalign_kernels.head.chunks import chunk_size, chunk_spans
from fastalign_kernels.head.form_table import head_form
from fastalign_kernels.head.operands import Operands
from fastalign_kernels.head.rows import Coefficients, RowStats, empty_stats, row_gradient, row_stats, slice_form
from fastalign_kernels.head.rows import stats_dtype as stats_dtype_of
from fastalign_kernels.head.token_stats import LogitForm
from fastalign_kernels.head.vocabulary_parallel import VocabularyShard

if TYPE_CHECKING:
    from fastalign_kernels.head.offset_rows import RowScaled

P = ParamSpec("P")
R = TypeVar("R")


def as_one_op(fn: Callable[P, R]) -> Callable[P, R]:
    """Makes `fn(hidden, ...)` opaque: autocast off (dtypes are the caller's choice), not traced by torch.compile."""

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None)
        with nullcontext() if first is None else torch.autocast(first.device.type, enabled=False):
            return fn(*args, **kwargs)

    return torch._disable_dynamo(run)  # pyright: ignore[reportPrivateImportUsage]


def _product_ready(tensor: Tensor) -> Tensor:
    """The matrix in a layout that a BLAS takes: copies once rather than in each product."""
    rows, columns = tensor.shape
    fits = (tensor.stride(1) == 1 and tensor.stride(0) >= columns) or (
        tensor.stride(0) == 1 and tensor.stride(1) >= rows
    )
    return tensor if fits else tensor.contiguous()


class Head:
    """The operands of one call in the dtype that the products run in (the hidden states'), cut into chunks.

    The logits buffer has that dtype, but fp32 on CUDA, where products of bf16 and fp16 can be written in fp32.
    Where `head_form` says so, the three roles (logits, stats, gradient) are those of an `OffsetEngine`.
    """

    def __init__(
        self,
        operands: Operands,
        targets: Tensor,
        form: LogitForm,
        chunk: int | None = None,
        groups: Tensor | None = None,
        shard: VocabularyShard | None = None,
        keep: bool = False,
        plain: bool = False,
    ):
        """`keep`: gradients follow. `plain`: the caller reads the logits themselves, which an engine does not give."""
        hidden, dtype = operands.hidden, operands.hidden.dtype
        self.hidden = _product_ready(hidden.detach())
        self.weight = _product_ready(operands.weight.detach().to(dtype))  # one cast per call where the dtypes differ
        self.bias = None if operands.bias is None else operands.bias.detach().to(dtype)
        u, b = operands.low_hidden, operands.low_weight
        self.low_rank = None
        if u is not None and b is not None:
            self.low_rank = _product_ready(u.detach().to(dtype)), _product_ready(b.detach().to(dtype))
        self.grad_dtypes = tuple(None if t is None else t.dtype for t in operands)
        cuda = hidden.is_cuda and torch.version.hip is None
        self.wide_products = cuda and dtype in (torch.bfloat16, torch.float16)
        self.logits_dtype = torch.float32 if self.wide_products else dtype
        self.stats_dtype = stats_dtype_of(dtype)
        num_tokens, vocabulary = hidden.shape[0], self.weight.shape[0]
        self.shard, self.targets = shard, targets.to(torch.int64)
        if shard is not None:
            self._share = vocabulary / shard.vocabulary(vocabulary, hidden.device).to(self.stats_dtype)
            self.targets = shard.local_targets(self.targets, vocabulary)
        temperature = form.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.detach().to(self.stats_dtype)
        self.form = LogitForm(form.scale, form.softcap, temperature)
        offset = shard is None and self.low_rank is None and not plain
        offset = offset and head_form(hidden.device, dtype, num_tokens, vocabulary, hidden.shape[1]) == "offset"
        if chunk is None:
            itemsize = dtype.itemsize if offset else self.logits_dtype.itemsize
            columns = vocabulary if keep or not offset else -(-vocabulary // 32)  # without E: sums of tiles alone
            chunk = chunk_size(columns, itemsize, hidden.device)
        self.spans = chunk_spans(num_tokens, chunk, groups)
        longest = max((s.stop - s.start for s in self.spans), default=0)
        self._engine = self._offset_engine(longest, keep) if offset else None
        if not offset:
            stride = -(-vocabulary // 8) * 8  # rows on 16-byte borders, also of a vocabulary such as 151,643
            buffer = torch.empty(longest, stride, dtype=self.logits_dtype, device=hidden.device)
            buffer[:, vocabulary:] = 0  # bf16 products on CPU read columns in pairs, past an odd vocabulary
            self._buffer = buffer[:, :vocabulary]

    def _offset_engine(self, rows: int, keep: bool):
        from fastalign_kernels.head.offset_rows import OffsetEngine

        return OffsetEngine(self.hidden, self.weight, self.bias, self.targets, self.form, rows, keep)

    def logits(self, span: slice) -> Any:
        """W h + bias + b u of a span (C, V), in the buffer that the next call overwrites."""
        if self._engine is not None:
            return self._engine.logits(span)
        hidden, out = self.hidden[span], self._buffer[: span.stop - span.start]
        wide: dict[str, Any] = {"out_dtype": torch.float32} if self.wide_products else {}
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), **wide, out=out)
        elif self.wide_products:
            torch.mm(hidden, self.weight.t(), **wide, out=out).add_(self.bias)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        if self.low_rank is not None:
            low_hidden, low_weight = self.low_rank
            torch.addmm(out, low_hidden[span], low_weight.t(), **wide, out=out)
        return out

    def empty_stats(self, outputs: tuple[str, ...]) -> RowStats:
        """Room for the statistics of all tokens."""
        written = tuple(name for name in outputs if name != "lse")
        rows = empty_stats(self.hidden.shape[0], written, self.stats_dtype, self.hidden.device)
        rows.stats.lse = rows.lse if "lse" in outputs else None
        return rows

    def stats(self, logits: Any, span: slice, outputs: tuple[str, ...], out: RowStats) -> None:
        """Statistics of the span's logits, written into the statistics of all tokens."""
        part = out.slice(span)
        if self._engine is not None:
            return self._engine.stats(logits, span, outputs, part)
        form = slice_form(self.form, span)
        row_stats(logits, self.targets[span], form, outputs, part)
        if self.shard is not None:
            self.shard.combine(logits, self.targets[span], form, part, self._share)
        return None

    def gradient(self, logits: Any, span: slice, rows: RowStats, coefficients: Coefficients) -> Tensor | RowScaled:
        """dL/d(logits) of the span, in the memory of its logits; `rows` and `coefficients` are of the span."""
        if self._engine is not None:
            return self._engine.gradient(logits, span, rows, coefficients)
        if self.shard is not None:
            coefficients = self.shard.coefficients(coefficients, self._share)
        form = slice_form(self.form, span)
        return row_gradient(logits, self.targets[span], form, rows, coefficients, self.hidden.dtype)
