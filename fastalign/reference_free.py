"""What preference trainers without a reference model share: the checks and a step of CPO, ORPO and TPO."""

from __future__ import annotations

import logging
from typing import Any

from fastalign_kernels.head.preference import PreferenceResult
from torch import Tensor, nn

from .config_groups import one_of
from .data.batch import TokenBatch
from .pairs import pair_loss, record_pairs

logger = logging.getLogger(__name__)
SMOOTHED = ("sigmoid", "simpo", "tpo-l")  # losses in which preferences may be flipped


def check_loss(config: Any, allowed: tuple[str, ...]) -> None:
    """Check `loss_type`, `label_smoothing` and `beta` (ValueError); warn of smoothing that the loss leaves out."""
    one_of(config, "loss_type", allowed)
    if not 0 <= config.label_smoothing <= 1:
        raise ValueError(f"`label_smoothing` is {config.label_smoothing}; it must be from 0 to 1.")
    if config.loss_type == "ipo" and config.beta == 0:
        raise ValueError("`beta` is 0, but 'ipo' aims at a margin of 1 / (2 beta): give another number.")
    warn_of_smoothing(config.label_smoothing, [config.loss_type], SMOOTHED)


def warn_of_smoothing(label_smoothing: float, types: list[str], smoothed: tuple[str, ...]) -> None:
    """Warn where no loss among `types` is one of the `smoothed`, which read `label_smoothing`."""
    if label_smoothing and not set(smoothed).intersection(types):
        found = types[0] if len(types) == 1 else types
        logger.warning("`label_smoothing` is ignored with `loss_type=%r`; set it to 0.0.", found)


def check_model(trainer: Any) -> None:
    """ValueError for models with an encoder. Settle how the experts' balancing loss is weighted.

    Unset, `router_aux_loss_coef` is the model's own only where its config has `output_router_logits=True`, as in TRL.
    """
    config, args = trainer.loaded.model.config, trainer.args
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(trainer.loaded.model).__name__} has an encoder (`is_encoder_decoder` in its config); "
            f"{trainer._name} trains causal language models. Pass one of them as `model`."
        )
    if args.router_aux_loss_coef is None and not getattr(config.get_text_config(), "output_router_logits", False):
        args.router_aux_loss_coef = 0.0


def answer_step(
    trainer: Any, model: nn.Module, batch: TokenBatch, loss: str, per_pair: int = 2, **settings: Any
) -> tuple[Tensor, PreferenceResult]:
    """(loss of a micro-batch with the balancing loss of experts, its details), with the metrics of pairs recorded."""
    trainer.check_lengths(batch)
    found = pair_loss(model, batch, loss, per_pair, router=trainer.router_inputs(), **settings)
    record_pairs(trainer.metrics, batch, found.result, per_pair)
    return trainer.with_router_loss(found.loss, found.aux_loss, None), found.result
