"""Keys and values of completions in the making, and attention of one new token per row to them.

A cohort is a set of rows that started together: all have sampled equally many tokens, so their own keys (the suffix)
have one length and no mask. The keys of a prompt are held once for all its completions (the prefix), right-aligned, so
that a window is a slice. Attention over both parts is merged by their logsumexp.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from ..scoring_head import body_dtype

aten = torch.ops.aten
Pair = tuple[Tensor, Tensor]  # keys and values


class PrefillCache(Cache):
    """Hands the model's keys and values of a flat batch over to whoever asks afterwards."""

    def __init__(self):
        super().__init__(layers=[])
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (1, H_kv, T, K) and (1, H_kv, T, K_v)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        self.kept[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class DecodeCache(PrefillCache):
    """Takes the key and value of one new token per row, of several cohorts that lie back to back."""

    def __init__(self, cohorts: list[KeyValues]):
        super().__init__()
        self.cohorts = cohorts
        self.layer = -1

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        self.layer, start = layer_idx, 0
        for cohort in self.cohorts:
            stop = start + cohort.num_rows
            cohort.append(layer_idx, key_states[start:stop], value_states[start:stop])
            start = stop
        return key_states, value_states

    def attend(self, q: Tensor, **options) -> Tensor:
        """(B, H, K_v) of the queries (B, H, K) of the layer that came last."""
        if len(self.cohorts) == 1:
            return self.cohorts[0].attend(self.layer, q, **options)
        parts = q.split([cohort.num_rows for cohort in self.cohorts])
        return torch.cat([c.attend(self.layer, part, **options) for c, part in zip(self.cohorts, parts, strict=True)])


class KeyValues:
    """Keys and values of the rows of one cohort."""

    def __init__(self, lengths: list[int], prompt_of_row: list[int], device: torch.device):
        """`lengths` of the prompts, tokens; `prompt_of_row`: which of them each row continues."""
        self.device = device
        self.lengths = lengths
        self.prompt_of_row = list(prompt_of_row)
        self.prefix: dict[int, Pair] = {}  # layer -> (n, H_kv, P, K) and (n, H_kv, P, K_v), P the longest prompt
        self.suffix: dict[int, Pair] = {}  # layer -> (rows or more, H_kv, capacity, K), ...
        self.length = 0  # tokens of each row in the suffix
        self.capacity = 0
        self.allocated = self.num_rows
        self._place_rows()

    @property
    def num_rows(self) -> int:
        return len(self.prompt_of_row)

    @property
    def num_tokens(self) -> int:
        """Tokens that there is memory for."""
        return len(self.lengths) * self.longest + self.allocated * self.capacity

    def fill_prefix(self, kept: dict[int, Pair], prompts: range) -> None:
        """Take the keys of `prompts`, which lie back to back in `kept`."""
        lengths = self.lengths[prompts.start : prompts.stop]
        rows = torch.arange(prompts.start, prompts.stop).repeat_interleave(torch.tensor(lengths)).to(self.device)
        places = torch.cat([torch.arange(self.longest - n, self.longest) for n in lengths]).to(self.device)
        for layer, (k, v) in kept.items():
            if layer not in self.prefix:
                n, longest = len(self.lengths), self.longest
                self.prefix[layer] = _pair(v.new_zeros(n, x.shape[1], longest, x.shape[3]) for x in (k, v))
            for held, new in zip(self.prefix[layer], (k, v), strict=True):
                held[rows, :, places] = new[0].transpose(0, 1).to(held.dtype)

    def reserve(self, capacity: int) -> None:
        """Room for `capacity` tokens of each row."""
        self.capacity, self.allocated = capacity, self.num_rows
        for layer, held in self.suffix.items():
            self.suffix[layer] = _pair(self._resized(x) for x in held)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keys (rows, H_kv, 1, K) and values of the token after the `length` tokens that are there."""
        if layer not in self.suffix:
            self.suffix[layer] = _pair(v.new_empty(len(k), x.shape[1], self.capacity, x.shape[3]) for x in (k, v))
        for held, new in zip(self.suffix[layer], (k, v), strict=True):
            held[: self.num_rows, :, self.length] = new[:, :, 0]

    def drop(self, source: list[int], target: list[int], kept: int) -> None:
        """Move the rows at `source` to `target` and forget all after the first `kept`."""
        if source:
            index = torch.tensor([source, target], device=self.device)
            for held in self.suffix.values():
                for x in held:
                    x[index[1], :, : self.length] = x[index[0], :, : self.length]
            for a, b in zip(source, target, strict=True):
                self.prompt_of_row[b] = self.prompt_of_row[a]
        del self.prompt_of_row[kept:]
        if kept:
            if 2 * kept <= self.allocated:
                self.reserve(self.capacity)
            self._drop_prompts()
            self._place_rows()

    def histories(self, layer: int) -> Pair:
        """Keys (rows, H_kv, P + length, K) of prompt and suffix of each row, right-aligned, and values."""
        rows = torch.tensor(self.prompt_of_row, device=self.device)
        pairs = zip(self.prefix[layer], self.suffix.get(layer, (None, None)), strict=True)
        return _pair(
            before[rows] if own is None else torch.cat([before[rows], own[: self.num_rows, :, : self.length]], 2)
            for before, own in pairs
        )

    def attend(
        self, layer: int, q: Tensor, *, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention (B, H, K_v) of queries (B, H, K) to prefix and suffix; `window` in tokens, the query included."""
        k, v = self.suffix[layer]
        num_rows, num_heads, size = q.shape
        kv_heads, stop = k.shape[1], self.length + 1
        q = q.to(v.dtype)
        start = 0 if window is None else max(stop - window, 0)
        own = q.view(num_rows, kv_heads, -1, size)
        rows = slice(0, num_rows)
        out, lse = _attention(own, k[rows, :, start:stop], v[rows, :, start:stop], None, scale, softcap)
        out, lse = out.reshape(num_rows, num_heads, -1), lse.reshape(num_rows, num_heads)
        seen = self.longest if window is None else min(window - stop, self.longest)
        if seen > 0:
            before, before_lse = self._attend_prefix(layer, own, seen, scale, softcap)
            share = (before_lse - lse).sigmoid().unsqueeze(-1)
            out = torch.lerp(out.float(), before.float(), share).to(out.dtype)
            lse = torch.logaddexp(lse, before_lse) if sinks is not None else lse
        if sinks is not None:
            out = out * (lse - sinks.to(lse.dtype)).sigmoid().unsqueeze(-1).to(out.dtype)
        return out

    def _attend_prefix(self, layer: int, q: Tensor, seen: int, scale: float, softcap: float | None):
        """Out (B, H, K_v) and logsumexp (B, H) of q (B, H_kv, r, K) over the last `seen` places of the prompts."""
        k, v = (x[:, :, -seen:] for x in self.prefix[layer])
        num_prompts, (num_rows, kv_heads, repeats, _) = len(k), q.shape
        if self._row_of_slot is not None:
            q = q[self._row_of_slot]
        # (n, H_kv, slots r, K): all completions of a prompt ask its keys together
        q = q.view(num_prompts, -1, kv_heads, repeats, q.shape[-1]).transpose(1, 2).flatten(2, 3)
        bias = None if self._bias is None else self._bias[..., -seen:]
        out, lse = _attention(q, k, v, bias, scale, softcap)
        out = out.unflatten(2, (-1, repeats)).transpose(1, 2).flatten(0, 1)
        lse = lse.unflatten(2, (-1, repeats)).transpose(1, 2).flatten(0, 1)
        if self._slot_of_row is not None:
            out, lse = out[self._slot_of_row], lse[self._slot_of_row]
        return out.reshape(num_rows, kv_heads * repeats, -1), lse.reshape(num_rows, -1)

    def _resized(self, held: Tensor) -> Tensor:
        resized = held.new_empty(self.allocated, held.shape[1], self.capacity, held.shape[3])
        resized[:, :, : self.length] = held[: self.num_rows, :, : self.length]
        return resized

    def _drop_prompts(self) -> None:
        """Free the keys of prompts without rows, once these are a quarter."""
        used = sorted(set(self.prompt_of_row))
        if len(used) * 4 > len(self.lengths) * 3:
            return
        before = self.longest
        self.lengths = [self.lengths[prompt] for prompt in used]
        cut, index = before - max(self.lengths), torch.tensor(used, device=self.device)
        for layer, held in self.prefix.items():
            self.prefix[layer] = _pair(x[:, :, cut:].index_select(0, index) for x in held)
        place = {prompt: number for number, prompt in enumerate(used)}
        self.prompt_of_row = [place[prompt] for prompt in self.prompt_of_row]

    def _place_rows(self) -> None:
        """Where each row stands among the completions of its prompt, empty places included."""
        num_prompts, self.longest = len(self.lengths), max(self.lengths)
        counts, slots = [0] * num_prompts, []
        for prompt in self.prompt_of_row:
            slots.append(counts[prompt])
            counts[prompt] += 1
        width = max(counts)
        slot_of_row = [prompt * width + slot for prompt, slot in zip(self.prompt_of_row, slots, strict=True)]
        row_of_slot = [0] * (num_prompts * width)
        for row, slot in enumerate(slot_of_row):
            row_of_slot[slot] = row
        in_place = slot_of_row == list(range(num_prompts * width))
        self._slot_of_row = None if in_place else torch.tensor(slot_of_row, device=self.device)
        self._row_of_slot = None if in_place else torch.tensor(row_of_slot, device=self.device)
        pads = torch.arange(self.longest) < self.longest - torch.tensor(self.lengths)[:, None]  # (n, P)
        bias = torch.zeros(pads.shape).masked_fill_(pads, -torch.inf)[:, None, None].to(self.device)
        self._bias = bias if pads.any() else None


def joined(parts: list[KeyValues]) -> KeyValues:
    """The rows of `parts`, each behind a prompt of its own: all that it has so far."""
    lengths = [part.lengths[prompt] + part.length for part in parts for prompt in part.prompt_of_row]
    whole = KeyValues(lengths, list(range(len(lengths))), parts[0].device)
    for layer in parts[0].prefix:
        columns = zip(*(part.histories(layer) for part in parts), strict=True)
        whole.prefix[layer] = _pair(torch.cat([_fitted(x, whole.longest) for x in column]) for column in columns)
    return whole


def _fitted(x: Tensor, length: int) -> Tensor:
    """x (n, h, L, K) with `length` places, cut or filled at the left."""
    x = x[:, :, -length:]
    return F.pad(x, (0, 0, length - x.shape[2], 0))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Out (n, h, m, K_v) and logsumexp (n, h, m) fp32 of q (n, h, m, K) over k (n, h, L, K); bias (n, 1, 1, L)."""
    if q.device.type == "cpu" and softcap is None and q.shape[-1] == v.shape[-1]:
        mask = None if bias is None else bias.to(q.dtype).expand(-1, -1, q.shape[2], -1)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        return out, lse
    with torch.autocast(q.device.type, enabled=False):
        return _explicit_attention(q, k, v, bias, scale, softcap)


def _explicit_attention(q, k, v, bias: Tensor | None, scale: float, softcap: float | None) -> Pair:
    if q.is_cuda and q.itemsize < 4:  # 16-bit scores are too coarse
        scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        scores = scores.view(*q.shape[:3], -1) * scale
    else:
        scores = torch.matmul(q, k.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    return torch.matmul((scores - lse[..., None]).exp().to(v.dtype), v), lse


def _pair(tensors: Iterable[Tensor]) -> Pair:
    k, v = tensors
    return k, v


def bytes_per_token(model: Any) -> int:
    """Keys and values of one token, all layers; of a model without heads, as if it had hidden states for both."""
    config = model.config.get_text_config()
    all_heads = getattr(config, "num_attention_heads", None) or 1
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // all_heads
    dtype = body_dtype(model) or model.dtype
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize
