"""Outcome reward models: a number on a whole answer, learnt from pairs of answers of which one is preferred."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from fastalign_kernels.losses.reward import bradley_terry_loss
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from ..config import AlignConfig, arg
from ..config_groups import LoadArgs, RowArgs
from ..data.batch import TokenBatch, name_read
from ..data.pair_batches import AnswerCollator
from ..data.preferences import prepare_reward_dataset
from ..given_data import GivenDataTrainer, passed_on
from ..loop.health import watch_pulls
from ..models import set_chat_template, set_eos_token, set_pad_token
from ..pairs import AnswerArgs, answer_collator
from ..policy import PolicyInfo
from ..reward_head import prepare_reward_model, read_before_padding, score_loss, warn_of_untrained_head

ANSWERS = ("chosen", "rejected")


@dataclass
class RewardConfig(AnswerArgs, RowArgs, LoadArgs, AlignConfig):
    """Settings of RewardTrainer: `transformers.TrainingArguments`, the shared groups, and those below."""

    _VALID_DICT_FIELDS = [*AlignConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = arg(1e-4, "Initial learning rate.")
    chat_template_path: str | None = arg(
        None, "A Jinja file with the chat template, or the tokenizer (folder or Hub id) to clone it from."
    )
    eos_token: str | None = arg(None, "End-of-sequence token; unset: the tokenizer's.")
    max_length: int | None = arg(
        1024, "Longest sequence, in tokens; pairs with a longer one are left out, and counted. None: no limit."
    )
    center_rewards_coefficient: float | None = arg(
        None, "Weight of the squared sum of a pair's rewards, which centres them on 0 (arXiv:2312.09244); try 0.01."
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_length_args()
        self.check_model_args()
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor}, but rewards have no classes to smooth "
                "over. Set it to 0; a `margin` column says how sure a preference is."
            )


class RewardTrainer(GivenDataTrainer):
    """Trains a model with one score per sequence, given by name, as an object, or with adapters.

    Takes `chosen` and `rejected` with or without `prompt`, as texts or messages, and rows that are tokenised
    (`chosen_ids`, `rejected_ids`), each perhaps with a `margin`. Arguments, defaults and metrics are those of TRL's
    trainer. `compute_metrics` gets the rewards (pairs, 2), chosen first, and labels 0.
    """

    config_class = RewardConfig
    model_kind = AutoModelForSequenceClassification
    num_labels = 1
    task = "SEQ_CLS"
    answers = ANSWERS
    row_columns = ("margin",)
    loss_is_normalized = False
    _name = "Reward"
    _tag_names = ["fastalign", "reward-trainer"]
    args: RewardConfig

    def __init__(
        self,
        model,
        args: RewardConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        optimizer_cls_and_kwargs=None,
        preprocess_logits_for_metrics=None,
        quantization_config=None,
        peft_config=None,
    ):
        super().__init__(**passed_on(locals()))
        warn_of_untrained_head(self.model)

    def check(self, sample: dict) -> None:
        """Refuse models that give anything but one number per sequence."""
        model = self.loaded.model
        if model.get_output_embeddings() is not None:
            raise ValueError(
                f"{type(model).__name__} is a language model, and a reward model is needed: pass its name, or load it "
                "with `AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)`."
            )
        if (found := getattr(model.config, "num_labels", None)) != 1:
            raise ValueError(
                f"The model has `num_labels={found}`, but a reward model gives one number per sequence: load it with "
                "`num_labels=1`, or pass its name."
            )

    def adapt(self) -> None:
        """End token and chat template."""
        set_eos_token(self.loaded, self.args.eos_token)
        set_chat_template(self.loaded, self.args.chat_template_path)

    def prepare_model(self) -> PolicyInfo:
        """Flat batches where the backbone takes them."""
        return prepare_reward_model(self.model)

    # Data

    def prepare_dataset(self, dataset, name: str, training: bool):
        """Raw rows -> `prompt_ids` (what both sequences begin with), `chosen_ids`, `rejected_ids`, `margin`."""
        if "chosen_input_ids" in (dataset.column_names or ()):
            warnings.warn(
                "`chosen_input_ids` and `rejected_input_ids` are deprecated; rename them to `chosen_ids` and "
                "`rejected_ids`.",
                FutureWarning,
                stacklevel=2,
            )
        return prepare_reward_dataset(
            dataset,
            self.loaded.processing_class,
            max_length=self.args.max_length,
            num_proc=self.args.dataset_num_proc,
            name=name,
            bad_rows=self.args.bad_rows,
        )

    def make_collator(self) -> RewardCollator:
        """Flat batches, with shared beginnings where that saves work, or padded ones."""
        return answer_collator(self, RewardCollator, read="last")

    def adapt_collator(self, given):
        """A user's collator of `chosen_ids` and `rejected_ids`, whole sequences."""
        set_pad_token(self.loaded, self.args.pad_token)
        return _PairsOfRows(given, self.make_collator())

    # Loss

    def compute_loss(self, model, inputs: TokenBatch, return_outputs: bool = False, num_items_in_batch=None):
        """Bradley-Terry's loss, the mean over the batch's pairs."""
        self.check_lengths(inputs)

        def op(scores: Tensor) -> tuple[Tensor, Tensor]:
            rewards = scores.view(-1, 2)
            losses = bradley_terry_loss(
                *rewards.unbind(1),
                margin=inputs.extras.get("margin"),
                center_rewards_coefficient=self.args.center_rewards_coefficient,
            )
            return losses.mean(), rewards.detach()

        found = score_loss(model, inputs, op)
        self._record(found.result)
        watch_pulls(self.metrics, torch.sigmoid(found.result[:, 1] - found.result[:, 0]))
        self.metrics.tokens(inputs.num_tokens)
        return (found.loss, {"logits": found.result}) if return_outputs else found.loss

    def _record(self, rewards: Tensor) -> None:
        """TRL's metrics; of several ranks min_reward and max_reward are means of each one's."""
        difference = rewards[:, 0] - rewards[:, 1]
        values = {"min_reward": rewards.min(), "mean_reward": rewards.mean(), "max_reward": rewards.max()}
        values |= {"accuracy": (difference > 0).float().mean(), "margin": difference.mean()}
        for name, value in values.items():
            self.metrics.mean(name, value)

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """(loss, rewards (B, 2) with the chosen first, labels (B,) 0) of one evaluation batch."""
        batch: Any = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = cast(tuple[Tensor, dict], self.compute_loss(model, batch, return_outputs=True))
        if prediction_loss_only:
            return loss, None, None
        rewards = outputs["logits"]
        return loss, rewards, torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)


class RewardCollator(AnswerCollator):
    """AnswerCollator that reads every sequence where the model's ordinary forward does."""

    def __call__(self, rows) -> TokenBatch:
        return name_read(read_before_padding(super().__call__(rows), self.pad_token_id))


class _PairsOfRows:
    """Wraps a collator that returns `input_ids` (2B, L), chosen rows first, `attention_mask` and perhaps `margin`."""

    def __init__(self, collator, own: RewardCollator):
        self.collator, self.own, self.flat = collator, own, own.flat

    def __call__(self, rows: list[dict[str, Any]]) -> TokenBatch:
        whole = [row | {f"{a}_ids": [*row.get("prompt_ids", ()), *row[f"{a}_ids"]] for a in ANSWERS} for row in rows]
        made = self.collator([{k: v for k, v in row.items() if k != "prompt_ids"} for row in whole])
        if isinstance(made, TokenBatch):
            return made
        if not hasattr(made, "keys") or not {"input_ids", "attention_mask"} <= set(made):
            found = sorted(made) if hasattr(made, "keys") else type(made).__name__
            raise TypeError(
                f"`data_collator` must return a dictionary with `input_ids` and `attention_mask`, got {found}."
            )
        pairs = zip(
            *(
                [ids[mask.bool()].tolist() for ids, mask in zip(*halves, strict=True)]
                for halves in zip(made["input_ids"].chunk(2), made["attention_mask"].chunk(2), strict=True)
            ),
            strict=True,
        )
        columns = [dict(zip(("chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
        if "margin" in made:
            columns = [row | {"margin": float(m)} for row, m in zip(columns, made["margin"], strict=True)]
        return self.own(columns)
