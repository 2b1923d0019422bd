"""PPO: a policy and a critic that learn from the same completions, with rewards per token and a clip on both."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from fastalign_kernels.head.policy import PolicyStats, linear_policy_loss
from torch import Tensor
from transformers import AutoTokenizer

from ..config import AlignConfig, arg
from ..config_groups import ModelArgs, one_of
from ..given_data import as_config
from ..loop.distributed import is_fsdp
from ..models import model_name
from ..policy import head_loss
from ..policy_check import quiet
from ..reference import MovingReferenceArgs
from ..rollout.buffer import Experience
from ..rollout.completions_log import render, sample_rows
from ..rollout.config import DICT_FIELDS, CompletionLogArgs, EngineArgs, GroupArgs, RewardArgs, SamplingArgs
from ..rollout.episodes import Rollouts
from ..rollout.generation import GenerationBatch
from ..rollout.group_batches import GroupBatch
from ..rollout.loader import Step
from ..rollout.prompts import tokenised_prompts
from ..rollout.reward_models import RewardModel, load_reward_model
from ..rollout.rewards import RewardPool
from ..rollout.states import add_last_state, set_targets, state_weights, token_counts
from ..rollout.update import attach
from ..sampled_data import SampledDataTrainer
from ..value_model import (
    ActorCritic,
    ValueModelCallback,
    critic_loss,
    make_value_model,
    ready_value_model,
    state_values,
)

logger = logging.getLogger(__name__)
KL_ESTIMATORS = ("k1", "k3")
TARGETS = ("kl_coef", "kl_estimator", "whiten_rewards", "gamma", "lam")  # fields that `set_targets` takes


@dataclass
class PPOConfig(
    CompletionLogArgs, GroupArgs, RewardArgs, EngineArgs, SamplingArgs, MovingReferenceArgs, ModelArgs, AlignConfig
):
    """Settings of PPOTrainer. A step is one batch of `per_device_train_batch_size * gradient_accumulation_steps`
    completions per process, from which `num_ppo_epochs * num_mini_batches` updates are made."""

    _VALID_DICT_FIELDS = [*AlignConfig._VALID_DICT_FIELDS, *DICT_FIELDS]

    learning_rate: float = arg(3e-6, "Initial learning rate.")
    remove_unused_columns: bool | None = arg(False, "Give reward functions no column but the prompt.")
    num_generations: int = arg(1, "Completions of each prompt.")
    temperature: float = arg(0.7, "Divides the logits, of sampling and of the loss alike.")
    max_completion_length: int | None = field(init=False, default=None)  # `response_length`
    response_length: int = arg(53, "Longest completion, in tokens.")
    stop_token: str | None = arg(None, "'eos': completions end at the end token; unset: only at their longest.")
    stop_token_id: int | None = arg(None, "The token at which completions end, in place of `stop_token`.")
    total_episodes: int | None = arg(None, "Completions of the run; unset: the prompts of `num_train_epochs`.")
    num_ppo_epochs: int = arg(4, "Times that a batch is learned from, each time in another order.")
    num_mini_batches: int = arg(1, "Updates that one such pass makes.")
    kl_coef: float = arg(0.05, "Weight of the divergence from the reference in the rewards; 0: no reference.")
    kl_estimator: str = arg("k1", "Estimate of it: k1, or k3 (never negative).", choices=[*KL_ESTIMATORS])
    cliprange: float = arg(0.2, "Clip of the ratio.")
    vf_coef: float = arg(0.1, "Weight of the critic's loss.")
    cliprange_value: float = arg(0.2, "Clip of the change of a value.")
    gamma: float = arg(1.0, "Discount of later rewards.")
    lam: float = arg(0.95, "Lambda of the generalised advantages (arXiv:1506.02438).")
    whiten_rewards: bool = arg(False, "Divide rewards by their deviation; needs 8 completions in a mini-batch.")
    missing_eos_penalty: float | None = arg(None, "Taken off the score of completions without an end token.")
    local_rollout_forward_batch_size: int = arg(64, "Without effect: passes without gradient are cut by tokens.")
    num_sample_generations: int = arg(10, "Times in the run that completions of the evaluation set are printed.")
    share_backbone: bool = arg(False, "The critic is a head on the policy's body: one forward for both.")
    reward_model_path: str | None = arg(None, "Reward model, where the trainer is given none.")
    sft_model_path: str | None = arg(None, "Reference, where the trainer is given none; unset: the policy at first.")

    disable_dropout = True  # of all models, as in TRL
    num_iterations = 1

    def __post_init__(self):
        super().__post_init__()
        self.max_completion_length = self.response_length
        self.check_model_args()
        self.check_reference_args()
        self.check_sampling_args()
        self.check_engine_args()
        self.check_completion_log_args()
        one_of(self, "kl_estimator", KL_ESTIMATORS)
        one_of(self, "stop_token", (None, "eos"))
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError(f"`stop_token` {self.stop_token!r} and `stop_token_id` {self.stop_token_id}: give one.")
        for name in ("num_ppo_epochs", "num_mini_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if self.missing_eos_penalty is not None and not self.missing_eos_penalty > 0:
            raise ValueError(f"`missing_eos_penalty` is {self.missing_eos_penalty}; it must be above 0, or None.")
        self.check_group_args("PPO", self.generation_batch_size, 1)
        if self.local_batch_size % self.num_mini_batches:
            raise ValueError(
                f"`num_mini_batches` is {self.num_mini_batches}; it must divide the {self.local_batch_size} "
                "completions of a process (per_device_train_batch_size * gradient_accumulation_steps)."
            )
        if self.whiten_rewards and self.local_mini_batch_size < 8:
            raise ValueError(
                f"`whiten_rewards=True` needs at least 8 completions in a mini-batch of a process, found "
                f"{self.local_mini_batch_size}: raise `per_device_train_batch_size`, or lower `num_mini_batches`."
            )

    @property
    def local_batch_size(self) -> int:
        """Completions of a step on this process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def local_mini_batch_size(self) -> int:
        """Completions of an update on this process."""
        return self.local_batch_size // self.num_mini_batches

    @property
    def generation_batch_size(self) -> int:
        """Completions of a step over all processes."""
        return self.local_batch_size * self.world_size

    @property
    def steps_per_generation(self) -> int:
        """Micro-batches of a generation, which is a step; `PPOTrainer.batches_of` goes through it several times."""
        return self.gradient_accumulation_steps


class PPOTrainer(SampledDataTrainer):
    """PPO for language models (arXiv:1909.08593), with a critic of its own and TRL's arguments and metrics.

    Takes `input_ids` (prompts that are tokenised) or `prompt` (text or messages). Scores are those of `reward_model`
    (a model or a name, which reads the policy's tokens) and of `reward_funcs`, added up. `value_model` None: a copy of
    the reward model, or where there is none of the policy. A completion shorter than `response_length` has a last
    state, behind its last token, where its score is given; TRL takes the longest completion of the batch for that
    limit. Metrics of tokens are means over tokens, where TRL also counts padding.
    """

    config_class = PPOConfig
    _name = "PPO"
    _tag_names = ["fastalign", "ppo"]
    args: PPOConfig

    def __init__(
        self,
        args: PPOConfig | None = None,
        processing_class=None,
        model=None,
        ref_model=None,
        reward_model=None,
        train_dataset=None,
        value_model=None,
        data_collator=None,
        eval_dataset=None,
        optimizers=(None, None),
        callbacks=None,
        peft_config=None,
        reward_funcs=None,
        reward_processing_classes=None,
        rollout_func=None,
        quantization_config=None,
    ):
        if model is None:
            raise ValueError("`model` is required: the policy, by name or as an object.")
        config: Any = as_config(args, PPOConfig, f"{model_name(model).split('/')[-1]}-PPO")
        if data_collator is not None:
            logger.warning("`data_collator` has no effect: prompts are not padded, and completions are sampled.")
        reward_model = config.reward_model_path if reward_model is None else reward_model
        self._reward_model = load_reward_model(reward_model) if isinstance(reward_model, str) else reward_model
        _set_length(config, train_dataset)
        if processing_class is None:
            trust = config.trust_remote_code
            processing_class = AutoTokenizer.from_pretrained(model_name(model), trust_remote_code=trust)
        train_dataset, eval_dataset = (tokenised_prompts(d, processing_class) for d in (train_dataset, eval_dataset))
        super().__init__(
            model,
            reward_funcs,
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
            ref_model=config.sft_model_path if ref_model is None else ref_model,
        )
        if is_fsdp(self.accelerator):
            raise ValueError("PPO is not supported under FSDP, which shards one model: use DDP.")
        self.value_model = make_value_model(value_model, self._reward_model, self.model, config)
        ready_value_model(self.value_model, self)
        self.trained_module = ActorCritic(self.model, self.value_model)
        self.add_callback(ValueModelCallback(self.value_model))
        self._ratios: list[Tensor] = []  # mean ratio of each micro-batch of the step
        self._began, self._sampled_step = time.time(), 0

    def check(self) -> None:
        """Completions end where the config says, not where the model does."""
        eos, args = self.loaded.tokenizer.eos_token_id, self.args
        stop = eos if args.stop_token == "eos" else args.stop_token_id
        self.sampling = replace(self.sampling, stop_ids=() if stop is None else (stop,))

    def needs_reference(self) -> bool:
        """Unless the divergence weighs nothing."""
        return self.args.kl_coef != 0.0

    def make_rewards(self, reward_funcs, processing_classes) -> RewardPool:
        """The reward model, which reads the sampled ids, besides the functions."""
        if self._reward_model is None:
            return super().make_rewards(reward_funcs, processing_classes)
        pool = super().make_rewards(reward_funcs, processing_classes) if reward_funcs else RewardPool([])
        given = RewardModel(self._reward_model, self.processing_class, device=self.args.device, reads_ids=True)
        pool.add(given.name, given)  # pyright: ignore[reportArgumentType]
        return pool

    def create_optimizer(self, model=None):
        """One optimizer for policy and critic."""
        return super().create_optimizer(self.trained_module if model is None else model)

    # From scores to targets

    def needs_old(self, batch: GenerationBatch) -> list[Experience]:
        """All, unless the engine's log-probabilities are exact."""
        return [] if self.knows_old else batch.experiences

    def score_ahead(self, batch: GenerationBatch) -> None:
        """Reference, where needed old log-probabilities, and the critic's values."""
        filler: Any = self.loaded.tokenizer.pad_token_id
        for one in batch.experiences:
            add_last_state(one, self.args.response_length, filler)
        super().score_ahead(batch)
        attach("value", batch.experiences, self.run_pass(batch.experiences, self._values))

    def _values(self, batch: GroupBatch) -> Tensor:
        with quiet(self.trained_module), self.accelerator.autocast():
            return state_values(self.value_model, batch, self.model)

    def score(self, batch: GenerationBatch) -> None:
        """Advantages and returns of each token; a completion that nothing could score is left out."""
        args, eos = self.args, cast(int, self.loaded.tokenizer.eos_token_id)
        scores = (batch.rewards * self.rewards.weights).nansum(1)
        scores = scores.masked_fill(batch.rewards.isnan().all(1), torch.nan)[batch.own]
        if args.missing_eos_penalty is not None:
            ended = torch.tensor([eos in one.completion_ids for one in batch.samples])
            scores = scores - args.missing_eos_penalty * ~ended
        for one, score in zip(batch.experiences, scores.tolist(), strict=True):
            if math.isnan(score):
                one.learned_at, one.tokens = one.learned_at[:0], {}
            elif "old_logp" not in one.tokens:
                one.tokens["old_logp"] = one.tokens.pop("sampling_logp")
        kept = [one for one in batch.experiences if one.num_learned]
        if kept:
            known = scores[[one.num_learned > 0 for one in batch.experiences]]
            sums = set_targets(kept, known, args.device, **{name: getattr(args, name) for name in TARGETS})
            for name, value in sums.items():
                self.metrics.mean(f"objective/{name}", value, len(kept))
        self.metrics.mean("val/num_eos_tokens", float(sum(one.completion_ids.count(eos) for one in batch.samples)))

    # Updates

    def batches_of(self, step: Step) -> list[GroupBatch]:
        """The batches of all updates that are made from a generation; each update is a `Step` of its own."""
        if not step.training:
            return super().batches_of(step)
        args, made = self.args, []
        rows = [one for part in step.parts for one in part]
        size, micro = args.local_mini_batch_size, args.per_device_train_batch_size
        for epoch in range(args.num_ppo_epochs):
            order = [rows[i] for i in self.order(len(rows), step.number, epoch)]
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                parts = [chosen[i : i + micro] for i in range(0, size, micro)]
                count = len(parts)
                made += super().batches_of(Step(parts, step.num_items[:1] * count, step.made[:1] * count, step.number))
        return made

    def order(self, num_rows: int, step: int, epoch: int) -> list[int]:
        """The order of one pass: completions of a prompt stay neighbours, so that they share it."""
        seed = np.random.SeedSequence((self.args.seed, self.rank, step, epoch))
        size = self.args.num_generations if num_rows % self.args.num_generations == 0 else 1
        groups = np.random.default_rng(seed).permutation(num_rows // size)
        return (groups[:, None] * size + np.arange(size)).flatten().tolist()

    def weights(self, step: Step) -> list[list[float]]:
        """The mean over a micro-batch's tokens, averaged over the micro-batches of an update."""
        counts = zip(step.parts, token_counts(step), strict=True)
        return [[1 / (max(count, 1) * step.num_micro)] * len(part) for part, count in counts]

    def compute_loss(self, model, inputs: GroupBatch, return_outputs: bool = False, num_items_in_batch=None):
        """This batch's part of the update's loss: the policy's and `vf_coef` times the critic's."""
        if return_outputs:
            raise ValueError(f"{type(self).__name__} does not return outputs of its model.")
        args, known = self.args, inputs.extras
        has_token, of_states = known["has_token"], state_weights(inputs)

        def op(hidden: Tensor, weight: Tensor, **head) -> tuple[Tensor, Any]:
            policy_loss, stats = linear_policy_loss(
                hidden,
                weight,
                inputs.targets,
                known["advantage"],
                weights=inputs.weight * has_token,
                old_logp=known["old_logp"],
                loss_type="ppo",
                epsilon=args.cliprange,
                **head,
            )
            with self.accelerator.autocast():
                value_loss, of_values = critic_loss(self.value_model, inputs, hidden, of_states, args.cliprange_value)
            return policy_loss + args.vf_coef * value_loss, (stats, *of_values)

        found = head_loss(model, inputs, op, temperature=args.temperature, **self.router_inputs())
        self._record(inputs, *found.result)
        return self.with_router_loss(found.loss, found.aux_loss)

    # Metrics

    def _record(self, batch: GroupBatch, found: PolicyStats, value_losses: Tensor, value_clipped: Tensor) -> None:
        terms, log = found.terms, self.statistics(batch)
        assert terms.clip_low is not None and terms.clip_high is not None
        tokens, has_token = token_counts(batch.step), batch.extras["has_token"]
        change = found.logp - batch.extras["old_logp"]
        for name, values in {
            "policy/approxkl_avg": change.square() / 2,
            "policy/clipfrac_avg": (terms.clip_low | terms.clip_high).float(),
            "policy/entropy_avg": found.entropy,
            "loss/policy_avg": terms.loss,
            "val/ratio": terms.ratio,
        }.items():
            log.mean(name, values * has_token, counts=tokens)
        log.mean("loss/value_avg", value_losses)
        log.mean("val/clipfrac_avg", value_clipped)
        if not batch.is_last:
            return
        log.record(self.metrics)
        if not batch.step.training:
            return
        counts = torch.tensor(tokens, device=change.device).clamp(min=1)
        self._ratios += (log.totals["val/ratio"] / counts).unbind()
        updates = self.args.num_ppo_epochs * self.args.num_mini_batches
        if len(self._ratios) >= updates * batch.step.num_micro:
            if len(self._ratios) > 1:
                self.metrics.mean("val/ratio_var", torch.stack(self._ratios).var())
            self._ratios = []

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with TRL's names for where the run is."""
        if "loss" in logs:
            episode = self.state.global_step * self.args.generation_batch_size
            logs |= {"lr": logs["learning_rate"], "episode": episode}
            logs["eps"] = int(episode / max(time.time() - self._began, 1e-6))
        super().log(logs, start_time)

    def _log_evaluate_save(self) -> None:
        super()._log_evaluate_save()
        wanted, done = self.args.num_sample_generations, self.state.global_step
        if wanted > 0 and done != self._sampled_step and (done - 1) % max(1, self.state.max_steps // wanted) == 0:
            self.generate_completions(sampling=True)
        self._sampled_step = done

    def generate_completions(self, sampling: bool = False) -> None:
        """Print completions of the evaluation set, almost the likeliest ones; of its first batch with `sampling`."""
        dataset = next(iter(self.eval_dataset.values())) if isinstance(self.eval_dataset, dict) else self.eval_dataset
        if dataset is None or not isinstance(self.rollouts, Rollouts) or not self.is_world_process_zero():
            return
        rows = list(islice(iter(dataset), self.args.per_device_eval_batch_size if sampling else None))
        self._sync_engine()
        given, self.rollouts.sampling = self.rollouts.sampling, replace(self.sampling, temperature=0.01)
        samples = [group.samples[0] for group in sorted(self.rollouts.run(rows, 1, 0), key=lambda group: group.index)]
        self.rollouts.sampling = given
        print(
            render(sample_rows(samples, self.rewards.submit(samples).result()), self.state.global_step, 5), flush=True
        )


def _set_length(config: PPOConfig, dataset: Any) -> None:
    """`max_steps` for `total_episodes`, where it is not set itself."""
    if config.max_steps > 0:
        return
    if config.total_episodes is None and hasattr(dataset, "__len__"):
        config.total_episodes = int(config.num_train_epochs * len(dataset))
    if config.total_episodes is not None:
        config.max_steps = math.ceil(config.total_episodes / config.generation_batch_size)
