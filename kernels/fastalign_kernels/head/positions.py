"""Hidden states at any positions as the (N, D) rows that the head takes, without the positions that are not scored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign_kernels.head.operands import check_devices
from fastalign_kernels.head.token_stats import LogitForm


@dataclass
class Scored:
    """The rows that are scored, and the way back."""

    hidden: Tensor  # (N, D)
    targets: Tensor  # (N,)
    form: LogitForm
    low_rank: tuple[Tensor, Tensor] | None  # (N, r), (V, r)
    shape: torch.Size  # of the positions
    kept: Tensor | None  # (N,) flat positions; None: all

    def spread(self, values: Tensor) -> Tensor:
        """`values` (N,) at their positions, 0 elsewhere."""
        if self.kept is not None:
            values = values.new_zeros(self.shape.numel()).index_copy(0, self.kept, values)
        return values.reshape(self.shape)


def scored_positions(
    hidden: Tensor,
    targets: Tensor,
    form: LogitForm,
    low_rank: tuple[Tensor, Tensor] | None = None,
    ignore_index: int | None = -100,
) -> Scored:
    """Rows of hidden (..., D), targets (...) and u (..., r) whose target is not `ignore_index`.

    Finding them reads the targets back from a GPU once; None: all are scored, nothing is read. A temperature (...) in
    `form` goes with its row. ValueError for shapes that do not fit.
    """
    shape = hidden.shape[:-1]
    if targets.shape != shape:
        raise ValueError(f"targets {tuple(targets.shape)}: give {tuple(shape)}, one per hidden state")
    check_devices(hidden=hidden, targets=targets)
    rows = {"hidden": hidden.reshape(-1, hidden.shape[-1]), "targets": targets.reshape(-1)}
    temperature = form.temperature
    if isinstance(temperature, Tensor) and temperature.dim():
        if temperature.shape != shape:
            raise ValueError(f"temperature {tuple(temperature.shape)}: give a number or {tuple(shape)}")
        rows["temperature"] = temperature.reshape(-1)
    if low_rank is not None:
        if low_rank[0].shape[:-1] != shape:
            raise ValueError(f"low_rank[0] {tuple(low_rank[0].shape)}: give {(*shape, 'r')}")
        rows["low"] = low_rank[0].reshape(-1, low_rank[0].shape[-1])
    kept = None
    if ignore_index is not None:
        found = (rows["targets"] != ignore_index).nonzero().squeeze(1)
        if found.numel() < targets.numel():
            kept = found
            rows = {name: v.index_select(0, kept) for name, v in rows.items()}
    return Scored(
        rows["hidden"],
        rows["targets"],
        LogitForm(form.scale, form.softcap, rows.get("temperature", temperature)),
        None if low_rank is None else (rows["low"], low_rank[1]),
        shape,
        kept,
    )
