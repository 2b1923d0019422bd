"""Weights on their way to a vLLM server: broadcast to its GPUs, or files in memory that it reads again."""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from ..adapters import is_peft_model
from .vllm_adapter import AdapterFiles, memory_folder, why_merged
from .vllm_http import Client, ServerError
from .weights import TrainingWeights

POLICY = "policy"  # the adapter's name on the server
NCCL_HINT = """--weight-transfer-config '{"backend": "nccl"}'"""


def make_push(client: Client, model: Any, settings: dict[str, Any], group_port: int) -> Push:
    """The best way to a server with these `settings`: adapter files, NCCL, files of all weights.

    ValueError where no way leads to it, saying how to start it.
    """
    merged = why_merged(model)
    local = is_local(client.host)
    if is_peft_model(model) and not merged and settings.get("lora_config") and local:
        return AdapterPush(client, model)
    transfer = (settings.get("weight_transfer_config") or {}).get("backend")
    source = TrainingWeights(model, merged=is_peft_model(model))
    if transfer == "nccl" and torch.cuda.is_available():
        return BroadcastPush(client, source, group_port)
    if local:
        dtype = str((settings.get("model_config") or {}).get("dtype", "")).removeprefix("torch.")
        return FilePush(client, source, getattr(torch, dtype, None))
    raise ValueError(
        f"Weights cannot reach the vLLM server at {client.host}: on another machine than this one it needs GPUs on "
        f"both sides and to be started with {NCCL_HINT}; its setting is {transfer!r}."
    )


def is_local(host: str) -> bool:
    """Whether `host` is this machine, so that files in its memory can be read by both."""
    own = {"localhost", "0.0.0.0", "127.0.0.1", "::1", socket.gethostname()}
    return host in own or host.startswith("127.")


class Push:
    """Brings weights to the server, on the first process alone; the others wait until they are there."""

    way: Literal["in place", "reloaded", "adapter"] = "reloaded"

    def __init__(self, client: Client, source: TrainingWeights):
        self.client, self.source = client, source
        self._mark = uuid.uuid4().hex  # of this run, in the server's weight version
        self._known = ""  # version that the server has, where it keeps one
        self._broken = 0  # connections, when the server last was known to have our weights

    @property
    def is_first(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0

    def __call__(self, version: int) -> int:
        """Bring the weights of now; requests that are under way go on with them. Returns the bytes.

        All processes call it.
        """
        num_bytes = self._bring_all(version)
        if dist.is_initialized():
            dist.barrier()
        return num_bytes

    def again(self, version: int) -> None:
        """Bring them to a server that has restarted; on the first process alone, whenever that sees it.

        RuntimeError where it does not hold all weights.
        """
        if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in self.source.model.parameters()):
            raise RuntimeError(
                "The vLLM server has restarted and lost the weights, which are sharded over processes here. Resume "
                "the run from its last checkpoint."
            )
        self.connect()
        self._bring_all(version)

    def _bring_all(self, version: int) -> int:
        if not self.is_first:
            return self.bring()
        self.client.post("/pause", mode="keep")
        num_bytes = self.bring()
        self._reset_cache()
        self._known = f"{self._mark}:{version}"
        try:
            self.client.post("/update_weight_version", {"new_version": self._known})
        except ServerError:  # of an older vLLM, which keeps no version
            self._known = ""
        self.client.post("/resume")
        self._broken = self.client.num_broken
        return num_bytes

    def connect(self) -> None:
        """Open what weights travel on, where that is more than HTTP."""

    def bring(self) -> int:
        raise NotImplementedError

    def _reset_cache(self) -> None:
        for _ in range(20):
            answer = self.client.post("/reset_prefix_cache", reset_running_requests="true")
            if not isinstance(answer, dict) or answer.get("success", True):
                return
            time.sleep(0.05)
        raise RuntimeError("The vLLM server kept its prefix cache, whose contents belong to older weights.")

    def lost(self) -> bool:
        """Whether the server was away since the last call and came back without our weights."""
        if not self.is_first or self.client.num_broken == self._broken:
            return False
        self._broken = self.client.num_broken
        if not self._known:
            return True
        return self.client.get("/weight_info")["weight_version"] != self._known

    def close(self) -> None:
        pass


class FilePush(Push):
    """All weights as a file in shared memory, which the server loads anew."""

    def __init__(self, client: Client, source: TrainingWeights, dtype: torch.dtype | None):
        super().__init__(client, source)
        self.dtype = dtype

    def bring(self) -> int:
        with self.source.readable() as tensors:
            state = {}
            for name, tensor in self.source.checkpoint(tensors):
                if self.is_first:
                    cast = self.dtype if self.dtype and tensor.is_floating_point() else tensor.dtype
                    state[name] = tensor.to("cpu", cast).contiguous()
            if not self.is_first:
                return 0
            with memory_folder("fastalign_weights_") as folder:
                save_file(state, Path(folder, "model.safetensors"))
                body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
                self.client.post("/collective_rpc", body)
        return sum(t.numel() * t.element_size() for t in state.values())


class AdapterPush(Push):
    """The adapter's files in shared memory, which the server reads in place of those before."""

    way = "adapter"

    def __init__(self, client: Client, model: Any):
        super().__init__(client, TrainingWeights(model))
        self.files = AdapterFiles(model)

    def bring(self) -> int:
        num_bytes = self.files.write()
        if self.is_first:
            body = {"lora_name": POLICY, "lora_path": self.files.folder, "load_inplace": True}
            try:
                self.client.post("/v1/load_lora_adapter", body)
            except ServerError as error:
                raise ValueError(
                    f"The vLLM server does not take the adapter ({error}). Start it with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and --max-lora-rank at least as high as the "
                    "adapter's; without --enable-lora it gets merged weights."
                ) from error
        return num_bytes

    def close(self) -> None:
        self.files.close()


class BroadcastPush(Push):
    """All weights over NCCL into the server's GPUs, by vLLM's own weight transfer (0.28 or newer)."""

    way = "in place"

    def __init__(self, client: Client, source: TrainingWeights, group_port: int):
        super().__init__(client, source)
        self.port = group_port
        self.transfer: Any = None
        self._shapes: list[tuple[str, torch.dtype, torch.Size]] = []
        self.connect()

    def connect(self) -> None:
        try:
            from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource  # pyright: ignore
            from vllm.distributed.weight_transfer.nccl_engine import (  # pyright: ignore[reportMissingImports]
                NCCLTrainerInitInfo,
                NCCLTrainerWeightTransferEngine,
            )
            from vllm.utils.network_utils import get_ip  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"Weights go to the server through vLLM's NCCL transfer, which needs vLLM 0.28 or newer here too "
                f"({error}): `pip install fastalign[vllm]`, or start the server without {NCCL_HINT} on this machine."
            ) from error
        push = self

        class Source(WeightSource):
            def metadata(self):
                return [ParamMeta(name, dtype, tuple(shape)) for name, dtype, shape in push.shapes()]

            def __iter__(self):
                return push.tensors()

        # this process is one more than the server's workers, and the first
        world_size = self.client.get("/get_world_size")["world_size"] + 1 if self.is_first else 0
        rank = dist.get_rank() if dist.is_initialized() else 0
        info = NCCLTrainerInitInfo(rank=rank, master_address=get_ip(), master_port=self.port, world_size=world_size)
        self.transfer = NCCLTrainerWeightTransferEngine.trainer_init(info, client=_Calls(self.client), source=Source())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values in the order of `shapes`; on all processes alike."""
        device = torch.device("cuda", torch.cuda.current_device())
        with self.source.readable() as tensors, torch.no_grad():
            for name, tensor in self.source.checkpoint(tensors):
                yield name, tensor.to(device).contiguous()

    def shapes(self) -> list[tuple[str, torch.dtype, torch.Size]]:
        """Name, dtype and shape of everything that is sent; they stay the same during a run."""
        if not self._shapes:
            self._shapes = [(name, tensor.dtype, tensor.shape) for name, tensor in self.tensors()]
        return self._shapes

    def bring(self) -> int:
        self.transfer.send_weights()
        return sum(shape.numel() * dtype.itemsize for _, dtype, shape in self.shapes())

    def close(self) -> None:
        if self.is_first:
            with contextlib.suppress(ConnectionError, ServerError):  # it is gone, or older
                self.client.post("/shutdown_weight_transfer_engine")


class _Calls:
    """What vLLM's trainer asks of the server while it sends."""

    def __init__(self, client: Client):
        self.client = client

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.client.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.client.post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.client.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.client.post("/finish_weight_update", {"weight_version": weight_version} if weight_version else {})
