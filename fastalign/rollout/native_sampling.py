"""What a request's settings ask of the sampler, and random numbers that depend on the request alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastalign_kernels.head.sampling import Distribution
from torch import Tensor

from .engine import Sampling

_GOLDEN, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


@dataclass(frozen=True)
class Plan:
    """A `Sampling`, checked."""

    distribution: Distribution
    stop_ids: tuple[int, ...]
    max_new_tokens: int


def plan_of(sampling: Sampling, engine: str) -> Plan:
    """The plan of `sampling`; ValueError for a value out of its range or for what `engine` cannot do, by name."""
    options = dict(sampling.options)
    values = {
        name: options.pop(name, getattr(sampling, name))
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    }
    if options.pop("do_sample", True) is False:
        values["temperature"] = 0.0
    if options:
        raise ValueError(
            f"`generation_kwargs` has {', '.join(sorted(options))}, which the engine {engine!r} does not know; it "
            f"knows do_sample, {', '.join(values)}. Leave the others out, or set `use_vllm=True` for vLLM's."
        )
    if sampling.regex is not None:
        raise ValueError(
            f"`regex` is {sampling.regex!r}, but the engine {engine!r} cannot hold completions to a pattern. Set "
            "`use_vllm=True`, or leave it out."
        )
    allowed = {
        "max_new_tokens": (values["max_new_tokens"] >= 1, "1 or more"),
        "temperature": (values["temperature"] >= 0, "0 or more"),
        "top_k": ((values["top_k"] or 0) >= -1, "0 (all tokens) or more"),
        "top_p": (0 < values["top_p"] <= 1, "above 0 and at most 1"),
        "min_p": (0 <= (values["min_p"] or 0) <= 1, "from 0 to 1"),
        "repetition_penalty": (values["repetition_penalty"] > 0, "above 0"),
    }
    for name, (fits, what) in allowed.items():
        if not fits:
            raise ValueError(f"`{name}` of the sampling is {values[name]}; allowed is {what}.")
    distribution = Distribution(
        float(values["temperature"]),
        max(values["top_k"] or 0, 0),
        float(values["top_p"]),
        float(values["min_p"] or 0.0),
        float(values["repetition_penalty"]),
        tuple(sampling.banned),
    )
    return Plan(distribution, tuple(sampling.stop_ids), int(values["max_new_tokens"]))


def uniforms(seeds: list[int], first: list[int], count: int) -> Tensor:
    """(rows, count) fp64 in [0, 1): numbers first, first + 1, ... of each seed's stream (SplitMix64)."""
    state = torch.tensor([_signed(seed) for seed in seeds])[:, None]
    state = _mix(_mix(state * _MIX_2 + _GOLDEN) + _GOLDEN)
    place = torch.tensor(first)[:, None] + torch.arange(1, count + 1)
    return _right(_mix(state + place * _GOLDEN), 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 products wrap."""
    x = (x ^ _right(x, 30)) * _MIX_1
    x = (x ^ _right(x, 27)) * _MIX_2
    return x ^ _right(x, 31)


def _right(x: Tensor, bits: int) -> Tensor:
    """Shift that fills with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(seed: int) -> int:
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed
