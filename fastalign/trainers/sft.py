"""Supervised fine-tuning: next-token likelihood of texts, of completions, or of the assistant's turns."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from fastalign_kernels.losses.supervised import dft, nll, smoothed_nll
from torch import Tensor
from transformers import TrainingArguments, set_seed

from ..adapters import add_adapter
from ..config import AlignConfig, arg
from ..config_groups import LengthArgs, ModelArgs, one_of, renamed
from ..data.batch import TokenBatch
from ..data.chat import get_training_chat_template, has_generation_markers, is_chat_template_stop_token_trained
from ..data.collate import TokenCollator
from ..data.dict_batches import BatchAdapter
from ..data.formats import is_conversational
from ..data.packing import pack_dataset
from ..data.tokenize import prepare_sft_dataset
from ..data.vision import VisionCollator
from ..loop import Trainer
from ..loop.offload import offload_activations
from ..loop.selective import enable_selective_checkpointing
from ..models import (
    model_name,
    resolve_model,
    router_loss_coefficient,
    set_chat_template,
    set_eos_token,
    set_pad_token,
)
from ..policy import logits_forward, prepare_policy, token_loss, token_stats


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


class SFTTrainer(Trainer):
    """Supervised fine-tuning of a causal language model, given by name, as an object, or with adapters.

    Takes language-modelling (`text`, `messages`, `conversations`), prompt-completion and pre-tokenised data, standard
    or conversational, also with images; see docs/data.md. Arguments, defaults and metrics are those of TRL's trainer.
    """

    _tag_names = ["fastalign", "sft"]
    _name = "SFT"

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
        args = _as_config(args, model)
        _check_dataset(train_dataset)
        if isinstance(train_dataset, IterableDataset):
            args.accelerator_config.dispatch_batches = False
        set_seed(args.seed)  # adapters start from random weights
        loaded = resolve_model(model, args, quantization_config, processing_class)
        set_eos_token(loaded, args.eos_token)
        set_chat_template(loaded, args.chat_template_path)
        sample = _first_row(train_dataset)
        self._is_vision_data = "image" in sample or "images" in sample
        self._check_combination(args, loaded, sample, compute_loss_func, formatting_func)
        add_adapter(loaded, peft_config, args)
        self._formatting_func = formatting_func
        self._chat_template = _training_template(args, loaded.processing_class)
        self._completion_only = args.completion_only_loss
        if self._completion_only is None:
            self._completion_only = "prompt" in sample and "completion" in sample
        self._aux_coefficient = router_loss_coefficient(loaded.model, args.router_aux_loss_coef)
        if data_collator is None:
            set_pad_token(loaded, args.pad_token)
        if (args.gradient_checkpointing_kwargs or {}).get("selective"):
            enable_selective_checkpointing(loaded.model)
        self._skip_preparation = self._is_vision_data or (args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
        self._loaded = loaded
        self._reject_masks_without_labels({"train": train_dataset, **_named(eval_dataset)}, args, data_collator)
        super().__init__(
            model=loaded.model,
            args=args,
            train_dataset=self._prepared(train_dataset, args, args.packing, "train"),
            eval_dataset=self._prepared_eval(eval_dataset, args),
            processing_class=loaded.processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.policy = prepare_policy(self.model, allow_flat=not self._is_vision_data)
        if args.padding_free and not self.policy.flat:
            raise ValueError(f"`padding_free=True`, but this model needs padded rows: {self.policy.reason}.")
        self._check_packing_fits(args)
        self.data_collator = self._make_collator(data_collator)
        self.model.add_model_tags(self._tag_names)

    def _check_combination(self, args, loaded, sample, compute_loss_func, formatting_func) -> None:
        """Refuse settings that contradict each other or the data."""
        if self._is_vision_data:
            if not loaded.is_vision:
                raise ValueError(
                    "The dataset has images ('image' or 'images'), but the model's processing class is a plain "
                    "tokenizer. "
                    "Use a vision-language model, or drop the image columns."
                )
            for name, value in {"packing": args.packing, "padding_free": args.padding_free}.items():
                if value:
                    raise ValueError(f"`{name}=True` is not supported for vision datasets; set it to False.")
            if args.max_length is not None and args.truncation_mode == "keep_end":
                raise ValueError(
                    "`truncation_mode='keep_end'` is not supported for vision datasets: it could drop image tokens "
                    "and keep "
                    "their pixels. Use 'keep_start' or `max_length=None`."
                )
        if args.assistant_only_loss and not is_conversational(sample):
            raise ValueError(
                "`assistant_only_loss=True`, but the dataset is not conversational: its rows have "
                f"{sorted(sample)}. Give it `messages` (or prompt and completion as messages), or unset the field."
            )
        if args.loss_type == "dft" and compute_loss_func is not None:
            raise ValueError("`compute_loss_func` cannot be combined with `loss_type='dft'`: use one of the two.")
        if formatting_func is not None and args.completion_only_loss:
            raise ValueError(
                "`formatting_func` turns rows into plain text, which has no completion, so it cannot be combined with "
                "`completion_only_loss=True`. Format the dataset yourself, or unset one of the two."
            )
        if compute_loss_func is not None:
            warnings.warn(
                "`compute_loss_func` needs full logits, so each step runs a second forward pass for the metrics. "
                "Overriding "
                "`compute_loss` avoids it.",
                FutureWarning,
                stacklevel=3,
            )

    def _check_packing_fits(self, args) -> None:
        if (args.packing or args.eval_packing) and args.packing_strategy != "wrapped" and not self.policy.flat:
            raise ValueError(
                f"Packing with {args.packing_strategy!r} puts several sequences into a row, but this model cannot "
                "keep them "
                f"apart: {self.policy.reason}. Set `packing=False`, or `packing_strategy='wrapped'`, which lets them "
                "mix."
            )

    def _make_collator(self, data_collator):
        args = self.args
        if data_collator is not None:
            return BatchAdapter(data_collator, flat=self.policy.flat)
        if self._is_vision_data:
            return VisionCollator(
                self.processing_class,
                max_length=args.max_length,
                completion_only_loss=self._completion_only,
                assistant_only_loss=args.assistant_only_loss,
                pad_to_multiple_of=args.pad_to_multiple_of,
                text_field=args.dataset_text_field,
                chat_template=self._chat_template,
            )
        return TokenCollator(
            pad_token_id=self._loaded.tokenizer.pad_token_id,
            flat=self.policy.flat,
            vocab_size=self.model.get_input_embeddings().weight.shape[0],
            pad_to_multiple_of=args.pad_to_multiple_of,
        )

    # Data

    def _prepared(self, dataset, args, packing: bool, name: str):
        """Raw rows -> rows of `input_ids`, `labels` (and `seq_lengths` when packed)."""
        if self._skip_preparation or dataset is None or "seq_lengths" in (dataset.column_names or ()):
            return dataset  # packed rows are ready
        with PartialState().main_process_first():
            dataset = prepare_sft_dataset(
                dataset,
                self._loaded.processing_class,
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
            if packing:
                if args.shuffle_dataset:
                    dataset = dataset.shuffle(seed=args.seed)
                dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
        return dataset

    def _prepared_eval(self, dataset, args):
        packing = args.packing if args.eval_packing is None else args.eval_packing
        if isinstance(dataset, dict):
            return {name: self._prepared(part, args, packing, name) for name, part in dataset.items()}
        return self._prepared(dataset, args, packing, "eval")

    def _reject_masks_without_labels(self, datasets: dict, args, data_collator) -> None:
        if not self._skip_preparation or self._is_vision_data or data_collator is not None:
            return
        for name, dataset in datasets.items():
            columns = set(dataset.column_names or _first_row(dataset))
            if "labels" not in columns and columns & {"completion_mask", "assistant_masks"}:
                raise ValueError(
                    f"The {name} dataset has mask columns but no 'labels', and `skip_prepare_dataset=True` skips "
                    "making them, "
                    "so every token would be scored. Add 'labels' (-100 where not scored) or drop "
                    "`skip_prepare_dataset`."
                )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            text = ["input_ids", "labels", "seq_lengths", "attention_mask"]
            vision = ["messages", "prompt", "completion", "image", "images", "tools", "chat_template_kwargs"]
            self._signature_columns = vision if self._is_vision_data else text

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate; a dataset given here is prepared like the one given to the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            self._reject_masks_without_labels(_named(eval_dataset), self.args, None)
            eval_dataset = self._prepared_eval(eval_dataset, self.args)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    # Loss

    def activation_context(self):
        """Offload activations where asked."""
        return offload_activations(self.model) if self.args.activation_offloading else super().activation_context()

    def compute_loss(self, model, inputs: TokenBatch, return_outputs: bool = False, num_items_in_batch=None):
        """Sum of token losses over `num_items_in_batch` (unset: over this batch's scored tokens), plus balancing "
        "loss."""
        norm = inputs.num_scored if num_items_in_batch is None else num_items_in_batch
        norm = torch.as_tensor(norm, device=inputs.weight.device).clamp(min=1)
        router = {"output_router_logits": True} if self._aux_coefficient else {}
        outputs = None
        if self.compute_loss_func is not None:
            outputs = logits_forward(model, inputs, **router)
            loss = self.compute_loss_func(outputs, _labels(inputs), num_items_in_batch=num_items_in_batch)
            scored = token_stats(model, inputs, outputs=("logp", "entropy", "top1"), **router)
        else:
            scored = token_loss(
                model, inputs, self._loss_of_chunk(inputs, norm), outputs=self._head_outputs(), **router
            )
            loss = scored.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the tokens of all ranks are in `norm`, and DDP averages
        if self._aux_coefficient and self.compute_loss_func is None:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self._aux_coefficient * scored.aux_loss / steps
        self._record(inputs, scored)
        if return_outputs:
            with torch.no_grad():
                outputs = outputs or logits_forward(model, inputs, **router)
            return loss, outputs
        return loss

    def _head_outputs(self) -> tuple[str, ...]:
        smoothed = ("mean_logp",) if self.args.label_smoothing_factor > 0 else ()
        return ("logp", "entropy", "top1", *smoothed)

    def _loss_of_chunk(self, batch: TokenBatch, norm: Tensor):
        smoothing, dynamic = self.args.label_smoothing_factor, self.args.loss_type == "dft"

        def loss_of_chunk(stats, span: slice) -> Tensor:
            if smoothing > 0:
                per_token = smoothed_nll(stats.logp, stats.mean_logp, smoothing)
            else:
                per_token = dft(stats.logp) if dynamic else nll(stats.logp)
            return (per_token * batch.weight[span]).sum() / norm

        return loss_of_chunk

    def _record(self, batch: TokenBatch, scored) -> None:
        self.metrics.mean("entropy", scored.stats.entropy.sum(), batch.num_scored)
        self.metrics.mean("mean_token_accuracy", scored.stats.top1.sum(), batch.num_scored)
        self.metrics.tokens(batch.num_tokens)
        if self._aux_coefficient:
            self.metrics.mean("aux_loss", scored.aux_loss.detach(), 1)


def _labels(batch: TokenBatch) -> Tensor:
    """Labels as Transformers' losses expect them: shaped like `input_ids`, unshifted, -100 where not scored."""
    labels = torch.full((batch.input_ids.numel(),), -100, device=batch.targets.device)
    labels[batch.source + 1] = batch.targets
    return labels.view(batch.input_ids.shape if batch.is_padded else (1, -1))


def _as_config(args, model) -> SFTConfig:
    if args is None:
        return SFTConfig(f"{model_name(model).split('/')[-1] or type(model).__name__}-SFT")
    if isinstance(args, SFTConfig):
        return args
    values = args.to_dict() | {"hub_token": args.hub_token}  # to_dict hides the token
    return SFTConfig(**values)


def _check_dataset(dataset) -> None:
    if dataset is None:
        raise ValueError("`train_dataset` is required")
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"`train_dataset` must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`.")


def _first_row(dataset) -> dict:
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError("`train_dataset` is empty: there is nothing to train on.")
    return row


def _named(eval_dataset) -> dict:
    if eval_dataset is None or isinstance(eval_dataset, str):
        return {}
    return eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}


def _training_template(args, processing_class) -> str | None:
    """The template that marks the assistant's tokens, where the tokenizer's own does not; None where it does."""
    if not args.assistant_only_loss:
        return None
    template = None
    if not has_generation_markers(processing_class.chat_template):
        template = get_training_chat_template(processing_class)
    if not is_chat_template_stop_token_trained(processing_class, chat_template=template):
        warnings.warn(
            "The chat template leaves the token that ends the assistant's turn out of `{% generation %}`, so the "
            "model may "
            "not learn to stop. Move it inside, or set `assistant_only_loss=False`.",
            stacklevel=4,
        )
    return template
