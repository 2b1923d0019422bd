"""Policy-gradient losses straight from hidden states: three products in one pass, no logits in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastalign_kernels.head.chunks import chunk_size
from fastalign_kernels.head.deferred import deferred
from fastalign_kernels.head.fused import fused
from fastalign_kernels.head.logprobs import linear_logprobs_reference
from fastalign_kernels.head.stats import stats
from fastalign_kernels.head.token_stats import LogitForm, TokenStats
from fastalign_kernels.head.vocabulary_parallel import VocabularyShard
from fastalign_kernels.losses.corrections import entropy_threshold, high_entropy_mask
from fastalign_kernels.losses.policy_gradient import (
    WEIGHTINGS,
    PolicyObjective,
    PolicyTerms,
    PolicyTokens,
    policy_terms,
    token_weights,
)

OUTPUTS = ("logp", "entropy")


@dataclass
class PolicyStats:
    """What metrics and the next update need, without gradient; (N,) fp32 in nats unless said."""

    logp: Tensor
    entropy: Tensor
    terms: PolicyTerms  # loss, ratio, KL and clip flags of each token
    policy_loss: Tensor  # 0-dim: the loss without the entropy bonus
    entropy_mask: Tensor | None = None  # 1 or 0, under top_entropy_quantile


def _check(tokens: PolicyTokens, objective: PolicyObjective, num_rows: int | None, num_tokens: int) -> None:
    for f in fields(tokens):
        value = getattr(tokens, f.name)
        if value is not None and value.shape != (num_tokens,):
            raise ValueError(f"{f.name} {tuple(value.shape)}: give ({num_tokens},), one per target")
    if objective.needs_rows and (tokens.rows is None or num_rows is None):
        raise ValueError(
            f"rows or num_rows is not given: loss_type={objective.loss_type!r} with "
            f"importance_sampling_level={objective.importance_sampling_level!r}, off_policy_mask_threshold="
            f"{objective.off_policy_mask_threshold} and correction_mode={objective.correction_mode!r} looks at whole "
            "rows"
        )
    if objective.beta != 0.0 and tokens.ref_logp is None:
        raise ValueError(f"beta={objective.beta} needs the reference: give ref_logp, or ref_hidden")


class _LossFunction:
    """The loss of a span, which also keeps what is known of its tokens."""

    def __init__(self, tokens: PolicyTokens, objective: PolicyObjective, num_rows: int):
        self.tokens, self.objective, self.num_rows = tokens, objective, num_rows
        self.parts: list[PolicyTerms] = []

    def __call__(self, part: TokenStats, span: slice) -> Tensor:
        known = self.tokens.slice(span)
        terms = policy_terms(part.logp, known, self.objective, self.num_rows)
        self.parts.append(terms.detached())
        loss = (terms.loss * known.weights).sum()
        if self.objective.entropy_coef == 0.0:
            return loss
        assert part.entropy is not None
        mask = self.tokens.entropy_mask
        if mask is None and known.entropy_weights is not None:
            return loss - self.objective.entropy_coef * (part.entropy * known.entropy_weights).sum()
        if mask is None:
            return loss - self.objective.entropy_coef / len(self.tokens.weights) * part.entropy.sum()
        return loss - self.objective.entropy_coef * (part.entropy * mask[span]).sum() / mask.sum().clamp(min=1.0)

    def terms(self, logp: Tensor) -> PolicyTerms:
        """The terms of all spans, in order."""
        if not self.parts:
            return PolicyTerms(logp, logp)
        found = {f.name: [getattr(part, f.name) for part in self.parts] for f in fields(PolicyTerms)}
        return PolicyTerms(**{name: torch.cat(values) for name, values in found.items() if values[0] is not None})


def _check_rows(rows: Tensor | None, num_rows: int | None) -> None:
    """ValueError for ids on the CPU that are no runs; those on a GPU are not read back."""
    if rows is None or num_rows is None or rows.device.type != "cpu" or not rows.numel():
        return
    if bool((rows.diff() < 0).any()) or int(rows[0]) < 0 or int(rows[-1]) >= num_rows:
        raise ValueError(f"rows: give non-decreasing ids from 0 to {num_rows - 1}; sort the tokens by row")


def _chunk_holds_rows(rows: Tensor, chunk: int) -> bool:
    """Whether each row (ids (N,) on the CPU) fits into a chunk."""
    lengths = torch.unique_consecutive(rows, return_counts=True)[1]
    return int(lengths.max()) <= chunk


def linear_policy_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tokens: PolicyTokens,
    objective: PolicyObjective,
    *,
    num_rows: int = 0,
    bias: Tensor | None = None,
    form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
) -> Tensor:
    """The specification of `linear_policy_loss`: all logits, then the terms of all tokens at once; 0-dim."""
    options = {"temperature": form.temperature, "softcap": form.softcap, "logit_scale": form.scale}
    logp, entropy = linear_logprobs_reference(hidden, weight, targets, bias=bias, ignore_index=None, **options)
    if objective.top_entropy_quantile < 1.0:
        bound = entropy_threshold(entropy.detach(), objective.top_entropy_quantile)
        tokens = replace(tokens, entropy_mask=high_entropy_mask(entropy.detach(), bound))
    return _LossFunction(tokens, objective, num_rows)(TokenStats(logp, entropy), slice(0, len(targets)))


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    weights: Tensor | None = None,
    rows: Tensor | None = None,
    num_rows: int | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampling_logp: Tensor | None = None,
    importance_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    threshold_of: Callable[[Tensor], Tensor] | None = None,
    bias: Tensor | None = None,
    form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
    chunk: int | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    shard: VocabularyShard | None = None,
    **options: Any,
) -> tuple[Tensor, PolicyStats]:
    """Loss (0-dim fp32, differentiable) of scored tokens, hidden (N, D) under weight (V, D), and their numbers.

    `options` are the fields of `PolicyObjective` (loss_type="dapo", epsilon=0.2, beta=0.0, ...); the (N,) arguments
    those of `PolicyTokens`. `weights` default to `token_weights` of these rows alone: give them where a batch is cut
    into micro-batches. `rows` (N,) are non-decreasing ids below `num_rows`, best on the CPU. `old_logp` None: the
    policy itself made the batch. The reference: `ref_logp`, or `ref_hidden` (N, D') with `ref_weight` (default
    `weight`), one product more. `threshold_of(entropy)` finds the 0-dim bound of the entropy mask, as over all
    devices; default: the quantile of these tokens. The temperature, also per token, is in `form`; `low_rank` (of the
    policy) and `shard` (of policy and reference) as in `fused`.

    Three products; losses of whole rows cut chunks between rows. Four, where a row is longer than a chunk or
    `top_entropy_quantile` needs all entropies first. Raises ValueError for arguments that do not fit together.
    """
    objective = PolicyObjective(**options)
    _check_rows(rows, num_rows)
    ids = None if rows is None else rows.to(hidden.device, non_blocking=True)
    if weights is None:
        weights = _default_weights(ids, num_rows, targets, objective)
    if ref_hidden is not None:
        with torch.no_grad():
            head = weight if ref_weight is None else ref_weight
            ref_logp = stats(ref_hidden, head, targets, bias=ref_bias, form=form, chunk=chunk, shard=shard).logp
    tokens = PolicyTokens(
        advantages, weights, ids, old_logp, ref_logp, sampling_logp, importance_weights, entropy_weights
    )
    _check(tokens, objective, num_rows, targets.shape[0])
    groups = rows if objective.needs_rows else None
    logits_size = hidden.element_size() if hidden.device.type == "cpu" else 4
    limit = chunk or chunk_size(weight.shape[0], logits_size, hidden.device)
    if groups is not None and targets.shape[0] > limit:
        groups = groups.cpu()
    fits = groups is None or targets.shape[0] <= limit or _chunk_holds_rows(groups, limit)
    loss_fn = _LossFunction(tokens, objective, num_rows or 0)
    head_arguments = {
        "bias": bias,
        "form": form,
        "outputs": OUTPUTS,
        "chunk": chunk,
        "low_rank": low_rank,
        "shard": shard,
    }
    if fits and objective.top_entropy_quantile == 1.0:
        loss, found = fused(hidden, weight, targets, loss_fn, groups=groups, **head_arguments)
    else:
        found = deferred(hidden, weight, targets, **head_arguments)
        assert found.entropy is not None
        if objective.top_entropy_quantile < 1.0:
            entropy = found.entropy.detach()
            bound = threshold_of or (lambda h: entropy_threshold(h, objective.top_entropy_quantile))
            tokens.entropy_mask = high_entropy_mask(entropy, bound(entropy))
        loss = loss_fn(found, slice(0, targets.shape[0]))
    assert found.entropy is not None
    logp = found.logp.detach()
    terms = loss_fn.terms(logp)
    policy_loss = (terms.loss * weights).sum()
    return loss, PolicyStats(logp, found.entropy.detach(), terms, policy_loss, tokens.entropy_mask)


def _default_weights(ids: Tensor | None, num_rows: int | None, targets: Tensor, objective: PolicyObjective) -> Tensor:
    """Weights where these tokens are the whole batch."""
    if ids is not None and num_rows is not None:
        return token_weights(ids, num_rows, objective.loss_type)
    if WEIGHTINGS[objective.loss_type] in ("token_mean", "batch_tokens"):
        return token_weights(targets, 1, objective.loss_type)
    raise ValueError(
        f"rows or num_rows is not given: loss_type={objective.loss_type!r} weighs by them; give both, or weights"
    )
