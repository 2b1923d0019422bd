"""How vLLM is built around weights that live in this process already."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch

LOAD_FORMAT = "fastalign"
BATCHED_TOKENS = 4096  # per step; vLLM's memory profile reserves room for so many
CPU_BLOCK = 32  # tokens; prompts share whole blocks, and the default of 128 is longer than many prompts
_source: list[Callable[[Any], None]] = []  # what fills the model that is being built


@contextlib.contextmanager
def weights_from(load: Callable[[Any], None]) -> Iterator[None]:
    """While it lasts, engines are filled by `load(engine_model)`."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader  # pyright: ignore
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader  # pyright: ignore[reportMissingImports]

    class Loader(BaseModelLoader):
        def download_model(self, model_config) -> None:
            pass

        def load_weights(self, model, model_config) -> None:
            _source[-1](model)

    if LOAD_FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(LOAD_FORMAT)(Loader)
    _source.append(load)
    try:
        yield
    finally:
        _source.pop()


@contextlib.contextmanager
def plain_layout() -> Iterator[None]:
    """While it lasts, weights that a CPU engine loads stay matrices as torch has them.

    Those that oneDNN or SGL's kernels pack have no address per weight: they can be neither shared nor overwritten.
    """
    import vllm._custom_ops as ops  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.layers import utils as layers  # pyright: ignore[reportMissingImports]

    packers = [(ops, "_supports_onednn", False), (layers, "check_cpu_sgl_kernel", lambda *args: False)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in packers if hasattr(owner, name)]
    for owner, name, value in packers:
        if hasattr(owner, name):
            setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def import_model_class(architectures: list[str]) -> None:
    """Import the engine's class of a model here; vLLM would start another process to look at it."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    for name in architectures:
        known = ModelRegistry.models.get(name)
        if known is not None:
            ModelRegistry.register_model(name, known.load_model_cls())


def write_config(model: Any, folder: str) -> list[str]:
    """Write what an engine has to know of `model`, as it is now (its vocabulary may have grown).

    Returns the names of its architecture.
    """
    config = copy.copy(model.config)
    if not config.architectures:
        config.architectures = [next(c for c in type(model).__mro__ if not c.__name__.startswith("FSDP")).__name__]
    config.save_pretrained(folder)
    return config.architectures


def options(model_config: Any, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """vLLM's `EngineArgs` for a model of this config."""
    on_cpu = not torch.cuda.is_available()
    max_length = getattr(config, "vllm_max_model_length", None)
    num_rows = rows_at_once(config)
    chosen: dict[str, Any] = {
        "load_format": LOAD_FORMAT,
        "dtype": str(dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,
        "max_model_len": max_length,
        "max_num_seqs": num_rows,
        "max_num_batched_tokens": max(BATCHED_TOKENS, num_rows),
        "gpu_memory_utilization": getattr(config, "vllm_gpu_memory_utilization", 0.3),
        "model_impl": getattr(config, "vllm_model_impl", "vllm"),
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
        "seed": getattr(config, "seed", 0) or 0,
        "enable_prefix_caching": True,
    }
    if on_cpu:
        chosen |= {"enforce_eager": True, "block_size": CPU_BLOCK}
        chosen["kv_cache_memory_bytes"] = cache_bytes(
            model_config.get_text_config(), dtype, num_rows, max_length, chosen["gpu_memory_utilization"]
        )
    else:
        chosen["enable_sleep_mode"] = getattr(config, "vllm_enable_sleep_mode", False)
    return chosen


def rows_at_once(config: Any) -> int:
    """Completions that are sampled side by side: those of a generation batch of this process, 512 at most."""
    per_device = getattr(config, "per_device_train_batch_size", None)
    steps = getattr(config, "steps_per_generation", None)
    return min(512, per_device * steps) if per_device and steps else 256


def cache_bytes(model_config: Any, dtype: torch.dtype, num_rows: int, max_length: int | None, share: float) -> int:
    """Memory for keys and values of a CPU engine: for all rows at full length, `share` of this machine's at most."""
    heads = model_config.num_attention_heads
    head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    kv_heads = getattr(model_config, "num_key_value_heads", None) or heads
    per_token = 2 * model_config.num_hidden_layers * kv_heads * head_dim * dtype.itemsize
    length = max_length or getattr(model_config, "max_position_embeddings", None) or 4096
    length = -(-length // CPU_BLOCK) * CPU_BLOCK
    limit = int(min(share * psutil.virtual_memory().total, psutil.virtual_memory().available / 2))
    return max(min(per_token * length * num_rows, limit), per_token * (length + CPU_BLOCK))
