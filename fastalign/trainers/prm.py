"""Process reward models: the probability that a step of an answer is right, learnt at the end of every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from fastalign_kernels.losses.reward import process_reward_loss
from torch import Tensor
from transformers import AutoModelForTokenClassification, EvalPrediction

from ..config import AlignConfig, arg
from ..config_groups import LoadArgs, RowArgs
from ..data.bad_rows import RULES
from ..data.batch import TokenBatch
from ..data.stepwise import StepCollator, prepare_stepwise_dataset
from ..given_data import GivenDataTrainer, passed_on
from ..models import set_pad_token
from ..policy import PolicyInfo, unwrap
from ..reward_head import prepare_reward_model, score_loss, warn_of_untrained_head


@dataclass
class PRMConfig(RowArgs, LoadArgs, AlignConfig):
    """Settings of PRMTrainer: `transformers.TrainingArguments`, the shared groups, and those below."""

    _VALID_DICT_FIELDS = [*AlignConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = arg(1e-5, "Initial learning rate.")
    max_completion_length: int | None = arg(
        None, "Longest completion (all steps together), in tokens; longer ones are cut at the end. None: no limit."
    )
    disable_dropout: bool = arg(True, "Switch dropout off in the model.")
    step_separator: str = arg("\n", "Text behind every step; the step's label stands at its last token.")
    bad_rows: str = arg(
        "keep",
        "Rows with a step that says nothing: keep (and name them in the log), drop, or error. Rows that cannot be "
        "used (a value is missing, max_length leaves no label) are dropped, or an error.",
        choices=[*RULES],
    )
    train_on_last_step_only: bool = arg(False, "Learn from each answer's last label only; evaluation scores all.")

    def __post_init__(self):
        super().__post_init__()
        self.check_length_args()
        self.check_model_args()
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor}, which labels of steps do not take: set "
                "it to 0."
            )
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(
                f"`max_completion_length` is {self.max_completion_length}; it must be at least 1 or None."
            )


class PRMTrainer(GivenDataTrainer):
    """Trains a token classifier on `prompt`, `completions` (steps) and `labels`: by name, as an object, with adapters.

    Arguments and defaults are those of TRL's trainer (which TRL 1.16 has no more). The loss is the mean cross-entropy
    over the labelled steps of an optimizer step. `compute_metrics` (default: accuracy) gets logits and labels of the
    steps, one row per batch, with -100 where it has none.
    """

    config_class = PRMConfig
    model_kind = AutoModelForTokenClassification
    num_labels = 2
    task = "TOKEN_CLS"
    _name = "PRM"
    _tag_names = ["fastalign", "prm"]
    args: PRMConfig

    def __init__(
        self,
        model=None,
        args: PRMConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        model_init=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        preprocess_logits_for_metrics=None,
        peft_config=None,
        quantization_config=None,
    ):
        if (model is None) == (model_init is None):
            raise ValueError("Give the model once: as `model`, or as `model_init`, a function that returns it.")
        compute_metrics = compute_metrics or step_accuracy
        super().__init__(**passed_on(locals()))
        warn_of_untrained_head(self.model)

    def check(self, sample: dict) -> None:
        """Refuse models that do not classify tokens."""
        base = unwrap(self.loaded.model)
        if "TokenClassification" not in type(base).__name__ or base.config.num_labels < 2:
            raise ValueError(
                f"{type(base).__name__} with `num_labels={base.config.num_labels}` cannot judge steps: pass the "
                "model's name, or load it with `AutoModelForTokenClassification.from_pretrained(..., num_labels=2)`."
            )

    def prepare_model(self) -> PolicyInfo:
        """Flat batches where the backbone takes them."""
        return prepare_reward_model(self.model)

    def prepare_dataset(self, dataset, name: str, training: bool):
        """Raw rows -> `input_ids`, and `labels` at the ends of steps."""
        args = self.args
        return prepare_stepwise_dataset(
            dataset,
            self.loaded.processing_class,
            step_separator=args.step_separator,
            max_length=args.max_length,
            max_completion_length=args.max_completion_length,
            last_step_only=args.train_on_last_step_only and training,
            num_proc=args.dataset_num_proc,
            name=name,
            bad_rows=args.bad_rows,
        )

    def make_collator(self) -> StepCollator:
        """Flat or padded token batches."""
        return StepCollator(
            pad_token_id=cast(int, self.loaded.tokenizer.pad_token_id),
            num_labels=unwrap(self.model).config.num_labels,
            flat=self.policy.flat,
            vocab_size=self.model.get_input_embeddings().weight.shape[0],
            pad_to_multiple_of=self.args.padding_multiple,
        )

    def adapt_collator(self, given):
        """A user's collator of `input_ids` and `labels`."""
        set_pad_token(self.loaded, self.args.pad_token)
        return _StepsOfRows(given, self.make_collator())

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", "labels", "attention_mask"]

    def compute_loss(self, model, inputs: TokenBatch, return_outputs: bool = False, num_items_in_batch=None):
        """Cross-entropy summed over `num_items_in_batch` steps (unset: this batch's)."""
        self.check_lengths(inputs)
        norm = inputs.num_scored if num_items_in_batch is None else num_items_in_batch
        norm = norm.clamp(min=1) if isinstance(norm, Tensor) else max(norm, 1)

        def op(scores: Tensor) -> tuple[Tensor, Tensor]:
            return process_reward_loss(scores, inputs.targets).sum() / norm, scores.detach()

        found = score_loss(model, inputs, op)
        self.metrics.mean("accuracy", (found.result.argmax(1) == inputs.targets).sum(), inputs.num_scored)
        self.metrics.tokens(inputs.num_tokens)
        loss = self.over_ranks(found.loss, num_items_in_batch)
        return (loss, {"logits": found.result}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """(loss, logits (1, N, C), labels (1, N)) of the steps of one evaluation batch."""
        batch: Any = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = cast(tuple[Tensor, dict], self.compute_loss(model, batch, return_outputs=True))
        return (loss, None, None) if prediction_loss_only else (loss, outputs["logits"][None], batch.targets[None])


def step_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the steps whose label is the likeliest class."""
    logits, labels = cast(np.ndarray, prediction.predictions), cast(np.ndarray, prediction.label_ids)
    scored = labels != -100
    return {"accuracy": float((logits.argmax(-1) == labels)[scored].mean())}


class _StepsOfRows:
    """Wraps a collator that returns `input_ids`, `attention_mask` and `labels`, each (B, L)."""

    def __init__(self, collator, own: StepCollator):
        self.collator, self.own, self.flat = collator, own, own.flat

    def __call__(self, rows) -> TokenBatch:
        made = self.collator(rows)
        if isinstance(made, TokenBatch):
            return made
        real = [mask.bool() for mask in made["attention_mask"]]
        columns = {name: [r[m].tolist() for r, m in zip(made[name], real, strict=True)] for name in self.own.columns}
        return self.own([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
