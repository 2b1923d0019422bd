"""Attention on flat tokens by CUDA kernels: the flash-attn package, torch's varlen attention, FlexAttention."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor

from .segments import Segments

HALF = (torch.float16, torch.bfloat16)


@functools.cache
def has_flash_attn() -> bool:
    """The flash-attn package is installed and loads."""
    if importlib.util.find_spec("flash_attn") is None:
        return False
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError):  # built for another torch or CUDA
        return False
    return True


@functools.cache
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def is_flash_shape(query: Tensor, value: Tensor) -> bool:
    """The flash kernels take these head sizes and this dtype on this device."""
    size = query.shape[-1]
    fits = query.dtype in HALF and size == value.shape[-1] and size <= 256 and size % 8 == 0
    return fits and _capability(query.device.index) >= 8


def fitting_backends(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    dropout: float,
) -> list[str]:
    """The CUDA back ends that can compute this attention, fastest first: "flash_attn", "varlen", "flex"."""
    fits = []
    if is_flash_shape(query, value) and not sinks:
        if has_flash_attn() and (softcap is None or dropout == 0.0):
            fits.append("flash_attn")
        if softcap is None and dropout == 0.0:
            fits.append("varlen")
    if dropout == 0.0 and (softcap is not None or sinks or query.dtype in HALF) and query.shape[-1] >= 16:
        fits.append("flex")
    return fits


def _keys(k: Tensor, v: Tensor, segments: Segments, window: int | None) -> tuple[Tensor, Tensor, tuple]:
    """Keys and values that the segments see, bounds of queries and of keys, and the longest of each.

    Where keys are more than queries, these kernels take the last query to stand at the last key: a segment behind a
    copy of its prefix, or of as much of it as the window reaches.
    """
    cu, longest = segments.cu_seqlens, segments.max_seqlen
    if segments.prefix is None:
        return k, v, (cu, cu, longest, longest)
    index, cu_keys, longest_keys = segments.keys_with_prefixes(window)
    return k.index_select(0, index), v.index_select(0, index), (cu, cu_keys, longest, longest_keys)


def flash_attn_attention(q, k, v, segments: Segments, *, scale, causal, window, softcap, dropout) -> Tensor:
    """`flash_attn.flash_attn_varlen_func` on (T, H, K) tensors."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    k, v, bounds = _keys(k, v, segments, window)
    reach = (-1, -1) if window is None else (window - 1, 0)
    return flash_attn_varlen_func(
        q, k, v, *bounds, dropout_p=dropout, softmax_scale=scale, causal=causal, window_size=reach,
        softcap=softcap or 0.0, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def varlen_attention(q, k, v, segments: Segments, *, scale, causal, window) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` on (T, H, K) tensors."""
    from torch.nn.attention.varlen import varlen_attn

    k, v, bounds = _keys(k, v, segments, window)
    reach = (-1 if window is None else window - 1, 0 if causal else -1)
    attend: Any = varlen_attn
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        attend = functools.partial(attend, enable_gqa=q.shape[1] != k.shape[1])
    elif q.shape[1] != k.shape[1]:  # TODO: drop with torch < 2.12
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return attend(q, k, v, *bounds, scale=scale, window_size=reach)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _softcap_score(softcap: float):
    def score(s, b, h, q, k):
        return softcap * torch.tanh(s / softcap)

    return score


def flex_attention(q, k, v, segments: Segments, *, scale, causal, window, softcap, sinks) -> Tensor:
    """FlexAttention on (T, H, K) tensors; a sink takes its share of the softmax: out * sigmoid(lse - sink)."""
    from torch.nn.attention.flex_attention import AuxRequest
    from torch.nn.attention.flex_attention import flex_attention as plain

    attend: Any = _compiled_flex() if q.is_cuda else plain
    mask = segments.block_mask(q.shape[0], causal, window)
    out, aux = attend(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        score_mod=None if softcap is None else _softcap_score(softcap),
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:
        share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])
        out = out * share[..., None].to(out.dtype)
    return out[0].transpose(0, 1)
