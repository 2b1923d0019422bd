"""A head whose vocabulary is spread over ranks: statistics of all columns from those of each rank's own.

With lse_r, H_r, S2_r of the columns of rank r, m = max_r lse_r, e_r = exp(lse_r - m) and Z = sum_r e_r (so that the
rank's columns have the probability e_r / Z):

    lse = m + log Z         logp = [logp_r + lse_r - m of the owner] - log Z        S2 = sum_r e_r^2 S2_r / Z^2
    H = log Z + sum_r e_r (H_r - (lse_r - m)) / Z                                   mean_logit = sum_r V_r mean_r / V
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign_kernels.head.rows import Coefficients, RowStats, _form_logits
from fastalign_kernels.head.token_stats import LogitForm


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of a head: `weight`, `bias` and the adapter's b hold rows start, start + 1, ... of the whole.

    All ranks of `group` call together with the same hidden states, targets (ids in the whole vocabulary) and loss.
    Statistics and losses are those of the whole head on every rank. The gradient of the hidden states is summed over
    the group, in their dtype; gradients of weight and bias stay with their rows.
    """

    group: dist.ProcessGroup | None  # None: all ranks
    start: int

    def vocabulary(self, num_rows: int, device: torch.device) -> Tensor:
        """Rows of the whole head, 0-dim int64 on `device`."""
        total = torch.full((), num_rows, device=device)  # filled there: a copy would wait for it
        dist.all_reduce(total, group=self.group)
        return total

    def local_targets(self, targets: Tensor, num_rows: int) -> Tensor:
        """Columns of the targets on this rank, -1 where they are elsewhere."""
        local = targets - self.start
        return local.masked_fill_((local < 0) | (local >= num_rows), -1)

    def combine(self, logits: Tensor, targets: Tensor, form: LogitForm, rows: RowStats, share: Tensor) -> None:
        """Turns the statistics of (C, V_r) logits at local targets into those of all columns, in place.

        `share` is V_r / V. Two reductions: a maximum and a sum of a few (C,) vectors.
        """
        stats, here = rows.stats, targets >= 0
        maxima = [rows.lse]
        best = rows.lse
        if stats.top1 is not None:
            ends = logits.amax(1, keepdim=True) if form.scale >= 0 else logits.amin(1, keepdim=True)
            found, _ = _form_logits(torch.cat([ends, logits.gather(1, targets.clamp_min(0)[:, None])], 1), form)
            best = found[:, 0]
            absent = found.new_full((), -torch.inf)
            maxima += [torch.where(here, found[:, 1], absent), torch.where(here, float(self.start), absent)]
        highest = torch.stack(maxima)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        shift = rows.lse - highest[0]
        e = shift.exp()
        sums = {"total": e, "logp": torch.where(here, stats.logp + shift, 0.0)}
        if stats.entropy is not None:
            sums["entropy"] = e * (stats.entropy - shift)
        if stats.log_sum_p2 is not None:
            sums["squares"] = e.square() * stats.log_sum_p2.exp()
        if stats.mean_logit is not None:
            sums["mean"] = stats.mean_logit * share
        elif stats.mean_logp is not None:
            sums["mean"] = (stats.mean_logp + rows.lse) * share
        if stats.top1 is not None:  # beaten by a larger logit, or by an equal one that comes before
            _, target_logit, owner = highest
            elsewhere = (best > target_logit) | ((best == target_logit) & (self.start < owner))
            sums["beaten"] = torch.where(here, ~stats.top1, elsewhere).to(e.dtype)
        packed = torch.stack(list(sums.values()))
        dist.all_reduce(packed, group=self.group)
        self._write(dict(zip(sums, packed, strict=True)), highest[0], rows)

    @staticmethod
    def _write(sums: dict[str, Tensor], highest: Tensor, rows: RowStats) -> None:
        stats, log_total = rows.stats, sums["total"].log()
        torch.add(highest, log_total, out=rows.lse)
        torch.sub(sums["logp"], log_total, out=stats.logp)
        if stats.entropy is not None:
            torch.add(sums["entropy"] / sums["total"], log_total, out=stats.entropy)
        if stats.log_sum_p2 is not None:
            torch.sub(sums["squares"].log(), 2 * log_total, out=stats.log_sum_p2)
        if stats.mean_logit is not None:
            stats.mean_logit.copy_(sums["mean"])
        if stats.mean_logp is not None:
            torch.sub(sums["mean"], rows.lse, out=stats.mean_logp)
        if stats.top1 is not None:
            torch.eq(sums["beaten"], 0, out=stats.top1)

    def coefficients(self, whole: Coefficients, share: Tensor) -> Coefficients:
        """What the row kernel takes, which divides by V_r where means over the vocabulary divide by V.

        c (1/V - p) + d / V = c (1/V_r - p) + d' / V_r for d' = (c + d) V_r / V - c.
        """
        c, d = whole.mean_logp, whole.mean_logit
        if c is not None:
            d = (c if d is None else c + d) * share - c
        elif d is not None:
            d = d * share
        return Coefficients(whole.logp, whole.entropy, c, d, whole.log_sum_p2)

    def sum(self, partial: Tensor) -> None:
        """Adds up over the ranks, in place."""
        if partial.numel():
            dist.all_reduce(partial, group=self.group)
