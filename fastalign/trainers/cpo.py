"""Preference optimisation without a reference: CPO, SimPO and AlphaPO."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from ..config import AlignConfig, arg
from ..config_groups import CausalOnlyArgs
from ..data.batch import TokenBatch
from ..given_data import GivenDataTrainer, passed_on
from ..pairs import PairArgs, answer_collator, prepare_answers, with_outputs
from ..reference_free import answer_step, check_loss, check_model

ANSWERS = ("chosen", "rejected")
LOSS_TYPES = ("sigmoid", "hinge", "ipo", "simpo")


@dataclass
class CPOConfig(PairArgs, CausalOnlyArgs, AlignConfig):
    """Settings of CPOTrainer: `transformers.TrainingArguments`, the shared groups, and those below."""

    _VALID_DICT_FIELDS = [*AlignConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = arg(1e-6, "Initial learning rate.")
    beta: float = arg(0.1, "Factor of the margin between the answers' log-probabilities; 'ipo': its tau.")
    label_smoothing: float = arg(0.0, "Share of preferences taken to be flipped ('sigmoid', 'simpo').")
    loss_type: str = arg(
        "sigmoid",
        "'sigmoid' (CPO, arXiv:2401.08417), 'hinge' (SLiC, arXiv:2305.10425), 'ipo' (arXiv:2310.12036), 'simpo' "
        "(arXiv:2405.14734) or 'alphapo' (arXiv:2501.03884; sets loss_type='simpo' and cpo_alpha=0).",
        choices=[*LOSS_TYPES, "alphapo"],
    )
    cpo_alpha: float = arg(1.0, "Weight of the mean negative log-likelihood of the chosen completions; SimPO: 0.")
    simpo_gamma: float = arg(0.5, "Margin of rewards that 'simpo' aims at.")
    alpha: float = arg(0.0, "AlphaPO's shape of rewards, (1 - p^-alpha) / alpha, in any loss type; 0: log p.")

    def __post_init__(self):
        if self.loss_type == "alphapo":
            self.loss_type, self.cpo_alpha = "simpo", 0.0
        super().__post_init__()
        self.check_pair_args()
        self.check_causal_only()
        check_loss(self, LOSS_TYPES)


class CPOTrainer(GivenDataTrainer):
    """CPO and its relatives on pairs of answers (`prompt`, `chosen`, `rejected`), texts, messages or token ids.

    Arguments, defaults, data rules and metrics are those of TRL's trainer; `model_init` makes the model where `model`
    is None. logits/* are means over the completions' tokens (TRL: over prompts and padding, too).
    """

    config_class = CPOConfig
    _name = "CPO"
    _tag_names = ["fastalign", "cpo"]
    args: CPOConfig
    answers = ANSWERS
    loss_is_normalized = False

    def __init__(
        self,
        model=None,
        args: CPOConfig | TrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        model_init=None,
        callbacks=None,
        optimizers=(None, None),
        preprocess_logits_for_metrics=None,
        peft_config=None,
        compute_metrics=None,
        quantization_config=None,
    ):
        super().__init__(**passed_on(locals()))

    def check(self, sample: dict) -> None:
        """Refuse models with an encoder."""
        check_model(self)

    def prepare_dataset(self, dataset, name: str, training: bool):
        """Raw rows -> rows of ids; sequences start with BOS and end with EOS where the tokenizer has them."""
        return prepare_answers(self, dataset, name, ANSWERS, bos_and_eos=True)

    def make_collator(self):
        """Pairs of answers, flat or padded, that share their prompt where it pays."""
        return answer_collator(self)

    def compute_loss(self, model, inputs: TokenBatch, return_outputs: bool = False, num_items_in_batch=None):
        """Mean over the pairs plus `cpo_alpha` times the mean NLL of the chosen completions' tokens."""
        args = self.args
        loss, found = answer_step(
            self,
            model,
            inputs,
            "cpo",
            outputs=("mean_logit",),
            nll_alpha=args.cpo_alpha,
            loss_type=args.loss_type,
            beta=args.beta,
            label_smoothing=args.label_smoothing,
            simpo_gamma=args.simpo_gamma,
            alpha=args.alpha,
        )
        self.metrics.mean("nll_loss", 0.0 if found.nll is None else found.nll)
        return with_outputs(model, inputs, loss, return_outputs)
