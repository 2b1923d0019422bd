"""The C++ row kernels on CPU tensors: the arguments of head/rows.py as addresses."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastalign_kernels.dispatch import native_module
from fastalign_kernels.head.token_stats import LogitForm

if TYPE_CHECKING:
    from fastalign_kernels.head.rows import Coefficients, RowStats


def _native() -> ModuleType:
    module = native_module()
    assert module is not None, "dispatch.backend chose native"
    return module


def _address(tensor: Tensor | None) -> int:
    """Address of a contiguous vector; 0 for None."""
    assert tensor is None or tensor.is_contiguous()
    return 0 if tensor is None else tensor.data_ptr()


def _row_logits(logits: Tensor, targets: Tensor, form: LogitForm):
    """The native description of the logits, and the tensors that must outlive it."""
    assert logits.stride(1) == 1 or logits.shape[1] == 1
    targets = targets.contiguous()
    temperature, temperatures = form.temperature, None
    if isinstance(temperature, Tensor) and temperature.dim() == 1:
        temperature, temperatures = 1.0, temperature.to(torch.float32).contiguous()
    native = _native().RowLogits(
        data=logits.data_ptr(),
        is_bfloat16=logits.dtype == torch.bfloat16,
        num_rows=logits.shape[0],
        vocabulary=logits.shape[1],
        stride=logits.stride(0),
        targets=_address(targets),
        temperatures=_address(temperatures),
        scale=form.scale,
        softcap=form.softcap or 0.0,
        temperature=float(temperature),
    )
    return native, (targets, temperatures)


def row_stats(logits: Tensor, targets: Tensor, form: LogitForm, out: RowStats, isa: str = "") -> None:
    """`head.rows.row_stats` in C++; `isa` asks for a lower instruction set (tests)."""
    native, _alive = _row_logits(logits, targets, form)
    stats = out.stats
    # without room of its own the mean logit lies in mean_logp until the last line
    mean_logit = stats.mean_logp if stats.mean_logit is None else stats.mean_logit
    _native().row_statistics(
        native,
        logp=_address(stats.logp),
        lse=_address(out.lse),
        entropy=_address(stats.entropy),
        top1=_address(stats.top1),
        mean_logit=_address(mean_logit),
        log_sum_p2=_address(stats.log_sum_p2),
        num_threads=torch.get_num_threads(),
        isa=isa,
    )
    if stats.mean_logp is not None and mean_logit is not None:
        torch.sub(mean_logit, out.lse, out=stats.mean_logp)


def row_gradient(
    logits: Tensor, targets: Tensor, form: LogitForm, rows: RowStats, coefficients: Coefficients, isa: str = ""
) -> None:
    """`head.rows.row_gradient` in C++, in place."""
    native, _alive = _row_logits(logits, targets, form)
    c = coefficients.map(lambda v: v.contiguous())
    _native().row_gradient(
        native,
        on_logp=_address(c.logp),
        on_entropy=_address(c.entropy),
        on_mean_logp=_address(c.mean_logp),
        on_mean_logit=_address(c.mean_logit),
        on_log_sum_p2=_address(c.log_sum_p2),
        lse=_address(rows.lse),
        entropy=_address(rows.stats.entropy),
        log_sum_p2=_address(rows.stats.log_sum_p2),
        num_threads=torch.get_num_threads(),
        isa=isa,
    )
