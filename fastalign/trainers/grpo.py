"""Group-relative policy optimisation and its family: completions of a prompt, judged against each other."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from fastalign_kernels.head.policy import PolicyStats, linear_policy_loss
from fastalign_kernels.losses.advantages import group_advantages
from fastalign_kernels.losses.corrections import entropy_threshold, importance_weights
from fastalign_kernels.losses.policy_gradient import LEVELS, WEIGHTINGS
from fastalign_kernels.losses.row_sums import Rows
from torch import Tensor
from transformers import TrainingArguments

from ..config import AlignConfig, arg
from ..config_groups import ModelArgs, at_least, one_of
from ..policy import head_loss, unwrap
from ..reference import MovingReferenceArgs
from ..rollout.buffer import Experience
from ..rollout.config import BatchArgs, CompletionLogArgs, CorrectionArgs, EngineArgs, RewardArgs, SamplingArgs
from ..rollout.entropy_control import EntropyControl
from ..rollout.generation import GenerationBatch
from ..rollout.group_batches import GroupBatch
from ..rollout.health import watch_update
from ..rollout.loader import Step
from ..rollout.replay import ReplayBuffer
from ..rollout.setup import Sources
from ..rollout.statistics import Mismatch
from ..rollout.update import loss_weights
from ..sampled_data import SampledDataTrainer
from ..scoring_head import keep_head_in_fp32

logger = logging.getLogger(__name__)

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo", "gmpo", "dppo")
CLIPPED = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo", "gmpo", "dppo")  # that log how much of them is clipped
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
OBJECTIVE = (  # fields that are those of the loss
    *("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "beta", "use_bias_correction_kl"),
    *("sapo_temperature_neg", "sapo_temperature_pos", "clip_ratio_c", "off_policy_mask_threshold"),
    *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "top_entropy_quantile"),
)


@dataclass
class GRPOConfig(
    CorrectionArgs,
    CompletionLogArgs,
    BatchArgs,
    RewardArgs,
    EngineArgs,
    SamplingArgs,
    MovingReferenceArgs,
    ModelArgs,
    AlignConfig,
):
    """Settings of GRPOTrainer: `transformers.TrainingArguments`, the shared groups, and those below."""

    _VALID_DICT_FIELDS = [
        *AlignConfig._VALID_DICT_FIELDS,
        *("model_init_kwargs", "generation_kwargs", "chat_template_kwargs", "transformers_continuous_batching_config"),
    ]

    learning_rate: float = arg(1e-6, "Initial learning rate.")
    remove_unused_columns: bool | None = arg(False, "Give reward functions no column but the prompt.")
    disable_dropout: bool = arg(False, "Switch dropout off in the policy and in the reference.")
    cast_lm_head_to_fp32: bool = arg(
        False, "Keep the head's weight, input and product in fp32, in policy and reference (arXiv:2510.13786)."
    )
    loss_type: str = arg("dapo", "The loss; dppo and gmpo are not in TRL.", choices=[*LOSSES])
    importance_sampling_level: str = arg(
        "token", "Ratios of tokens, or of whole completions (GSPO, arXiv:2507.18071).", choices=[*LEVELS]
    )
    epsilon: float = arg(0.2, "Lower clip of the ratio: 1 - epsilon (gmpo: in logs; dppo: of probabilities).")
    epsilon_high: float | None = arg(None, "Upper clip; unset: epsilon. cispo: the largest ratio itself.")
    delta: float | None = arg(None, "Largest ratio at negative advantages (INTELLECT-2), above 1 + epsilon_high.")
    beta: float = arg(0.0, "Weight of the divergence from the reference; 0: no reference is loaded.")
    use_bias_correction_kl: bool = arg(True, "Multiply the divergence by the ratio (DeepSeek-V3.2).")
    sapo_temperature_neg: float = arg(1.05, "sapo: temperature at advantages that are not positive.")
    sapo_temperature_pos: float = arg(1.0, "sapo: temperature at positive advantages.")
    vespo_k_pos: float = arg(2.0, "vespo: exponent at advantages that are not negative.")
    vespo_lambda_pos: float = arg(3.0, "vespo: decay at advantages that are not negative.")
    vespo_k_neg: float = arg(3.0, "vespo: exponent at negative advantages.")
    vespo_lambda_neg: float = arg(2.0, "vespo: decay at negative advantages.")
    clip_ratio_c: float = arg(20.0, "dppo: the largest ratio.")
    scale_rewards: str = arg("group", "Divide advantages by the deviation of: group, batch, or none.")
    multi_objective_aggregation: str = arg(
        "sum_then_normalize",
        "Several rewards: added up, then normalised; or each normalised first (GDPO, arXiv:2601.05242).",
        choices=[*AGGREGATIONS],
    )
    mask_truncated_completions: bool = arg(False, "Completions without an end token have no loss.")
    off_policy_mask_threshold: float | None = arg(
        None, "Drop completions of negative advantage that became unlikelier by more than this, nats per token."
    )
    top_entropy_quantile: float = arg(1.0, "Share of tokens, those of highest entropy, that the loss keeps.")
    entropy_coef: float = arg(0.0, "Weight of the mean entropy, which the loss rewards.")
    use_adaptive_entropy: bool = arg(False, "Change entropy_coef after every step, towards entropy_target.")
    entropy_coef_min: float = arg(0.0, "Its lower bound.")
    entropy_coef_max: float = arg(1.0, "Its upper bound.")
    entropy_coef_delta: float = arg(0.005, "Its change.")
    entropy_target: float = arg(0.2, "Entropy, nats per token, at or below which the bonus applies.")
    replay_buffer_size: int = arg(
        0, "Groups of earlier batches that are kept, to take the place of those whose rewards are all equal."
    )
    max_tool_calling_iterations: int | None = arg(None, "Rounds of tool calls of a completion; unset: no limit.")
    tool_timeout: float | None = arg(300.0, "Seconds for a tool call or an environment's reset; unset: no limit.")

    def __post_init__(self):
        super().__post_init__()
        scale = str(self.scale_rewards).lower()  # True and False are TRL's, too
        self.scale_rewards = {"true": "group", "false": "none"}.get(scale, scale)
        self.check_model_args()
        self.check_reference_args()
        self.check_sampling_args()
        self.check_engine_args()
        self.check_batch_args("GRPO")
        self.check_completion_log_args()
        self.check_correction_args()
        self._check_loss()

    def _check_loss(self) -> None:
        one_of(self, "loss_type", LOSSES)
        one_of(self, "importance_sampling_level", LEVELS)
        one_of(self, "scale_rewards", ("group", "batch", "none"))
        one_of(self, "multi_objective_aggregation", AGGREGATIONS)
        at_least(self, epsilon=0, epsilon_high=0, replay_buffer_size=0)
        at_least(self, entropy_coef_max=self.entropy_coef_min * self.use_adaptive_entropy)
        if self.loss_type in CLIPPED:
            at_least(self, delta=1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high))
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(f"`top_entropy_quantile` is {self.top_entropy_quantile}; it must be above 0, at most 1.")
        if self.sync_ref_model and self.beta == 0.0:
            raise ValueError("`sync_ref_model=True` moves a reference, but with `beta=0.0` there is none. Set one.")
        if self.top_entropy_quantile < 1 and self.token_budget is not None:
            raise ValueError(
                "`token_budget` regroups the completions of a step, and `top_entropy_quantile` compares the tokens of "
                "a micro-batch: unset one of them."
            )
        token_modes = self.vllm_importance_sampling_mode.startswith("token")
        if self.loss_type == "vespo" and self.corrects and not token_modes:
            raise ValueError(
                f"`vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r}`: vespo takes weights of "
                "tokens, 'token_truncate' or 'token_mask'."
            )
        sequence = self.importance_sampling_level == "sequence"
        if self.loss_type == "luspo" and not sequence:
            logger.warning("loss_type='luspo' is meant for importance_sampling_level='sequence'.")
        if sequence and self.loss_type in ("bnpo", "dr_grpo", "dapo", "cispo"):
            logger.warning(
                "loss_type=%r sums over tokens, so that with importance_sampling_level='sequence' long completions "
                "weigh more; GSPO's own is loss_type='grpo'.",
                self.loss_type,
            )


class GRPOTrainer(SampledDataTrainer):
    """GRPO and its relatives for a causal language model, given by name, as an object, or with adapters.

    Takes `prompt`: text, or messages, these also with images. All other columns go to the reward functions. Arguments,
    defaults, batch algebra and metrics are those of TRL's trainer. Completions of advantage 0 are not run where
    nothing reads them (beta 0, no entropy bonus or mask): `entropy` is then that of the others.
    """

    config_class = GRPOConfig
    _name, takes_images = "GRPO", True
    _tag_names = ["fastalign", "grpo"]
    args: GRPOConfig

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: GRPOConfig | TrainingArguments | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        tools=None,
        rollout_func=None,
        environment_factory=None,
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
            tools,
            rollout_func,
            environment_factory,
        )
        if self.args.cast_lm_head_to_fp32 and self.reference is not None and self.reference.model is not None:
            keep_head_in_fp32(unwrap(self.reference.model))
        self.entropy = EntropyControl(self.args)
        self.replay = ReplayBuffer(self.args.replay_buffer_size)
        self._ahead: Mismatch | None = None  # of samples that the present step does not see

    def _make_parts(self, sources: Sources, reward_funcs, processing_classes) -> None:
        if self.args.cast_lm_head_to_fp32:
            if (kind := self.accelerator.distributed_type) in (DistributedType.FSDP, DistributedType.DEEPSPEED):
                raise ValueError(
                    f"`cast_lm_head_to_fp32=True` is not supported under {kind.name}, which gives all weights of a "
                    "unit one dtype. Set it to False, or load the whole model in float32."
                )
            keep_head_in_fp32(unwrap(self.model))
        super()._make_parts(sources, reward_funcs, processing_classes)

    def check(self) -> None:
        """Refuse importance weights of tokens that were drawn from another distribution than the loss's."""
        args, found = self.args, self.sampling.distortions(self.args.temperature)
        if found and (args.corrects or args.replay_buffer_size):
            raise ValueError(
                f"Sampling with {found}, not from the softmax at the loss's temperature {args.temperature}, would "
                "bias the importance sampling ratio. Leave that out, or set "
                "`vllm_importance_sampling_correction=False` and `replay_buffer_size=0`."
            )
        if found:
            logger.warning("Log-probabilities as sampled are not used: they are those of sampling with %s.", found)

    @property
    def samples_whole(self) -> bool:
        """Whether log-probabilities as sampled are at the loss's temperature, over the whole vocabulary."""
        return not self.sampling.distortions(self.args.temperature)

    # From rewards to advantages

    def score_ahead(self, batch: GenerationBatch) -> None:
        """The base's passes; samples that these give their old log-probabilities are compared with the engine's."""
        super().score_ahead(batch)
        old = [one for one in batch.experiences if "old_logp" in one.tokens and one.num_learned]
        if self.args.corrects and old:
            logp, sampled = (torch.cat([one.tokens[n] for one in old]) for n in ("old_logp", "sampling_logp"))
            sampled = sampled.to(logp.device)
            ids = torch.arange(len(old)).repeat_interleave(torch.tensor([one.num_learned for one in old]))
            rows, bounds = Rows(ids.to(logp.device), len(old)), self.args.correction
            weights = importance_weights(
                logp, sampled, mode=bounds["mode"], clip_max=bounds["max"], clip_min=bounds["min"], rows=rows
            )
            self._ahead = Mismatch(logp.device)
            self._ahead.add(logp, sampled, weights, torch.ones_like(ids, dtype=torch.bool), self._of_rows(rows))

    def _of_rows(self, rows: Rows) -> Rows | None:
        """`rows` where they are what the correction weights."""
        return None if self.args.vllm_importance_sampling_mode.startswith("token") else rows

    def score(self, batch: GenerationBatch) -> None:
        """Advantages within groups, over all ranks."""
        args = self.args
        found = group_advantages(
            batch.rewards,
            batch.num_generations,
            reward_weights=self.rewards.weights,
            scale_rewards=args.scale_rewards,  # pyright: ignore[reportArgumentType] (checked)
            multi_objective_aggregation=args.multi_objective_aggregation,  # pyright: ignore[reportArgumentType]
        )
        batch.set_advantages(found.advantages)
        self.metrics.mean("frac_reward_zero_std", float(found.std_is_zero.float().mean()))
        if batch.training and args.replay_buffer_size:
            self._replay(batch, found.rewards)

    def _replay(self, batch: GenerationBatch, rewards: Tensor) -> None:
        """Groups of the past in place of those without deviation; rewards (N,) of all ranks."""
        own = rewards.nan_to_num(nan=0.0).view(-1, batch.num_generations).std(1)
        own = own.repeat_interleave(batch.num_generations)[batch.own]
        number = self.replay.renew(batch, own, seed=self.args.seed + 7919 * self.state.global_step + self.rank)
        self.metrics.mean("replay/groups", number)
        counts = [sum(one.num_learned for one in batch.experiences)]
        batch.num_items = max(sum(gather_object(counts) if self.world > 1 else counts), 1) / self.world

    def skips(self, experience: Experience) -> bool:
        """An advantage of 0 is no gradient, unless the divergence, the entropy or a router has one."""
        args = self.args
        reads_all = (
            args.beta != 0.0 or self.entropy.has_bonus or args.top_entropy_quantile < 1.0 or self.router_coefficient
        )
        return experience.advantage == 0.0 and not reads_all

    def weights(self, step: Step) -> list[list[float]]:
        """By `loss_type`, over nominal micro-batches, as TRL divides."""
        args = self.args
        return loss_weights(
            step,
            WEIGHTINGS[args.loss_type],
            steps_per_generation=args.steps_per_generation or 1,
            max_completion_length=args.max_completion_length,
        )

    # Loss

    def compute_loss(self, model, inputs: GroupBatch, return_outputs: bool = False, num_items_in_batch=None):
        """This batch's part of the step's loss."""
        if return_outputs:
            raise ValueError(f"{type(self).__name__} does not return outputs of its model.")
        args, known = self.args, inputs.extras
        objective: dict[str, Any] = {name: getattr(args, name) for name in OBJECTIVE}
        objective |= {f"correction_{name}": value for name, value in args.correction.items()}
        objective["entropy_coef"] = self.entropy.bonus(inputs.step)

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
                ref_logp=known.get("ref_logp") if args.beta else None,
                sampling_logp=known.get("sampling_logp") if self.samples_whole else None,
                entropy_weights=self.entropy.weights(inputs),
                threshold_of=self._entropy_threshold,
                **head,
                **objective,
            )

        found = head_loss(model, inputs, op, temperature=args.temperature, **self.router_inputs())
        self.remember_old(inputs, found.result.logp)
        self._record(inputs, found.result)
        return self.with_router_loss(found.loss, found.aux_loss)

    def _entropy_threshold(self, entropy: Tensor) -> Tensor:
        """The bound of the entropy mask, over the tokens of all ranks."""
        if self.world > 1:
            padded = self.accelerator.pad_across_processes(entropy, dim=0, pad_index=-1)  # pyright: ignore
            entropy = self.accelerator.gather(padded)  # pyright: ignore
            entropy = entropy[entropy >= 0]
        return entropy_threshold(entropy, self.args.top_entropy_quantile)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return self._sum_over_ranks(sums) if self.world > 1 else sums

    # Metrics

    def _record(self, batch: GroupBatch, found: PolicyStats) -> None:
        args, terms, log = self.args, found.terms, self.statistics(batch)
        of_rows = args.importance_sampling_level == "sequence"
        log.mean("entropy", found.entropy, over_seen=True)
        if terms.kl is not None:
            log.mean("kl", terms.kl)
        if args.loss_type in CLIPPED:
            assert terms.clip_low is not None and terms.clip_high is not None
            log.mean("clip_ratio/low_mean", terms.clip_low, of_rows=of_rows)
            log.mean("clip_ratio/high_mean", terms.clip_high, of_rows=of_rows)
            log.mean("clip_ratio/region_mean", terms.clip_low | terms.clip_high, of_rows=of_rows)
            log.extreme_row("clip_ratio/low_min", terms.clip_low, largest=False)
            log.extreme_row("clip_ratio/high_max", terms.clip_high, largest=True)
        elif args.loss_type == "cispo":
            assert terms.clip_high is not None
            log.mean("cispo_clip_ratio", terms.clip_high, of_rows=of_rows)
        elif terms.phi is not None:
            log.mean("vespo/phi_seq_mean", terms.phi, of_rows=True)
        if self.entropy.has_bonus:
            scale = 1 if WEIGHTINGS[args.loss_type] == "batch_tokens" else batch.step.num_micro
            log.sum("policy_loss", terms.loss * batch.weight * scale)
        if terms.importance is not None:
            self._record_mismatch(batch, found, terms.importance, log.batch_rows)
        watch_update(log, batch, found.logp, terms.importance, args.correction.get("max"))
        self.entropy.adapt(batch, found.entropy, found.entropy_mask, self._over_ranks)
        if batch.is_last:
            log.record(self.metrics)
            if self.entropy.has_bonus and batch.step.training:
                self.metrics.mean("entropy_coef", self.entropy.coefficient)

    def _record_mismatch(self, batch: GroupBatch, found: PolicyStats, weights: Tensor, rows: Rows) -> None:
        """Of the completions that this update is the first to see."""
        state, old = batch.step.state, batch.extras.get("old_logp")
        first = torch.ones_like(found.logp, dtype=torch.bool) if old is None else old.isnan()
        if "mismatch" not in state:
            state["mismatch"], self._ahead = self._ahead or Mismatch(found.logp.device), None
        state["mismatch"].add(found.logp, batch.extras["sampling_logp"], weights, first, self._of_rows(rows))
        if batch.is_last and any(made == batch.step.number for made in batch.step.made):
            state["mismatch"].record(self.metrics)

    def state_dict(self) -> dict:
        """The base's, and the adaptive weight of the entropy."""
        own = {"entropy": (self.entropy.coefficient, self.entropy.last), "replay": self.replay.state_dict()}
        return super().state_dict() | own

    def load_state_dict(self, state: dict) -> None:
        """Continue with a checkpoint's."""
        super().load_state_dict(state)
        self.entropy.coefficient, self.entropy.last = state["entropy"]
        self.replay.load_state_dict(state["replay"])
