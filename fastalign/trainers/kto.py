"""Kahneman-Tversky optimisation: single answers that are judged good or bad, compared with a frozen reference."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments

from ..config import AlignConfig, arg
from ..config_groups import one_of
from ..data.batch import TokenBatch
from ..data.preferences import rotate_completions
from ..free_tokens import teach_layers
from ..given_data import GivenDataTrainer, passed_on
from ..pairs import PairArgs, with_outputs
from ..policy import PolicyInfo
from ..reference import ReferenceArgs
from ..unpaired import adapt_judged, judged_collator, prepare_judged, record_unpaired, unpaired_loss

logger = logging.getLogger(__name__)


@dataclass
class KTOConfig(ReferenceArgs, PairArgs, AlignConfig):
    """Settings of KTOTrainer: `transformers.TrainingArguments`, the shared groups, and those below."""

    _VALID_DICT_FIELDS = [*AlignConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = arg(1e-6, "Initial learning rate.")
    train_sampling_strategy: str = arg(
        "sequential",
        "Order of the rows: 'kto' needs 'sequential', because mismatched answers come from the rows of a batch.",
        choices=["random", "sequential", "group_by_length"],
    )
    loss_type: str = arg(
        "kto",
        "'kto' (arXiv:2402.01306) or 'apo_zero_unpaired' (arXiv:2408.06266, without mismatched answers).",
        choices=["kto", "apo_zero_unpaired"],
    )
    beta: float = arg(0.1, "How strongly the policy is held at the reference.")
    desirable_weight: float = arg(1.0, "Factor of the losses of good answers.")
    undesirable_weight: float = arg(1.0, "Factor of the losses of bad answers.")

    def __post_init__(self):
        super().__post_init__()
        self.check_pair_args()
        self.check_reference_args()
        one_of(self, "loss_type", ("kto", "apo_zero_unpaired"))

    @property
    def estimates_kl(self) -> bool:
        """Whether the loss needs answers to other prompts."""
        return self.loss_type == "kto"


class KTOTrainer(GivenDataTrainer):
    """KTO and APO-zero for a causal language model, given by name, as an object, or with adapters.

    Takes `prompt`, `completion` and `label` (true: good), or pairs (`chosen` is good, `rejected` bad), as texts,
    messages or token ids; the former also with images. Arguments, defaults and metrics are those of TRL's trainer.
    With the loss "kto" each answer of every `per_device_train_batch_size` rows is also scored behind the prompt of the
    next row; the policy does so in the forward of the loss, without a gradient.
    """

    config_class = KTOConfig
    loss_is_normalized = False
    takes_images = True
    _name = "KTO"
    _tag_names = ["fastalign", "kto"]
    args: KTOConfig
    row_columns = ("label",)

    def __init__(
        self,
        model,
        ref_model=None,
        args: KTOConfig | TrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
    ):
        super().__init__(**passed_on(locals()))

    def check(self, sample: dict) -> None:
        """Refuse batches that mismatched answers cannot be formed in."""
        args = self.args
        if not args.estimates_kl:
            return
        if args.train_sampling_strategy != "sequential":
            raise ValueError(
                f"`loss_type={args.loss_type!r}` needs `train_sampling_strategy='sequential'`, as mismatched answers "
                f"come from the rows of a batch; found {args.train_sampling_strategy!r}. Shuffle the dataset instead, "
                "or use `loss_type='apo_zero_unpaired'`."
            )
        if args.per_device_train_batch_size <= 1:
            raise ValueError(
                f"`per_device_train_batch_size` is {args.per_device_train_batch_size}; `loss_type='kto'` needs at "
                "least 2: alone, an answer would be its own mismatched one, and the KL term its own reward."
            )
        if self.has_images and args.token_budget is not None:
            raise ValueError(
                "`token_budget` may leave a row of a vision dataset alone in its batch, where mismatched answers come "
                "from; unset it, or use `loss_type='apo_zero_unpaired'`."
            )

    # Data

    def prepare_dataset(self, dataset, name: str, training: bool):
        """Raw rows -> `prompt_ids`, `completion_ids`, `label` and, for the KL term, `kl_completion_ids`.

        Rows with images stay as they are, and their batches get the mismatched answers.
        """
        args = self.args
        dataset = prepare_judged(self, dataset, name)
        if training and isinstance(dataset, Dataset):
            _check_weights(np.asarray(dataset.select_columns(["label"]).with_format("numpy")["label"]), args)
            if args.estimates_kl and not args.dataloader_drop_last:
                _check_last_batch(len(dataset), args.per_device_train_batch_size)
        if not args.estimates_kl or self.has_images:
            return dataset
        return rotate_completions(dataset, args.per_device_train_batch_size)

    @property
    def answers(self) -> tuple[str, ...]:
        """The columns of answers that a row has, without "_ids"."""
        return ("completion", "kl_completion") if self.args.estimates_kl else ("completion",)

    @property
    def predicts_answer_by_answer(self) -> bool:
        """Whether the rows of a batch are all judged answers, then all mismatched ones."""
        return self.has_images

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """The reference's log-probabilities of these answers."""
        return ("ref_logps", "ref_kl_logps")[: len(self.answers)]

    def prepare_model(self) -> PolicyInfo:
        """Flat batches where the model takes them, in which mismatched answers need no gradient."""
        info = super().prepare_model()
        if info.flat and self.args.estimates_kl:
            teach_layers(self.model)
        return info

    def make_collator(self):
        """Batches in which the mismatched answers share the prompts, and need no gradient."""
        return judged_collator(self)

    def adapt_collator(self, given):
        """A user's collator of judged answers."""
        return adapt_judged(self, given)

    # Loss

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        return self._sum_over_ranks(value[None])[0] / self.world if self.world > 1 else value

    def compute_loss(self, model, inputs: TokenBatch, return_outputs: bool = False, num_items_in_batch=None):
        """The mean over the batch's answers of their weighted losses, plus the router's."""
        assert self.reference is not None
        self.check_lengths(inputs)
        args = self.args
        found = unpaired_loss(
            model,
            inputs,
            self.reference.logps(model, inputs),
            mean_over_ranks=self._mean_over_ranks,
            router=self.router_inputs(),
            loss_type=args.loss_type,
            beta=args.beta,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
        )
        loss = self.with_router_loss(found.loss, found.aux_loss, None)
        self.metrics.mean("kl", 0.0 if found.result.baseline is None else found.result.baseline)
        record_unpaired(self, inputs, found.result)
        return with_outputs(model, inputs, loss, return_outputs)


def _check_last_batch(num_rows: int, batch_size: int) -> None:
    """Warn where it has one row."""
    if num_rows % batch_size == 1:
        logger.warning(
            "The last batch of %d rows with `per_device_train_batch_size=%d` has one row, whose mismatched answer is "
            "its own: there the KL term is its own reward. Set `dataloader_drop_last=True`, or another batch size.",
            num_rows,
            batch_size,
        )


def _check_weights(labels: np.ndarray, args: KTOConfig) -> None:
    """Warn where the weights do not make up for unequal numbers of labels, arXiv:2402.01306 Eq. 8."""
    good = int(labels.sum())
    bad = len(labels) - good
    if good == bad:
        return
    if not good or not bad:
        logger.warning(
            "All %d answers are %s, and no weight makes up for it: add answers of the other kind.",
            len(labels),
            "desirable" if good else "undesirable",
        )
        return
    ratio = args.desirable_weight * good / (args.undesirable_weight * bad) if args.undesirable_weight else np.inf
    if not 1 <= round(ratio, 2) <= 1.33:
        low, high = (round(args.undesirable_weight * bad / good * factor, 2) for factor in (1, 1.33))
        least, most = (round(args.desirable_weight * good / bad / factor, 2) for factor in (1.33, 1))
        logger.warning(
            "%d answers are desirable, %d are not, and the weights do not make up for it: set either "
            "`desirable_weight` to %s..%s or `undesirable_weight` to %s..%s.",
            good,
            bad,
            low,
            high,
            least,
            most,
        )
