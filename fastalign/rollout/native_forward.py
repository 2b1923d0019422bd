"""One forward of the training model whose head answers with sampled tokens in place of logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from fastalign_kernels.head.sampling import Distribution, SecondHead, sample_tokens
from fastalign_kernels.head.token_stats import LogitForm
from torch import Tensor, nn

from ..logit_form import head_output_kept
from ..scoring_head import ScoringRequest, attach_heads, body_dtype, scoring
from .native_cohort import Cohort

Owners = list[tuple[Cohort, list[int] | None]]  # whose next tokens: cohorts, and the places of their rows, None: all


def next_tokens(
    model: nn.Module,
    base: Any,
    form: LogitForm,
    inputs: dict[str, Any],
    source: Tensor,
    owners: Owners,
    second: SecondHead | None = None,
) -> tuple[Tensor, Tensor, Any]:
    """Tokens (B,) int64 after the positions `source` (B,) of the flattened input, which belong to `owners` in their
    order, log-probabilities (B,) fp32 in nats, and the model's output. `second`: they are drawn from a mixture."""
    uniform = torch.cat([cohort.uniforms[_rows(cohort, places), cohort.count] for cohort, places in owners])
    parts = _parts(owners, source.device)

    def op(hidden: Tensor, weight: Tensor, *, low_rank: tuple[Tensor, Tensor] | None = None, **options):
        ids, logps = torch.empty_like(source), uniform.new_empty(len(source), dtype=torch.float32)
        for distribution, rows in parts:
            seen = None
            if distribution.repetition_penalty != 1.0:
                found = [c.seen_tokens(weight.shape[0])[_rows(c, places)] for c, places in owners]
                seen = torch.cat(found)[rows]
            thin = None if low_rank is None else (low_rank[0][rows], low_rank[1])
            other = None if second is None else second.of(rows)
            ids[rows], logps[rows] = sample_tokens(
                hidden[rows], weight, uniform[rows], distribution, seen=seen, low_rank=thin, second=other, **options
            )
        return uniform.new_zeros(()), (ids, logps)

    (ids, logps), output = _answer(model, base, form, inputs, source, op)
    return ids, logps, output


def second_head(
    model: nn.Module, base: Any, form: LogitForm, inputs: dict[str, Any], source: Tensor, share: float
) -> SecondHead:
    """What `model` says after the positions `source` (B,), with weight `share` in a mixture."""

    def op(hidden: Tensor, weight: Tensor, **options):
        return hidden.new_zeros(()), SecondHead(share, hidden, weight, **options)

    return _answer(model, base, form, inputs, source, op)[0]


def _answer(model: nn.Module, base: Any, form: LogitForm, inputs: dict[str, Any], source: Tensor, op: Any):
    """What `op` makes of the hidden states at `source` and the head, and the model's output."""
    request = ScoringRequest(
        source=source,
        targets=source,
        length=inputs["input_ids"].shape[1],
        mode="loss",
        outputs=(),
        form=form,
        op=op,
        heads=attach_heads(base),
    )
    with scoring(request), head_output_kept(base):
        output = model(**inputs)
    return request.result, output


def is_exact(base: Any, autocast: Callable[[], AbstractContextManager]) -> bool:
    """Sampled log-probabilities equal the training model's; with 16-bit products they round with the batch."""
    with autocast():
        whole = (body_dtype(base) or base.dtype).itemsize >= 4
        return whole and not torch.is_autocast_enabled(base.device.type)


def _rows(cohort: Cohort, places: list[int] | None) -> Any:
    return slice(0, len(cohort.rows)) if places is None else places


def _parts(owners: Owners, device: torch.device) -> list[tuple[Distribution, Any]]:
    """The distributions that are drawn from, and which of all rows do so."""
    kinds = {distribution for cohort, _ in owners for distribution in cohort.distributions}
    if len(kinds) == 1:
        return [(kinds.pop(), slice(None))]
    rows: dict[Distribution, list[int]] = {}
    drawn = [row.plan.distribution for cohort, places in owners for row in _chosen(cohort, places)]
    for place, distribution in enumerate(drawn):
        rows.setdefault(distribution, []).append(place)
    return [(distribution, torch.tensor(places, device=device)) for distribution, places in rows.items()]


def _chosen(cohort: Cohort, places: list[int] | None):
    return cohort.rows if places is None else [cohort.rows[place] for place in places]
