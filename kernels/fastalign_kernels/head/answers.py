"""Where the tokens of each answer lie, and a loss over groups of answers (pairs) in one pass of the head."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign_kernels.head.chunks import chunk_size
from fastalign_kernels.head.deferred import deferred
from fastalign_kernels.head.fused import fused
from fastalign_kernels.head.token_stats import LogitForm, TokenStats
from fastalign_kernels.losses.sequences import ld_weights, row_sums

# value and details of the groups in a span of tokens: 0-dim, and tensors that need not be detached
Objective = Callable[[TokenStats, slice], tuple[Tensor, list[Tensor]]]
LONGEST_GROUP = 2  # chunks that the logits of one group may take before they are made a second time instead


class Answers:
    """Tokens of G groups with `per_group` answers each, sorted group by group; answers are rows of the batch."""

    def __init__(
        self, hidden: Tensor, rows: Tensor, num_groups: int, per_group: int, blocks: bool, scored: Tensor | None
    ):
        num_rows = num_groups * per_group
        if rows.shape != hidden.shape[:1] or rows.dtype.is_floating_point:
            raise ValueError(
                f"rows {tuple(rows.shape)} {rows.dtype}: give ({hidden.shape[0]},) int64, the answer of each token"
            )
        if scored is not None and scored.shape != rows.shape:
            raise ValueError(f"scored {tuple(scored.shape)}: give {tuple(rows.shape)}, one per token")
        rows, device = rows.cpu(), hidden.device  # from here to there without waiting for what the GPU is at
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= num_rows):
            raise ValueError(
                f"rows hold {int(rows.min())} to {int(rows.max())}: allowed are 0 to {num_rows - 1}, "
                f"{per_group} for each of {num_groups}"
            )
        if blocks and num_groups:
            rows = rows % num_groups * per_group + rows // num_groups
        self.order: Tensor | None = None  # (N,) places of the sorted tokens
        if bool((rows.diff() < 0).any()):
            order = rows.argsort(stable=True)
            rows, self.order = rows[order], order.to(device, non_blocking=True)
        self.per_group, self.blocks = per_group, blocks
        self.groups = rows // per_group  # (N,) on the CPU
        self._answer = (rows % per_group).to(device, non_blocking=True) if per_group > 1 else None
        counts = torch.bincount(rows, minlength=num_rows)
        self.num_tokens = counts.view(num_groups, per_group)  # on the CPU
        self._ends = self.num_tokens.sum(1).cumsum(0).tolist()
        self.counts = counts.to(device, non_blocking=True)  # (R,) tokens
        self.scored: Tensor | None = None  # (N,) fp32, 1 for tokens that count in their answer's logp
        self.lengths = self.counts  # (R,) of those
        if scored is not None:
            self.scored = self.sorted(scored.to(device, torch.float32, non_blocking=True))
            self.lengths = row_sums(self.scored, self.counts).long()
        self._weights = self.scored

    @property
    def longest_group(self) -> int:
        """Tokens of the longest group."""
        return int(self.num_tokens.sum(1).max()) if self._ends else 0

    def sorted(self, values: Tensor) -> Tensor:
        """Values (N, ...) of the tokens in the order of groups."""
        return values if self.order is None else values.index_select(0, self.order)

    def unsorted(self, stats: TokenStats) -> TokenStats:
        """Detached statistics in the order that the caller gave the tokens in."""
        inverse = None if self.order is None else self.order.argsort()
        found = {k: v.detach() for k, v in vars(stats).items() if v is not None}
        return TokenStats(**(found if inverse is None else {k: v[inverse] for k, v in found.items()}))

    def to_groups(self, values: Tensor) -> Tensor:
        """Values (R,) by the caller's numbers of answers in the order of groups."""
        return values.view(self.per_group, -1).t().reshape(-1) if self.blocks else values

    def rows_of(self, span: slice) -> slice:
        """The answers of the groups that end in a span of tokens; groups without tokens belong to the earlier span."""
        first = bisect_right(self._ends, span.start) if span.start else 0
        return slice(first * self.per_group, bisect_right(self._ends, span.stop) * self.per_group)

    def logps(self, logp: Tensor, span: slice, rows: slice, average: bool) -> Tensor:
        """Sums, or means over tokens, of the tokens' logp in each answer, in fp64 where there is any.

        What losses compare with a reference are small differences of these sums of hundreds of nats.
        """
        logp = logp if logp.device.type == "mps" else logp.double()
        sums = row_sums(logp if self._weights is None else logp * self._weights[span], self.counts[rows])
        return sums / self.lengths[rows].clamp(min=1) if average else sums

    def of_answer(self, answer: int, span: slice) -> Tensor:
        """Bool per token of the span: it belongs to the group's answer number `answer`."""
        assert self._answer is not None
        return self._answer[span] == answer

    def fade_tails(self, ld_alpha: float) -> None:
        """LD-DPO: tokens beyond the length of the pair's shorter answer count `ld_alpha` times."""

        def by_token(values: Tensor) -> Tensor:
            return values.repeat_interleave(self.counts, output_size=self.groups.numel())

        counted = (
            torch.ones_like(self.groups, device=self.counts.device) if self.scored is None else self.scored.long()
        )
        place = counted.cumsum(0) - counted - by_token(self.lengths.cumsum(0) - self.lengths)
        shared = self.lengths.view(-1, self.per_group)[:, :2].amin(1, keepdim=True)
        weights = ld_weights(place, by_token(shared.expand(-1, self.per_group).reshape(-1)), ld_alpha)
        self._weights = weights if self.scored is None else weights * self.scored


def total_over_groups(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    answers: Answers,
    objective: Objective,
    coupled: bool,
    outputs: Sequence[str],
    *,
    form: LogitForm,
    chunk: int | None,
    low_rank: tuple[Tensor, Tensor] | None,
    **head: Any,
) -> tuple[Tensor, list[Tensor], TokenStats, Tensor | None]:
    """Loss with its graph, detached details over all groups, detached statistics in the caller's order, and `pulls`.

    The loss is the sum of the objective over spans of whole groups (`fused`). A `coupled` one sees all tokens at once,
    through `deferred` if they fill more than a chunk; so does any with a group longer than `LONGEST_GROUP` chunks, and
    one without tokens, for which `fused` asks nobody.
    """
    num_tokens, whole = targets.numel(), slice(0, targets.numel())
    temperature = form.temperature
    if isinstance(temperature, Tensor) and temperature.dim():
        form = LogitForm(form.scale, form.softcap, answers.sorted(temperature))
    if low_rank is not None:
        low_rank = answers.sorted(low_rank[0]), low_rank[1]
    tokens = (answers.sorted(hidden), weight, answers.sorted(targets))
    head |= {"form": form, "low_rank": low_rank, "outputs": tuple(dict.fromkeys(outputs))}
    wide = hidden.is_cuda and hidden.dtype.itemsize == 2
    limit = chunk or chunk_size(weight.shape[0], 4 if wide else hidden.dtype.itemsize, hidden.device)
    if (coupled and num_tokens > limit) or answers.longest_group > LONGEST_GROUP * limit or not num_tokens:
        stats = deferred(*tokens, chunk=chunk, **head)
        loss, details = objective(stats, whole)
        pulls = _pulls(loss, stats.logp, answers)
    else:
        chunk = max(1, num_tokens) if coupled else chunk
        part = lambda stats, span: objective(stats, span)[0]  # noqa: E731
        loss, stats = fused(*tokens, part, groups=answers.groups, chunk=chunk, **head)
        stats.logp.requires_grad_(torch.is_grad_enabled())
        again, details = objective(stats, whole)
        pulls = _pulls(again, stats.logp, answers)
    return loss, [v.detach() for v in details], answers.unsorted(stats), pulls


def _pulls(loss: Tensor, logp: Tensor, answers: Answers) -> Tensor | None:
    """(G,) sum over each group's tokens of |d loss / d logp|: its part of the gradient; None without a graph."""
    if not loss.requires_grad:
        return None
    (found,) = torch.autograd.grad(loss, logp, retain_graph=True, allow_unused=True)
    return None if found is None else row_sums(found.abs(), answers.counts.view(-1, answers.per_group).sum(1))
