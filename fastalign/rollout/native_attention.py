"""Attention of one new token per row through Transformers' interface, for models that take attention from outside."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from ..flat_attention import IGNORE_SOFTCAP, original_of
from .native_cache import DecodeCache

NAME = "fastalign_decode"
_cache: ContextVar[DecodeCache | None] = ContextVar("fastalign_decode_cache", default=None)


@dataclass(frozen=True, eq=False)
class DecodeMask:
    """What a layer gets as its attention mask."""

    cache: DecodeCache
    window: int | None  # tokens, the query included


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """The configs in which the layers of `model` look their attention up."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())


@contextmanager
def decoding(configs: list[PreTrainedConfig], cache: DecodeCache) -> Iterator[None]:
    """Inside, each row of the model's input is one new token, which attends to its own keys in `cache`."""
    names = [(config, config._attn_implementation) for config in configs]
    token = _cache.set(cache)
    try:
        for config, name in names:
            plain = original_of(name or "eager") in IGNORE_SOFTCAP
            config._attn_implementation_internal = NAME if plain else f"{NAME}_capped"
        yield
    finally:
        _cache.reset(token)
        for config, name in names:
            config._attn_implementation_internal = name


def _mask(**request: Any) -> DecodeMask:
    cache = _cache.get()
    assert cache is not None, "set by `decoding`"
    if request["use_vmap"] or request["attention_mask"] is not None:
        raise ValueError("the model adds a mask of its own to the causal one")
    return DecodeMask(cache, request.get("local_size"))


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, plain: bool, **kwargs
) -> tuple[Tensor, None]:
    """(B, 1, H, K_v) from (B, H, 1, K); arguments as Transformers' attention functions take them."""
    if not isinstance(attention_mask, DecodeMask) or kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} does not use the mask that its model made")
    scale = kwargs.get("scaling")
    out = attention_mask.cache.attend(
        query[:, :, 0],
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window=attention_mask.window,
        softcap=None if plain else kwargs.get("softcap"),
        sinks=None if plain else kwargs.get("s_aux"),
    )
    return out[:, None], None


for _suffix, _plain in (("", True), ("_capped", False)):
    AttentionInterface.register(NAME + _suffix, functools.partial(_attention, plain=_plain))
    AttentionMaskInterface.register(NAME + _suffix, _mask)
