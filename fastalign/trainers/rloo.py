"""RLOO: completions are compared with the mean of the others of their prompt; the divergence is in the reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from fastalign_kernels.head.policy import PolicyStats, linear_policy_loss
from fastalign_kernels.losses.advantages import group_advantages, leave_one_out_advantages
from torch import Tensor
from transformers import TrainingArguments

from ..config import AlignConfig, arg
from ..config_groups import ModelArgs, at_least
from ..policy import head_loss
from ..reference import MovingReferenceArgs
from ..rollout.buffer import Experience
from ..rollout.config import DICT_FIELDS, BatchArgs, CompletionLogArgs, EngineArgs, RewardArgs, SamplingArgs
from ..rollout.generation import GenerationBatch
from ..rollout.group_batches import GroupBatch
from ..rollout.health import watch_groups, watch_update
from ..rollout.loader import Step
from ..sampled_data import SampledDataTrainer


@dataclass
class RLOOConfig(
    CompletionLogArgs, BatchArgs, RewardArgs, EngineArgs, SamplingArgs, MovingReferenceArgs, ModelArgs, AlignConfig
):
    """Settings of RLOOTrainer: `transformers.TrainingArguments`, the shared groups, and those below."""

    _VALID_DICT_FIELDS = [*AlignConfig._VALID_DICT_FIELDS, *DICT_FIELDS]

    learning_rate: float = arg(1e-6, "Initial learning rate.")
    remove_unused_columns: bool | None = arg(False, "Give reward functions no column but the prompt.")
    disable_dropout: bool = arg(False, "Switch dropout off in the policy and in the reference.")
    num_generations: int = arg(2, "Completions of each prompt.")
    beta: float = arg(0.05, "Weight of the divergence from the reference in the reward; 0: no reference is loaded.")
    epsilon: float = arg(0.2, "Lower clip of the completion's ratio: 1 - epsilon.")
    epsilon_high: float | None = arg(None, "Upper clip; unset: epsilon.")
    normalize_advantages: bool = arg(False, "Bring advantages to mean 0 and variance 1 over the generation batch.")
    reward_clip_range: list[float] | None = arg(None, "Bounds of the summed rewards, before the divergence.")
    mask_truncated_completions: bool = arg(False, "Completions without an end token have no loss.")

    def __post_init__(self):
        super().__post_init__()
        self.check_model_args()
        self.check_reference_args()
        self.check_sampling_args()
        self.check_engine_args()
        self.check_batch_args("RLOO")
        self.check_completion_log_args()
        at_least(self, epsilon=0, epsilon_high=0)
        bounds = self.reward_clip_range
        if bounds is not None and (len(bounds) != 2 or bounds[0] >= bounds[1]):
            raise ValueError(f"`reward_clip_range` is {bounds}; give two numbers, the smaller one first.")
        if self.sync_ref_model and self.beta == 0.0:
            raise ValueError("`sync_ref_model=True` moves a reference, but with `beta=0.0` there is none. Set one.")


class RLOOTrainer(SampledDataTrainer):
    """RLOO (arXiv:2402.14740) for a causal language model, given by name, as an object, or with adapters.

    Takes `prompt`: text, or messages, these also with images. All other columns go to the reward functions. Arguments,
    defaults, batch algebra and metrics are those of TRL's trainer. Completions of advantage 0 are not run:
    `entropy` is that of the others.
    """

    config_class = RLOOConfig
    _name, takes_images = "RLOO", True
    _tag_names = ["fastalign", "rloo"]
    args: RLOOConfig

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: RLOOConfig | TrainingArguments | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        rollout_func=None,
    ):
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            reward_processing_classes,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
            rollout_func=rollout_func,
        )

    def needs_old(self, batch: GenerationBatch) -> list[Experience]:
        """All where the reward has a divergence, unless the engine's log-probabilities are exact."""
        if self.args.beta == 0.0:
            return super().needs_old(batch)
        return [] if self.knows_old else batch.experiences

    def score(self, batch: GenerationBatch) -> None:
        """Rewards, clipped, less the divergence; then each against the others of its group, over all ranks."""
        args = self.args
        rewards = (batch.rewards * self.rewards.weights).nansum(1)
        rewards = rewards.masked_fill(batch.rewards.isnan().all(1), torch.nan)
        if args.reward_clip_range is not None:
            rewards = rewards.clamp(*args.reward_clip_range)
        watch_groups(
            self.metrics, rewards, batch.num_generations
        )  # before the divergence, which differs in all groups
        if args.beta != 0.0:
            rewards = rewards - args.beta * self._divergence(batch)
        advantages = leave_one_out_advantages(
            rewards, batch.num_generations, normalize_advantages=args.normalize_advantages
        )
        batch.set_advantages(advantages)
        equal = group_advantages(rewards[:, None], batch.num_generations).std_is_zero
        self.metrics.mean("frac_reward_zero_std", float(equal.float().mean()))

    def _divergence(self, batch: GenerationBatch) -> Tensor:
        """(N,) sums over the learned tokens of old minus reference log-probabilities, nats, of all ranks' samples."""
        found = []
        for one in batch.experiences:
            old = one.tokens.get("old_logp", one.tokens.get("sampling_logp"))
            assert old is not None
            found.append((old.to(one.tokens["ref_logp"]) - one.tokens["ref_logp"]).sum())
        sums = torch.stack(found).cpu()
        self.metrics.mean("kl", sums.sum(), max(sum(one.num_learned for one in batch.experiences), 1))
        return torch.cat(gather_object([sums])) if self.world > 1 else sums

    def skips(self, experience: Experience) -> bool:
        """An advantage of 0 is no gradient, unless a router has one."""
        return experience.advantage == 0.0 and not self.router_coefficient

    def weights(self, step: Step) -> list[list[float]]:
        """The mean over a micro-batch's completions, averaged over the micro-batches; tokens share their row's."""
        return [[1 / (max(one.num_learned, 1) * len(part) * step.num_micro) for one in part] for part in step.parts]

    def compute_loss(self, model, inputs: GroupBatch, return_outputs: bool = False, num_items_in_batch=None):
        """This batch's part of the step's loss."""
        if return_outputs:
            raise ValueError(f"{type(self).__name__} does not return outputs of its model.")
        args, known = self.args, inputs.extras

        def op(hidden: Tensor, weight: Tensor, **head) -> tuple[Tensor, PolicyStats]:
            return linear_policy_loss(
                hidden,
                weight,
                inputs.targets,
                known["advantages"],
                weights=inputs.weight,
                rows=inputs.row if inputs.host_row is None else inputs.host_row,
                num_rows=inputs.num_rows,
                old_logp=known.get("old_logp"),
                loss_type="rloo",
                epsilon=args.epsilon,
                epsilon_high=args.epsilon_high,
                **head,
            )

        found = head_loss(model, inputs, op, temperature=args.temperature, **self.router_inputs())
        self.remember_old(inputs, found.result.logp)
        self._record(inputs, found.result)
        loss = found.loss
        if inputs.is_last:  # completions without learned tokens have the ratio 1
            silent = [(one.advantage, len(part)) for part in inputs.step.parts for one in part if not one.num_learned]
            loss = loss - sum(advantage / size for advantage, size in silent) / inputs.step.num_micro
        return self.with_router_loss(loss, found.aux_loss)

    def _record(self, batch: GroupBatch, found: PolicyStats) -> None:
        terms, log = found.terms, self.statistics(batch)
        assert terms.clip_low is not None and terms.clip_high is not None
        log.mean("entropy", found.entropy, over_seen=True)
        log.mean("clip_ratio/low_mean", terms.clip_low, of_rows=True)
        log.mean("clip_ratio/high_mean", terms.clip_high, of_rows=True)
        log.mean("clip_ratio/region_mean", terms.clip_low | terms.clip_high, of_rows=True)
        log.extreme_row("clip_ratio/low_min", terms.clip_low, largest=False)
        log.extreme_row("clip_ratio/high_max", terms.clip_high, largest=True)
        watch_update(log, batch, found.logp)
        if batch.is_last:
            log.record(self.metrics)
