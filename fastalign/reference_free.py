"""What preference trainers without a reference model share: the rows, the batches and a step of CPO, ORPO and TPO."""

from __future__ import annotations

import logging
from typing import Any, cast

import numpy as np
import torch
from fastalign_kernels.head.preference import PreferenceResult
from torch import Tensor, nn

from .config_groups import one_of
from .data.batch import TokenBatch
from .data.pair_batches import AnswerCollator
from .data.preferences import prepare_preference_dataset
from .pairs import PairAdapter, disable_dropout, group_lengths, pair_loss, record_pairs, sharing
from .policy import logits_forward

logger = logging.getLogger(__name__)
SMOOTHED = ("sigmoid", "simpo", "tpo-l")  # losses in which preferences may be flipped


def check_loss(config: Any, allowed: tuple[str, ...]) -> None:
    """Check `loss_type`, `label_smoothing` and `beta` (ValueError); warn of smoothing that the loss leaves out."""
    one_of(config, "loss_type", allowed)
    if not 0 <= config.label_smoothing <= 1:
        raise ValueError(f"`label_smoothing` is {config.label_smoothing}; it must be from 0 to 1.")
    if config.loss_type == "ipo" and config.beta == 0:
        raise ValueError("`beta` is 0, but 'ipo' aims at a margin of 1 / (2 beta): give another number.")
    if config.label_smoothing and config.loss_type not in SMOOTHED:
        logger.warning("`label_smoothing` is ignored with `loss_type=%r`; set it to 0.0.", config.loss_type)


def check_model(trainer: Any) -> None:
    """ValueError for models with an encoder and for images. Settle how the experts' balancing loss is weighted.

    Unset, `router_aux_loss_coef` is the model's own only where its config has `output_router_logits=True`, as in TRL.
    """
    config, args = trainer.loaded.model.config, trainer.args
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(trainer.loaded.model).__name__} has an encoder (`is_encoder_decoder` in its config); "
            f"{trainer._name} trains causal language models. Pass one of them as `model`."
        )
    if trainer.has_images:
        raise ValueError(
            f"The dataset has images ('image' or 'images'), which {trainer._name} does not take: drop these columns."
        )
    if args.router_aux_loss_coef is None and not getattr(config.get_text_config(), "output_router_logits", False):
        args.router_aux_loss_coef = 0.0


def settle(trainer: Any, data_collator: Any, answers: tuple[str, ...]) -> None:
    """After construction: dropout off where asked, adapters' too; a collator of the user's gives answers of pairs."""
    if trainer.args.disable_dropout:
        disable_dropout(trainer.model)
    if data_collator is not None:
        trainer.data_collator = PairAdapter(data_collator, flat=trainer.policy.flat, num_answers=len(answers))
        trainer._signature_columns = [f"{name}_ids" for name in ("prompt", *answers)]


def prepare_answers(trainer: Any, dataset: Any, name: str, answers: tuple[str, ...], bos_and_eos: bool = False) -> Any:
    """Raw rows -> `prompt_ids` and the ids of each of the answers."""
    args = trainer.args
    return prepare_preference_dataset(
        dataset,
        trainer.loaded.processing_class,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        answers=answers,
        bos_and_eos=bos_and_eos,
        num_proc=args.dataset_num_proc,
        name=name,
        bad_rows=args.bad_rows,
    )


def answer_collator(trainer: Any, answers: tuple[str, ...], score_prompt: tuple[str, ...] = ()) -> AnswerCollator:
    """The collator of a trainer; answers share prompts where `share_prefix` and the model allow it."""
    args = trainer.args
    return AnswerCollator(
        answers,
        pad_token_id=cast(int, trainer.loaded.tokenizer.pad_token_id),
        flat=trainer.policy.flat,
        share=sharing(trainer, trainer.train_dataset, answers),
        vocab_size=trainer.model.get_input_embeddings().weight.shape[0],
        pad_to_multiple_of=args.padding_multiple,
        score_prompt=score_prompt,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        extras=(),
    )


def answer_lengths(trainer: Any, dataset: Any, answers: tuple[str, ...]) -> np.ndarray:
    """(rows,) int64: tokens that each row takes in a batch; the column `length_column_name` where there is one."""
    if (name := trainer.args.length_column_name) in dataset.column_names:
        return np.asarray(dataset[name], dtype=np.int64)
    share = getattr(trainer.data_collator, "share", False)
    return group_lengths(dataset, answers, flat=trainer.policy.flat, share=share, limits=trainer.args)


def answer_step(
    trainer: Any, model: nn.Module, batch: TokenBatch, loss: str, per_pair: int = 2, **settings: Any
) -> tuple[Tensor, PreferenceResult]:
    """(loss of a micro-batch with the balancing loss of experts, its details), with the metrics of pairs recorded."""
    trainer.check_lengths(batch)
    found = pair_loss(model, batch, loss, per_pair, router=trainer.router_inputs(), **settings)
    record_pairs(trainer.metrics, batch, found.result, per_pair)
    return trainer.with_router_loss(found.loss, found.aux_loss, None), found.result


def with_outputs(trainer: Any, model: nn.Module, batch: TokenBatch, loss: Tensor, return_outputs: bool) -> Any:
    """`loss`, or (loss, the model's own outputs, logits included)."""
    if not return_outputs:
        return loss
    with torch.no_grad():
        return loss, logits_forward(model, batch, **trainer.router_inputs())
