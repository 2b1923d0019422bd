"""Sums over the rows (sequences) of flat tokens, the same bits on every run."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign_kernels.losses.sequences import row_sums


class Rows:
    """Which row each token belongs to: `ids` (N,) int64, non-decreasing in [0, num_rows)."""

    def __init__(self, ids: Tensor, num_rows: int):
        if ids.dim() != 1 or ids.dtype.is_floating_point:
            raise ValueError(f"rows {tuple(ids.shape)} {ids.dtype}: give (N,) int64, the row of each token")
        self.ids = ids
        self.num_rows = num_rows
        # a search in sorted ids, not bincount, which reads its result back from a GPU
        borders = torch.searchsorted(ids, torch.arange(num_rows + 1, device=ids.device, dtype=ids.dtype))
        self.lengths = borders.diff()  # (num_rows,) int64, tokens

    def token_lengths(self) -> Tensor:
        """(N,) int64: the length of each token's row."""
        return self.lengths[self.ids]

    def sums(self, values: Tensor) -> Tensor:
        """(num_rows,) sums of values (N,), without gradient; 0 for a row without tokens."""
        return row_sums(values.detach(), self.lengths)

    def spread_sums(self, values: Tensor) -> Tensor:
        """(N,): at each token the sum of `values` (N,) over its row; differentiable."""
        return _SpreadSums.apply(values, self)

    def spread_means(self, values: Tensor) -> Tensor:
        """(N,): at each token the mean of `values` (N,) over its row; differentiable."""
        return self.spread_sums(values) / self.token_lengths()


class _SpreadSums(torch.autograd.Function):
    """A symmetric map, so its backward is itself; indexing's own backward would add with atomics on a GPU."""

    @staticmethod
    def forward(ctx, values, rows):
        ctx.rows = rows
        return rows.sums(values)[rows.ids]

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _SpreadSums.apply(grad.contiguous(), ctx.rows), None
