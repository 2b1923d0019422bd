"""Nash-MD: the policy learns to beat a mixture of itself and the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastalign_kernels.head.token_stats import TokenStats
from fastalign_kernels.losses.sampled_pairs import nash_md_loss
from torch import Tensor
from transformers import TrainingArguments

from ..config import AlignConfig, arg
from ..given_data import as_config
from ..loop.health import watch_drift
from ..models import model_name
from ..policy import token_loss
from ..rollout.generation import GenerationBatch
from ..rollout.group_batches import GroupBatch
from ..rollout.loader import Step
from ..rollout.opponents import MixtureEngine
from ..rollout.rewards import RewardPool
from ..sampled_data import SampledDataTrainer
from ..sampled_pairs import (
    SampledPairArgs,
    add_opponent,
    check_arguments,
    check_per_epoch,
    check_sharding,
    forget,
    judged,
    mean_weights,
    of_epoch,
    own_tokens,
    pair_scores,
    record_known,
    shorten_prompts,
)


@dataclass
class NashMDConfig(SampledPairArgs, AlignConfig):
    """Settings of NashMDTrainer: `transformers.TrainingArguments`, the shared groups, and the mixture."""

    _VALID_DICT_FIELDS = [
        *AlignConfig._VALID_DICT_FIELDS,
        *("model_init_kwargs", "generation_kwargs", "chat_template_kwargs", "transformers_continuous_batching_config"),
    ]

    mixture_coef: list[float] = arg(
        factory=lambda: [0.5],
        help="Share of the reference in the opponent's logits, 0 to 1; several: one for each epoch.",
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_pair_args()
        if wrong := [share for share in check_per_epoch(self, "mixture_coef") if not 0 <= share <= 1]:
            raise ValueError(f"`mixture_coef` is {wrong[0]}; it is a share, from 0 (the policy) to 1 (the reference).")
        if self.use_vllm or self.use_transformers_continuous_batching:
            raise ValueError(
                "`use_vllm` and `use_transformers_continuous_batching` are not supported by Nash-MD: its opponent is "
                "a mixture of two models' logits at each token, which only the embedded engine samples. Set both to "
                "False."
            )


class NashMDTrainer(SampledDataTrainer):
    """Nash-MD (arXiv:2312.00886) for a causal language model, given by name, as an object, or with adapters.

    Takes `prompt` (text or messages); all other columns go to the reward functions. Arguments, defaults and metrics
    are those of TRL 1.10's trainer; batch sizes count prompts. The probability of winning is the sigmoid of the
    difference of (weighted) rewards, or what `judge` says. Reward models read the policy's tokens. Only the policy's
    completion is learned from, so that the opponent's has no forward.
    """

    config_class = NashMDConfig
    rows_of_one = 2
    loss_temperature = 1.0  # pyright: ignore[reportAssignmentType] (constant)
    _name = "Nash-MD"
    _tag_names = ["fastalign", "nash-md"]
    args: NashMDConfig

    def __init__(
        self,
        model,
        ref_model=None,
        reward_funcs=None,
        args: NashMDConfig | TrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        preprocess_logits_for_metrics=None,
        quantization_config=None,
        judge=None,
    ):
        check_arguments(self, data_collator, compute_metrics, preprocess_logits_for_metrics)
        config = as_config(args, self.config_class, f"{model_name(model).split('/')[-1]}-Nash-MD")
        self.has_judge = judge is not None
        super().__init__(
            model,
            judged(reward_funcs, judge, config),
            config,
            train_dataset,
            eval_dataset,
            processing_class,
            None,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
            ref_model=ref_model,
        )
        check_sharding(self)
        options = {"autocast": self.accelerator.autocast, "seed": self.args.seed}
        add_opponent(self, MixtureEngine(self.model, self.reference, lambda: self.mixture_coef, **options))

    @property
    def mixture_coef(self) -> float:
        """The share of the reference in this epoch."""
        return of_epoch(self.args.mixture_coef, self.state.epoch)

    def needs_reference(self) -> bool:
        """Always."""
        return True

    def make_rewards(self, reward_funcs, processing_classes) -> RewardPool:
        """Reward models read the sampled ids."""
        return own_tokens(self, reward_funcs, processing_classes, super().make_rewards)

    def score_ahead(self, batch: GenerationBatch) -> None:
        """The reference's log-probabilities of the policy's completions, of prompts that are short enough."""
        shorten_prompts(batch, self.args.max_length)
        forget(batch.experiences[1::2])
        super().score_ahead(batch)

    def score(self, batch: GenerationBatch) -> None:
        """How likely the policy's completion wins."""
        scores, ended = pair_scores(self, batch)
        own, other = scores.unbind(1)
        wins = own if self.has_judge else torch.sigmoid(own - other)
        for one, win in zip(batch.experiences[::2], wins.tolist(), strict=True):
            one.values["preference"] = win
        record_known(self.metrics, "rewards/probabilities", wins)
        for place, (name, ref) in enumerate((("chosen", "model"), ("rejected", "ref"))):
            self.metrics.mean(f"val/{ref}_contain_eos_token", ended[:, place].sum(), len(ended))
            if not self.has_judge:
                record_known(self.metrics, f"rewards/{name}", scores[:, place])

    def weights(self, step: Step) -> list[list[float]]:
        """The mean over a micro-batch's completions of the policy, averaged over the micro-batches."""
        return mean_weights(step)

    def compute_loss(self, model, inputs: GroupBatch, return_outputs: bool = False, num_items_in_batch=None):
        """This batch's part of the step's loss."""
        if return_outputs:
            raise ValueError(f"{type(self).__name__} does not return outputs of its model.")
        beta, ref_logp, weight = of_epoch(self.args.beta, self.state.epoch), inputs.extras["ref_logp"], inputs.weight
        wins = torch.tensor([one.values.get("preference", 0.5) for one in inputs.experiences])
        counts = torch.tensor([one.num_learned for one in inputs.experiences])
        preference = wins.repeat_interleave(counts).to(weight.device)

        def loss_fn(stats: TokenStats, span: slice) -> Tensor:
            losses = nash_md_loss(stats.logp, ref_logp[span], preference[span], beta)
            return (losses * weight[span]).sum()

        found = token_loss(model, inputs, loss_fn, **self.router_inputs())
        self._record(inputs, found.stats.logp, wins.to(weight.device), beta)
        assert found.loss is not None
        return self.with_router_loss(found.loss, found.aux_loss)

    def _record(self, batch: GroupBatch, logp: Tensor, wins: Tensor, beta: float) -> None:
        log = self.statistics(batch)
        rows = log.batch_rows
        is_real = torch.tensor([one.group >= 0 for one in batch.experiences], device=logp.device)
        logps, ref_logps = rows.sums(logp) * is_real, rows.sums(batch.extras["ref_logp"].to(logp)) * is_real
        margins = logps - ref_logps
        watch_drift(self.metrics, margins, batch.extras["lengths"])
        for name, values in {
            "loss/kl": margins,
            "loss/score": (wins - 0.5) * logps,
            "objective/entropy": -logps,
            "logps/chosen": logps,
            "logps/rejected": ref_logps,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
        }.items():
            log.mean_of_rows(name, values)
        if batch.is_last:
            log.record(self.metrics)
            self.metrics.mean("beta", beta)
            self.metrics.mean("mixture_coef", self.mixture_coef)
