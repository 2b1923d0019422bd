"""How many tokens the head handles at a time, and where the chunks end."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

MIB = 2**20
LARGE_CARD = 70 * 2**30  # bytes of device memory from which the larger budget applies


def chunk_size(vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Tokens per chunk of logits with `itemsize` bytes each: a function of shape, dtype and card alone.

    Free memory plays no part, because chunk borders change the last bits of the result. CPU: 64 MiB of logits, within
    256 (below it products lose speed) and 768 tokens (then 2048 tokens with 32000 bf16 logits and both gradients take
    less than a quarter of what full logits take). Elsewhere: 2 GiB on cards of 80 GB and more, else 512 MiB,
    at least 512 tokens (fewer make the accumulation of the weight gradient memory-bound).
    """
    if device.type == "cpu":
        return min(max(64 * MIB // (vocabulary * itemsize) // 64 * 64, 256), 768)
    large = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= LARGE_CARD
    budget = (2048 if large else 512) * MIB
    return min(max(budget // (vocabulary * itemsize) // 128 * 128, 512), 65536)


def chunk_spans(num_tokens: int, chunk: int, groups: Tensor | None = None) -> list[slice]:
    """Spans of at most `chunk` tokens that cover `num_tokens`, as equal in size as can be.

    With `groups` (N,) non-decreasing ids, spans end where a group ends; a group larger than `chunk` is one span. If
    there is more than one span, groups on a GPU are read back (one synchronisation): keep them on the CPU.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: give at least 1 token, or None for the default")
    if num_tokens <= chunk:
        return [slice(0, num_tokens)] if num_tokens else []
    if groups is None:
        num_chunks = -(-num_tokens // chunk)
        even = -(-num_tokens // num_chunks)
        size = min(chunk, -(-even // 64) * 64)
        return [slice(i, min(i + size, num_tokens)) for i in range(0, num_tokens, size)]
    steps = groups.cpu().diff()
    if bool((steps < 0).any()):
        raise ValueError("groups must not decrease: sort the tokens so that each group is one run")
    ends = [*((steps != 0).nonzero().squeeze(1) + 1).tolist(), num_tokens]
    spans, begin, next_end = [], 0, 0
    while begin < num_tokens:
        last = max(bisect_right(ends, begin + chunk) - 1, next_end)
        spans.append(slice(begin, ends[last]))
        begin, next_end = ends[last], last + 1
    return spans
