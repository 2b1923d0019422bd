"""Kernels for the layers of a model of Transformers, put in module by module and taken out again without a trace.

A module keeps its parameters, hooks and wrappers; its class becomes a subclass of the same name whose forward calls
the op, so state dicts, FSDP's wrapping by class name, PEFT and deep copies work as before. What differs from the
classes known here (another forward, another activation, sharded tensors) keeps its own forward.

RoPE is no module in Transformers: each modeling file has a function that its attention calls by name. That name is
rebound in the file while a patched model of it lives. Swapping the attention classes instead would copy their
forward, which changes between versions; a hook on a module sees the angles but not the rotation.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import types
import weakref
from collections import Counter
from typing import Any

import torch
from fastalign_kernels.layers import add_rms_norm, embedding, glu, glu_packed, lora_linear, rms_norm, rope
from fastalign_kernels.layers.choice import has_kernels
from torch import Tensor, nn
from transformers.trainer_utils import unwrap_peft_model

logger = logging.getLogger(__name__)

KERNELS = ("auto", "own", "liger", "hub", "none")
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu"}


class OwnLayer:
    """Mixed into the class of a module whose forward runs on our kernels."""

    def __reduce_ex__(self, protocol):
        mixin, original = type(self).__bases__
        return _new_module, (mixin, original), self.__getstate__()


class RMSNorm(OwnLayer):
    """y = (OFFSET + weight) * x / rms(x), rounded before the product or after it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        norm: Any = self
        return rms_norm(hidden_states, norm.weight, self.eps_of(), **norm.own_form)

    def eps_of(self) -> float:
        """What is added to the mean of the squares."""
        return vars(self)["eps"] if "eps" in vars(self) else vars(self)["variance_epsilon"]


class DecoderLayer(OwnLayer):
    """Attention and MLP behind a norm each: the addition after attention and the norm of its sum are one kernel."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        layer: Any = self
        norm = layer.post_attention_layernorm
        options = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        options |= {"use_cache": use_cache, "position_embeddings": position_embeddings, **kwargs}
        if not issubclass(type(norm), RMSNorm) or _watched(norm):
            ordinary: Any = super()
            return ordinary.forward(hidden_states, **options)
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
        normed, residual = add_rms_norm(attended, hidden_states, norm.weight, norm.eps_of(), **norm.own_form)
        return residual + layer.mlp(normed)


def _separate_layer(
    self,
    hidden_states,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    use_cache=False,
    position_embeddings=None,
    **kwargs,
):
    # What `DecoderLayer` stands for, never called: a layer whose own forward compiles to other code is left alone.
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = self.mlp(hidden_states)
    hidden_states = residual + hidden_states
    return hidden_states


class Embedding(OwnLayer):
    """The table of input tokens; its gradient is summed in a fixed order."""

    def forward(self, input: Tensor) -> Tensor:
        table: Any = self
        return embedding(input, table.weight, table.padding_idx)


class GatedMLP(OwnLayer):
    """down(act(gate(x)) * up(x)); the backward recomputes the activation into the products of gate and up."""

    def forward(self, x: Tensor) -> Tensor:
        mlp: Any = self
        gate, up, activation = mlp.gate_proj(x), mlp.up_proj(x), ACTIVATIONS[type(mlp.act_fn).__name__]
        return mlp.down_proj(glu(gate, up, activation, overwrite=not _watched(mlp.gate_proj, mlp.up_proj)))


class PackedMLP(OwnLayer):
    """As `GatedMLP`, with gate and up as halves of one product."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mlp: Any = self
        activation = ACTIVATIONS[type(mlp.activation_fn).__name__]
        gate_up = mlp.gate_up_proj(hidden_states)
        return mlp.down_proj(glu_packed(gate_up, activation, overwrite=not _watched(mlp.gate_up_proj)))


class Experts(OwnLayer):
    """The activation of experts whose products Transformers batches; its eager loop over experts stays as it is."""

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        experts: Any = self
        return glu_packed(gate_up_out, ACTIVATIONS[type(experts.act_fn).__name__], overwrite=True)


class LoraLinear(OwnLayer):
    """PEFT's LoRA on a linear layer; what is more than one plain adapter without dropout takes PEFT's forward."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        module: Any = self
        name = None if args or kwargs or torch.compiler.is_compiling() else _plain_adapter(module, x)
        if name is None:
            ordinary: Any = super()
            return ordinary.forward(x, *args, **kwargs)
        base, lora_a, lora_b = module.base_layer, module.lora_A[name], module.lora_B[name]
        return lora_linear(x, base.weight, base.bias, lora_a.weight, lora_b.weight, module.scaling[name])


def _plain_adapter(module: Any, x: Tensor) -> str | None:
    """The one active adapter of a LoRA layer if it adds nothing but s B A x to a plain linear layer."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or module.disable_adapters or module.merged or names[0] in module.lora_variant:
        return None
    lora_a, lora_b, base = module.lora_A[names[0]], module.lora_B[names[0]], module.base_layer
    if any(type(part) is not nn.Linear or _watched(part) for part in (base, lora_a, lora_b)):
        return None
    dropout = module.lora_dropout[names[0]]
    if lora_b.bias is not None or (module.training and getattr(dropout, "p", 0) > 0):
        return None
    weights = (base.weight, lora_a.weight, lora_b.weight)
    if any(hasattr(weight, "device_mesh") or not weight.is_floating_point() for weight in weights):
        return None
    alike = all(weight.dtype == x.dtype for weight in weights)
    return names[0] if alike or torch.is_autocast_enabled(x.device.type) else None


def _watched(*modules: nn.Module) -> bool:
    """Whether hooks may keep or change what the modules take or return."""
    return any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in modules)


_LLAMA, _GEMMA, _OLMO = (
    {"offset": offset, "round_first": first} for offset, first in ((0.0, True), (1.0, False), (0.0, False))
)
NORMS = {  # class -> offset of the weight, whether x / rms(x) is rounded before the product
    **dict.fromkeys(
        [f"{name}RMSNorm" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe", "Phi3", "Granite")], _LLAMA
    ),
    **dict.fromkeys(["GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"], _GEMMA),
    **dict.fromkeys(["Olmo2RMSNorm", "Olmo3RMSNorm", "GptOssRMSNorm"], _OLMO),
}
_GATED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma", "Gemma2", "Gemma3", "Olmo", "Olmo2", "Olmo3")
LAYERS: dict[str, type[OwnLayer]] = {  # class in Transformers or PEFT -> what is mixed into it
    **dict.fromkeys(NORMS, RMSNorm),
    **dict.fromkeys([f"{name}MLP" for name in (*_GATED, "Granite", "Cohere")], GatedMLP),
    "Phi3MLP": PackedMLP,
    "Qwen3MoeExperts": Experts,
    "Linear": LoraLinear,
    **dict.fromkeys(
        [f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma")], DecoderLayer
    ),
}
ROPE_FILES = {  # modeling file -> whether its tables hold each angle once
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3"], False),
    **dict.fromkeys(["phi3", "olmo", "olmo2", "olmo3", "granite"], False),
    "gpt_oss": True,
}
_rope_users: dict[str, weakref.WeakSet] = {}  # modeling file -> patched models that use it


@functools.cache
def _known_class(cls: type) -> str:
    """Name of the class that the tables hold and whose forward `cls` inherits; '' if there is none."""
    for part in cls.__mro__:
        if part.__name__ in LAYERS and part.__module__.startswith(("transformers.models.", "peft.tuners.lora.layer")):
            unchanged = getattr(cls, "forward", None) is vars(part).get("forward") or issubclass(cls, OwnLayer)
            return part.__name__ if unchanged else ""
    return ""


@functools.cache
def _own_class(mixin: type[OwnLayer], cls: type) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (mixin, cls), names | {"own_form": NORMS.get(_known_class(cls))})


def _new_module(mixin: type[OwnLayer], cls: type) -> nn.Module:
    own: Any = _own_class(mixin, cls)
    return own.__new__(own)


def _fits(module: nn.Module) -> bool:
    """Whether a module of a known class does what that class does: no forward of its own, a known activation."""
    if isinstance(module, OwnLayer) or not _known_class(type(module)) or "forward" in vars(module):
        return False
    if hasattr(module, "post_attention_layernorm"):
        return _is_separate_layer(module)
    activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    return activation is None or type(activation).__name__ in ACTIVATIONS


def _is_separate_layer(layer: Any) -> bool:
    """Whether a decoder layer's forward is `_separate_layer`, with a norm that is known."""
    norm = layer.post_attention_layernorm
    if _known_class(type(norm)) not in NORMS or "forward" in vars(norm):
        return False
    found, expected = (inspect.unwrap(fn).__code__ for fn in (type(layer).forward, _separate_layer))
    parts = ("co_code", "co_names", "co_varnames", "co_consts")
    return all(getattr(found, part) == getattr(expected, part) for part in parts)


def _plain_table(model: nn.Module) -> nn.Embedding | None:
    """The embedding of input tokens if it does nothing but look up rows."""
    try:
        table: Any = unwrap_peft_model(model).get_input_embeddings()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError):
        return None
    if type(table) is not nn.Embedding or "forward" in vars(table):
        return None
    return None if table.max_norm or table.scale_grad_by_freq or table.sparse else table


def patch_model(model: nn.Module, kernels: str = "own", **options) -> dict[str, int]:
    """Put `kernels` into `model`, in place and idempotent; returns how many modules of which kind changed.

    "own": ours, undone by `unpatch_model`. "liger": Liger's layers without its losses, `options` as Liger takes them.
    "hub": those that Transformers loads from the Hub. "auto": own where Triton or C++ runs them. "none": nothing.
    Raises ImportError, saying what to install, for a package that is missing; ValueError for another name.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(KERNELS)}")
    if kernels == "auto":
        kernels = "own" if all(has_kernels(device) for device in {p.device for p in model.parameters()}) else "none"
    if kernels == "liger":
        _use_liger(model, options)
    elif kernels == "hub":
        _use_hub(model)
    if kernels != "own":
        return {}
    found: Counter[str] = Counter()
    for module in list(model.modules()):
        if _fits(module):
            mixin = LAYERS[_known_class(type(module))]
            module.__class__ = _own_class(mixin, type(module))
            found[mixin.__name__] += 1
    if (table := _plain_table(model)) is not None:
        table.__class__ = _own_class(Embedding, nn.Embedding)
        found["Embedding"] += 1
    for file in {_rope_file(module) for module in model.modules()} - {""}:
        if _bind_rope(file, model):
            found[f"RoPE of {file.rpartition('.')[2]}"] += 1
    if found:
        counts = ", ".join(f"{name} ({count})" for name, count in sorted(found.items()))
        logger.info("Own kernels in %s: %s.", type(unwrap_peft_model(model)).__name__, counts)
    return dict(found)


def unpatch_model(model: nn.Module) -> None:
    """Undo `patch_model(model)`: classes and functions are what they were. Liger's and the Hub's layers stay."""
    for module in model.modules():
        if isinstance(module, OwnLayer):
            if type(module).__bases__[0] not in {*LAYERS.values(), Embedding}:
                raise ValueError(f"{type(module).__name__} was wrapped after patch_model: unpatch it before sharding.")
            module.__class__ = type(module).__bases__[1]
    for file, users in _rope_users.items():
        users.discard(model)
        apply = getattr(sys.modules[file], "apply_rotary_pos_emb", None)
        if not users and hasattr(apply, "_fastalign_original"):
            sys.modules[file].apply_rotary_pos_emb = apply._fastalign_original  # pyright: ignore


def _rope_file(module: nn.Module) -> str:
    """The modeling file whose RoPE function the attention `module` calls; '' if it is none, or one not known."""
    for cls in type(module).__mro__:
        name = cls.__module__
        if cls.__name__.endswith("Attention") and name.startswith("transformers.models."):
            return name if name.split(".")[2] in ROPE_FILES else ""
    return ""


def _bind_rope(file: str, model: nn.Module) -> bool:
    """Rebind the RoPE function of a modeling file; False where that is done, or another library was there before."""
    module: Any = sys.modules[file]
    original = getattr(module, "apply_rotary_pos_emb", None)
    if not isinstance(original, types.FunctionType) or original.__module__ not in (file, __name__):
        return False
    users = _rope_users.setdefault(file, weakref.WeakSet())
    if model in users:
        return False
    users.add(model)
    if hasattr(original, "_fastalign_original"):
        return True
    half_tables = ROPE_FILES[file.split(".")[2]]

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        fits = q.dim() == k.dim() == 4 and cos.dim() == 3 and q.dtype == k.dtype and len(users)
        if not fits or torch.compiler.is_compiling() or hasattr(q, "device_mesh"):
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return rope(q, k, cos, sin, heads_dim=unsqueeze_dim, half_tables=half_tables)

    apply_rotary_pos_emb._fastalign_original = original  # type: ignore[attr-defined]
    module.apply_rotary_pos_emb = apply_rotary_pos_emb
    return True


def _use_liger(model: nn.Module, options: dict) -> None:
    try:
        from liger_kernel.transformers import monkey_patch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("kernel_backend='liger' needs liger-kernel: pip install liger-kernel") from error
    losses = {"cross_entropy", "fused_linear_cross_entropy"}
    if asked := sorted(name for name in losses & options.keys() if options[name]):
        raise ValueError(
            f"liger_kernel_config asks for {', '.join(asked)}: the loss is computed by fastalign's own head. Leave "
            "it out or set it to False."
        )
    base: Any = unwrap_peft_model(model)
    kind = getattr(base.config, "model_type", None)
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        logger.warning("liger-kernel has no layers for the model type %r: the model stays as it is.", kind)
    monkey_patch._apply_liger_kernel_to_instance(model=base, **{**options, **dict.fromkeys(losses, False)})


def _use_hub(model: nn.Module) -> None:
    from transformers.utils.import_utils import is_kernels_available

    if not is_kernels_available():
        raise ImportError("kernel_backend='hub' needs the kernels package: pip install kernels")
    base: Any = unwrap_peft_model(model)
    base.set_use_kernels(True)


def use_kernel_backend(model: nn.Module, args) -> None:
    """What the config `args` asks for in `kernel_backend`, or in transformers' `use_liger_kernel`."""
    liger = getattr(args, "use_liger_kernel", False)
    backend = "liger" if liger else getattr(args, "kernel_backend", "none")
    if backend == "auto":
        backend = "own" if has_kernels(args.device) else "none"
    patch_model(model, backend, **((args.liger_kernel_config or {}) if backend == "liger" else {}))
