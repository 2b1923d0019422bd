"""One storage for weights that train and weights that sample: parameters become views of an engine's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# An engine's fused layer <- the layers of the training model whose rows it holds, in this order
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
EXPERTS = {  # all experts of a layer in one tensor
    "experts.gate_up_proj": "experts.routed_experts.w13_weight",
    "experts.down_proj": "experts.routed_experts.w2_weight",
}


@dataclass(frozen=True)
class Twin:
    """A training parameter and the place of its values in the engine."""

    name: str  # of the parameter in the training model
    place: Tensor  # a view of the engine's tensor, of the parameter's shape

    def holds(self, parameter: Tensor) -> bool:
        """Whether `parameter` is this very memory."""
        return (
            parameter.data_ptr() == self.place.data_ptr()
            and parameter.stride() == self.place.stride()
            and parameter.dtype == self.place.dtype
        )


@dataclass(frozen=True)
class Twins:
    """Places of all training parameters, or why there are none."""

    found: tuple[Twin, ...] = ()
    reason: str = ""  # why the engine's tensors cannot be addressed one by one; '' where they can


def find_twins(engine_model: nn.Module, tensors: Mapping[str, Tensor]) -> Twins:
    """Where the engine keeps the values of each training parameter (name -> tensor, further names of tied ones too).

    Names decide: the same name, or the rows of a fused layer. Whether values agree is for the caller to check, since
    an engine may keep a matrix transposed or packed.
    """
    engine = {name.replace(".base_layer.", "."): p.data for name, p in engine_model.named_parameters()}
    engine |= _tied(engine_model, engine)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    fused = FUSED | dict(getattr(engine_model, "packed_modules_mapping", None) or {})
    parents = {part: (whole, parts) for whole, parts in fused.items() for part in parts if len(parts) > 1}
    mapper = getattr(engine_model, "hf_to_vllm_mapper", None)
    found, covered, lost, placed = [], set(), {}, set()
    for name, shape in shapes.items():
        place, whole = _place(name, shape, shapes, engine, parents)
        if place is None and mapper is not None and (mapped := _mapped(mapper, name)) in engine:
            place, whole = _rows(engine[mapped], 0, shape), mapped
        if place is None:
            lost[name] = id(tensors[name])
            continue
        found.append(Twin(name, place))
        placed.add(id(tensors[name]))
        covered.add(engine[whole].data_ptr())
    for name, tensor in lost.items():
        if tensor not in placed:  # else its other name has a place, and the engine ties it by itself
            return Twins(reason=f"the engine keeps no tensor in which {name} could be addressed")
    missing = [name for name, tensor in engine.items() if tensor.data_ptr() not in covered and tensor.numel()]
    if missing:
        return Twins(reason=f"{missing[0]} of the engine belongs to no single parameter of the model")
    return Twins(tuple(found))


def _place(name: str, shape, shapes, engine, parents) -> tuple[Tensor | None, str]:
    """The view for `name` and the name of the engine's tensor it lies in."""
    if name in engine:
        return _rows(engine[name], 0, shape), name
    for of_model, of_engine in EXPERTS.items():
        if name.endswith(of_model) and (whole := name.replace(of_model, of_engine)) in engine:
            return _rows(engine[whole], 0, shape), whole
    prefix, _, suffix = name.rpartition(".")
    layer = prefix.rpartition(".")[2]
    parent = prefix.removesuffix(layer)
    if layer not in parents:
        return None, ""
    whole, parts = parents[layer]
    fused = f"{parent}{whole}.{suffix}"
    rows = [shapes.get(f"{parent}{part}.{suffix}", (None,))[0] for part in parts]
    if fused not in engine or None in rows or sum(rows) != engine[fused].shape[0]:
        return None, ""
    return _rows(engine[fused], sum(rows[: parts.index(layer)]), shape), fused


def _rows(tensor: Tensor, first: int, shape) -> Tensor | None:
    """Rows of `tensor` from `first` on, as many as `shape` has; None where the rest of the shape differs."""
    if tensor.ndim != len(shape) or tensor.shape[1:] != shape[1:] or first + shape[0] > tensor.shape[0]:
        return None
    return tensor[first : first + shape[0]]


def _mapped(mapper, name: str) -> str:
    try:
        return mapper.apply_list([name])[0]
    except (AttributeError, IndexError):
        return name


def _tied(engine_model: nn.Module, engine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Further names of tensors that `named_parameters` lists once."""
    everything = engine_model.named_parameters(remove_duplicate=False)
    return {name: p.data for name, p in everything if name not in engine and ".base_layer." not in name}


def agree(twins: Twins, tensors: Mapping[str, Tensor]) -> str:
    """'' where each place holds the values of its tensor (cast to the engine's dtype), else the name that differs."""
    for twin in twins.found:
        value = tensors[twin.name].detach()
        if not torch.equal(twin.place, value.to(device=twin.place.device, dtype=twin.place.dtype)):
            return twin.name
    return ""


def bind(twins: Twins, parameters: Mapping[str, nn.Parameter]) -> int:
    """Give every parameter the engine's memory, its own values in it; returns the bytes that were copied.

    The parameters stay the same objects, so that optimizers and hooks keep them.
    """
    copied = 0
    for twin in twins.found:
        parameter = parameters[twin.name]
        if twin.holds(parameter):
            continue
        with torch.no_grad():
            twin.place.copy_(parameter.data)
        parameter.data = twin.place
        copied += twin.place.numel() * twin.place.element_size()
    return copied


def moved(twins: Twins, parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of parameters that no longer are the engine's memory."""
    return [twin.name for twin in twins.found if not twin.holds(parameters[twin.name])]
