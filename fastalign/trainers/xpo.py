"""XPO: a completion of the policy against one of the reference, with a bonus for leaving what the reference says."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from ..config import AlignConfig, arg
from ..given_data import as_config
from ..models import model_name
from ..rollout.generation import GenerationBatch
from ..rollout.group_batches import GroupBatch
from ..rollout.loader import Step
from ..rollout.opponents import ReferenceEngine
from ..rollout.rewards import RewardPool
from ..sampled_data import SampledDataTrainer
from ..sampled_pairs import (
    SampledPairArgs,
    add_opponent,
    check_arguments,
    check_per_epoch,
    check_sharding,
    judged,
    mean_weights,
    of_epoch,
    own_tokens,
    pair_scores,
    rank_pairs,
    record_known,
    record_pairs,
    run_pairs,
    shorten_prompts,
)


@dataclass
class XPOConfig(SampledPairArgs, AlignConfig):
    """Settings of XPOTrainer: `transformers.TrainingArguments`, the shared groups, and the bonus."""

    _VALID_DICT_FIELDS = [
        *AlignConfig._VALID_DICT_FIELDS,
        *("model_init_kwargs", "generation_kwargs", "chat_template_kwargs", "transformers_continuous_batching_config"),
    ]

    alpha: list[float] = arg(factory=lambda: [1e-5], help="Weight of the bonus; several: one for each epoch.")

    def __post_init__(self):
        super().__post_init__()
        self.check_pair_args()
        check_per_epoch(self, "alpha")


class XPOTrainer(SampledDataTrainer):
    """XPO (arXiv:2405.21046) for a causal language model, given by name, as an object, or with adapters.

    Takes `prompt` (text or messages); all other columns go to the reward functions. Arguments, defaults and metrics
    are those of TRL 1.10's trainer; batch sizes count prompts. Reward models without an entry in
    `reward_processing_classes` read the policy's tokens. The embedded engine samples the reference. As in TRL,
    logps/chosen and logps/rejected are log-probabilities under the policy plus those under the reference.
    """

    config_class = XPOConfig
    rows_of_one = learned_of_one = 2
    loss_temperature = 1.0  # pyright: ignore[reportAssignmentType] (constant)
    _name = "XPO"
    _tag_names = ["fastalign", "xpo"]
    args: XPOConfig

    def __init__(
        self,
        model,
        ref_model=None,
        reward_funcs=None,
        args: XPOConfig | TrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        peft_config=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        preprocess_logits_for_metrics=None,
        quantization_config=None,
        judge=None,
    ):
        check_arguments(self, data_collator, compute_metrics, preprocess_logits_for_metrics)
        config = as_config(args, self.config_class, f"{model_name(model).split('/')[-1]}-XPO")
        self.has_judge = judge is not None
        super().__init__(
            model,
            judged(reward_funcs, judge, config),
            config,
            train_dataset,
            eval_dataset,
            processing_class,
            reward_processing_classes,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
            ref_model=ref_model,
        )
        check_sharding(self)
        options = {"autocast": self.accelerator.autocast, "seed": self.args.seed}
        add_opponent(self, ReferenceEngine(self.reference, self.model, **options))

    def needs_reference(self) -> bool:
        """Always."""
        return True

    def make_rewards(self, reward_funcs, processing_classes) -> RewardPool:
        """Reward models read the sampled ids, where they have no tokenizer of their own."""
        return own_tokens(self, reward_funcs, processing_classes, super().make_rewards)

    def score_ahead(self, batch: GenerationBatch) -> None:
        """The reference's log-probabilities, of prompts that are short enough."""
        shorten_prompts(batch, self.args.max_length)
        super().score_ahead(batch)

    def score(self, batch: GenerationBatch) -> None:
        """Which of policy and reference has the better completion."""
        scores, ended = pair_scores(self, batch)
        rank_pairs(batch, scores)
        for place, name in enumerate(("model", "ref")):
            self.metrics.mean(f"val/{name}_contain_eos_token", ended[:, place].sum(), len(ended))
            if not self.has_judge:
                record_known(self.metrics, f"objective/{name}_scores", scores[:, place])
        if not self.has_judge:
            record_known(self.metrics, "objective/scores_margin", scores[:, 0] - scores[:, 1])

    def weights(self, step: Step) -> list[list[float]]:
        """The mean over a micro-batch's pairs, averaged over the micro-batches."""
        return mean_weights(step)

    def compute_loss(self, model, inputs: GroupBatch, return_outputs: bool = False, num_items_in_batch=None):
        """This batch's part of the step's loss."""
        if return_outputs:
            raise ValueError(f"{type(self).__name__} does not return outputs of its model.")
        alpha = of_epoch(self.args.alpha, self.state.epoch)
        found = run_pairs(self, model, inputs, alpha=alpha)
        bonus = alpha * found.logps[:, 1]
        chosen, rejected = found.ordered(found.logps + found.ref_logps)
        values = {"logps/chosen": chosen, "logps/rejected": rejected}
        record_pairs(self, inputs, found, values | {"loss/dpo": found.losses - bonus, "loss/xpo": bonus})
        if inputs.is_last:
            self.metrics.mean("alpha", alpha)
        return found.loss
