"""What trainers on pairs of answers share: settings, lengths of rows, the loss of a batch, and its metrics."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from fastalign_kernels.head.preference import PreferenceResult, linear_preference_loss
from torch import Tensor, nn

from .config import arg
from .config_groups import LengthArgs, ModelArgs
from .data.bad_rows import RULES
from .data.batch import TokenBatch
from .data.dict_batches import token_batch
from .data.pair_batches import SHARE_GAIN, AnswerCollator
from .data.preferences import check_image_dataset, prepare_preference_dataset
from .data.vision_pairs import VisionAnswerCollator, number_by_answer
from .free_tokens import reading
from .loop.batching import list_lengths
from .loop.health import watch_pulls
from .metrics import Metrics
from .policy import HeadLoss, head_loss, logits_forward

OUTPUTS = ("entropy", "mean_logit", "top1")  # statistics of tokens that the metrics of pairs need


@dataclass
class AnswerArgs:
    """How answers to a prompt are run through the model."""

    disable_dropout: bool = arg(True, "Switch dropout off in the policy and in the reference.")
    share_prefix: bool | None = arg(
        None, "Compute a prompt once for all answers to it; unset: where that saves 15% of the tokens."
    )
    bad_rows: str = arg(
        "keep",
        "Rows whose answers are equal or say nothing: keep (and name them in the log), drop, or error. Rows that "
        "cannot be used (a value is missing, the prompt fills max_length) are dropped, or an error.",
        choices=[*RULES],
    )


@dataclass
class PairArgs(AnswerArgs, LengthArgs, ModelArgs):
    """Settings of trainers on pairs of answers of a language model."""

    def check_pair_args(self) -> None:
        """The checks of both groups, and no label smoothing over the vocabulary (ValueError)."""
        config: Any = self
        self.check_length_args()
        self.check_model_args()
        if config.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {config.label_smoothing_factor}, but losses of pairs have no smoothing "
                "over the vocabulary. Set it to 0; for labels that may be wrong see `label_smoothing`."
            )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of `model` to 0, also those that its attention keeps as a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 (nn.Module types its attributes)


def prepare_answers(trainer: Any, dataset: Any, name: str, answers: tuple[str, ...], bos_and_eos: bool = False) -> Any:
    """Raw rows -> `prompt_ids` and the ids of each of the answers; with images the rows as they are."""
    args = trainer.args
    if trainer.has_images:
        check_image_dataset(dataset, answers, name)
        return dataset
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


def answer_collator(trainer: Any, kind: Any = AnswerCollator, **options: Any) -> Any:
    """The collator of a trainer's `answers`: flat batches, with shared prompts where that saves work, or padded ones.

    `kind(answers, ...)` makes it, given `options` besides. Rows with images go through the processor first.
    """
    args = trainer.args
    if isinstance(args, LengthArgs):
        options |= {"max_length": args.max_length, "truncation_mode": args.truncation_mode}
    collator = kind(
        trainer.answers,
        pad_token_id=cast(int, trainer.loaded.tokenizer.pad_token_id),
        flat=trainer.policy.flat,
        share=sharing(trainer, trainer.train_dataset, trainer.answers),
        vocab_size=trainer.model.get_input_embeddings().weight.shape[0],
        pad_to_multiple_of=args.padding_multiple,
        extras=(*trainer.row_columns, *trainer.reference_columns),
        **options,
    )
    return VisionAnswerCollator(trainer.processing_class, collator) if trainer.has_images else collator


def sharing(trainer, dataset, answers: tuple[str, ...]) -> bool | str:
    """The collator's `share` for a trainer: as set; with a token budget one choice for the whole dataset.

    A router's balancing loss counts the tokens of a prompt once per answer, so there prompts are not shared unasked.
    ValueError where `share_prefix=True` and the model cannot.
    """
    wish, policy = trainer.args.share_prefix, trainer.policy
    if len(answers) < 2:
        return False
    if wish and not policy.shares_prefix:
        raise ValueError(
            f"`share_prefix=True`, but this model's answers cannot share a prompt: {policy.reason}. Set it to False."
        )
    if wish is not None or not policy.shares_prefix or trainer.router_coefficient:
        return bool(wish)
    if trainer.args.token_budget is None:
        return "auto"
    limits = trainer.args if isinstance(trainer.args, LengthArgs) else None
    lengths = [group_lengths(dataset, answers, flat=True, share=x, limits=limits).sum() for x in (False, True)]
    return bool(lengths[0] > SHARE_GAIN * lengths[1])


def group_lengths(
    dataset, answers: tuple[str, ...], *, flat: bool, share: bool | str, limits: LengthArgs | None = None
) -> np.ndarray:
    """(rows,) int64: tokens that a row takes in a batch, padded ones as wide as their longest answer.

    Of sequences longer than `limits` allow, what the collator leaves of them counts.
    """
    prompts = list_lengths(dataset, "prompt_ids")
    totals = prompts[:, None] + np.stack([list_lengths(dataset, f"{name}_ids") for name in answers], 1)
    shared = prompts * (share is True)
    if limits is not None and limits.max_length is not None:
        over = np.maximum(totals - limits.max_length, 0)
        totals = totals - over
        if limits.truncation_mode == "keep_end":  # cuts prompts, and shares those that it leaves equal
            shared = np.where((over == over[:, :1]).all(1), np.maximum(shared - over[:, 0], 0), 0)
    shared = np.where((totals > shared[:, None]).all(1), shared, 0)  # an answer without tokens shares nothing
    if not flat:
        return len(answers) * totals.max(1, initial=0)
    return totals.sum(1) - (len(answers) - 1) * shared


class PairAdapter:
    """Wraps a collator that returns TRL's dictionary of pairs, so that it returns a TokenBatch.

    The dictionary needs `input_ids`, `attention_mask` and `completion_mask`, each (2B, L): first the chosen rows, then
    the rejected ones, then those of further answers. With `images` everything else in it is passed to the model.
    """

    def __init__(self, collator, *, flat: bool, num_answers: int = 2, images: bool = False):
        self.collator, self.flat, self.num_answers, self.images = collator, flat, num_answers, images

    def __call__(self, rows) -> TokenBatch:
        """Raises TypeError for a result of another kind."""
        made = self.collator(rows)
        if isinstance(made, TokenBatch):
            return made
        if not hasattr(made, "keys") or not {"input_ids", "completion_mask"} <= set(made):
            found = sorted(made) if hasattr(made, "keys") else type(made).__name__
            raise TypeError(
                f"`data_collator` must return a dictionary with `input_ids`, `attention_mask` and `completion_mask`, "
                f"or a TokenBatch, got {found}."
            )
        num_rows = len(made["input_ids"])
        if self.images:
            mask, tensors = made["completion_mask"], {k: v for k, v in made.items() if k != "completion_mask"}
            labels = made["input_ids"].masked_fill(mask == 0, -100)
            batch = number_by_answer(token_batch(tensors | {"labels": labels}, flat=False), self.num_answers)
            return replace(batch, extras={"lengths": mask.sum(1).view(self.num_answers, -1).t().flatten()})
        pairs = torch.arange(num_rows).view(self.num_answers, -1).t().flatten()
        tensors = {k: v[pairs] for k, v in made.items() if len(v) == num_rows}
        extras = {k: v for k, v in made.items() if len(v) != num_rows}
        mask = tensors.pop("completion_mask")
        batch = token_batch(tensors | {"labels": tensors["input_ids"].masked_fill(mask == 0, -100)}, flat=self.flat)
        return replace(batch, extras=extras | {"lengths": mask.sum(1)})


def pair_loss(
    model: nn.Module,
    batch: TokenBatch,
    loss: str,
    per_pair: int = 2,
    *,
    outputs: tuple[str, ...] = OUTPUTS,
    router: dict[str, Any] | None = None,
    **settings: Any,
) -> HeadLoss:
    """One forward of `model` over `batch`, numbered pair by pair, through `linear_preference_loss(loss, **settings)`.

    `result` is its `PreferenceResult`; the loss is the mean over the batch's pairs.
    """
    num_pairs = batch.extras["lengths"].numel() // per_pair

    def op(hidden: Tensor, weight: Tensor, **head) -> tuple[Tensor, PreferenceResult]:
        found = linear_preference_loss(
            hidden,
            weight,
            batch.targets,
            batch.row if batch.host_row is None else batch.host_row,
            num_pairs=num_pairs,
            loss=loss,
            scored=batch.extras.get("scored"),
            outputs=outputs,
            **head,
            **settings,
        )
        return found.loss, found

    with nullcontext() if router else reading(batch):  # a router sees every token
        return head_loss(model, batch, op, **(router or {}))


def with_outputs(model: nn.Module, batch: TokenBatch, loss: Tensor, return_outputs: bool) -> Any:
    """`loss`, or (loss, the model's own outputs, logits included)."""
    if not return_outputs:
        return loss
    with torch.no_grad():
        return loss, logits_forward(model, batch)


def record_pairs(metrics: Metrics, batch: TokenBatch, found: PreferenceResult, per_pair: int = 2) -> None:
    """TRL's metrics of pairs: rewards/*, logps/*, logits/* (means over vocabulary and tokens), entropy (nats),
    mean_token_accuracy (of the chosen answers), num_tokens. A metric is a ratio over all ranks."""
    num_pairs, stats = found.losses.numel(), found.stats
    record_rewards(metrics, found)
    for name, logps in {"chosen": found.chosen_logps, "rejected": found.rejected_logps}.items():
        metrics.mean(f"logps/{name}", logps.sum(), num_pairs)
    answer = batch.row.to(stats.logp.device) % per_pair
    if "scored" in batch.extras:
        answer = answer.masked_fill(~batch.extras["scored"], -1)
    chosen, rejected = answer == 0, answer == 1
    if stats.mean_logit is not None:
        metrics.mean("logits/chosen", (stats.mean_logit * chosen).sum(), chosen.sum())
        metrics.mean("logits/rejected", (stats.mean_logit * rejected).sum(), rejected.sum())
    if stats.entropy is not None:
        metrics.mean("entropy", (stats.entropy * (answer >= 0)).sum(), (answer >= 0).sum())
    if stats.top1 is not None:
        metrics.mean("mean_token_accuracy", (stats.top1 & chosen).sum(), chosen.sum())
    metrics.tokens(batch.num_tokens)
    watch_pulls(metrics, found.pulls)


def record_rewards(metrics: Metrics, found: PreferenceResult) -> None:
    """rewards/chosen, rewards/rejected, rewards/accuracies and rewards/margins, means over pairs."""
    values = {
        "chosen": found.chosen_rewards,
        "rejected": found.rejected_rewards,
        "accuracies": found.accuracies,
        "margins": found.margins,
    }
    for name, value in values.items():
        metrics.mean(f"rewards/{name}", value.sum(), value.numel())
