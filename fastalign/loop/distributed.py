"""Devices, precision and ranks: the Accelerator of a run, and models wrapped for DDP, FSDP2 or DeepSpeed."""

from __future__ import annotations

import atexit
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
)
from torch.distributed.fsdp import register_fsdp_forward_method


def make_accelerator(args) -> Accelerator:
    """The Accelerator that `args` and the launcher's environment describe; gradient accumulation stays with the loop.

    Raises ValueError for combinations of fields that contradict each other.
    """
    config = args.accelerator_config.to_dict()
    accumulation = dict(config["gradient_accumulation_kwargs"] or {})
    num_steps = accumulation.pop("num_steps", None)
    if num_steps is not None:
        if args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"accelerator_config sets num_steps={num_steps} and gradient_accumulation_steps is "
                f"{args.gradient_accumulation_steps}: set only one of them."
            )
        args.gradient_accumulation_steps = num_steps
    loader = {name: config[name] for name in ("split_batches", "dispatch_batches", "even_batches", "non_blocking")}
    kwargs: dict[str, Any] = {
        "mixed_precision": args.mixed_precision,
        "deepspeed_plugin": args.deepspeed_plugin,
        "dataloader_config": DataLoaderConfiguration(
            **loader, use_seedable_sampler=config["use_seedable_sampler"], data_seed=args.data_seed
        ),
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=1, **accumulation),
        "kwargs_handlers": [_ddp_settings(args)],
        "dynamo_plugin": TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode),
    }
    if args.fsdp_plugin_args is not None:
        kwargs["fsdp_plugin"] = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        kwargs["fsdp_plugin"] = FullyShardedDataParallelPlugin()  # reads what `accelerate launch` was told
    if args.parallelism_config is not None:
        kwargs["parallelism_config"] = args.parallelism_config
    AcceleratorState._reset_state()  # an earlier trainer of this process may have had another precision
    accelerator = Accelerator(**kwargs)
    if accelerator.num_processes > 1:
        atexit.unregister(await_gloo_threads)  # once per process
        atexit.register(await_gloo_threads)
    if accelerator.distributed_type == DistributedType.MULTI_CPU and "fsdp_plugin" in kwargs:
        _shard_on_cpu(accelerator, kwargs["fsdp_plugin"])
    _settle_fsdp(args, accelerator)
    if (
        accelerator.distributed_type == DistributedType.DEEPSPEED
        and getattr(args, "hf_deepspeed_config", None) is None
    ):
        from transformers.integrations.deepspeed import propagate_args_to_deepspeed

        propagate_args_to_deepspeed(accelerator, args)
    return accelerator


def use_precision(trainer) -> None:
    """Accelerate has one precision per process, that of the trainer made last: go back to this one's."""
    trainer.accelerator.state._mixed_precision = trainer.args.mixed_precision


def await_gloo_threads(limit: float = 10.0) -> None:
    """Wait until the threads that run gloo's collectives rest, for `limit` seconds at most; runs at exit of a rank.

    Such a thread releases the tensors of a collective after the result is there, and takes the interpreter's lock for
    it. When the interpreter is being taken down by then, Python ends the thread, and the C++ runtime aborts the
    process: "terminate called without an active exception" (pytorch/pytorch#190489). Destroying the process group does
    not join these threads, since a model in DDP keeps the group.
    """
    if not Path("/proc/self/task").is_dir():  # not Linux: they are not seen, but this long is nearly always enough
        return time.sleep(0.2)
    end, before, now = time.monotonic() + limit, None, _gloo_thread_states()
    while now and (now != before or any("S (" not in state for state in now)) and time.monotonic() < end:
        time.sleep(0.02)  # without the interpreter's lock; a thread that waits for the lock wakes up every 5 ms
        before, now = now, _gloo_thread_states()


def _gloo_thread_states() -> list[str]:
    """State of each of gloo's threads and how often it was switched."""
    states = []
    for path in sorted(Path("/proc/self/task").glob("*/status")):
        try:
            lines = path.read_text().splitlines()
        except OSError:  # the thread has ended
            continue
        if lines[0].endswith("pt_gloo_runloop"):
            states.append(" ".join(line for line in lines if line.startswith("State:") or "ctxt_switches" in line))
    return states


def _ddp_settings(args) -> DistributedDataParallelKwargs:
    find_unused = args.ddp_find_unused_parameters
    # searching the graph for unused parameters does not work with checkpointing, which builds it in the backward pass
    options: dict[str, Any] = {
        "find_unused_parameters": not args.gradient_checkpointing if find_unused is None else find_unused
    }
    for name in ("bucket_cap_mb", "broadcast_buffers", "static_graph"):
        if (value := getattr(args, f"ddp_{name}", None)) is not None:
            options[name] = value
    return DistributedDataParallelKwargs(**options)


def _shard_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Switch FSDP on: Accelerate ignores the plugin where all ranks are on the CPU."""
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _settle_fsdp(args, accelerator: Accelerator) -> None:
    """Refuse FSDP settings that we do not support; keep the model's outputs in full precision."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP version 1 is not supported: use version 2 (`--fsdp_version 2`, or fsdp_config.version=2)."
        )
    if plugin.mixed_precision_policy is not None:
        # losses and log-probabilities leave the model in fp32; Accelerate would round them to the compute dtype
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    if plugin.activation_checkpointing and args.gradient_checkpointing:
        raise ValueError(
            "FSDP's activation_checkpointing and gradient_checkpointing=True do the same work twice: set one to False."
        )


def is_fsdp(accelerator: Accelerator) -> bool:
    """Whether models are sharded with FSDP2."""
    return accelerator.distributed_type == DistributedType.FSDP


def prepare_model(trainer) -> None:
    """Make the optimizer and wrap `trainer.model` and it together; sets `model_wrapped` and `optimizer`.

    DDP and DeepSpeed wrap the model; FSDP2 shards it in place, and the optimizer then holds the shards. A model that
    is wrapped already stays so, and only the optimizer is made new.
    """
    accelerator = trainer.accelerator
    if getattr(trainer, "_is_prepared", False):
        if trainer.optimizer is None:
            trainer.create_optimizer()
            trainer.optimizer = accelerator.prepare_optimizer(trainer.optimizer)
        return
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from transformers.integrations.deepspeed import deepspeed_init

        trainer.optimizer, trainer.lr_scheduler = deepspeed_init(trainer, num_training_steps=trainer.args.max_steps)
    else:
        trainer.create_optimizer()
    trained = getattr(trainer, "trained_module", trainer.model)  # a module that holds more than the model
    trainer.model_wrapped, trainer.optimizer = accelerator.prepare(trained, trainer.optimizer)
    if is_fsdp(accelerator):
        trainer.model = trainer.model_wrapped
        if hasattr(trainer.model, "generate"):
            register_fsdp_forward_method(trainer.model, "generate")
    trainer._is_prepared = True
