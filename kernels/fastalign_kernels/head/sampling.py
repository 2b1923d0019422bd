"""Drawing the next token from what a head says, with the exact log-probability of the draw.

With p the softmax of z (the logits formed as in `head.rows`, after repetition penalty and truncation) and a uniform u
in [0, 1), the token is the first one whose cumulative p exceeds u (inversion). The sums are taken block by block, over
blocks in fp64, so that one pass over the vocabulary follows the softmax and tokens of probability below 2^-24 are
reached. A row's token depends on its own u and logits alone. Order of the settings as in Transformers: penalty,
temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastalign_kernels.head.operands import operands_of
from fastalign_kernels.head.products import Head, as_one_op
from fastalign_kernels.head.rows import _blocks, _form_logits, slice_form
from fastalign_kernels.head.token_stats import LogitForm

BLOCK = 128  # tokens whose probabilities are summed together


@dataclass(frozen=True)
class Distribution:
    """What is drawn from, made of a head's logits."""

    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # tokens kept, 0: all
    top_p: float = 1.0  # mass kept
    min_p: float = 0.0  # least probability kept, as a share of the largest
    repetition_penalty: float = 1.0  # divides positive logits of tokens seen before, multiplies negative ones
    banned: tuple[int, ...] = ()  # tokens that are never drawn; log-probabilities do not know of it


@dataclass(frozen=True)
class SecondHead:
    """A second model's say: the formed logits are (1 - share) times the first's plus share times these.

    Their softmax is the geometric mixture p1^(1 - share) p2^share, normalised.
    """

    share: float
    hidden: Tensor  # (N, D'), of the same positions
    weight: Tensor  # (V, D')
    bias: Tensor | None = None  # (V,)
    form: LogitForm = LogitForm()  # noqa: RUF009 (frozen)
    low_rank: tuple[Tensor, Tensor] | None = None

    def of(self, rows: Any) -> SecondHead:
        """The same for some of the positions."""
        thin = None if self.low_rank is None else (self.low_rank[0][rows], self.low_rank[1])
        return replace(self, hidden=self.hidden[rows], low_rank=thin)


@as_one_op
@torch.no_grad()
def sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    uniform: Tensor,
    distribution: Distribution,
    *,
    bias: Tensor | None = None,
    form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
    low_rank: tuple[Tensor, Tensor] | None = None,
    seen: Tensor | None = None,
    second: SecondHead | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens (N,) int64 drawn for hidden (N, D) under the head (V, D), and their log-probability (N,) fp32, nats.

    `uniform` is (N,) fp64 in [0, 1). `seen` (N, V) bool is needed with a repetition penalty. The log-probability is
    that of the distribution drawn from; of the most likely token (temperature 0) that at temperature 1, untruncated.
    `second`: draw from the mixture with another model (ValueError for another vocabulary).
    """
    head, other = _head(hidden, weight, bias, form, low_rank, _chunk(hidden, weight.shape[0])), None
    if second is not None:
        if second.weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"the second head has {second.weight.shape[0]} tokens, the first one {weight.shape[0]}: give two with "
                "the same vocabulary"
            )
        longest = max((span.stop - span.start for span in head.spans), default=1)
        other = _head(second.hidden, second.weight, second.bias, second.form, second.low_rank, longest)
    ids = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    logp = torch.empty(len(hidden), dtype=head.stats_dtype, device=hidden.device)
    for span in head.spans:
        logits: Any = head.logits(span)
        others: Any = None if other is None else other.logits(span)
        for block in _blocks(logits):
            rows = slice(span.start + block.start, span.start + block.stop)
            z, _ = _form_logits(logits[block], slice_form(head.form, rows))
            if second is not None and other is not None:
                z = torch.lerp(
                    z, _form_logits(others[block], slice_form(other.form, rows))[0].to(z.dtype), second.share
                )
            if distribution.repetition_penalty != 1.0:
                assert seen is not None
                penalty = distribution.repetition_penalty
                z = torch.where(seen[rows], torch.where(z < 0, z * penalty, z / penalty), z)
            ids[rows], logp[rows] = _draw(z, uniform[rows], distribution)
    return ids, logp.float()


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, form: LogitForm, low_rank: Any, chunk: Any) -> Head:
    operands, targets = operands_of(hidden, weight, bias, low_rank), hidden.new_zeros(len(hidden))
    return Head(operands, targets, form, chunk, plain=True)


def _chunk(hidden: Tensor, vocabulary: int) -> int | None:
    """Rows at a time. CPU: memory of up to 32 MiB is kept by the C library; more costs page faults in each call."""
    return None if hidden.device.type != "cpu" else max(2**25 // (vocabulary * hidden.itemsize) // 64 * 64, 64)


def _draw(z: Tensor, uniform: Tensor, distribution: Distribution) -> tuple[Tensor, Tensor]:
    allowed, banned = z, list(distribution.banned)
    if banned:
        allowed = z.clone()
        allowed[:, banned] = -torch.inf
    if distribution.temperature == 0.0:
        ids = allowed.argmax(1)
        return ids, z.log_softmax(1).gather(1, ids[:, None])[:, 0]
    if distribution.temperature != 1.0:
        z, allowed = z / distribution.temperature, allowed / distribution.temperature
    p = truncate(allowed, distribution).softmax(1)
    ids = invert(p, uniform)
    logp = p.gather(1, ids[:, None])[:, 0].log()
    return ids, logp + allowed.logsumexp(1) - z.logsumexp(1) if banned else logp


def truncate(z: Tensor, distribution: Distribution) -> Tensor:
    """z (N, V) with -inf at the tokens that are left out; the most likely one always stays."""
    if 0 < distribution.top_k < z.shape[1]:
        least = z.topk(distribution.top_k, dim=1).values[:, -1:]
        z = z.masked_fill(z < least, -torch.inf)
    if distribution.top_p < 1.0:
        ordered, order = z.sort(dim=1)
        out = ordered.softmax(1).cumsum(1) <= 1.0 - distribution.top_p
        out[:, -1] = False
        z = z.masked_fill(torch.zeros_like(out).scatter_(1, order, out), -torch.inf)
    if distribution.min_p > 0.0:
        p = z.softmax(1)
        out = p < distribution.min_p * p.amax(1, keepdim=True)
        z = z.masked_fill(out, -torch.inf)
    return z


def invert(p: Tensor, uniform: Tensor) -> Tensor:
    """The first column (N,) int64 at which the cumulative p (N, V) exceeds uniform (N,) fp64 times its total."""
    num_rows, vocabulary = p.shape
    whole = vocabulary // BLOCK
    sums = p[:, : whole * BLOCK].reshape(num_rows, whole, BLOCK).sum(2)
    if rest := vocabulary - whole * BLOCK:
        sums = torch.cat([sums, p[:, -rest:].sum(1, keepdim=True)], 1)
    ends = sums.double().cumsum(1)
    target = (uniform * ends[:, -1])[:, None]
    # the last block that holds anything is the last resort of rounding
    block = (ends <= target).sum(1, keepdim=True)
    block = torch.minimum(block, (ends < ends[:, -1:]).sum(1, keepdim=True))
    start = ends.gather(1, block) - sums.gather(1, block)
    columns = block * BLOCK + torch.arange(BLOCK, device=p.device)
    inside = p.gather(1, columns.clamp_max(vocabulary - 1)).double() * (columns < vocabulary)
    inner = inside.cumsum(1)
    place = (inner <= (target - start).clamp_min(0)).sum(1, keepdim=True)
    place = torch.minimum(place, (inner < inner[:, -1:]).sum(1, keepdim=True))
    return (block * BLOCK + place)[:, 0]
