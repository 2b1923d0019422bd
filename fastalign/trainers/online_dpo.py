"""Online DPO: two completions of each prompt, sampled from the policy itself, ranked, and learned from as a pair."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from ..config import AlignConfig
from ..given_data import as_config
from ..models import model_name
from ..rollout.generation import GenerationBatch
from ..rollout.group_batches import GroupBatch
from ..rollout.loader import Step
from ..sampled_data import SampledDataTrainer
from ..sampled_pairs import (
    SampledPairArgs,
    check_arguments,
    judged,
    mean_weights,
    of_epoch,
    pair_scores,
    rank_pairs,
    record_known,
    record_pairs,
    run_pairs,
    shorten_prompts,
)


@dataclass
class OnlineDPOConfig(SampledPairArgs, AlignConfig):
    """Settings of OnlineDPOTrainer: `transformers.TrainingArguments` and the shared groups."""

    _VALID_DICT_FIELDS = [
        *AlignConfig._VALID_DICT_FIELDS,
        *("model_init_kwargs", "generation_kwargs", "chat_template_kwargs", "transformers_continuous_batching_config"),
    ]

    def __post_init__(self):
        super().__post_init__()
        self.check_pair_args()


class OnlineDPOTrainer(SampledDataTrainer):
    """Online DPO (arXiv:2402.04792) for a causal language model, given by name, as an object, or with adapters.

    Takes `prompt` (text or messages); all other columns go to the reward functions. Arguments, defaults and metrics
    are those of TRL's trainer; batch sizes count prompts. The completion with the higher (weighted) reward is the
    chosen one, or that which `judge` prefers (`BasePairwiseJudge`). objective/kl and objective/entropy are sums over
    the completions' tokens (TRL: padding, too).
    """

    config_class = OnlineDPOConfig
    rows_of_one = learned_of_one = 2
    loss_temperature = 1.0  # pyright: ignore[reportAssignmentType] (constant)
    _name = "Online DPO"
    _tag_names = ["fastalign", "online-dpo"]
    args: OnlineDPOConfig

    def __init__(
        self,
        model,
        ref_model=None,
        reward_funcs=None,
        args: OnlineDPOConfig | TrainingArguments | None = None,
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
        rollout_func=None,
    ):
        check_arguments(self, data_collator, compute_metrics, preprocess_logits_for_metrics)
        config = as_config(args, self.config_class, f"{model_name(model).split('/')[-1]}-Online-DPO")
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
            rollout_func=rollout_func,
            ref_model=ref_model,
        )

    def needs_reference(self) -> bool:
        """Always."""
        return True

    def score_ahead(self, batch: GenerationBatch) -> None:
        """The reference's log-probabilities, of prompts that are short enough."""
        shorten_prompts(batch, self.args.max_length)
        super().score_ahead(batch)

    def score(self, batch: GenerationBatch) -> None:
        """Which completion of each pair is the better one."""
        scores, ended = pair_scores(self, batch)
        better = rank_pairs(batch, scores)
        self.metrics.mean("val/contain_eos_token", ended.sum(), ended.numel())
        if not self.has_judge:
            record_known(self.metrics, "objective/scores", scores)
            record_known(self.metrics, "objective/scores_margin", better * (scores[:, 0] - scores[:, 1]))

    def weights(self, step: Step) -> list[list[float]]:
        """The mean over a micro-batch's pairs, averaged over the micro-batches."""
        return mean_weights(step)

    def compute_loss(self, model, inputs: GroupBatch, return_outputs: bool = False, num_items_in_batch=None):
        """This batch's part of the step's loss."""
        if return_outputs:
            raise ValueError(f"{type(self).__name__} does not return outputs of its model.")
        found = run_pairs(self, model, inputs)
        chosen, rejected = found.ordered(found.logps)
        non_score = of_epoch(self.args.beta, self.state.epoch) * (found.ref_logps - found.logps)
        values = {"logps/chosen": chosen, "logps/rejected": rejected, "objective/non_score_reward": non_score}
        if not self.has_judge:
            scores = non_score.new_tensor([one.values.get("score", 0.0) for one in inputs.experiences])
            values["objective/rlhf_reward"] = scores.view(-1, 2) + non_score
        record_pairs(self, inputs, found, values)
        return found.loss
