"""Settings that several trainers share: how the model is loaded, how long sequences may be. Each field stands once."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

from .config import arg

logger = logging.getLogger(__name__)


@dataclass
class LoadArgs:
    """How the trained model is loaded and run, whatever its head."""

    model_init_kwargs: dict[str, Any] | str | None = arg(
        None, "Keyword arguments for `from_pretrained` where the model is given by name; dtype is float32 if not set."
    )
    trust_remote_code: bool = arg(False, "Allow models and tokenizers that ship their own Python code.")
    activation_offloading: bool = arg(False, "Keep activations in host memory between forward and backward.")

    @property
    def selective_checkpointing(self) -> bool:
        """Whether `gradient_checkpointing_kwargs` asks to keep attention outputs."""
        return bool((getattr(self, "gradient_checkpointing_kwargs", None) or {}).get("selective"))

    def check_model_args(self) -> None:
        """Refuse checkpointing options that contradict each other (ValueError)."""
        config: Any = self
        if not self.selective_checkpointing and "selective" in (config.gradient_checkpointing_kwargs or {}):
            config.gradient_checkpointing_kwargs = dict(config.gradient_checkpointing_kwargs)
            del config.gradient_checkpointing_kwargs["selective"]  # off; not an option of torch's checkpoint
        if self.selective_checkpointing:
            if not config.gradient_checkpointing:
                raise ValueError("`gradient_checkpointing_kwargs={'selective': True}` needs `gradient_checkpointing`.")
            if config.gradient_checkpointing_kwargs.get("use_reentrant"):
                raise ValueError("Selective checkpointing is not reentrant: unset `use_reentrant` or set it to False.")


@dataclass
class ModelArgs(LoadArgs):
    """How a trained language model is loaded and run."""

    router_aux_loss_coef: float | None = arg(
        None, "Weight of the mixture-of-experts balancing loss; unset: the model's own, 0: none."
    )


@dataclass
class RowArgs:
    """How rows become sequences: length and padding."""

    dataset_num_proc: int | None = arg(None, "Processes that prepare the dataset; one is usually fastest.")
    max_length: int | None = arg(1024, "Longest sequence, in tokens; longer ones are truncated. None: no limit.")
    pad_to_multiple_of: int | str | None = arg("auto", "Pad sequences to a multiple of this; 'auto': do not pad.")
    pad_token: str | None = arg(None, "Deprecated: set `tokenizer.pad_token`.")

    @property
    def padding_multiple(self) -> int | None:
        """`pad_to_multiple_of` as a number of tokens, None for no padding."""
        return self.pad_to_multiple_of if isinstance(self.pad_to_multiple_of, int) else None

    def check_length_args(self) -> None:
        """Read `pad_to_multiple_of`, warn of deprecated fields, refuse unknown values (ValueError)."""
        if isinstance(self.pad_to_multiple_of, str):
            value = self.pad_to_multiple_of.lower()
            self.pad_to_multiple_of = int(value) if value.isdecimal() else value
            if value in ("auto", "none", "null"):
                self.pad_to_multiple_of = None
        if self.pad_to_multiple_of is not None and not (self.padding_multiple or 0) >= 1:
            raise ValueError(
                f"`pad_to_multiple_of` is {self.pad_to_multiple_of!r}; use a number of tokens, 'auto' or None."
            )
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` is {self.max_length}; it must be at least 1 token, or None for no limit.")
        if self.pad_token is not None:
            deprecated("`pad_token` is deprecated; set `tokenizer.pad_token` and pass it as `processing_class`.")
        if isinstance(self, LengthArgs):
            one_of(self, "truncation_mode", ("keep_start", "keep_end"))
            if self.truncation_mode == "keep_end":
                deprecated("`truncation_mode='keep_end'` is deprecated.")


@dataclass
class LengthArgs(RowArgs):
    """How rows become sequences where long ones are truncated."""

    truncation_mode: str = arg(
        "keep_start", "Which end of a long sequence to keep.", choices=["keep_end", "keep_start"]
    )


@dataclass
class CausalOnlyArgs:
    """Fields of TRL's trainers that also take models with an encoder, or sample while they evaluate."""

    max_completion_length: int | None = arg(
        None, "Longest completion, in tokens, of a model with an encoder; without effect, as in TRL, on all others."
    )
    generate_during_eval: bool = arg(False, "Not supported: sample from the policy while evaluating.")
    is_encoder_decoder: bool | None = arg(None, "Not supported: the model has an encoder.")

    def check_causal_only(self) -> None:
        """Refuse what is not supported (ValueError), warn of what has no effect."""
        if self.generate_during_eval:
            raise ValueError(
                "`generate_during_eval=True` is not supported: set it to False and sample from saved checkpoints."
            )
        if self.is_encoder_decoder:
            raise ValueError(
                "`is_encoder_decoder=True` is not supported: only causal language models are trained. Leave it unset."
            )
        if self.max_completion_length is not None:
            logger.warning(
                "`max_completion_length=%d` has no effect on causal language models: `max_length` limits prompt and "
                "completion together.",
                self.max_completion_length,
            )


def one_of(config, name: str, allowed: tuple) -> None:
    """Raise ValueError unless the field `name` of `config` has one of the allowed values."""
    if getattr(config, name) not in allowed:
        raise ValueError(f"Invalid `{name}` {getattr(config, name)!r}. Supported values are {allowed}.")


def at_least(config, **bounds: float) -> None:
    """Raise ValueError where a field of `config` is below its bound; None is not."""
    for name, bound in bounds.items():
        if (value := getattr(config, name)) is not None and not value >= bound:
            raise ValueError(f"`{name}` is {value}; it must be at least {bound}.")


def deprecated(message: str) -> None:
    """Warn at the caller of the config's constructor."""
    warnings.warn(message, FutureWarning, stacklevel=5)


def renamed(config, name: str, old: str, new: str) -> None:
    """Replace a value that has a new name, with a warning."""
    if getattr(config, name) == old:
        deprecated(f"`{name}={old!r}` is deprecated; use {new!r}.")
        setattr(config, name, new)
