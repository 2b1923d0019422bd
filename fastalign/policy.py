"""A causal model of Transformers seen as: batch -> hidden states at the scored positions -> loss or statistics.

The wrapped model's own forward runs (DDP, FSDP2, PEFT, torch.compile, accelerate), so that hooks run and the loss
leaves through its output; the output embedding answers with the result where it would answer with logits.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastalign_kernels import fused
from fastalign_kernels.attention import Segments
from fastalign_kernels.head.token_stats import OUTPUTS, LogitForm, TokenStats
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import flat_attention
from .data.batch import TokenBatch
from .logit_form import head_output_kept, read_logit_form
from .policy_check import flat_errors, head_error, is_whole, quiet
from .scoring_head import ScoringRequest, attach_heads, scoring, unpack_stats

logger = logging.getLogger(__name__)

PACKABLE_LAYERS = {"full_attention", "sliding_attention", "attention"}


@dataclass(frozen=True)
class PolicyInfo:
    """How a model is fed and how its logits are formed."""

    flat: bool  # flat batches; else padded rows
    reason: str  # why
    form: LogitForm
    attention: str | None  # name of the attention implementation set, None if untouched
    shares_prefix: bool = False  # flat batches may have `prefix`


@dataclass
class PolicyOutput:
    """What one forward of a policy says about the scored tokens."""

    loss: Tensor | None  # 0-dim; None where only statistics were asked for
    stats: TokenStats
    aux_loss: Tensor | None = None  # load balancing of a mixture of experts, not yet times its coefficient


@dataclass
class HeadLoss:
    """What `op` made of a policy's hidden states and head."""

    loss: Tensor  # 0-dim
    result: Any
    aux_loss: Tensor | None = None  # load balancing of a mixture of experts, not yet times its coefficient


def unwrap(model: nn.Module) -> Any:
    """The model of Transformers inside DDP, torch.compile, DeepSpeed and PEFT wrappers."""
    *_, base = _wrapping(model)
    return base


def _wrapping(model: Any) -> Iterator[Any]:
    """`model` and what it wraps, from outside to inside."""
    while True:
        yield model
        if "_orig_mod" in model.__dict__.get("_modules", {}):
            model = model._orig_mod
        elif hasattr(model, "get_base_model") and not isinstance(model, PreTrainedModel):
            model = model.get_base_model()
        elif "module" in model.__dict__.get("_modules", {}) and not isinstance(model, PreTrainedModel):
            model = model.module
        else:
            return


def prepare_policy(model: nn.Module, *, allow_flat: bool = True, check: bool = True) -> PolicyInfo:
    """Teach `model` to score: swap its head's class, read what follows the head, choose flat or padded batches.

    Idempotent; call it before the model is wrapped for training, and again after adapters change. `check` runs a few
    random tokens through the model: the head's result must equal the model's own logits (else ValueError: something
    unknown follows the head), two packed segments must equal each alone (else the model gets padded batches), and two
    answers behind one prompt each with the prompt (else prompts are not shared). Sharded and meta weights are not
    checked.
    """
    base = unwrap(model)
    attach_heads(base)
    info = base.__dict__.get("_fastalign_policy")
    if info is not None and (info.flat or not allow_flat):
        if info.flat and not allow_flat:
            info = _set_padded(base, info.form, "flat batches were not asked for")
        return info
    form = read_logit_form(base)
    obstacle = "flat batches were not asked for" if not allow_flat else flat_obstacle(model, base)
    check = check and is_whole(base)
    if check:
        _remember(base, PolicyInfo(False, "", form, None))
        with quiet(model):
            error = head_error(base, *_probes(model))
        if error is not None:
            del base.__dict__["_fastalign_policy"]
            raise ValueError(
                f"{type(base).__name__} does something to its logits after the head that is not known here: {error} "
                f"with scale={form.scale}, softcap={form.softcap} read from its config. Add the field to "
                "fastalign/logit_form.py."
            )
    return choose_batches(model, form, obstacle, (lambda: flat_errors(base, *_probes(model))) if check else None)


def choose_batches(
    model: nn.Module,
    form: LogitForm,
    obstacle: str | None,
    errors: Callable[[], tuple[str | None, str | None]] | None,
) -> PolicyInfo:
    """Flat batches unless there is an `obstacle`; `errors()`, run with flat attention set, may find one, and one to
    shared prefixes."""
    base = unwrap(model)
    if obstacle is None:
        name = flat_attention.select_flat_attention(base)
        info = _remember(base, PolicyInfo(True, "attention over segments", form, name, shares_prefix=True))
        with quiet(model):
            obstacle, unshared = (None, None) if errors is None else errors()
        if obstacle is None:
            _warn_of_softcap(base, name)
            if unshared is not None:
                logger.warning(
                    "%s computes a prompt again for each of its answers: %s.", type(base).__name__, unshared
                )
                reason = f"attention over segments, but no shared prefixes: {unshared}"
                info = _remember(base, replace(info, shares_prefix=False, reason=reason))
            return info
    return _set_padded(base, form, obstacle)


def _probes(model: nn.Module) -> tuple[Callable[[TokenBatch], Tensor], Callable[[TokenBatch], Tensor]]:
    return lambda batch: token_stats(model, batch).stats.logp, lambda batch: logits_forward(model, batch).logits


def policy_info(model: nn.Module) -> PolicyInfo:
    """What `prepare_policy` found for `model`; prepares it where that has not happened yet."""
    return unwrap(model).__dict__.get("_fastalign_policy") or prepare_policy(model)


def token_loss(
    model: nn.Module,
    batch: TokenBatch,
    loss_fn: Callable[[TokenStats, slice], Tensor],
    *,
    outputs: tuple[str, ...] = ("logp",),
    temperature: float | Tensor = 1.0,
    **model_kwargs,
) -> PolicyOutput:
    """The loss of `loss_fn(stats, span)` summed over chunks of scored tokens, in one forward of `model`.

    `temperature` is a number or (N,). The statistics returned are detached.
    """
    _check_outputs(outputs)

    def op(hidden: Tensor, weight: Tensor, **options) -> tuple[Tensor, TokenStats]:
        return fused(hidden, weight, batch.targets, loss_fn, outputs=outputs, **options)

    found = head_loss(model, batch, op, temperature=temperature, **model_kwargs)
    return PolicyOutput(found.loss, found.result, found.aux_loss)


def head_loss(
    model: nn.Module,
    batch: TokenBatch,
    op: Callable[..., tuple[Tensor, Any]],
    *,
    temperature: float | Tensor = 1.0,
    **model_kwargs,
) -> HeadLoss:
    """The loss that `op` makes of the hidden states at `batch.source` and the head, in one forward of `model`.

    `op(hidden (N, D), weight (V, D), bias=, form=, low_rank=)` returns a 0-dim loss with its graph, and anything else:
    one of `fastalign_kernels`' losses from hidden states, given its targets and rows.
    """
    result, request, output = _score(model, batch, "loss", (), temperature, model_kwargs, op)
    return HeadLoss(result.reshape(()), request.result, _aux_loss(output))


def token_stats(
    model: nn.Module,
    batch: TokenBatch,
    *,
    outputs: tuple[str, ...] = ("logp",),
    grad: bool = False,
    temperature: float | Tensor = 1.0,
    **model_kwargs,
) -> PolicyOutput:
    """Per-token statistics of `batch` under `model`, differentiable where `grad`; `loss` is None."""
    _check_outputs(outputs)
    outputs = outputs if "logp" in outputs else ("logp", *outputs)
    with nullcontext() if grad else torch.no_grad():
        result, request, output = _score(
            model, batch, "deferred" if grad else "stats", outputs, temperature, model_kwargs
        )
    return PolicyOutput(None, unpack_stats(result, request.outputs), _aux_loss(output))


def logits_forward(model: nn.Module, batch: TokenBatch, **model_kwargs) -> Any:
    """The model's ordinary output for `batch`, logits (1, T, V) or (B, L, V) included."""
    policy_info(model)
    base = unwrap(model)
    with flat_attention.flat_batch(_segments(base, batch)):
        return model(**_model_inputs(model, base, batch), **model_kwargs)


def _check_outputs(outputs: tuple[str, ...]) -> None:
    if unknown := set(outputs) - set(OUTPUTS):
        raise ValueError(f"outputs has {sorted(unknown)}; allowed are {OUTPUTS}.")


def _score(
    model: nn.Module,
    batch: TokenBatch,
    mode: str,
    outputs: tuple[str, ...],
    temperature: float | Tensor,
    model_kwargs: dict[str, Any],
    op: Callable[..., tuple[Tensor, Any]] | None = None,
) -> tuple[Tensor, ScoringRequest, Any]:
    info, base = policy_info(model), unwrap(model)
    request = ScoringRequest(
        source=batch.source,
        targets=batch.targets,
        length=batch.input_ids.shape[-1],
        mode=mode,
        outputs=outputs,
        form=replace(info.form, temperature=temperature),
        op=op,
        heads=attach_heads(base),
    )
    with scoring(request), head_output_kept(base), flat_attention.flat_batch(_segments(base, batch)):
        output = model(**_model_inputs(model, base, batch), **model_kwargs)
    if request.num_calls != 1:
        raise ValueError(
            f"{type(base).__name__} called its output embedding {request.num_calls} times in one forward; once is "
            "supported."
        )
    result = output["logits"] if isinstance(output, dict) else output[0]
    return result, request, output


def _aux_loss(output: Any) -> Tensor | None:
    return output.get("aux_loss") if isinstance(output, dict) else None


def _segments(base: Any, batch: TokenBatch) -> Segments | None:
    """The bounds to attend within; None where the model reads its input in the ordinary way."""
    if batch.is_padded or batch.num_segments == 1:
        return None
    info: PolicyInfo = base.__dict__["_fastalign_policy"]
    if not info.flat:
        raise ValueError(
            f"{type(base).__name__} cannot take flat batches ({info.reason}), found one of {batch.num_segments} "
            "segments; collate padded rows: TokenCollator(flat=False)."
        )
    if batch.prefix is not None and not info.shares_prefix:
        raise ValueError(
            f"{type(base).__name__} cannot take segments that share a prefix ({info.reason}), found `prefix` in the "
            "batch; collate each answer with its prompt: share=False."
        )
    if not base.config._attn_implementation.startswith(flat_attention.NAME):  # somebody set it after the preparation
        flat_attention.select_flat_attention(base)
    return Segments(batch.cu_seqlens, batch.max_seqlen, batch.prefix, batch.max_shared)


def _model_inputs(model: nn.Module, base: Any, batch: TokenBatch) -> dict[str, Any]:
    accepted = _accepted(type(base))
    inputs: dict[str, Any] = {"input_ids": batch.input_ids if batch.is_padded else batch.input_ids[None]}
    if batch.is_padded:
        inputs["attention_mask"] = batch.attention_mask
    # a model with images makes positions of its own, a soft prompt shifts them
    if "position_ids" in accepted and not (_has_images(base) or _has_soft_prompt(model)):
        inputs["position_ids"] = batch.position_ids if batch.is_padded else batch.position_ids[None]
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs | batch.model_inputs


def _has_images(base: Any) -> bool:
    return base.config.get_text_config() is not base.config


def _has_soft_prompt(model: nn.Module) -> bool:
    """PEFT's prompt, prefix or p-tuning is active on `model`, which may be wrapped."""
    adapted = next((m for m in _wrapping(model) if hasattr(m, "active_peft_config")), None)
    return adapted is not None and bool(adapted.active_peft_config.is_prompt_learning)


@functools.cache
def _accepted(cls: type) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters)  # pyright: ignore[reportAttributeAccessIssue]


def flat_obstacle(model: nn.Module, base: Any) -> str | None:
    """Why `base` cannot take flat batches, as far as its class and config tell."""
    config = base.config
    if getattr(base, "_is_stateful", False):
        return "it carries a recurrent state from token to token"
    if not getattr(base, "_supports_attention_backend", False):
        return "it does not take attention functions from outside"
    kinds = set(getattr(config, "layer_types", None) or ()) - PACKABLE_LAYERS
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds))}"
    if getattr(config, "attention_chunk_size", None):
        return "it attends within chunks of fixed size"
    if _has_images(base):
        return "it mixes text with images"
    if _has_soft_prompt(model):
        return "soft prompts stand before each row"
    if "position_ids" not in _accepted(type(base)):
        return "it takes no position ids"
    return None


def _remember(base: Any, info: PolicyInfo) -> PolicyInfo:
    base.__dict__["_fastalign_policy"] = info  # past nn.Module.__setattr__: plain data, copied with the model
    return info


def _set_padded(base: Any, form: LogitForm, reason: str) -> PolicyInfo:
    flat_attention.restore_attention(base)
    logger.warning("%s gets padded batches instead of flat ones: %s.", type(base).__name__, reason)
    return _remember(base, PolicyInfo(False, reason, form, None))


def _warn_of_softcap(base: Any, name: str) -> None:
    if flat_attention.NAME in name.split(", ") and getattr(base.config, "attn_logit_softcapping", None):
        logger.warning(
            "%s has attn_logit_softcapping=%s, which attn_implementation='sdpa' of Transformers leaves out, and so do "
            "we, to agree with it. Load the model with attn_implementation='eager' to apply it.",
            type(base).__name__,
            base.config.attn_logit_softcapping,
        )
