"""Supervised fine-tuning: next-token likelihood of texts, of completions, or of the assistant's turns."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from fastalign_kernels.losses.supervised import dft, nll, smoothed_nll
from torch import Tensor
from transformers import TrainingArguments

from ..config import AlignConfig, arg
from ..config_groups import LengthArgs, ModelArgs, one_of, renamed
from ..data.batch import TokenBatch
from ..data.chat import get_training_chat_template, has_generation_markers, is_chat_template_stop_token_trained
from ..data.collate import TokenCollator
from ..data.formats import is_conversational
from ..data.packing import pack_dataset
from ..data.tokenize import prepare_sft_dataset
from ..data.vision import VisionCollator
from ..given_data import IMAGE_COLUMNS, GivenDataTrainer, passed_on
from ..loop.model_inputs import labels_of
from ..models import set_chat_template, set_eos_token
from ..policy import logits_forward, token_loss, token_stats

logger = logging.getLogger(__name__)


@dataclass
class SFTConfig(LengthArgs, ModelArgs, AlignConfig):
    """Settings of SFTTrainer: `transformers.TrainingArguments`, the shared groups, and those below."""

    _VALID_DICT_FIELDS = [*AlignConfig._VALID_DICT_FIELDS, "model_init_kwargs", "dataset_kwargs"]

    learning_rate: float = arg(2e-5, "Initial learning rate.")
    chat_template_path: str | None = arg(
        None, "A Jinja file with the chat template, or the tokenizer (folder or Hub id) to clone it from."
    )
    dataset_text_field: str = arg("text", "Column that holds the text of language-modelling data.")
    dataset_kwargs: dict[str, Any] | str | None = arg(
        None, "{'skip_prepare_dataset': true} leaves the dataset as it is (it must then be tokenised)."
    )
    eos_token: str | None = arg(None, "End-of-sequence token; unset: the tokenizer's.")
    shuffle_dataset: bool = arg(False, "Shuffle the dataset once before training.")
    packing: bool = arg(False, "Put several sequences into each row of `max_length` tokens.")
    packing_strategy: str = arg(
        "bfd",
        "'bfd' (best fit, cuts off overflow), 'bfd_split' (best fit, splits overflow) or 'wrapped' (cuts anywhere).",
        choices=["bfd", "bfd_split", "wrapped"],
    )
    padding_free: bool = arg(
        False, "Require batches without padding: an error for a model that needs it (others never get any)."
    )
    eval_packing: bool | None = arg(None, "Pack the evaluation data; unset: like `packing`.")
    completion_only_loss: bool | None = arg(
        None, "Score the completion only; unset: yes for prompt-completion data, no otherwise."
    )
    assistant_only_loss: bool = arg(False, "Score the assistant's turns only (conversational data).")
    loss_type: str = arg(
        "nll", "'nll' (negative log-likelihood) or 'dft' (arXiv:2508.05629).", choices=["nll", "dft", "chunked_nll"]
    )

    @property
    def skip_preparation(self) -> bool:
        """Whether the dataset is tokenised already."""
        return isinstance(self.dataset_kwargs, dict) and bool(self.dataset_kwargs.get("skip_prepare_dataset"))

    def __post_init__(self):
        super().__post_init__()
        self.check_length_args()
        self.check_model_args()
        renamed(self, "loss_type", "chunked_nll", "nll")
        renamed(self, "packing_strategy", "bfd-requeue", "bfd_split")
        one_of(self, "loss_type", ("nll", "dft"))
        one_of(self, "packing_strategy", ("bfd", "bfd_split", "wrapped"))
        if self.loss_type == "dft" and self.label_smoothing_factor > 0:
            raise ValueError("`label_smoothing_factor` has no meaning with `loss_type='dft'`; set it to 0.")
        unknown = set(self.dataset_kwargs or {}) - {"skip_prepare_dataset"}
        if unknown:
            raise ValueError(f"`dataset_kwargs` has unknown keys {sorted(unknown)}; allowed: 'skip_prepare_dataset'.")
        if (self.packing or self.eval_packing) and self.max_length is None:
            raise ValueError("When packing is enabled, `max_length` can't be `None`: it is the length of the rows.")


class SFTTrainer(GivenDataTrainer):
    """Supervised fine-tuning of a causal language model, given by name, as an object, or with adapters.

    Takes language-modelling (`text`, `messages`, `conversations`), prompt-completion and pre-tokenised data, standard
    or conversational, also with images. Arguments, defaults and metrics are those of TRL's trainer.
    """

    config_class = SFTConfig
    takes_images = True
    _name = "SFT"
    _tag_names = ["fastalign", "sft"]
    args: SFTConfig

    def __init__(
        self,
        model,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_loss_func=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        optimizer_cls_and_kwargs=None,
        preprocess_logits_for_metrics=None,
        quantization_config=None,
        peft_config=None,
        formatting_func=None,
    ):
        self._formatting_func, self.compute_loss_func = formatting_func, compute_loss_func
        self._collator_given = data_collator is not None and not isinstance(data_collator, TokenCollator)
        super().__init__(**passed_on(locals(), "formatting_func"))
        self._check_flat()

    # Set-up

    def check(self, sample: dict) -> None:
        """Refuse settings that contradict each other or the data; see whether completions are scored alone."""
        args = self.args
        if args.assistant_only_loss and not is_conversational(sample):
            raise ValueError(
                "`assistant_only_loss=True`, but the dataset is not conversational: its rows have "
                f"{sorted(sample)}. Give it `messages` (or prompt and completion as messages), or unset the field."
            )
        if self._collator_given and (args.padding_free or self._keeps_apart):
            raise ValueError(
                "A `data_collator` cannot be combined with `padding_free=True` or with packing ('bfd', 'bfd_split'): "
                "it would not keep the sequences of a row apart. Leave it out, or set `packing_strategy='wrapped'`."
            )
        if args.loss_type == "dft" and self.compute_loss_func is not None:
            raise ValueError("`compute_loss_func` cannot be combined with `loss_type='dft'`: use one of the two.")
        if self.compute_loss_func is not None:
            warnings.warn(
                "`compute_loss_func` needs full logits, so each step runs a second forward pass for the metrics. "
                "Overriding `compute_loss` avoids it.",
                FutureWarning,
                stacklevel=4,
            )
        has_completion = "prompt" in sample and "completion" in sample and self._formatting_func is None
        self._completion_only = has_completion if args.completion_only_loss is None else args.completion_only_loss

    def adapt(self) -> None:
        """Settle the end token and the chat template, and the template that marks the assistant's tokens."""
        set_eos_token(self.loaded, self.args.eos_token)
        set_chat_template(self.loaded, self.args.chat_template_path)
        self._chat_template = None
        if self.args.assistant_only_loss:
            processing_class = self.loaded.processing_class
            own = processing_class.chat_template
            if own is None or not has_generation_markers(own):
                self._chat_template = get_training_chat_template(processing_class)
            if not is_chat_template_stop_token_trained(processing_class, chat_template=self._chat_template):
                logger.warning(
                    "The chat template leaves the token that ends the assistant's turn out of `{% generation %}`, so "
                    "the model may not learn to stop. Move it inside, or set `assistant_only_loss=False`."
                )

    @property
    def _keeps_apart(self) -> bool:
        """Whether rows are packed that hold several sequences."""
        return bool(self.args.packing or self.args.eval_packing) and self.args.packing_strategy != "wrapped"

    def _check_flat(self) -> None:
        args, policy = self.args, self.policy
        if policy.flat:
            return
        if args.padding_free:
            raise ValueError(f"`padding_free=True`, but this model needs padded rows: {policy.reason}.")
        if self._keeps_apart:
            raise ValueError(
                f"Packing with {args.packing_strategy!r} puts several sequences into a row, but this model cannot "
                "keep "
                f"them apart: {policy.reason}. Set `packing=False`, or `packing_strategy='wrapped'`, which lets them "
                "mix."
            )

    # Data

    def prepare_dataset(self, dataset, name: str, training: bool):
        """Raw rows -> rows of `input_ids`, `labels` (and `seq_lengths` when packed)."""
        args = self.args
        columns = set(dataset.column_names or next(iter(dataset), {}))
        if self.has_images or "seq_lengths" in columns:
            return dataset  # images are processed batch by batch; packed rows are ready
        if args.skip_preparation:
            unlabelled = "labels" not in columns and columns & {"completion_mask", "assistant_masks"}
            if unlabelled and (args.remove_unused_columns or not self._collator_given):
                raise ValueError(
                    f"The {name} dataset has mask columns but no 'labels', and `skip_prepare_dataset=True` skips "
                    "making them, so every token would be scored. Add 'labels' (-100 where not scored) or drop "
                    "`skip_prepare_dataset`."
                )
            return dataset
        packing = args.packing if training or args.eval_packing is None else args.eval_packing
        dataset = prepare_sft_dataset(
            dataset,
            self.loaded.processing_class,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            completion_only_loss=self._completion_only,
            assistant_only_loss=args.assistant_only_loss,
            formatting_func=self._formatting_func,
            dataset_text_field=args.dataset_text_field,
            chat_template=self._chat_template,
            num_proc=args.dataset_num_proc,
            packing=packing,
            name=name,
        )
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        if packing:
            assert args.max_length is not None  # the config saw to it
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
            dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        return dataset

    def make_collator(self):
        """Flat or padded token batches; rows with images go through the processor."""
        args = self.args
        if self.has_images:
            return VisionCollator(
                self.processing_class,
                max_length=args.max_length,
                completion_only_loss=self._completion_only,
                assistant_only_loss=args.assistant_only_loss,
                pad_to_multiple_of=args.padding_multiple,
                text_field=args.dataset_text_field,
                chat_template=self._chat_template,
            )
        return TokenCollator(
            pad_token_id=cast(int, self.loaded.tokenizer.pad_token_id),
            flat=self.policy.flat,
            vocab_size=self.model.get_input_embeddings().weight.shape[0],
            pad_to_multiple_of=args.padding_multiple,
        )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            text = ["input_ids", "labels", "seq_lengths", "attention_mask"]
            vision = ["messages", "prompt", "completion", *IMAGE_COLUMNS, self.args.dataset_text_field]
            self._signature_columns = vision if self.has_images else text

    # Loss

    def compute_loss(self, model, inputs: TokenBatch, return_outputs: bool = False, num_items_in_batch=None):
        """Token losses summed over `num_items_in_batch` (unset: this batch's scored tokens), plus the router's."""
        self.check_lengths(inputs)
        norm = inputs.num_scored if num_items_in_batch is None else num_items_in_batch
        norm = norm.clamp(min=1) if isinstance(norm, Tensor) else max(norm, 1)
        router, outputs = self.router_inputs(), None
        if self.compute_loss_func is not None:
            outputs = logits_forward(model, inputs, **router)
            aux_loss = outputs.get("aux_loss")
            loss = self.compute_loss_func(outputs, labels_of(inputs), num_items_in_batch=num_items_in_batch)
            scored = token_stats(model, inputs, outputs=("logp", "entropy", "top1"))
        else:
            smoothed = ("mean_logp",) if self.args.label_smoothing_factor > 0 else ()
            wanted = ("logp", "entropy", "top1", *smoothed)
            scored = token_loss(model, inputs, self._loss_of_chunk(inputs, norm), outputs=wanted, **router)
            loss, aux_loss = cast(Tensor, scored.loss), scored.aux_loss
        loss = self.over_ranks(loss, num_items_in_batch)
        loss = self.with_router_loss(loss, aux_loss, num_items_in_batch)
        for name, values in {"entropy": scored.stats.entropy, "mean_token_accuracy": scored.stats.top1}.items():
            self.metrics.mean(name, cast(Tensor, values).sum(), inputs.num_scored)
        self.metrics.tokens(inputs.num_tokens)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, outputs or logits_forward(model, inputs, **router)

    def _loss_of_chunk(self, batch: TokenBatch, norm: Tensor | int):
        smoothing, dynamic = self.args.label_smoothing_factor, self.args.loss_type == "dft"

        def loss_of_chunk(stats, span: slice) -> Tensor:
            if smoothing > 0:
                per_token = smoothed_nll(stats.logp, stats.mean_logp, smoothing)
            else:
                per_token = dft(stats.logp) if dynamic else nll(stats.logp)
            return (per_token * batch.weight[span]).sum() / norm

        return loss_of_chunk
