"""TPO: preferences and the likelihood of a gold answer, from triples of answers to a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from ..config import AlignConfig, arg
from ..data.batch import TokenBatch
from ..given_data import GivenDataTrainer, passed_on
from ..pairs import OUTPUTS, PairArgs, answer_collator, prepare_answers, with_outputs
from ..reference_free import answer_step, check_loss, check_model

ANSWERS = ("chosen", "rejected", "reference")
LOSS_TYPES = ("sigmoid", "hinge", "ipo", "tpo-l")


@dataclass
class TPOConfig(PairArgs, AlignConfig):
    """Settings of TPOTrainer: `transformers.TrainingArguments`, the shared groups, and those below."""

    _VALID_DICT_FIELDS = [*AlignConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = arg(5e-7, "Initial learning rate.")
    loss_type: str = arg(
        "sigmoid",
        "'sigmoid' (TPO, arXiv:2405.16681), 'hinge' (SLiC, arXiv:2305.10425), 'ipo' (arXiv:2310.12036) or 'tpo-l' "
        "(TPO on means over tokens, with a target margin).",
        choices=list(LOSS_TYPES),
    )
    beta: float = arg(0.01, "Factor of the margin between the answers' log-probabilities; 'ipo': its tau.")
    label_smoothing: float = arg(0.0, "Share of preferences taken to be flipped ('sigmoid', 'tpo-l').")
    tpo_alpha: float = arg(
        1.0, "Weight of the mean negative log-likelihood of the gold answers; 0: they are not run through the model."
    )
    tpo_l_gamma: float = arg(0.5, "Margin of rewards that 'tpo-l' aims at.")

    def __post_init__(self):
        super().__post_init__()
        self.check_pair_args()
        check_loss(self, LOSS_TYPES)


class TPOTrainer(GivenDataTrainer):
    """TPO on triples of answers to a `prompt`: `chosen`, `rejected` and the gold answer `reference`.

    Takes texts, messages and token ids. Arguments, defaults, data rules and metrics are those of TRL's trainer.
    """

    config_class = TPOConfig
    _name = "TPO"
    _tag_names = ["fastalign", "tpo"]
    args: TPOConfig
    loss_is_normalized = False

    def __init__(
        self,
        model,
        args: TPOConfig | TrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        peft_config=None,
        quantization_config=None,
    ):
        super().__init__(**passed_on(locals()))

    def check(self, sample: dict) -> None:
        """Refuse models with an encoder."""
        check_model(self)

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers that are run through the model."""
        return ANSWERS if self.args.tpo_alpha else ANSWERS[:2]

    def prepare_dataset(self, dataset, name: str, training: bool):
        """Raw rows -> rows of ids."""
        return prepare_answers(self, dataset, name, ANSWERS)

    def make_collator(self):
        """Triples of answers, flat or padded, that share their prompt where it pays."""
        return answer_collator(self)

    def compute_loss(self, model, inputs: TokenBatch, return_outputs: bool = False, num_items_in_batch=None):
        """Mean over the pairs plus `tpo_alpha` times the mean NLL of the gold answers' tokens."""
        args = self.args
        loss, _ = answer_step(
            self,
            model,
            inputs,
            "tpo",
            per_pair=len(self.answers),
            outputs=OUTPUTS,
            nll_alpha=args.tpo_alpha,
            loss_type=args.loss_type,
            beta=args.beta,
            label_smoothing=args.label_smoothing,
            tpo_l_gamma=args.tpo_l_gamma,
        )
        return with_outputs(model, inputs, loss, return_outputs)
