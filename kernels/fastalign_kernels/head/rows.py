"""Row kernels of the head: a row of logits -> statistics of its softmax, and the gradient of any loss on them.

Form of the logits, from the product m = W h + bias (`LogitForm`):

    z = softcap * tanh(scale * m / softcap) / temperature        (without soft-cap: scale * m / temperature)

Statistics of a row, with p = softmax(z), y the target and V the vocabulary, in nats:

    lse = log sum_v e^z_v         logp = z_y - lse                entropy H = -sum_v p_v log p_v
    mean_logit = sum_v z_v / V    mean_logp = mean_logit - lse    log_sum_p2 = log S2,  S2 = sum_v p_v^2
    top1 = (the first v with the largest z_v is y)

Gradient, for a = dL/dlogp, b = dL/dH, c = dL/dmean_logp, d = dL/dmean_logit, e = dL/dlog_sum_p2 of the row. From
dp_v/dz_w = p_v (1[v=w] - p_w): dH/dz_v = -p_v (log p_v + H) and dlog S2/dz_v = 2 p_v^2 / S2 - 2 p_v, so

    dL/dz_v = a (1[v=y] - p_v) - b p_v (log p_v + H) + c (1/V - p_v) + d / V + 2 e (p_v^2 / S2 - p_v)
    dL/dm_v = dL/dz_v * (scale / temperature) * (1 - tanh^2(scale * m_v / softcap))

The temperature is a constant: no gradient goes to it, also where it is a tensor.
A target of -1 is a token whose column is not among these (it lies on another shard of the vocabulary): logp is -inf
and top1 false, the other statistics are those of the columns here; the gradient's a 1[v=y] is absent, a p_v is not.
Arithmetic is fp32 (fp64 for fp64 logits) whatever the logits are stored in; `row_stats_reference` and
`row_gradient_reference` are the specification of the kernels in C++ (csrc/rows.cpp) and Triton (triton_rows.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign_kernels.dispatch import backend
from fastalign_kernels.head import native_rows
from fastalign_kernels.head.token_stats import LogitForm, TokenStats

# Logits that the reference handles at a time: bounds its temporaries (a few of this size, in the dtype of the sums).
REFERENCE_BLOCK = {"cpu": 2**20, "other": 2**24}


@dataclass
class RowStats:
    """Statistics of (C, V) logits, and what the gradient needs again: the log-normaliser."""

    stats: TokenStats
    lse: Tensor  # (C,) fp32 (fp64 for fp64 logits), nats

    def slice(self, span: slice) -> RowStats:
        return RowStats(self.stats.slice(span), self.lse[span])


@dataclass
class Coefficients:
    """dL/d(statistic) of each row, each (C,) fp32 (fp64 for fp64 logits); None is zero."""

    logp: Tensor | None = None
    entropy: Tensor | None = None
    mean_logp: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_p2: Tensor | None = None

    def map(self, fn) -> Coefficients:
        """`fn` on each coefficient that is not None."""
        return Coefficients(**{k: None if v is None else fn(v) for k, v in vars(self).items()})

    def given(self) -> list[Tensor]:
        return [v for v in vars(self).values() if v is not None]


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the statistics for inputs of `dtype`: fp64 stays, everything else gives fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slice_form(form: LogitForm, span: slice) -> LogitForm:
    """The logit form of a span of tokens."""
    temperature = form.temperature
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        return form
    return LogitForm(form.scale, form.softcap, temperature[span])


def _column(temperature: float | Tensor) -> float | Tensor:
    return temperature.unsqueeze(-1) if isinstance(temperature, Tensor) and temperature.dim() else temperature


def _form_logits(logits: Tensor, form: LogitForm) -> tuple[Tensor, Tensor | None]:
    """z (C, V) in the dtype of the statistics, and tanh of the soft-cap for its derivative."""
    z = logits.to(stats_dtype(logits.dtype))
    tanh = None
    if form.scale != 1.0:
        z = z * form.scale
    if form.softcap is not None:
        tanh = torch.tanh(z / form.softcap)
        z = tanh * form.softcap
    if isinstance(form.temperature, Tensor) or form.temperature != 1.0:
        z = z / _column(form.temperature)
    return z, tanh


def row_stats_reference(logits: Tensor, targets: Tensor, form: LogitForm, outputs: tuple[str, ...]) -> RowStats:
    """The statistics of (C, V) logits in plain torch; fields not in `outputs` are None, except logp."""
    z, _ = _form_logits(logits, form)
    top, argmax = z.max(dim=1)
    z_target = z.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1).masked_fill(targets < 0, -torch.inf)
    shifted = z - top.unsqueeze(1)
    e = shifted.exp()
    sums = e.sum(dim=1)
    log_sum = sums.log()
    lse = top + log_sum
    stats = TokenStats(logp=z_target - top - log_sum)
    if "entropy" in outputs:
        # the floor keeps 0 * -inf out where a logit is -inf
        floor = torch.finfo(z.dtype).min
        stats.entropy = log_sum - (e * shifted.clamp_min_(floor)).sum(dim=1) / sums
    if "top1" in outputs:
        stats.top1 = argmax == targets
    if "mean_logp" in outputs or "mean_logit" in outputs:
        mean_logit = z.mean(dim=1)
        stats.mean_logp = mean_logit - lse if "mean_logp" in outputs else None
        stats.mean_logit = mean_logit if "mean_logit" in outputs else None
    if "log_sum_p2" in outputs:
        stats.log_sum_p2 = e.square_().sum(dim=1).log() - 2 * log_sum
    return RowStats(stats, lse)


def row_gradient_reference(
    logits: Tensor, targets: Tensor, form: LogitForm, rows: RowStats, coefficients: Coefficients, out: Tensor
) -> None:
    """dL/dm (C, V) in plain torch, written to `out` (which may be the logits themselves)."""
    z, tanh = _form_logits(logits, form)
    zero = torch.zeros_like(rows.lse)
    a, b, c, d, e = (zero if v is None else v for v in vars(coefficients).values())
    log_p = z - rows.lse.unsqueeze(1)
    p = log_p.exp()
    grad = p * (-(a + c + 2 * e)).unsqueeze(1)
    if rows.stats.entropy is not None and coefficients.entropy is not None:
        floor = torch.finfo(z.dtype).min
        grad -= b.unsqueeze(1) * p * (log_p.clamp_min_(floor) + rows.stats.entropy.unsqueeze(1))
    if rows.stats.log_sum_p2 is not None and coefficients.log_sum_p2 is not None:
        grad += (2 * e * torch.exp(-rows.stats.log_sum_p2)).unsqueeze(1) * p.square_()
    grad += ((c + d) / logits.shape[1]).unsqueeze(1)
    at_target = a.masked_fill(targets < 0, 0).unsqueeze(1)
    grad.scatter_add_(1, targets.clamp_min(0).unsqueeze(1), at_target)
    if tanh is not None:
        grad *= 1 - tanh.square()
    if form.scale != 1.0 or isinstance(form.temperature, Tensor) or form.temperature != 1.0:
        grad *= form.scale / _column(form.temperature)
    out.copy_(grad)


def _blocks(logits: Tensor) -> list[slice]:
    """Spans of rows that the reference handles at a time."""
    num_rows, vocabulary = logits.shape
    size = max(1, REFERENCE_BLOCK["cpu" if logits.device.type == "cpu" else "other"] // vocabulary)
    return [slice(i, min(i + size, num_rows)) for i in range(0, num_rows, size)]


def empty_stats(num_rows: int, outputs: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> RowStats:
    """Room for the statistics of `num_rows` rows."""
    fields = {name: torch.empty(num_rows, dtype=dtype, device=device) for name in {"logp", *outputs} - {"top1"}}
    if "top1" in outputs:
        fields["top1"] = torch.empty(num_rows, dtype=torch.bool, device=device)
    return RowStats(TokenStats(**fields), torch.empty(num_rows, dtype=dtype, device=device))


def row_stats(logits: Tensor, targets: Tensor, form: LogitForm, outputs: tuple[str, ...], out: RowStats) -> None:
    """Statistics of (C, V) logits of any row stride, written to `out`; the logits stay as they are."""
    chosen = backend(logits.device, logits.dtype)
    if chosen == "triton":
        from fastalign_kernels.head import triton_rows

        return triton_rows.row_stats(logits, targets, form, out)
    if chosen == "native":
        return native_rows.row_stats(logits, targets, form, out)
    for block in _blocks(logits):
        rows = row_stats_reference(logits[block], targets[block], slice_form(form, block), outputs)
        out.lse[block] = rows.lse
        for name, value in vars(rows.stats).items():
            if value is not None:
                getattr(out.stats, name)[block] = value
    return None


def row_gradient(
    logits: Tensor, targets: Tensor, form: LogitForm, rows: RowStats, coefficients: Coefficients, dtype: torch.dtype
) -> Tensor:
    """dL/dm (C, V) in `dtype`, in the memory of the logits, which are lost.

    Where `dtype` is narrower than the logits, each row of the result lies at the start of its logits' row.
    """
    out = logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]
    chosen = backend(logits.device, logits.dtype)
    if chosen == "triton":
        from fastalign_kernels.head import triton_rows

        triton_rows.row_gradient(logits, targets, form, rows, coefficients, out)
        return out
    if chosen == "native":
        native_rows.row_gradient(logits, targets, form, rows, coefficients)
        return out
    for block in _blocks(logits):
        part = coefficients.map(lambda v, block=block: v[block])
        row_gradient_reference(
            logits[block], targets[block], slice_form(form, block), rows.slice(block), part, out[block]
        )
    return out
