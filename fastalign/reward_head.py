"""Reward models: classification models of Transformers run on flat token batches, their head only where it is read.

A classification model calls its head (`score` or `classifier`) on every position; one of whole sequences then keeps
the last token's result. In a flat batch the head is asked for its results at `batch.source` instead, and answers the
model with their loss at every position, which therefore comes out of the wrapped model's own forward (DDP, FSDP2,
PEFT) whichever one it keeps. Padded batches take the ordinary forward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from fastalign_kernels.head.token_stats import LogitForm
from torch import Tensor, nn

from .data.batch import TokenBatch
from .free_tokens import reading
from .policy import HeadLoss, PolicyInfo, choose_batches, flat_obstacle, logits_forward, unwrap
from .policy_check import batch_of, is_whole, packed_errors, random_segments, teach_reading
from .scoring_head import ScoringRequest, attach_classifier, scoring

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of the largest score; TF32 keeps 10 bits, half precision 7

ScoreLoss = Callable[[Tensor], tuple[Tensor, Any]]  # scores (N, C) -> 0-dim loss, anything


def prepare_reward_model(model: nn.Module, *, allow_flat: bool = True, check: bool = True) -> PolicyInfo:
    """Choose flat or padded batches for a model with a classification head, and teach the head to answer.

    Idempotent; call it before the model is wrapped for training. `check` runs a few random tokens: the head's result
    must be the model's ordinary one, and two packed sequences must equal each alone; else the model gets padded
    batches. Sharded and meta weights are not checked.
    """
    base = unwrap(model)
    info = base.__dict__.get("_fastalign_policy")
    if info is not None and (info.flat or not allow_flat):
        return info
    obstacle = "flat batches were not asked for" if not allow_flat else flat_obstacle(model, base)
    if not attach_classifier(base):
        obstacle = obstacle or "it has no head named `score` or `classifier`"
    errors = (lambda: _flat_errors(model)) if check and is_whole(base) else None
    info = choose_batches(model, LogitForm(), obstacle, errors)
    if info.flat:
        teach_reading(model, base, lambda batch: _hidden(base, batch))
    return info


def score_loss(
    model: nn.Module, batch: TokenBatch, op: ScoreLoss, *, per_token: bool = False, **model_kwargs
) -> HeadLoss:
    """The loss that `op` makes of the scores (N, C), at least fp32, at `batch.source`, in one forward of `model`.

    The scores of a padded batch through a model of whole sequences are those of its rows, (B, C), read where the
    model reads them: at the last token that is not its pad token. With `per_token` they too are at `batch.source`.
    """
    info = unwrap(model).__dict__.get("_fastalign_policy") or prepare_reward_model(model)
    if (batch.is_padded or not info.flat) and not per_token:
        logits = _logits(logits_forward(model, batch, **model_kwargs))
        if logits.ndim == 3:
            logits = logits.flatten(0, 1).index_select(0, batch.source)
        return HeadLoss(*op(_wide(logits)))
    return HeadLoss(*_head_forward(model, batch, lambda rows, head: op(_wide(_apply(head, rows))), model_kwargs))


def read_before_padding(batch: TokenBatch, pad_token_id: int) -> TokenBatch:
    """`batch` with each sequence read at its last token that is not `pad_token_id`, as Transformers' models read it.

    That is before its end where the end token also pads, and its first token if all of them pad.
    """
    ids = batch.input_ids.flatten()
    if (ids[batch.source] != pad_token_id).all():
        return batch
    last = torch.where(ids != pad_token_id, torch.arange(len(ids)), -1).cummax(0).values  # (T,), up to each position
    if batch.is_padded:
        found, start = last[batch.source], batch.source // batch.input_ids.shape[1] * batch.input_ids.shape[1]
    else:
        bounds = batch.cu_seqlens.long()
        segment = torch.searchsorted(bounds[1:], batch.source, right=True)
        found, start = last[batch.source], bounds[segment]
        if batch.prefix is not None:
            prefix = batch.prefix[segment].long()
            behind = (found < start) & (prefix >= 0)
            found = torch.where(behind, last[bounds[prefix + 1] - 1], found)
            start = torch.where(behind, bounds[prefix], start)
    return replace(batch, source=torch.maximum(found, start))


def warn_of_untrained_head(model: nn.Module) -> None:
    """Say so if adapters leave the head of `model` as it was loaded, mostly random."""
    heads = attach_classifier(unwrap(model))
    modules = [module for module in model.modules() if id(module) in heads]
    if modules and not any(p.requires_grad for module in modules for p in module.parameters()):
        logger.warning(
            "The head of %s is not trained: add modules_to_save=['score'] to the PEFT config, unless the head was "
            "trained before.",
            type(unwrap(model)).__name__,
        )


@torch.no_grad()
def scores(model: nn.Module, batch: TokenBatch, *, per_token: bool = False) -> Tensor:
    """The scores (N, C) at `batch.source`, at least fp32, without gradient."""
    return score_loss(model, batch, lambda found: (found.sum(), found), per_token=per_token).result


def _head_forward(model: nn.Module, batch: TokenBatch, op, model_kwargs: dict) -> tuple[Tensor, Any]:
    base = unwrap(model)
    request = ScoringRequest(
        source=batch.source,
        targets=batch.targets,
        length=batch.input_ids.shape[-1],
        mode="scores",
        outputs=(),
        form=LogitForm(),
        op=op,
        heads=attach_classifier(base),
    )
    with scoring(request), reading(batch):
        output = logits_forward(model, batch, **model_kwargs)
    if request.num_calls != 1:
        raise ValueError(
            f"{type(base).__name__} called its head {request.num_calls} times in one forward; once is right."
        )
    return _logits(output).reshape(-1)[0], request.result


def _logits(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output[0]


def _apply(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """(N, C) in the precision of the head's weight: of N rows it costs nothing, and rewards are told apart better."""
    owner: Any = head
    weight = next((p for p in owner.__self__.parameters() if p.is_floating_point()), hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(weight.dtype))


def _wide(found: Tensor) -> Tensor:
    return found.to(torch.promote_types(found.dtype, torch.float32))


def _hidden(model: nn.Module, batch: TokenBatch) -> Tensor:
    """(N, D) hidden states at `batch.source`, which also show what a head near 0 would hide."""
    return _head_forward(model, batch, lambda rows, head: (rows.sum(), rows), {})[1]


def _flat_errors(model: nn.Module) -> tuple[str | None, str | None]:
    """Why the head's answers on flat batches, and on those that share prompts, are not the model's own, or None."""
    base = unwrap(model)

    def hidden(batch: TokenBatch) -> Tensor:
        return _hidden(model, batch)

    def alone(segment: Tensor) -> tuple[Tensor, float]:
        rows = hidden(batch_of([segment]))
        return rows, rows.abs().max().item()

    segment = random_segments(base)[0]
    batch = replace(batch_of([segment]), source=torch.arange(len(segment), device=segment.device))
    expected = _logits(logits_forward(model, batch))
    try:
        found = _head_forward(model, batch, lambda rows, head: (rows.sum(), _apply(head, rows)), {})[1]
        found = found[-1:] if expected.ndim == 2 else found  # a model of whole sequences keeps the last token's
        error, size = (found - expected.reshape(found.shape)).abs().max().item(), found.abs().max().item()
    except (ValueError, RuntimeError, IndexError) as failure:
        obstacle = f"its head cannot be asked for single positions ({failure})"
        return obstacle, obstacle
    if error > TOLERANCE.get(found.dtype, 0.05) * max(size, 1.0):
        obstacle = f"it does not return what its head says of the last token: they differ by {error:.3g}"
        return obstacle, obstacle
    return packed_errors(base, hidden, alone)
