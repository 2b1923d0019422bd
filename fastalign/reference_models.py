"""Where the frozen model of a reference comes from: given, loaded, a copy of the policy, or an adapter of it."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .loop.distributed import is_fsdp
from .loop.model_setup import place_model
from .models import load_model, model_name
from .policy import prepare_policy
from .scoring_head import body_dtype

logger = logging.getLogger(__name__)
REF_ADAPTER = "ref"


def copy_adapter(model: Any) -> None:
    """A frozen copy of the adapter that is trained, named "ref"; an adapter of that name is used as it is."""
    trained = model.active_adapter
    if trained == REF_ADAPTER:
        raise ValueError(
            f"The adapter that is trained is named {REF_ADAPTER!r}, which is the name of the reference's: it would be "
            "compared with itself. Load it under another name, with `adapter_name=`."
        )
    if REF_ADAPTER in model.peft_config:
        return
    model.add_adapter(REF_ADAPTER, model.peft_config[trained])
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if f".{trained}." in name or name.endswith(f".{trained}"):
            head, _, tail = name.rpartition(f".{trained}")
            copied = parameters[f"{head}.{REF_ADAPTER}{tail}"]
            copied.data = parameter.data.clone()
            copied.requires_grad_(False)


def resolve_reference(trainer, ref_model, quantization_config) -> Any:
    """The reference as a model: given, loaded from where the policy came from, or a copy of it."""
    policy, args = trainer.model, trainer.args
    if ref_model is policy or (ref_model is not None and ref_model is trainer.accelerator.unwrap_model(policy)):
        raise ValueError(
            "`model` and `ref_model` are the same object, so the reference would be trained. Leave `ref_model` out: "
            "it is then a copy of `model`."
        )
    if ref_model is not None and not isinstance(ref_model, str):
        return ref_model
    name = ref_model or model_name(policy)
    has_weights = any(file.suffix in (".safetensors", ".bin") for file in Path(name).glob("*"))
    if ref_model is None and (not name or (os.path.isdir(name) and not has_weights)):
        return copy.deepcopy(policy)  # made in memory: there is no file of its first weights
    options = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED", "FSDP", "MULTI_CPU"):
        options["device_map"] = None
    options.setdefault("dtype", body_dtype(policy) or policy.dtype)
    if not trainer.policy.flat:
        options.setdefault("attn_implementation", policy.config._attn_implementation)
    trust = options.pop("trust_remote_code", args.trust_remote_code)
    found = load_model(name, trust_remote_code=trust, **options)
    if ref_model is None and _differ(policy, found, name):
        logger.warning(
            "The reference is loaded from %r, but the weights of `model` are others: it was changed in memory. If it "
            "should be compared with itself as it is now, pass `ref_model=copy.deepcopy(model)`.",
            name,
        )
    return found


def _differ(model: nn.Module, other: nn.Module, name: str) -> bool:
    """Whether some parameter has other values; those without any yet (meta, on ranks that load nothing) are left out.

    ValueError where shapes differ: the two would not even have the same tokens.
    """
    found, loaded = list(model.named_parameters()), list(other.named_parameters())
    shapes, others = ([(n, tuple(p.shape)) for n, p in side if p.is_floating_point()] for side in (found, loaded))
    if [shape for _, shape in shapes] != [shape for _, shape in others]:
        first = next((pair for pair in zip(shapes, others, strict=False) if pair[0][1] != pair[1][1]), None)
        what = f"{first[0][0]} is {first[0][1]}, there {first[1][1]}" if first else f"{len(shapes)} and {len(others)}"
        raise ValueError(
            f"`ref_model` is not given, so the reference is loaded from {name!r}, but the parameters of `model` have "
            f"other shapes ({what}), as after `resize_token_embeddings`: pass `ref_model=copy.deepcopy(model)`."
        )
    pairs = [(a, b) for (_, a), (_, b) in zip(found, loaded, strict=False) if not (a.is_meta or b.is_meta)]
    return any(not torch.equal(a, b.to(a.device, a.dtype)) for a, b in pairs)


def prepare_reference(trainer, model: Any) -> Any:
    """The reference frozen, on its device, sharded under FSDP, and able to score."""
    model.requires_grad_(False)
    model.eval()
    if model.config is not None:
        model.config.use_cache = False
    model = place_model(model, trainer.args, trainer.accelerator)
    info = prepare_policy(model, allow_flat=trainer.policy.flat)
    if (trainer.policy.flat, trainer.policy.shares_prefix) > (info.flat, info.shares_prefix):
        raise ValueError(
            f"`ref_model` ({type(model).__name__}) cannot take the batches that the policy takes: {info.reason}. "
            "Use a reference of the policy's kind, or `precompute_ref_log_probs` in a run of its own."
        )
    if is_fsdp(trainer.accelerator):
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        model = fsdp2_prepare_model(trainer.accelerator, model)
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, noise and checkpointing; then back to training where it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def adapter(model: Any, mode: str) -> Iterator[None]:
    """The policy with its adapter switched off or with the frozen one."""
    if mode == "adapter_off":
        with model.disable_adapter():
            yield
    elif mode == "ref_adapter":
        trained = model.active_adapter
        model.set_adapter(REF_ADAPTER)
        try:
            yield
        finally:
            model.set_adapter(trained)
    else:
        yield
