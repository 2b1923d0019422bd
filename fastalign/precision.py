"""fp8 for the body of a model: its large linear layers multiply in e4m3, everything else stays as it is.

A module keeps its parameters, hooks and name in the model; its class becomes a subclass of the same name, so state
dicts, `save_pretrained`, pickles, deep copies, PEFT and FSDP's wrapping by class name work as before.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from fastalign_kernels.layers.fp8 import fp8_linear, has_fp8
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# 1 / (1 / in_features + 1 / out_features) from which the products gain more than quantising costs, from the rates of
# an H200: 5 bytes of each element of x and dy at 4.3 TB/s, against half of two bf16 products at 800 TFLOP/s.
WORTHWHILE = 465
ROUTERS = ("gate", "router", "shared_expert_gate", "expert_gate")  # last part of their names; small errors flip them


class Fp8Linear:
    """Mixed into the class of a linear layer that multiplies in fp8; weights spread over ranks multiply as before."""

    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self
        if hasattr(layer.weight, "device_mesh"):
            return F.linear(input, layer.weight, layer.bias)
        return fp8_linear(input, layer.weight, layer.bias)

    def __reduce_ex__(self, protocol):
        return _new_module, (type(self).__bases__[1],), self.__getstate__()


@functools.cache
def _fp8_class(cls: type) -> type:
    return type(cls.__name__, (Fp8Linear, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _new_module(cls: type) -> nn.Module:
    fp8: Any = _fp8_class(cls)
    return fp8.__new__(fp8)


def _kept_as_they_are(model: Any) -> set[nn.Module]:
    """The output head with all that adapters put around it, and what adapters add to other layers."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kept = set() if head is None else set(head.modules())
    for module in model.modules():
        if hasattr(module, "base_layer"):  # a layer of PEFT
            for name, child in module.named_children():
                kept |= set(child.modules()) if name != "base_layer" else set()
    return kept


def fp8_candidates(model: nn.Module, worthwhile: float = WORTHWHILE) -> Iterator[nn.Linear]:
    """The linear layers of `model` that can multiply in fp8 and gain from it.

    Left out: the output head, routers of experts, matrices of adapters, layers with another forward than nn.Linear's
    (quantised ones among them), and those too small to gain. Experts whose weights are one tensor are no nn.Linear.
    """
    kept = _kept_as_they_are(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module in kept or name.rpartition(".")[2] in ROUTERS:
            continue
        if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
            continue
        weight = module.weight
        if not weight.is_floating_point() or weight.dtype == torch.float64 or weight.itemsize < 2:
            continue
        size = module.in_features + module.out_features
        if size and module.in_features * module.out_features >= worthwhile * size:
            yield module


def convert_to_fp8(model: nn.Module, *, worthwhile: float = WORTHWHILE, compiled: bool = False) -> int:
    """Let the large linear layers of `model` multiply in fp8, in place and idempotent; returns how many changed.

    Forward and the gradient of the input are e4m3 products with a scale per row, the gradient of the weight keeps
    its dtype (`fp8_linear`). `compiled`: torch.compile follows, and torchao's layers (recipe rowwise_with_gw_hp) take
    the trainable weights where it is installed and the card multiplies fp8. Its quantisation is plain torch, made to
    be compiled, so without torch.compile our layers with their own kernel stay.
    """
    found = list(fp8_candidates(model, worthwhile))
    if compiled and importlib.util.find_spec("torchao") and found and has_fp8(found[0].weight.device):
        _use_torchao(model, {module for module in found if module.weight.requires_grad})
    for module in found:  # those that torchao replaced are part of the model no more
        module.__class__ = _fp8_class(type(module))
    return len(found)


def _use_torchao(model: nn.Module, chosen: set[nn.Linear]) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # pyright: ignore

    convert_to_float8_training(
        model,
        config=Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"),
        module_filter_fn=lambda module, _: module in chosen,
    )


def use_fp8(model: nn.Module, args) -> None:
    """What the config `args` asks for in `fp8`.

    ValueError on a card without fp8, where the emulation would be slower than bf16, and for a model without a layer
    that gains. On the CPU the emulation is for checks of the numbers, and says so.
    """
    if not getattr(args, "fp8", False):
        return
    device = args.device
    if device.type != "cpu" and not has_fp8(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ValueError(
            f"fp8=True needs a CUDA card of compute capability 8.9 or higher (Ada, Hopper, Blackwell), found {name}: "
            "set fp8=False. bf16 is faster there than fp8 emulated."
        )
    count = convert_to_fp8(model, worthwhile=WORTHWHILE, compiled=args.torch_compile)
    if not count and not any(
        type(module).__name__ == "Float8Linear" or isinstance(module, Fp8Linear) for module in model.modules()
    ):
        raise ValueError(
            f"fp8=True, but no linear layer of {type(model).__name__} is large enough to gain (in_features * "
            f"out_features / (in_features + out_features) of at least {WORTHWHILE}), or all are quantised or experts "
            "in one tensor: set fp8=False."
        )
    if device.type == "cpu":
        logger.warning("fp8 is emulated on the CPU: the numbers of fp8, slower than without it.")
    logger.info("%d linear layers of %s multiply in fp8.", count, type(model).__name__)
