"""PEFT adapters: wrapping a model, and the settings that adapters need in training."""

from __future__ import annotations

import copy
import logging

import torch

from .models import LoadedModel, is_quantized

logger = logging.getLogger(__name__)


def is_peft_model(model) -> bool:
    """Whether `model` is a PeftModel (False where peft is not installed)."""
    try:
        from peft import PeftModel
    except ImportError:
        return False
    return isinstance(model, PeftModel)


def add_adapter(loaded: LoadedModel, peft_config, args) -> None:
    """Wrap `loaded.model` with `peft_config` (None: leave it) and prepare adapters for training.

    Raises ImportError without peft, TypeError for a config that is not PEFT's, ValueError for a model that is already
    wrapped or for adapters that DeepSpeed ZeRO-3 cannot checkpoint selectively.
    """
    if peft_config is not None:
        _check_config(loaded.model, peft_config)
        if loaded.added_tokens:
            _train_added_tokens(loaded.model, peft_config, loaded.added_tokens)
        from peft import get_peft_model

        options = {}
        if _zero3(args) and not loaded.is_quantized:
            # ZeRO-3 gathers parameters of one dtype: adapters must keep the base model's (DeepSpeed issue 8072)
            options["autocast_adapter_dtype"] = False
        loaded.model = get_peft_model(loaded.model, peft_config, **options)
    if not is_peft_model(loaded.model):
        return
    if _zero3(args) and args.gradient_checkpointing:
        _require_reentrant(args)
    if args.gradient_checkpointing:
        loaded.model.enable_input_require_grads()
    if is_quantized(loaded.model):
        for module in loaded.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # what bitsandbytes packs on CPUs, at its first use without gradients, computes in bf16 and has none
                module.support_avx512bf16_for_cpu = False
        for name, parameter in loaded.model.named_parameters():
            # QLoRA trains its adapters in bf16; DoRA's magnitudes move by less than bf16 resolves
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)


def for_task(peft_config, task: str):
    """`peft_config` as it is, or a copy for `task` ("SEQ_CLS") where it says "CAUSAL_LM"; said in the log."""
    if getattr(peft_config, "task_type", None) != "CAUSAL_LM":
        return peft_config
    logger.warning("The PEFT config has task_type='CAUSAL_LM'; %r is used, which trains the new head too.", task)
    peft_config = copy.copy(peft_config)
    peft_config.task_type = task
    return peft_config


def _check_config(model, peft_config) -> None:
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ImportError(
            "`peft_config` needs the `peft` library: install it with `pip install fastalign[peft]`."
        ) from error
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` must be a `peft.PeftConfig` (for example `peft.LoraConfig`), got "
            f"{type(peft_config).__name__}."
        )
    if is_peft_model(model):
        raise ValueError(
            "The model is a `PeftModel` already and a `peft_config` is given too. Merge and unload the adapter and "
            "pass the base model with the new `peft_config`, or leave `peft_config` out to go on training the "
            "adapter."
        )


def _train_added_tokens(model, peft_config, added_tokens: list[int]) -> None:
    """Let the embeddings of tokens that a cloned chat template added, and the head, be trained."""
    embedding = _name_of(model, model.get_input_embeddings())
    trainable = peft_config.trainable_token_indices or {}
    trainable = trainable if isinstance(trainable, dict) else {embedding: trainable}  # a list means the embedding
    trainable[embedding] = [*trainable.get(embedding, []), *added_tokens]
    peft_config.trainable_token_indices = trainable
    if model.get_output_embeddings() is None:  # it does not generate
        return
    head, saved = _name_of(model, model.get_output_embeddings()), list(peft_config.modules_to_save or [])
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight  # then PEFT trains both rows
    if head not in saved and not is_tied:
        logger.warning(
            "The cloned chat template added tokens, so %r is added to `modules_to_save` of the PEFT config: without "
            "it the model could not learn to generate them.",
            head,
        )
        peft_config.modules_to_save = [*saved, head]


def _name_of(model, module) -> str:
    """Last part of the name of a submodule ("embed_tokens", "wte", "lm_head", ...)."""
    return next(name for name, found in model.named_modules() if found is module).rpartition(".")[2]


def _zero3(args) -> bool:
    plugin = getattr(args, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def _require_reentrant(args) -> None:
    options = dict(args.gradient_checkpointing_kwargs or {})
    if options.get("selective"):
        raise ValueError(
            "`gradient_checkpointing_kwargs={'selective': True}` does not work with PEFT under DeepSpeed ZeRO-3, "
            "which needs reentrant checkpointing. Drop 'selective' or use another sharding."
        )
    if options.get("use_reentrant") is False:
        logger.warning("`use_reentrant` is set to True: PEFT under DeepSpeed ZeRO-3 needs reentrant checkpointing.")
    args.gradient_checkpointing_kwargs = options | {"use_reentrant": True}
