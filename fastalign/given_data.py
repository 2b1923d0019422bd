"""The base of trainers that learn from a dataset they are given: from constructor arguments to batches and back."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import TrainingArguments, set_seed

from .adapters import add_adapter, for_task
from .config import AlignConfig
from .config_groups import LengthArgs
from .data.batch import TokenBatch
from .data.dict_batches import BatchAdapter
from .data.examine import examine
from .data.formats import first_row, has_images
from .loop import Trainer
from .loop.selective import enable_selective_checkpointing
from .models import LoadedModel, model_name, position_limit, resolve_model, router_loss_coefficient, set_pad_token
from .pairs import PairAdapter, disable_dropout, group_lengths
from .policy import PolicyInfo, prepare_policy, token_stats, unwrap
from .policy_check import teach_reading
from .reference import Reference

WITHOUT_IMAGES = ("packing", "padding_free", "share_prefix", "precompute_ref_log_probs")
IMAGE_COLUMNS = ("image", "images", "tools", "chat_template_kwargs")  # of rows that are read batch by batch


class GivenDataTrainer(Trainer):
    """Loads the model, prepares the data, chooses the batches; an algorithm adds what is its own.

    Algorithms set `config_class` and override `check` (refuse what does not fit together), `adapt` (tokenizer and
    template, before adapters), `prepare_dataset`, `make_collator` and `compute_loss`. A constructor of theirs says
    what it takes and hands it on (`passed_on`).
    """

    config_class: type[AlignConfig]  # with the fields of LoadArgs and RowArgs
    model_kind: Any = None  # auto class of models with another head than a language model's
    num_labels: int | None = None  # of such a model, where it is loaded by name
    task: str | None = None  # PEFT's name of what such a model does
    takes_images = False
    answers: Any = ()  # of data that are prompts with answers: the columns of these, without "_ids"
    row_columns: tuple[str, ...] = ()  # such rows' further columns,
    reference_columns: Any = ()  # and those that a frozen reference fills, where the algorithm compares with one
    reference: Reference | None = None
    args: Any
    _name = ""
    _tag_names: list[str] = []

    def __init__(
        self,
        model=None,
        args: AlignConfig | TrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        quantization_config=None,
        peft_config=None,
        *,
        model_init=None,
        ref_model=None,
        **loop_arguments,
    ):
        model = model_init() if model is None and model_init is not None else model
        _check_kinds(model, train_dataset, eval_dataset)
        config: Any = as_config(args, self.config_class, f"{model_name(model).split('/')[-1]}-{self._name}")
        self.args = config
        sample = first_row(cast(Any, train_dataset), "train")
        if isinstance(train_dataset, IterableDataset):
            config.accelerator_config.dispatch_batches = False  # batches of ranks differ in length
        set_seed(config.seed)  # adapters start from random weights
        self.loaded = loaded = resolve_model(
            model, config, quantization_config, processing_class, self.model_kind, self.num_labels
        )
        self.longest = position_limit(loaded.model)
        self.has_images = has_images(sample)
        if self.has_images:
            self._check_images(sample)
        reentrant = (config.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if loaded.is_vision and config.ddp_find_unused_parameters is None and not reentrant:
            config.ddp_find_unused_parameters = True  # a batch without images gives the vision tower no gradient
        self.check(sample)
        self.adapt()
        add_adapter(loaded, peft_config if self.task is None else for_task(peft_config, self.task), config)
        has_router = hasattr(config, "router_aux_loss_coef")
        self.router_coefficient = (
            router_loss_coefficient(loaded.model, config.router_aux_loss_coef) if has_router else 0.0
        )
        if data_collator is None:
            set_pad_token(loaded, config.pad_token)
        if config.selective_checkpointing:
            enable_selective_checkpointing(loaded.model)
        super().__init__(
            model=loaded.model,
            args=config,
            train_dataset=self._prepared(train_dataset, "train", training=True),
            eval_dataset=self._prepared(eval_dataset, "eval", training=False),
            processing_class=loaded.processing_class,
            **loop_arguments,
        )
        cut_at = config.max_length if isinstance(config, LengthArgs) else None
        self.health.of_data = examine(self.train_dataset, cut_at)
        self.policy = self.prepare_model()
        if getattr(config, "disable_dropout", False):
            disable_dropout(self.model)
        own = data_collator is None
        self.data_collator = self.make_collator() if own else self.adapt_collator(data_collator)
        self.model.add_model_tags(self._tag_names)
        if self.reference_columns:
            self.reference = Reference.make(
                self,
                ref_model,
                self.reference_columns,
                has_new_adapter=peft_config is not None,
                quantization_config=quantization_config,
            )

    loaded: LoadedModel

    @property
    def ref_model(self):
        """The second model, None where there is none."""
        return None if self.reference is None else self.reference.model

    def _check_images(self, sample: dict) -> None:
        """ValueError for what images, which are read batch by batch, do not go together with."""
        args, kind = self.args, type(self).__name__
        if not self.takes_images:
            raise ValueError(
                f"The dataset has images, which {kind} does not take: drop the columns 'image' or 'images'."
            )
        if not self.loaded.is_vision:
            raise ValueError(
                "The dataset has images ('image' or 'images'), but the model's processing class is a plain tokenizer. "
                "Use a vision-language model, or drop the image columns."
            )
        for name in WITHOUT_IMAGES:
            if getattr(args, name, None):
                raise ValueError(f"`{name}=True` is not supported for vision datasets; set it to False.")
        if getattr(args, "bad_rows", "keep") != "keep":
            raise ValueError(
                f"`bad_rows={args.bad_rows!r}` is not supported for vision datasets, whose rows nobody reads before "
                "they are trained on; set it to 'keep' and filter the dataset."
            )
        if args.max_length is not None and args.truncation_mode == "keep_end":
            raise ValueError(
                "`truncation_mode='keep_end'` is not supported for vision datasets: it could drop image tokens and "
                "keep their pixels. Use 'keep_start' or `max_length=None`."
            )
        by_length = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        if (by_length or args.token_budget is not None) and args.length_column_name not in sample:
            raise ValueError(
                "`token_budget` and sampling by length need the length of every row, which rows with images do not "
                f"have before they are processed: add a column {args.length_column_name!r} with their tokens, or "
                "leave these fields out."
            )

    def check(self, sample: dict) -> None:
        """Raise ValueError where `self.args`, `self.loaded` and a row of the data contradict each other."""

    def adapt(self) -> None:
        """Change `self.loaded` before adapters are put on (tokens, chat template)."""

    def prepare_model(self) -> PolicyInfo:
        """Teach the model to score, and see whether it takes flat batches."""
        info = prepare_policy(self.model, allow_flat=not self.has_images)
        if self.answers and info.flat:
            teach_reading(self.model, unwrap(self.model), lambda batch: token_stats(self.model, batch).stats.logp)
        return info

    def prepare_dataset(self, dataset, name: str, training: bool):
        """Raw rows -> the rows that the collator takes; `name` is what progress and errors call the dataset."""
        raise NotImplementedError

    def make_collator(self):
        """The collator of this algorithm's batches (`self.policy` says flat or padded)."""
        raise NotImplementedError

    def adapt_collator(self, given) -> Any:
        """The collator that a user gave, made to return batches."""
        if self.answers:
            return PairAdapter(given, flat=self.policy.flat, num_answers=len(self.answers), images=self.has_images)
        return BatchAdapter(given, flat=self.policy.flat)

    def example_lengths(self, dataset) -> np.ndarray:
        """Tokens that each row takes in a batch, (rows,) int64."""
        if not self.answers or self.args.length_column_name in dataset.column_names:
            return super().example_lengths(dataset)
        share = getattr(self.data_collator, "share", False)
        limits = self.args if isinstance(self.args, LengthArgs) else None
        return group_lengths(dataset, self.answers, flat=self.policy.flat, share=share, limits=limits)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None and self.answers:
            names = ("prompt", *self.answers)
            taken = [*names, *IMAGE_COLUMNS] if self.has_images else [f"{name}_ids" for name in names]
            self._signature_columns = [*taken, *self.row_columns, *self.reference_columns]
        super()._set_signature_columns_if_needed()

    def _prepared(self, dataset, name: str, training: bool):
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {key: self._prepared(part, key, training) for key, part in dataset.items()}
        with PartialState().main_process_first():
            dataset = self.prepare_dataset(dataset, name, training)
        return dataset if self.reference is None else self.reference.complete(dataset, name)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate; a dataset given here is prepared like the one given to the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):  # the loop takes a dict apart
            _check_dataset("eval_dataset", eval_dataset)
            eval_dataset = self._prepared(eval_dataset, metric_key_prefix, training=False)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        """Predict; the dataset is prepared like the ones given to the constructor."""
        _check_dataset("test_dataset", test_dataset)
        return super().predict(
            self._prepared(test_dataset, metric_key_prefix, training=False), ignore_keys, metric_key_prefix
        )

    # What the losses of algorithms share

    def router_inputs(self) -> dict:
        """Arguments that make a mixture of experts return its balancing loss, where that is weighted."""
        return {"output_router_logits": True} if self.router_coefficient else {}

    def check_lengths(self, batch: TokenBatch) -> None:
        """ValueError for a sequence that is longer than the model's table of positions."""
        if self.longest is not None and batch.max_seqlen > self.longest:
            raise ValueError(
                f"A sequence has {batch.max_seqlen} tokens, but {type(self.model).__name__} has positions for "
                f"{self.longest}. Set `max_length` to at most that."
            )

    def over_ranks(self, loss: Tensor, num_items_in_batch) -> Tensor:
        """`loss` normalised by the tokens of all ranks, times their number, because gradients are averaged."""
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            return loss * self.accelerator.num_processes
        return loss

    def with_router_loss(self, loss: Tensor, aux_loss: Tensor | None, num_items_in_batch) -> Tensor:
        """`loss` plus the weighted balancing loss: a mean of each micro-batch, averaged over the step's."""
        if not self.router_coefficient or aux_loss is None:
            return loss
        self.metrics.mean("aux_loss", aux_loss.detach(), 1)
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return loss + self.router_coefficient * aux_loss / steps


def passed_on(arguments: dict[str, Any], *own: str) -> dict[str, Any]:
    """The arguments of a constructor, its `locals()`, without the object and without what is the constructor's own."""
    return {k: v for k, v in arguments.items() if k not in ("self", "__class__", *own)}


def as_config(args, config_class: type[AlignConfig], output_dir: str) -> AlignConfig:
    """`args` as a `config_class`: the default, itself, or made from plain TrainingArguments."""
    if args is None:
        return config_class(output_dir)
    if isinstance(args, config_class):
        return args
    return config_class(**(args.to_dict() | {"hub_token": args.hub_token}))  # to_dict hides the token


def _check_kinds(model, train_dataset, eval_dataset) -> None:
    if not isinstance(model, str) and not hasattr(model, "config"):
        raise TypeError(f"`model` must be a name, a PreTrainedModel or a PeftModel, got `{type(model).__name__}`.")
    if train_dataset is None:
        raise ValueError("`train_dataset` is required")
    _check_dataset("train_dataset", train_dataset)
    parts = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for part in parts:
        if eval_dataset is not None:
            _check_dataset("eval_dataset", part)


def _check_dataset(name: str, dataset) -> None:
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"`{name}` must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`.")
