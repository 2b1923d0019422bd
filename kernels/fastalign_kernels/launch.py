"""What a launch must know of its card. Tile sizes follow from op, shape, dtype and architecture, never from trials."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

ARCHITECTURES = (80, 90, 100)  # those that the tables of tile sizes name: Ampere, Hopper, Blackwell
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
MULTIPROCESSORS_ELSEWHERE = 132  # what a device that is no CUDA card (interpreter, compilation ahead) counts as


@functools.cache
def _of_card(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def architecture(device: torch.device) -> int:
    """Compute capability, such as 90 for Hopper. FASTALIGN_ARCH says it for tensors that lie on no card."""
    if device.type == "cuda":
        return _of_card(device.index if device.index is not None else torch.cuda.current_device())[0]
    return int(os.environ.get("FASTALIGN_ARCH", "90"))


def table_architecture(device: torch.device) -> int:
    """The architecture whose row of a table of tile sizes applies: the newest that is not newer than the card.

    Consumer cards (86, 89, 120) have less shared memory than the data-centre card of their generation: they use
    Ampere's row.
    """
    found = architecture(device)
    if SHARED_MEMORY.get(found, 0) < SHARED_MEMORY[80]:
        return 80
    return max((known for known in ARCHITECTURES if known <= found), default=80)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the card."""
    if device.type != "cuda":
        return MULTIPROCESSORS_ELSEWHERE
    return _of_card(device.index if device.index is not None else torch.cuda.current_device())[1]


def on_its_card(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Makes the card of the first argument the current one: Triton launches there, wherever the operands lie."""

    @functools.wraps(launch)
    def run(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return launch(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(first, *args, **kwargs)

    return run
