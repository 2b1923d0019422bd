"""How the weights of the training model reach an engine in the same process: shared, copied in place, or reloaded."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from ..adapters import is_peft_model
from ..loop.weights import WRAPPER
from ..models import is_quantized
from .shared_weights import Twins, agree, bind, find_twins, moved

logger = logging.getLogger(__name__)

Way = Literal["shared", "in place", "reloaded"]


class TrainingWeights:
    """The weights of a training model under the names of its checkpoint, whatever wraps it.

    `merged`: adapters are added to the weights they belong to while these are read (else they are left out).
    """

    def __init__(self, model: Any, merged: bool = False):
        self.model = model
        self.merged = merged and is_peft_model(model)

    @property
    def base(self) -> Any:
        """The model without adapters around it."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, further names of tied ones included; parameters of adapters are left out."""
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: p for old, p in named if (name := self._name(old)) is not None}

    def _name(self, name: str) -> str | None:
        """The checkpoint's name of a parameter or buffer, None for one of an adapter."""
        for part in (WRAPPER, "_orig_mod.", "_fsdp_wrapped_module."):
            name = name.replace(part, "")
        if not is_peft_model(self.model):
            return name
        if "original_module." in name or self.model.base_model.prefix in name:
            return None
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        for adapter in self.model.peft_config:
            name = name.replace(f"modules_to_save.{adapter}.", "")
        return name

    def reason_not_to_share(self) -> str:
        """Why no engine could use the very memory of the parameters; '' where one could."""
        if is_quantized(self.model):
            return "the training model is quantized"
        if self.merged:
            return "the adapter has to be merged into copies of the weights"
        parameters = self.parameters().values()
        if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in parameters):
            return "the parameters are sharded over ranks"
        if len(found := sorted({str(p.dtype).removeprefix("torch.") for p in parameters})) > 1:
            return f"the parameters have several dtypes ({', '.join(found)})"
        return ""

    @contextlib.contextmanager
    def readable(self) -> Iterator[dict[str, Tensor]]:
        """Name -> parameter as in `parameters()`, their values complete except for DTensors (see `whole`)."""
        with contextlib.ExitStack() as stack:
            if self.merged:
                self.model.merge_adapter()
                stack.callback(self.model.unmerge_adapter)
            parameters = self.parameters()
            if sharded := [p for p in parameters.values() if hasattr(p, "ds_id")]:
                import deepspeed  # pyright: ignore[reportMissingImports]

                stack.enter_context(deepspeed.zero.GatheredParameters(sharded))
            yield dict(parameters)

    def checkpoint(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Names and values as a checkpoint of this model has them, which is what engines load."""
        seen: set[int] = set()
        state = {}
        for name, tensor in tensors.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                state[name] = whole(tensor)
        kept = self.base.state_dict().keys()
        for old, buffer in self.model.named_buffers():
            name = self._name(old)
            if name is not None and name in kept:  # persistent ones only
                state[name] = buffer
        yield from revert_weight_conversion(self.base, state).items()


def whole(tensor: Tensor) -> Tensor:
    """The full values of a parameter; all ranks must call it for one that is spread over them."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass
class WeightPath:
    """The way from training weights to an engine's, found once and checked at every use."""

    source: TrainingWeights
    way: Way = "reloaded"
    reason: str = ""  # why it is no better way
    twins: Twins = field(default_factory=Twins)

    def load(self, engine_model: Any) -> None:
        """First load, by the engine's own loader; called while the engine is built."""
        with self.source.readable() as tensors, torch.no_grad():
            engine_model.load_weights(self.source.checkpoint(tensors))

    def settle(self, engine_model: nn.Module, num_parts: int = 1) -> None:
        """Choose the best way for an engine that has just been built, and bind parameters where it is "shared".

        `num_parts`: over how many devices the engine spreads each matrix.
        """
        if num_parts > 1:
            self.reason = self.reason or f"the engine spreads the model over {num_parts} devices"
            return
        with self.source.readable() as tensors:
            self.twins = find_twins(engine_model, tensors)
            if not self.twins.reason:
                values = {name: whole(tensor) for name, tensor in tensors.items()}
                if different := agree(self.twins, values):
                    self.twins = Twins(reason=f"the engine keeps {different} in a layout of its own")
        if self.twins.reason:
            self.way, self.reason = "reloaded", self.twins.reason
            return
        self.way, self.reason = "in place", self.reason or self._obstacle()
        if not self.reason:
            bind(self.twins, self.source.parameters())
            self.way = "shared"

    def _obstacle(self) -> str:
        """Why these parameters cannot be the engine's memory; '' where they can."""
        if reason := self.source.reason_not_to_share():
            return reason
        parameters = self.source.parameters()
        places: dict[int, int] = {}
        for twin in self.twins.found:
            parameter = parameters[twin.name]
            if parameter.dtype != twin.place.dtype:
                trained, sampled = (str(t.dtype).removeprefix("torch.") for t in (parameter, twin.place))
                return f"{twin.name} trains in {trained} and samples in {sampled}"
            if parameter.device != twin.place.device and parameter.device.type != "cpu":
                return f"{twin.name} trains on {parameter.device} and samples on {twin.place.device}"
            if places.setdefault(id(parameter), twin.place.data_ptr()) != twin.place.data_ptr():
                return f"{twin.name} is tied in training and kept apart in the engine"
        return ""

    def push(self, reload: Any) -> tuple[Way, int]:
        """Bring the engine's weights up to date; returns the way it was done and the bytes that were copied.

        `reload(iterator of (name, tensor))` is the engine's own loading.
        """
        if self.way == "shared":
            names = moved(self.twins, self.source.parameters())
            if not names:
                return "shared", 0
            if not (reason := self._obstacle()):
                logger.warning(
                    "%d parameters (%s, ...) were moved out of the memory they share with the engine, by `model.to`, "
                    "`param.data = ...` or `load_state_dict(assign=True)`. They are moved back.",
                    len(names),
                    names[0],
                )
                return "in place", bind(self.twins, self.source.parameters())
            self.way, self.reason = "in place", reason
            logger.warning("Weights are copied to the engine from now on: %s.", reason)
        with self.source.readable() as tensors, torch.no_grad():
            if self.way == "in place":
                return "in place", self._copy(tensors)
            total = _num_bytes(tensors)
            reload(self.source.checkpoint(tensors))
            return "reloaded", total

    def _copy(self, tensors: dict[str, Tensor]) -> int:
        done: dict[int, Tensor] = {}
        total = 0
        for twin in self.twins.found:
            parameter = tensors[twin.name]
            if twin.holds(parameter):
                continue
            if id(parameter) not in done or done[id(parameter)].data_ptr() != twin.place.data_ptr():
                twin.place.copy_(whole(parameter))
                done[id(parameter)] = twin.place
                total += twin.place.numel() * twin.place.element_size()
        return total


def _num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors.values()}.values())
