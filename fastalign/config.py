"""The config that every trainer's config extends: `TrainingArguments` with the defaults of post-training."""

from __future__ import annotations

import logging
from dataclasses import MISSING, dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from .findings import ALL, FINDINGS, check_bounds, check_names

logger = logging.getLogger(__name__)


def arg(default: Any = MISSING, help: str = "", *, factory: Any = MISSING, choices: list | None = None) -> Any:
    """A dataclass field with its one-sentence documentation; `--help` and the docs read it."""
    metadata: dict[str, Any] = {"help": help.replace("%%", "%").replace("%", "%%")}
    if choices is not None:
        metadata["choices"] = choices
    return field(default=default, default_factory=factory, metadata=metadata)


@dataclass
class AlignConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults that TRL's configs share, and the token budget.

    Each inherited field is honoured or refused by name (`fastalign.loop.arguments`); none is ignored silently.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "health_bounds"]

    logging_steps: float = arg(10, "Optimizer steps between two logs; below 1 a share of all steps.")
    gradient_checkpointing: bool = arg(True, "Recompute activations in the backward pass: less memory, slower.")
    bf16: bool | None = arg(
        None, "Mixed precision with bfloat16; unset: on unless fp16 is set or the machine has no bf16 GPU."
    )
    lr_scheduler_kwargs: dict | str | None = arg(
        None, "Arguments of the learning-rate schedule, a dict or JSON, such as {'num_cycles': 1}."
    )
    token_budget: int | None = arg(
        None,
        "Tokens in a micro-batch: the examples of an optimizer step are regrouped, longest first, so that none "
        "exceeds it. Losses that are means over tokens or rows stay what they are; means within a micro-batch, such "
        "as the NLL terms of preference losses and logged values, are those of the new ones. Unset: "
        "per_device_train_batch_size examples.",
    )
    kernel_backend: str = arg(
        "auto",
        "Kernels of norms, gated activations, RoPE and LoRA: fastalign's own, Liger's, those of the Hub, or none; "
        "auto: own on a GPU with Triton and on a CPU.",
        choices=["auto", "own", "liger", "hub", "none"],
    )
    fp8: bool = arg(
        False,
        "Multiply in fp8 (e4m3, a scale per row) in the large linear layers of the model's body, forward and input "
        "gradients; needs a card from Ada or Hopper on.",
    )
    bf16_update: str = arg(
        "plain",
        "How weights loaded in bfloat16 take updates smaller than their last bit: plain (lost), stochastic_rounding "
        "(right on average, AdamW only), fp32_master (kept in an fp32 copy, 4 bytes a weight).",
        choices=["plain", "stochastic_rounding", "fp32_master"],
    )
    stop_on_health: list[str] = arg(
        factory=list,
        help=f"Findings of health checks that stop the run: '{ALL}', or some of {', '.join(FINDINGS)}.",
    )
    health_bounds: dict[str, Any] | str | None = arg(
        None, "Bounds of findings by name, such as {'zero_variance': 0.9}; docs/health.md has ours."
    )

    def __post_init__(self):
        if self.token_budget is not None and self.token_budget <= 0:
            raise ValueError(f"token_budget must be a positive number of tokens or None, found {self.token_budget}.")
        if self.kernel_backend not in ("auto", "own", "liger", "hub", "none"):
            raise ValueError(f"kernel_backend={self.kernel_backend!r}: choose auto, own, liger, hub or none.")
        check_bf16_update(self)
        self.stop_on_health = [self.stop_on_health] if isinstance(self.stop_on_health, str) else self.stop_on_health
        check_names(self.stop_on_health)
        if self.use_liger_kernel and self.kernel_backend not in ("auto", "liger"):
            raise ValueError(
                f"use_liger_kernel=True means kernel_backend='liger', but that is {self.kernel_backend!r}: set one."
            )
        if self.liger_kernel_config and not (self.use_liger_kernel or self.kernel_backend == "liger"):
            raise ValueError("liger_kernel_config is given, but not kernel_backend='liger' (or use_liger_kernel).")
        if self.bf16 is None:
            # TRL turns bf16 on everywhere and lets machines without a bf16 GPU fail; there we train in fp32.
            self.bf16 = not self.fp16 and (self.use_cpu or is_torch_bf16_gpu_available())
            if not (self.bf16 or self.fp16):
                logger.info("bf16 is off: no GPU with bf16. Set bf16=True and use_cpu=True for bf16 on the CPU.")
        super().__post_init__()
        check_bounds(self.health_bounds)


def check_bf16_update(args: AlignConfig) -> None:
    """ValueError where `bf16_update` is unknown, or `optim` cannot do it."""
    optim = str(getattr(args.optim, "value", args.optim))
    if args.bf16_update not in ("plain", "stochastic_rounding", "fp32_master"):
        raise ValueError(f"bf16_update={args.bf16_update!r}: choose plain, stochastic_rounding or fp32_master.")
    if args.bf16_update == "stochastic_rounding" and optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ValueError(
            "bf16_update='stochastic_rounding' is made for optim='adamw_torch' or 'adamw_torch_fused', found "
            f"{optim!r}: choose one of them, or bf16_update='fp32_master'."
        )
    own_copies = ("lomo", "schedule_free", "layerwise")  # they update in the backward pass, or swap the weights
    if args.bf16_update == "fp32_master" and any(part in optim for part in own_copies):
        raise ValueError(
            f"bf16_update='fp32_master' does not work with optim={optim!r}, which changes the weights outside of its "
            "step: choose another optimizer, or bf16_update='plain'."
        )
