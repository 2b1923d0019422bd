"""The output embedding of a model, taught to answer with per-token statistics while somebody asks for them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from fastalign_kernels import head as head_ops
from fastalign_kernels.head.token_stats import LogitForm, TokenStats
from torch import Tensor, nn

from .flat_attention import flat_batch

CLASSIFIERS = ("score", "classifier")  # what Transformers calls the heads of classification models


@dataclass
class ScoringRequest:
    """What one forward of a model shall compute in place of logits."""

    source: Tensor  # (N,) int64, positions in the flattened input
    targets: Tensor  # (N,) int64
    length: int  # tokens of one row of the input: T, or L where padded
    mode: (
        str  # "loss" (of `op`), "deferred" (statistics with gradient), "stats" (without), "scores" (`op` of the head)
    )
    outputs: tuple[str, ...]
    form: LogitForm
    op: Any = None  # op(hidden (N, D), weight, bias=, form=, low_rank=) or op(hidden, head) -> (0-dim loss, anything)
    heads: frozenset[int] = frozenset()  # ids of the modules that may answer
    result: Any = None  # what `op` gave beside the loss
    num_calls: int = field(default=0, init=False)


_request: ContextVar[ScoringRequest | None] = ContextVar("fastalign_request", default=None)


@contextmanager
def scoring(request: ScoringRequest | None) -> Iterator[None]:
    """Inside, the heads of `request` answer it; always cleared on the way out, nested requests come back."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)


class ScoringHead:
    """Mixed into the class of a head: answers a `ScoringRequest` as (1, 1, M) fp32, else behaves as before."""

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        request = _request.get()
        if request is None or id(self) not in request.heads:
            ordinary: Any = super()
            if not hasattr(self, "fp32_head_of"):
                return ordinary.forward(hidden, *args, **kwargs)
            with torch.autocast(hidden.device.type, enabled=False):
                return ordinary.forward(hidden.float(), *args, **kwargs)
        if request.mode == "scores":
            return _answer_scores(request, hidden, super().forward)  # pyright: ignore
        return _answer(self, request, hidden)  # pyright: ignore

    def __reduce_ex__(self, protocol):
        order = type(self).__mro__
        return _new_scoring_module, (order[order.index(ScoringHead) + 1],), self.__getstate__()


@functools.cache
def _scoring_class(cls: type) -> type:
    return type(f"Scoring{cls.__name__}", (ScoringHead, cls), {"__module__": cls.__module__})


def _new_scoring_module(cls: type) -> nn.Module:
    scoring_class: Any = _scoring_class(cls)
    return scoring_class.__new__(scoring_class)


def attach_heads(model: Any) -> frozenset[int]:
    """Swap the class of the output embedding of `model`; the ids of the modules that answer. Idempotent and cheap.

    Raises ValueError where the model has no output embedding, or an adapter on it that is not additive.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embedding; load a model for causal language modelling."
        )
    modules = _copies(head)
    if hasattr(head, "token_adapter"):  # PEFT's trainable tokens: the wrapper calls the adapter's own forward
        modules = [head.token_adapter, head.token_adapter.get_base_layer()]
    for module in modules:
        if isinstance(module, ScoringHead):
            continue
        if not (isinstance(module, nn.Linear) or _is_peft(module, "lora") or _is_peft(module, "trainable_tokens")):
            raise ValueError(
                f"the output embedding is a {type(module).__name__}, which cannot be scored; allowed: nn.Linear, "
                "LoRA, trainable tokens or modules_to_save on it. Leave it out of target_modules or use one of these."
            )
        module.__class__ = _scoring_class(type(module))
    return frozenset(id(module) for module in modules)


def keep_head_in_fp32(model: Any) -> None:
    """Weight, input and product of the output embedding in fp32, under autocast too (ScaleRL, arXiv:2510.13786).

    Input embeddings that are tied to it go on giving the dtype they gave. ValueError for an adapter on the head and
    for a head whose weight is not of floating point.
    """
    head = model.get_output_embeddings()
    attach_heads(model)
    is_adapted = hasattr(head, "token_adapter") or _is_peft(head, "lora")
    if is_adapted or not all(module.weight.is_floating_point() for module in _copies(head)):
        what = "carries an adapter" if is_adapted else "is quantised"
        raise ValueError(
            f"`cast_lm_head_to_fp32=True`, but the output embedding {what}. Leave it out of the adapter's "
            "`target_modules` and of the quantisation, or set `cast_lm_head_to_fp32=False`."
        )
    embedding = model.get_input_embeddings()
    if body_dtype(model) is None and any(module.weight is embedding.weight for module in _copies(head)):
        embedding.register_forward_hook(functools.partial(_cast_output, head.weight.dtype))
    for module in _copies(head):
        if not hasattr(module, "fp32_head_of"):
            module.fp32_head_of = module.weight.dtype
            module.float()


def body_dtype(model: Any) -> torch.dtype | None:
    """What the layers of `model` compute in where its head is kept in fp32; None where the head is as they are."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(head, "fp32_head_of", None)


def _cast_output(dtype: torch.dtype, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def attach_classifier(model: Any) -> frozenset[int]:
    """`attach_heads` for the head of a classification model, `score` or `classifier`; empty where it has none."""
    head = next((found for name in CLASSIFIERS if (found := getattr(model, name, None)) is not None), None)
    modules = [] if head is None else _copies(head)
    for module in modules:
        if not isinstance(module, ScoringHead):
            module.__class__ = _scoring_class(type(module))
    return frozenset(id(module) for module in modules)


def _copies(head: Any) -> list[Any]:
    """The head, or where a full copy of it is trained beside an adapter, all that may be called in its place."""
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


def _is_peft(module: nn.Module, tuner: str) -> bool:
    if "peft" not in sys.modules:
        return False
    return any(cls.__module__.startswith(f"peft.tuners.{tuner}.") for cls in type(module).__mro__)


@torch.compiler.disable
def _answer(module: nn.Module, request: ScoringRequest, hidden: Tensor) -> Tensor:
    request.num_calls += 1
    with scoring(None), flat_batch(None):  # what loss_fn calls is none of this request
        rows = hidden.reshape(-1, hidden.shape[-1])
        source = request.source
        added = hidden.shape[-2] - request.length
        if added:  # soft prompts stand before each row
            source = source + (source // request.length + 1) * added
        rows, weight, bias, *low_rank = _operands(module, rows.index_select(0, source))
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        dtype = torch.float32 if hasattr(module, "fp32_head_of") else dtype
        rows, weight = rows.to(dtype), weight.to(dtype)
        options: dict[str, Any] = {"bias": None if bias is None else bias.to(dtype), "form": request.form}
        options["low_rank"] = tuple(factor.to(dtype) for factor in low_rank) or None
        with torch.autocast(kind, enabled=False):
            if request.mode == "loss":
                loss, request.result = request.op(rows, weight, **options)
                return loss.reshape(1, 1, 1).clone()  # FSDP2 hangs its hooks on it, and warns of a view
            score = head_ops.deferred if request.mode == "deferred" else head_ops.stats
            stats = score(rows, weight, request.targets, outputs=request.outputs, **options)
    columns = [getattr(stats, name) for name in request.outputs]
    return torch.cat([column.to(stats.logp.dtype) for column in columns]).reshape(1, 1, -1).clone()


@torch.compiler.disable
def _answer_scores(request: ScoringRequest, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, L, 1) views of one loss, so that whatever position the model pools, it finds the loss there."""
    request.num_calls += 1
    if hidden.ndim != 3 or hidden.shape[1] != request.length:
        raise ValueError(f"the head is given {tuple(hidden.shape)}, not every one of {request.length} positions")
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, request.source)
    with scoring(None):
        loss, request.result = request.op(rows, head)
    return loss.reshape(1, 1, 1).expand(*hidden.shape[:-1], 1)


def unpack_stats(result: Tensor, outputs: tuple[str, ...]) -> TokenStats:
    """The statistics back from what a head answered."""
    columns = dict(zip(outputs, result.reshape(len(outputs), -1).unbind(), strict=True))
    if "top1" in columns:
        columns["top1"] = columns["top1"] > 0.5
    return TokenStats(**columns)


def _operands(module: Any, rows: Tensor) -> tuple[Any, ...]:
    """h (N, D), W (V, D), bias (V,) or None, and for LoRA u (N, r), b (V, r): logits of `module` at `rows` (N, D)."""
    if _is_peft(module, "lora"):
        return _lora_operands(module, rows)
    if _is_peft(module, "trainable_tokens"):
        active = [] if module.disable_adapters or module.merged else module.active_adapters
        weight = module.get_merged_weights(active) if active else _plain_weight(module.get_base_layer())
        return rows, weight, None if active else getattr(module.get_base_layer(), "bias", None)
    return rows, _plain_weight(module), getattr(module, "bias", None)


def _plain_weight(module: Any) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"the head {type(module).__name__} has no weight; keep lm_head out of quantisation.")
    if hasattr(weight, "device_mesh"):
        raise ValueError(
            "the head's weight is a DTensor in its forward (tensor parallel); shard it with FSDP2 instead."
        )
    is_torchao = type(weight).__module__.startswith("torchao.")
    if weight.is_floating_point() and not hasattr(weight, "quant_state") and not is_torchao:
        return weight
    try:
        from peft.utils.integrations import dequantize_module_weight
    except ImportError as error:
        raise ValueError(f"a quantised head ({type(module).__name__}) needs peft: pip install peft.") from error
    return dequantize_module_weight(module)


def _lora_operands(module: Any, rows: Tensor) -> tuple[Any, ...]:
    """LoRA as thin factors: h W^T + u b^T, u = s drop(h) A^T and b = B of all active adapters side by side."""
    layer = module.get_base_layer()
    if module.disable_adapters and module.merged:
        module.unmerge()
    weight, bias = _plain_weight(layer), getattr(layer, "bias", None)
    if module.disable_adapters or module.merged:
        return rows, weight, bias
    factors = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in getattr(module, "lora_variant", {}):
            raise ValueError(
                f"adapter '{name}' puts a variant of LoRA (DoRA or another) on the output embedding; plain LoRA, "
                "rsLoRA or modules_to_save=['lm_head'] are supported there. Leave lm_head out of target_modules."
            )
        lora_a, lora_b, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        factors.append((lora_a(module.lora_dropout[name](rows.to(lora_a.weight.dtype))) * scaling, lora_b.weight))
        if lora_b.bias is not None:
            extra = lora_b.bias * scaling
            bias = extra if bias is None else bias + extra
    if len(factors) < 2:
        return rows, weight, bias, *(factors[0] if factors else ())
    low_hidden, low_weight = zip(*factors, strict=True)
    return rows, weight, bias, torch.cat(low_hidden, dim=1), torch.cat(low_weight, dim=1)
