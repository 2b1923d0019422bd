"""Activation offloading: what the backward pass needs waits in page-locked host memory instead of on the GPU."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule

logger = logging.getLogger(__name__)

MIN_BYTES = 1024  # smaller tensors stay: their transfer costs more than their memory
AHEAD = 4  # tensors fetched before the backward pass asks for them
IN_FLIGHT = 4  # tensors whose copy to the host may still run while the forward pass goes on


def offload_activations(model: nn.Module) -> contextlib.AbstractContextManager:
    """Context around one forward pass of `model`: its activations of 1 KiB and more wait in host memory.

    Parameters stay where they are. Copies run on a stream of their own, and the backward pass finds the next ones
    fetched already. Values are bit-identical. A model on the CPU has nothing to offload: the context does nothing.
    """
    if next(model.parameters()).device.type == "cpu":
        _say_once()
        return contextlib.nullcontext()
    return _Offload(model)


@functools.cache
def _say_once() -> None:
    logger.info("activation_offloading does nothing here: the model is on the CPU, and so are its activations.")


@functools.cache
def _copy_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)


class _Slot:
    """One offloaded tensor: its copy in host memory, and again on the device once it was fetched."""

    def __init__(self, place: int, host: Tensor, device: torch.device, copied: torch.Event):
        self.place, self.host, self.device, self.copied = place, host, device, copied
        self.fetched: Tensor | None = None
        self.arrived: torch.Event | None = None

    def fetch(self) -> None:
        """Start the copy back to the device."""
        stream = _copy_stream(self.device)
        if self.fetched is None:
            with stream:
                stream.wait_event(self.copied)
                self.fetched = self.host.to(self.device, non_blocking=True)
                self.arrived = stream.record_event()


class _Offload(saved_tensors_hooks):
    def __init__(self, model: nn.Module):
        super().__init__(self._pack, self._unpack)
        self.model = model
        self._parameters: set[int] = set()  # addresses of parameter storages
        self._slots: list[weakref.ref[_Slot]] = []  # in the order of the forward pass
        self._leaving: list[tuple[Tensor, torch.Event]] = []  # held until the compute stream knows of their copies
        self._hooks: list = []

    def __enter__(self):
        self._note_parameters(self.model)
        for module in self.model.modules():  # FSDP2 gathers weights into new storage before each module's forward
            if isinstance(module, FSDPModule):
                self._hooks.append(module.register_forward_pre_hook(lambda m, _: self._note_parameters(m)))
        return super().__enter__()

    def __exit__(self, *args):
        self._release(0)
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*args)

    def _note_parameters(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            local = getattr(parameter, "_local_tensor", parameter)
            self._parameters.add(local.untyped_storage().data_ptr())

    def _release(self, limit: int) -> None:
        """Let the compute stream wait for the oldest copies, so that at most `limit` tensors are held for them."""
        while len(self._leaving) > limit:
            tensor, copied = self._leaving.pop(0)
            torch.accelerator.current_stream(tensor.device).wait_event(copied)

    def _pack(self, tensor: Tensor) -> Tensor | _Slot:
        if tensor.device.type == "cpu" or tensor.nbytes < MIN_BYTES or type(tensor) is not Tensor:
            return tensor
        if tensor.untyped_storage().data_ptr() in self._parameters:
            return tensor
        stream = _copy_stream(tensor.device)
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream.wait_stream(torch.accelerator.current_stream(tensor.device))
        with stream:
            host.copy_(tensor, non_blocking=True)
            copied = stream.record_event()
        self._leaving.append((tensor, copied))
        self._release(IN_FLIGHT)
        slot = _Slot(len(self._slots), host, tensor.device, copied)
        self._slots.append(weakref.ref(slot))
        return slot

    def _unpack(self, packed: Tensor | _Slot) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        packed.fetch()
        for reference in self._slots[max(packed.place - AHEAD, 0) : packed.place]:
            if (slot := reference()) is not None:
                slot.fetch()
        tensor, packed.fetched = packed.fetched, None
        assert tensor is not None and packed.arrived is not None
        compute = torch.accelerator.current_stream(packed.device)
        compute.wait_event(packed.arrived)
        tensor.record_stream(compute)
        return tensor
