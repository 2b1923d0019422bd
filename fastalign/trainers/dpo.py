"""Direct preference optimisation and its relatives: pairs of answers, compared with a frozen reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fastalign_kernels.losses.preference import COUPLE_PAIRS, PREFERENCE_LOSSES, check_preference_loss
from transformers import TrainingArguments

from ..config import AlignConfig, arg
from ..config_groups import one_of
from ..data.batch import TokenBatch
from ..data.pair_batches import AnswerCollator
from ..given_data import GivenDataTrainer, passed_on
from ..loop.health import watch_drift
from ..pairs import PairArgs, answer_collator, pair_loss, prepare_answers, record_pairs, with_outputs
from ..reference import ReferenceArgs
from ..reference_free import warn_of_smoothing

ANSWERS = ("chosen", "rejected")
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # losses in which preferences may be flipped
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass
class DPOConfig(ReferenceArgs, PairArgs, AlignConfig):
    """Settings of DPOTrainer: `transformers.TrainingArguments`, the shared groups, and those below."""

    _VALID_DICT_FIELDS = [*AlignConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = arg(1e-6, "Initial learning rate.")
    padding_free: bool = arg(
        False, "Require batches without padding: an error for a model that needs it (others never get any)."
    )
    loss_type: list[str] = arg(
        factory=lambda: ["sigmoid"], help=f"One loss, or several to add up: {', '.join(PREFERENCE_LOSSES)}."
    )
    loss_weights: list[float] | None = arg(None, "Weights of the losses (MPO, arXiv:2411.10442); unset: 1 each.")
    ld_alpha: float | None = arg(
        None, "Weight, 0 to 1, of the tokens beyond the shorter answer's length (LD-DPO, arXiv:2409.06411); unset: 1."
    )
    f_divergence_type: str = arg(
        "reverse_kl", "Divergence that keeps the policy at the reference (arXiv:2309.16240).", choices=[*DIVERGENCES]
    )
    f_alpha_divergence_coef: float = arg(0.5, "Order of the alpha divergence.")
    label_smoothing: float = arg(0.0, "Share of labels that are wrong, for 'robust', 'exo_pair', 'aot*'.")
    beta: float = arg(0.1, "How strongly the policy is held at the reference.")
    use_weighting: bool = arg(False, "Weight pairs by the policy's likelihood of them (WPO, arXiv:2406.11827).")
    discopop_tau: float = arg(0.05, "Temperature of 'discopop' (arXiv:2406.08414).")

    def __post_init__(self):
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        super().__post_init__()
        self.check_pair_args()
        self.check_reference_args()
        self._check_loss()

    def _check_loss(self) -> None:
        types = self.loss_type
        if not types or (self.loss_weights is not None and len(self.loss_weights) != len(types)):
            raise ValueError(
                f"`loss_weights` is {self.loss_weights}, `loss_type` {types}: give at least one loss, and a weight "
                "for each or none."
            )
        if self.discopop_tau <= 0:
            raise ValueError(f"`discopop_tau` is {self.discopop_tau}, which margins are divided by: give one above 0.")
        warn_of_smoothing(self.label_smoothing, types, SMOOTHED)
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"`ld_alpha` is {self.ld_alpha}; it must be from 0 to 1, or None for plain sums.")
        one_of(self, "f_divergence_type", DIVERGENCES)
        check_preference_loss(types, self.label_smoothing, self.f_divergence_type, self.use_weighting)
        if self.beta == 0 and (divided := sorted({"ipo", "sppo_hard"}.intersection(types))):
            raise ValueError(f"`beta` is 0, but {divided} aim at margins of 1 / (2 beta): give another number.")
        coupled = sorted(COUPLE_PAIRS.intersection(types))
        if coupled and self.token_budget is not None:
            raise ValueError(
                f"`token_budget` regroups the pairs of a step, and `loss_type={coupled}` sorts those of a "
                "micro-batch: unset it and use `per_device_train_batch_size`."
            )


class DPOTrainer(GivenDataTrainer):
    """DPO and its relatives for a causal language model, given by name, as an object, or with adapters.

    Takes `chosen` and `rejected` with or without `prompt`, as texts or messages, also with images, and rows that are
    tokenised (`prompt_ids`, `chosen_ids`, `rejected_ids`). Arguments, defaults and metrics are those of TRL's trainer.
    `ref_model` None: the model without its new adapter, a frozen copy of the adapter that is trained further, or the
    model as it is loaded from its name.
    """

    config_class = DPOConfig
    loss_is_normalized = False
    predicts_answer_by_answer = True
    takes_images = True
    _name = "DPO"
    _tag_names = ["fastalign", "dpo"]
    args: DPOConfig
    answers = ANSWERS
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(
        self,
        model,
        ref_model=None,
        args: DPOConfig | TrainingArguments | None = None,
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

    # Data

    def prepare_dataset(self, dataset, name: str, training: bool):
        """Raw rows -> `prompt_ids`, `chosen_ids`, `rejected_ids`; rows with images stay as they are."""
        return prepare_answers(self, dataset, name, ANSWERS)

    def make_collator(self) -> AnswerCollator:
        """Flat batches, with shared prompts where that saves work, or padded ones."""
        if self.args.padding_free and not self.policy.flat:
            raise ValueError(f"`padding_free=True`, but this model needs padded rows: {self.policy.reason}.")
        return answer_collator(self)

    # Loss

    def compute_loss(self, model, inputs: TokenBatch, return_outputs: bool = False, num_items_in_batch=None):
        """The mean over the batch's pairs of the losses, weighted, plus the router's."""
        assert self.reference is not None
        self.check_lengths(inputs)
        args, ref_logps = self.args, self.reference.logps(model, inputs, ld_alpha=self.args.ld_alpha)
        found = pair_loss(
            model,
            inputs,
            "dpo",
            router=self.router_inputs(),
            ref_logps=ref_logps,
            loss_type=args.loss_type,
            loss_weights=args.loss_weights,
            beta=args.beta,
            label_smoothing=args.label_smoothing,
            f_divergence_type=args.f_divergence_type,
            f_alpha_divergence_coef=args.f_alpha_divergence_coef,
            discopop_tau=args.discopop_tau,
            ld_alpha=args.ld_alpha,
            use_weighting=args.use_weighting,
        )
        loss = self.with_router_loss(found.loss, found.aux_loss, None)
        record_pairs(self.metrics, inputs, found.result)
        logps = torch.stack([found.result.chosen_logps, found.result.rejected_logps], 1).flatten()
        watch_drift(self.metrics, logps - ref_logps.to(logps.device), inputs.extras["lengths"])
        return with_outputs(model, inputs, loss, return_outputs)

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """(loss, logits, labels) of one batch, chosen rows before rejected ones, without gradients."""
        found: Any = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if inputs.by_answer:
            return found
        return found[0], *(rows if rows is None else torch.cat([rows[::2], rows[1::2]]) for rows in found[1:])
