"""Which engine a config asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..loop.distributed import is_fsdp
from .engine import Engine, Sampling


def make_engine(config: Any, model: Any, processing_class: Any, *, accelerator: Any, sampling: Sampling) -> Engine:
    """The engine of `config`: vLLM in this process or a server (`use_vllm`, `vllm_mode`), Transformers' continuous
    batching (`use_transformers_continuous_batching`), else the training model itself.

    `model` is the training model without DDP's wrapper (PEFT's stays); `sampling` is what most requests will ask for.
    With `max_staleness`, the training model is sampled from through a copy, and another thread can stop the engine.
    ValueError for a mode that does not exist, for two engines at once, and for what the engine finds wrong.
    """
    continuous = getattr(config, "use_transformers_continuous_batching", False)
    if config.use_vllm and continuous:
        raise ValueError(
            "`use_vllm` and `use_transformers_continuous_batching` are both set, but one engine samples. Unset one."
        )
    if getattr(config, "max_staleness", 0):
        return _engine_ahead(config, model, processing_class, accelerator, sampling)
    if config.use_vllm:
        if config.vllm_mode == "colocate":
            from .vllm_engine import VLLMEngine as Chosen  # pyright: ignore
        elif config.vllm_mode == "server":
            from .vllm_server import VLLMServerEngine as Chosen  # pyright: ignore
        else:
            raise ValueError(f"`vllm_mode` is {config.vllm_mode!r}; allowed are 'colocate' and 'server'.")
        return Chosen(model, processing_class, config, sampling=sampling)
    autocast: Callable[[], Any] = accelerator.autocast
    seed = config.seed + accelerator.process_index
    if continuous:
        from .continuous import ContinuousEngine

        options = config.transformers_continuous_batching_config
        return ContinuousEngine(model, options=options, autocast=autocast, seed=seed)
    from .native import NativeEngine

    return NativeEngine(model, autocast=autocast, seed=seed)


def _engine_ahead(config: Any, model: Any, processing_class: Any, accelerator: Any, sampling: Sampling) -> Any:
    """An engine that samples while the model trains: a server, or a copy of the model."""
    from .overlap import StoppableEngine

    if config.use_vllm:
        from .vllm_server import VLLMServerEngine

        return StoppableEngine(VLLMServerEngine(model, processing_class, config, sampling=sampling))
    from .own_weights import OwnWeightsEngine

    if is_fsdp(accelerator) or getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        raise ValueError(
            f"`max_staleness` is {config.max_staleness}: the embedded engine copies whole weights, and these are "
            "spread over ranks. Sample with a vLLM server, train with DDP, or set it to 0."
        )
    return StoppableEngine(OwnWeightsEngine(model, autocast=accelerator.autocast, seed=config.seed))
