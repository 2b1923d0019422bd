"""One vLLM engine over the GPUs of several training processes: they ask together and step together."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .engine import Request


class TensorParallel:
    """This process's place in a group of `size` processes that run one engine (neighbours in rank, on one machine).

    Every process of the group submits as often as the others, and a step lasts until all they asked for is done:
    matrices are multiplied together, so that no process may run ahead. ValueError where `size` does not divide the
    number of processes.
    """

    def __init__(self, size: int):
        world = dist.get_world_size() if dist.is_initialized() else 1
        if size < 1 or world % size:
            raise ValueError(
                f"`vllm_tensor_parallel_size` is {size}, but training runs in {world} process(es): it must divide "
                "their number, each process gives its GPU. Start as many with `accelerate launch --num_processes`."
            )
        self.size = size
        self.index = (dist.get_rank() if dist.is_initialized() else 0) // size  # of this engine among all
        self.rank = 0
        self._group: Any = None
        if size > 1:
            groups = [list(range(first, first + size)) for first in range(0, world, size)]
            self._group, _ = dist.new_subgroups_by_enumeration(groups)
            self.rank = dist.get_rank(self._group)

    def environment(self) -> dict[str, str]:
        """What the engine's processes find each other by; none for an engine in one process."""
        if self.size == 1:
            return {}
        address = self.gather(("localhost", _free_port()))[0]
        device = torch.cuda.current_device() if torch.cuda.is_available() else self.rank
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(device),
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.size),
            "MASTER_ADDR": address[0],
            "MASTER_PORT": str(address[1]),
        }

    def options(self) -> dict[str, Any]:
        """The engine's arguments."""
        if self.size == 1:
            return {}
        return {"tensor_parallel_size": self.size, "distributed_executor_backend": "external_launcher"}

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process of the group, in order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def join(self, requests: Sequence[Request]) -> list[tuple[bool, Request]]:
        """(whether it is this process's own, request) of all processes, in the same order on each."""
        joined = self.gather(list(requests))
        return [(rank == self.rank, request) for rank, part in enumerate(joined) for request in part]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
