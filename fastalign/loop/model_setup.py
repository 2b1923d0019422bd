"""The model made ready: on its device, with gradient checkpointing, NEFTune noise and aligned special tokens."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.debug_utils import DebugOption, DebugUnderflowOverflow
from transformers.trainer_utils import align_special_tokens, unwrap_peft_model, validate_quantization_for_training

from ..data.batch import TokenBatch
from ..patch import use_kernel_backend
from ..precision import use_fp8


def place_model(model: nn.Module, args, accelerator) -> nn.Module:
    """Move `model` to the device, except where sharding, quantisation or a device map decides; set its kernels."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module here, found {type(model).__name__}.")
    validate_quantization_for_training(model)
    use_kernel_backend(model, args)
    use_fp8(model, args)
    placed_elsewhere = (
        len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
        or getattr(model, "is_loaded_in_8bit", False)
        or getattr(model, "is_loaded_in_4bit", False)
        or getattr(accelerator.state, "fsdp_plugin", None) is not None
        or getattr(accelerator.state, "deepspeed_plugin", None) is not None
    )
    return model if placed_elsewhere else model.to(args.device)


@contextlib.contextmanager
def ready_for_training(trainer) -> Iterator[None]:
    """What `train` switches on; NEFTune's noise ends with it."""
    args, model = trainer.args, trainer.model
    if args.gradient_checkpointing:
        _enable_gradient_checkpointing(model, dict(args.gradient_checkpointing_kwargs or {}))
    if isinstance(trainer.processing_class, (PreTrainedTokenizerBase, ProcessorMixin)) and hasattr(model, "config"):
        align_special_tokens(model, trainer.processing_class)
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
        DebugUnderflowOverflow(model)
    noise = None
    if args.neftune_noise_alpha is not None:
        noise = add_embedding_noise(unwrap_peft_model(model), args.neftune_noise_alpha, lambda: trainer.current_batch)
    try:
        yield
    finally:
        if noise is not None:
            noise.remove()


def _enable_gradient_checkpointing(model, options: dict) -> None:
    """`every_n_layers` and `offload` are the model's, the rest torch's; ValueError if this transformers lacks one."""
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ValueError(
            f"gradient_checkpointing=True (the default), but {type(model).__name__} has no "
            "gradient_checkpointing_enable: set it to False."
        )
    own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    known = inspect.signature(enable).parameters
    takes_any = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    for name in own:
        if name not in known and not takes_any:
            raise ValueError(
                f"gradient_checkpointing_kwargs[{name!r}] needs a newer transformers: remove it or upgrade."
            )
    enable(gradient_checkpointing_kwargs=options or None, **own)


def add_embedding_noise(model, alpha: float, current_batch):
    """NEFTune, arXiv:2310.05914: uniform noise of size alpha / sqrt(L * D) on the embeddings while training.

    L is the padded length of the row, in a flat batch the length of the token's own sequence. Returns the hook's
    handle; `current_batch()` is the batch that is in the model.
    """

    def hook(module: nn.Module, _, output: Tensor) -> Tensor:
        if not module.training:
            return output
        batch = current_batch()
        if isinstance(batch, TokenBatch) and not batch.is_padded:
            lengths = batch.cu_seqlens.diff()
            size = lengths.repeat_interleave(lengths, output_size=batch.input_ids.numel()).view(-1, 1)  # (T, 1)
        else:
            size = torch.full((), output.shape[-2], device=output.device)
        bound = alpha / torch.sqrt(size * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-1, 1) * bound.to(output.dtype)

    return model.get_input_embeddings().register_forward_hook(hook)
