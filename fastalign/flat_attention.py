"""Flat batches through Transformers' attention: our function under its own name, and a mask that carries the bounds.

Transformers asks the registered mask function for a mask before the first layer and hands what it returns to every
layer as `attention_mask`. In a flat batch ours returns a `FlatMask`, so the bounds travel with the arguments of each
layer: they are there again when gradient checkpointing runs a layer a second time, outside of the forward. The window
is the one that the model asks for when it makes the mask. Without a flat batch both functions hand over to the
implementation that the model had, named by what follows "fastalign_" (SDPA: "fastalign" alone).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from fastalign_kernels.attention import Segments, packed_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "fastalign"
IGNORE_SOFTCAP = ("sdpa",)  # implementations of Transformers that leave out soft-cap and sinks
_segments: ContextVar[Segments | None] = ContextVar("fastalign_segments", default=None)
_free: ContextVar[Any] = ContextVar("fastalign_free_tokens", default=None)


@dataclass(frozen=True, eq=False)
class FlatMask:
    """What a layer of a flat batch gets as its attention mask."""

    segments: Segments
    causal: bool
    window: int | None  # tokens, the query included
    free: Any = None  # `FreeTokens` of the batch, for layers that know what to do with them

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        """`attention(q, k, v, segments=)` as this mask has it; (T, H, K) in and out."""
        return attention(q, k, v, segments=self.segments)


@contextmanager
def flat_batch(segments: Segments | None) -> Iterator[None]:
    """Inside, a prepared model takes its input as one flat row with these bounds (None: as ordinary input)."""
    token = _segments.set(segments)
    try:
        yield
    finally:
        _segments.reset(token)


@contextmanager
def free_tokens(free: Any) -> Iterator[None]:
    """Inside, flat batches have these `FreeTokens` (None: none)."""
    token = _free.set(free)
    try:
        yield
    finally:
        _free.reset(token)


def select_flat_attention(model: nn.Module) -> str:
    """Switch `model` to our attention with its present one kept for ordinary calls; returns the name set."""
    names = set()
    for config in _configs(model):
        name = config._attn_implementation or "eager"
        if not name.startswith(NAME):
            name = NAME if name == "sdpa" else f"{NAME}_{name}"
            register(name)
            config._attn_implementation_internal = name
        names.add(name)
    return ", ".join(sorted(names))


def restore_attention(model: nn.Module) -> None:
    """Undo `select_flat_attention`."""
    for config in _configs(model):
        name = config._attn_implementation or ""
        if name.startswith(NAME):
            config._attn_implementation_internal = original_of(name)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())


def original_of(name: str) -> str:
    """The implementation that a name of ours stands in for."""
    return name.removeprefix(NAME).removeprefix("_") or "sdpa"


def register(name: str) -> None:
    """Make `name` known to Transformers."""
    original = original_of(name)
    AttentionInterface.register(name, functools.partial(_attention, original=original))
    AttentionMaskInterface.register(name, functools.partial(_mask, original=original))


def _mask(*, original: str, **request: Any) -> Any:
    """A `FlatMask` in a flat batch, else the mask of the original implementation."""
    segments = _segments.get()
    if segments is None:
        return cast(Callable[..., Any], ALL_MASK_ATTENTION_FUNCTIONS[original])(**request)
    if request["use_vmap"] or request["attention_mask"] is not None:
        raise ValueError("the model adds a mask of its own to the causal one")
    if request["batch_size"] != 1 or request["q_length"] != request["kv_length"]:
        raise ValueError("the model caches keys or changes the shape of its input")
    is_causal = "allow_is_bidirectional_skip" not in request
    return FlatMask(segments, is_causal, request.get("local_size"), _free.get())


def _attention(
    module: Any,
    query: Tensor,  # (1, H, T, K) in a flat batch
    key: Tensor,  # (1, H_kv, T, K)
    value: Tensor,  # (1, H_kv, T, K_v)
    attention_mask: FlatMask | Tensor | None,
    *,
    original: str,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Packed attention where the mask is a `FlatMask`, else the original implementation."""
    if isinstance(attention_mask, FlatMask):
        return _packed(module, query, key, value, attention_mask, original, **kwargs), None  # pyright: ignore
    if _segments.get() is not None:
        raise ValueError(f"{type(module).__name__} does not use the mask that its model made")
    if "flash" not in original:
        return _original_function(module, original)(module, query, key, value, attention_mask, **kwargs)
    config = module.config  # Transformers reads there which of the flash packages to load
    name = config._attn_implementation
    config._attn_implementation_internal = original
    try:
        return _original_function(module, original)(module, query, key, value, attention_mask, **kwargs)
    finally:
        config._attn_implementation_internal = name


def _original_function(module: nn.Module, original: str) -> Callable:
    if original != "eager":
        return ALL_ATTENTION_FUNCTIONS[original]
    for cls in type(module).__mro__:  # each modeling file has its own
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(
        f"{type(module).__name__} has no eager attention; load the model with attn_implementation='sdpa'."
    )


@torch.compiler.disable
def _packed(module, query, key, value, mask: FlatMask, original: str, **kwargs) -> Tensor:
    """(1, T, H, K_v) from (1, H, T, K); arguments as Transformers' attention functions take them."""
    if kwargs.get("position_bias") is not None:
        raise ValueError("the model adds a position bias to its scores")
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and value.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = value.dtype  # rotary embeddings in fp32 widen queries and keys
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    scale = kwargs.get("scaling")
    plain = original in IGNORE_SOFTCAP
    attention = functools.partial(
        packed_attention,
        cu_seqlens=None,
        max_seqlen=None,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        causal=mask.causal,
        window=mask.window,
        softcap=None if plain else kwargs.get("softcap"),
        sinks=None if plain else kwargs.get("s_aux"),
        dropout=kwargs.get("dropout") or 0.0,
    )
    return mask.attend(q, k, v, attention)[None]


for _name in (NAME, f"{NAME}_eager", f"{NAME}_flex_attention", f"{NAME}_flash_attention_2"):
    register(_name)  # so that a copied or unpickled model finds them
