"""What a trainer is given turned into what it trains: a loaded model and a processing class that agree with each "
"other."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


@dataclass
class LoadedModel:
    """A model, the tokenizer or processor that feeds it, and what was found out while loading."""

    model: Any  # PreTrainedModel or PeftModel
    processing_class: Any  # tokenizer or processor
    revision: str | None = None  # Hub revision that the model was loaded from
    added_tokens: list[int] = field(default_factory=list)  # ids that cloning a chat template added

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The text tokenizer, also where the processing class is a multimodal processor."""
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    @property
    def is_vision(self) -> bool:
        return isinstance(self.processing_class, ProcessorMixin)

    @property
    def is_quantized(self) -> bool:
        return is_quantized(self.model)


def is_quantized(model) -> bool:
    """Whether bitsandbytes holds the weights in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def model_name(model) -> str:
    """Hub id or path that `model` (an object or a name) came from; '' where it is not known."""
    if isinstance(model, str):
        return model
    return getattr(model.config, "_name_or_path", "") or ""


def position_limit(model) -> int | None:
    """Longest sequence, in tokens, where the model looks positions up in a table; None where it computes them."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        is_table = isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES
        if is_table and limit and 0 <= module.num_embeddings - limit <= 2:  # OPT keeps two rows more
            return limit
    return None


def model_class(config):
    """The class that `config.architectures` names; the auto class where transformers does not know that name."""
    for name in config.architectures or ():
        if (cls := getattr(transformers, name, None)) is not None:
            return cls
    if "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {}):
        return transformers.AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_model(name: str, *, trust_remote_code: bool = False, kind=None, **init_kwargs):
    """Load `name` (Hub id or folder), in float32 unless `dtype` says otherwise.

    `kind` is the class that loads it (None: the one that its config names).
    `dtype` is a `torch.dtype`, "auto", or one of "bfloat16", "float16", "float32"; anything else raises ValueError.
    """
    if os.path.isfile(os.path.join(name, "adapter_config.json")) and not os.path.isfile(
        os.path.join(name, "config.json")
    ):
        raise ValueError(
            f"{name!r} holds an adapter and no model. Load it with `peft.AutoPeftModelForCausalLM` and "
            "`is_trainable=True`, and pass the object as `model`."
        )
    dtype = init_kwargs.setdefault("dtype", "float32")
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(
                f"`dtype` in `model_init_kwargs` is {dtype!r}; use 'auto', one of {DTYPES} or a torch.dtype."
            )
        init_kwargs["dtype"] = getattr(torch, dtype)
    if "device_map" not in init_kwargs:
        on_host = PartialState().device.type in ("cpu", "mps")  # pyright: ignore[reportOptionalMemberAccess]
        init_kwargs["device_map"] = None if on_host else "auto"
    revision = {"revision": init_kwargs["revision"]} if init_kwargs.get("revision") else {}
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **revision)
    kind = model_class(config) if kind is None else kind
    return kind.from_pretrained(name, trust_remote_code=trust_remote_code, **init_kwargs)


def resolve_model(
    model, args, quantization_config=None, processing_class=None, kind=None, num_labels: int | None = None
) -> LoadedModel:
    """The model and processing class of a trainer, from what its constructor was given.

    `model` is a name, a PreTrainedModel or a PeftModel; `args` is the trainer's config (`model_init_kwargs`,
    `trust_remote_code`). `kind` is the auto class of a model with another head than that of a language model, which
    is loaded with `num_labels`. Raises ValueError where `quantization_config` is given twice, TypeError for a
    processing class that is neither a tokenizer nor a processor.
    """
    revision = None
    if isinstance(model, str):
        init_kwargs = dict(args.model_init_kwargs or {})
        if quantization_config is not None:
            if "quantization_config" in init_kwargs:
                raise ValueError(
                    "`quantization_config` is given both to the trainer and in `args.model_init_kwargs`. Give it "
                    "once, preferably to the trainer."
                )
            init_kwargs["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED", "FSDP", "MULTI_CPU"):
            init_kwargs["device_map"] = None
        revision = init_kwargs.get("revision")
        trust = init_kwargs.pop("trust_remote_code", args.trust_remote_code)
        if num_labels is not None:
            init_kwargs["num_labels"] = num_labels
        model = load_model(model, trust_remote_code=trust, kind=kind, **init_kwargs)
    else:
        ignored = {"model_init_kwargs": args.model_init_kwargs, "quantization_config": quantization_config}
        for name, value in ignored.items():
            if value is not None:
                logger.warning(
                    f"`{name}` is ignored: the model is already instantiated. Pass the model by name to use it."
                )
    if kind is None and model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-modelling head; use AutoModelForCausalLM, or pass its name."
        )
    if processing_class is None:
        if not model_name(model):
            raise ValueError("The model does not know its name, so its tokenizer must be given as `processing_class`.")
        processing_class = AutoProcessor.from_pretrained(
            model_name(model), revision=revision, trust_remote_code=args.trust_remote_code
        )
    if not isinstance(processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
        raise TypeError(
            "The `processing_class` must be either a `PreTrainedTokenizerBase` or a `ProcessorMixin`, got "
            f"{type(processing_class).__name__}."
        )
    return LoadedModel(model, processing_class, revision)


def _known_token(loaded: LoadedModel, token: str, field_name: str) -> None:
    if token not in loaded.tokenizer.get_vocab():
        raise ValueError(
            f"The `{field_name}` {token!r} is not in the vocabulary of the given `processing_class` "
            f"({type(loaded.processing_class).__name__}). Add it to the tokenizer, or name a token that it has."
        )


def set_eos_token(loaded: LoadedModel, eos_token: str | None) -> None:
    """Make `eos_token` the end token of tokenizer, model and generation config (which keeps the ones it had)."""
    if eos_token is None:
        return
    _known_token(loaded, eos_token, "eos_token")
    tokenizer, model = loaded.tokenizer, loaded.model
    tokenizer.eos_token = eos_token
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    generation_config = getattr(model, "generation_config", None)  # none of a model that does not generate
    if generation_config is None:
        return
    known = generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if tokenizer.eos_token_id not in known:
        generation_config.eos_token_id = [tokenizer.eos_token_id, *known]


def set_pad_token(loaded: LoadedModel, pad_token: str | None = None) -> None:
    """Settle the pad token (given, the tokenizer's, or its end token) and tell the model.

    Raises ValueError where the tokenizer has neither or does not know the one given.
    """
    tokenizer = loaded.tokenizer
    token = pad_token or tokenizer.pad_token or tokenizer.eos_token
    if not isinstance(token, str):
        raise ValueError(
            "The tokenizer has neither a pad token nor an end token. Set `tokenizer.pad_token` (or `eos_token`) and "
            "pass it as `processing_class`."
        )
    _known_token(loaded, token, "pad_token")
    tokenizer.pad_token = token
    loaded.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(loaded.model, "generation_config", None) is not None:
        loaded.model.generation_config.pad_token_id = tokenizer.pad_token_id


def set_chat_template(loaded: LoadedModel, path: str | None) -> None:
    """Take the chat template from a Jinja file, or clone it (with its tokens) from another tokenizer."""
    if path is None:
        return
    if path.endswith((".jinja", ".j2")):
        if not os.path.isfile(path):
            raise ValueError(f"`chat_template_path` is {path!r}, but there is no such file.")
        with open(path, encoding="utf-8") as file:
            loaded.processing_class.chat_template = file.read()
        return
    from .data.chat import clone_chat_template

    loaded.model, loaded.processing_class, loaded.added_tokens = clone_chat_template(
        loaded.model, loaded.processing_class, path
    )


def router_loss_coefficient(model, coefficient: float | None) -> float:
    """Weight of the mixture-of-experts balancing loss, 0.0 where there is none; the model's config is set to match.

    `coefficient` None takes the model's own. A non-zero one for a model without experts raises ValueError.
    """
    config = model.config.get_text_config()
    has_router = hasattr(config, "output_router_logits")
    if coefficient and not has_router:
        raise ValueError(
            f"`router_aux_loss_coef` is {coefficient}, but {type(model).__name__} is not a mixture-of-experts model "
            "that "
            "returns its router logits, so there is no auxiliary loss to weight. Leave the field unset."
        )
    value = getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
    if hasattr(config, "router_aux_loss_coef"):
        config.output_router_logits = has_router and value != 0.0
        config.router_aux_loss_coef = value
    return value if has_router else 0.0
