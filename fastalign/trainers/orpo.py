"""ORPO: supervised fine-tuning on the chosen answer, with a penalty on the odds of the rejected one."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from fastalign_kernels.losses.odds import log_odds_ratio
from transformers import TrainingArguments

from ..config import AlignConfig, arg
from ..config_groups import CausalOnlyArgs
from ..data.batch import TokenBatch
from ..given_data import GivenDataTrainer, passed_on
from ..pairs import PairArgs, answer_collator, prepare_answers, with_outputs
from ..reference_free import answer_step, check_model

ANSWERS = ("chosen", "rejected")


@dataclass
class ORPOConfig(PairArgs, CausalOnlyArgs, AlignConfig):
    """Settings of ORPOTrainer: `transformers.TrainingArguments`, the shared groups, and those below."""

    _VALID_DICT_FIELDS = [*AlignConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = arg(1e-6, "Initial learning rate.")
    beta: float = arg(0.1, "Weight of the log odds ratio (lambda in arXiv:2403.07691).")
    padding_value: int | None = arg(None, "Token id that fills padded rows; unset: the tokenizer's pad token.")

    def __post_init__(self):
        super().__post_init__()
        self.check_pair_args()
        self.check_causal_only()


class ORPOTrainer(GivenDataTrainer):
    """ORPO (arXiv:2403.07691) on pairs of answers (`prompt`, `chosen`, `rejected`), texts, messages or token ids.

    Arguments, defaults, data rules and metrics are those of TRL's trainer; `model_init` makes the model where `model`
    is None. logits/* are means over the completions' tokens (TRL: over prompts and padding, too).
    """

    config_class = ORPOConfig
    _name = "ORPO"
    _tag_names = ["fastalign", "orpo"]
    args: ORPOConfig
    answers = ANSWERS
    loss_is_normalized = False

    def __init__(
        self,
        model=None,
        args: ORPOConfig | TrainingArguments | None = None,
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
        """Pairs of answers, flat or padded, sharing prompts where it pays; the NLL also scores chosen prompts."""
        collator = answer_collator(self, score_prompt=("chosen",))
        if self.args.padding_value is not None:
            collator.pad_token_id = self.args.padding_value
        return collator

    def compute_loss(self, model, inputs: TokenBatch, return_outputs: bool = False, num_items_in_batch=None):
        """Mean NLL of the chosen sequences' tokens, prompts included, minus `beta` times the mean log sigmoid."""
        loss, found = answer_step(self, model, inputs, "orpo", outputs=("mean_logit",), beta=self.args.beta)
        log_odds = log_odds_ratio(found.chosen_logps, found.rejected_logps)
        num_pairs = log_odds.numel()
        self.metrics.mean("nll_loss", 0.0 if found.nll is None else found.nll)
        self.metrics.mean("log_odds_ratio", F.logsigmoid(log_odds).sum(), num_pairs)  # TRL's names
        self.metrics.mean("log_odds_chosen", log_odds.sum(), num_pairs)
        return with_outputs(model, inputs, loss, return_outputs)
