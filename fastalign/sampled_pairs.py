"""What trainers on pairs of sampled completions share: settings, who won, the loss of a batch, and its metrics."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from fastalign_kernels.head.preference import PreferenceResult
from fastalign_kernels.losses.sampled_pairs import PAIR_LOSSES, sampled_pair_loss
from torch import Tensor, nn

from .config import arg
from .config_groups import ModelArgs, one_of
from .loop.distributed import is_fsdp
from .loop.health import watch_drift, watch_pulls
from .pairs import pair_loss
from .reference import MovingReferenceArgs, answer_logps
from .rollout.config import CompletionLogArgs, EngineArgs, LayoutArgs, RewardArgs, SamplingArgs
from .rollout.episodes import Rollouts
from .rollout.generation import GenerationBatch
from .rollout.group_batches import GroupBatch
from .rollout.loader import Step
from .rollout.opponents import OpponentRollouts
from .rollout.reward_models import RewardModel
from .rollout.rewards import RewardPool

logger = logging.getLogger(__name__)


@dataclass
class SampledPairArgs(
    CompletionLogArgs, LayoutArgs, RewardArgs, EngineArgs, SamplingArgs, MovingReferenceArgs, ModelArgs
):
    """Settings of trainers on two completions of each prompt; batch sizes count prompts."""

    learning_rate: float = arg(5e-7, "Initial learning rate.")
    remove_unused_columns: bool | None = arg(False, "Give reward functions no column but the prompt.")
    reward_model_path: str | None = arg(None, "Reward model, where the trainer is given no rewards and no judge.")
    max_new_tokens: int = arg(64, "Longest completion, in tokens.")
    max_completion_length: int | None = arg(None, "Another name of `max_new_tokens`, over which it wins.")
    max_length: int = arg(
        512,
        "Longest prompt and completion in the loss, in tokens: the beginning of a longer prompt is left out there.",
    )
    temperature: float = arg(0.9, "Divides the logits of sampling; the loss is at temperature 1.")
    missing_eos_penalty: float | None = arg(None, "Taken off the score of completions without an end token.")
    beta: list[float] = arg(
        factory=lambda: [0.1], help="How strongly the policy is held at the reference; several: one for each epoch."
    )
    loss_type: str = arg("sigmoid", "The loss of pairs.", choices=[*PAIR_LOSSES])
    disable_dropout: bool = arg(True, "Switch dropout off in the policy and in the reference.")
    vllm_gpu_memory_utilization: float = arg(0.55, "Share of the GPU's memory for vLLM in this process.")

    num_generations = 2
    num_generations_eval = None
    num_iterations = 1

    def check_pair_args(self) -> None:
        """The checks of all groups; ValueError for values that make no sense."""
        config: Any = self
        if self.max_completion_length is not None:
            self.max_new_tokens = self.max_completion_length
        self.max_completion_length = self.max_new_tokens
        self.check_model_args()
        self.check_reference_args()
        self.check_sampling_args()
        self.check_engine_args()
        self.check_layout_args()
        self.check_completion_log_args()
        one_of(self, "loss_type", PAIR_LOSSES)
        betas = check_per_epoch(self, "beta")
        if self.loss_type == "ipo" and 0 in betas:
            raise ValueError("`beta` is 0, but 'ipo' aims at a margin of 1 / (2 beta): give another number.")
        if self.missing_eos_penalty is not None and not self.missing_eos_penalty > 0:
            raise ValueError(f"`missing_eos_penalty` is {self.missing_eos_penalty}; it must be above 0, or None.")
        if config.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` is not supported with sampled completions. Set it to False and lower "
                "`per_device_train_batch_size`."
            )
        if self.max_new_tokens >= self.max_length:
            logger.warning(
                "`max_new_tokens` is %d, `max_length` %d: prompts before such long completions are cut to one token "
                "in the loss. Raise `max_length`.",
                self.max_new_tokens, self.max_length,
            )  # fmt: skip

    @property
    def steps_per_generation(self) -> int:
        """A generation is what one optimizer step learns from."""
        config: Any = self
        return config.gradient_accumulation_steps

    @property
    def generation_batch_size(self) -> int:
        """Completions generated at once, over all processes."""
        config: Any = self
        return 2 * config.per_device_train_batch_size * self.steps_per_generation * config.world_size

    def check_eval_batch(self) -> None:
        """Nothing: a batch always holds whole pairs."""


def check_per_epoch(config: Any, name: str) -> list[float]:
    """The values of the field `name`, a number or one for each epoch, which becomes a number where there is one.

    ValueError for an empty list.
    """
    value = getattr(config, name)
    values = [float(one) for one in value] if isinstance(value, (list, tuple)) else [float(value)]
    if not values:
        raise ValueError(f"`{name}` is empty: give a number, or one for each epoch.")
    setattr(config, name, values[0] if len(values) == 1 else values)
    return values


def of_epoch(value: float | list[float], epoch: float | None) -> float:
    """The value of this epoch; the last one of a list stands for all that follow."""
    return value[min(int(epoch or 0), len(value) - 1)] if isinstance(value, list) else value


# Who is better


def judged(reward_funcs: Any, judge: Any, args: Any) -> Any:
    """The reward functions of a trainer: as given, `args.reward_model_path`, or the judge as one.

    ValueError where there are none of them, or a judge besides rewards or with `missing_eos_penalty`.
    """
    if judge is None:
        if not reward_funcs and not args.reward_model_path:
            raise ValueError("`reward_funcs` is missing: give functions or reward models, or a `judge`.")
        return reward_funcs or args.reward_model_path
    if reward_funcs or args.reward_model_path:
        raise ValueError("`judge` and rewards are both given: give one of them.")
    if args.missing_eos_penalty is not None:
        raise ValueError("`missing_eos_penalty` is taken off scores, which a `judge` does not give: unset it.")
    return judge_reward(judge)


def judge_reward(judge: Any) -> Callable[..., list[float | None]]:
    """`judge` as a reward function on pairs of neighbours: the probability that each is the better one.

    A judge whose `judge` takes `return_scores` is asked for the probability of the first; others give 1 and 0, or
    None for both where it cannot be told.
    """
    scores = "return_scores" in inspect.signature(judge.judge).parameters

    def judge_probability(prompts: list, completions: list, **kwargs: Any) -> list[float | None]:
        pairs = [[a, b] for a, b in zip(completions[::2], completions[1::2], strict=True)]
        answers = judge.judge(prompts[::2], pairs, **({"return_scores": True} if scores else {}))
        if len(answers) != len(pairs):
            raise ValueError(f"The judge returned {len(answers)} answers for {len(pairs)} pairs; give one each.")
        found: list[float | None] = []
        for answer in answers:
            if answer is None or not answer >= 0:
                found += [None, None]
                continue
            first = float(answer) if scores else 1.0 - answer  # else the place of the better one
            found += [first, 1.0 - first]
        return found

    return judge_probability


def own_tokens(
    trainer: Any, reward_funcs: Any, processing_classes: Any, make: Callable[..., RewardPool]
) -> RewardPool:
    """The pool of `make`, in which reward models that have no tokenizer of their own read the sampled ids."""
    count = len(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else 1
    given = processing_classes if isinstance(processing_classes, (list, tuple)) else [processing_classes] * count
    pool = make(reward_funcs, [trainer.processing_class if one is None else one for one in given])
    for function in pool.functions:
        if isinstance(function, RewardModel):
            function.reads_ids = function.processing_class is trainer.processing_class
    return pool


def check_arguments(trainer: Any, data_collator: Any, compute_metrics: Any, preprocess_logits: Any) -> None:
    """Warn of a collator; ValueError for what would need logits of an evaluation, which samples."""
    if data_collator is not None:
        logger.warning("`data_collator` has no effect: prompts are not padded, and completions are sampled.")
    for name, value in {
        "compute_metrics": compute_metrics,
        "preprocess_logits_for_metrics": preprocess_logits,
    }.items():
        if value is not None:
            raise ValueError(
                f"`{name}` is not supported by {trainer._name}: evaluation samples completions and has no labels. "
                "Give a reward function; its mean is logged."
            )


def add_opponent(trainer: Any, engine: Any) -> None:
    """Let the trainer's rollouts take the second completion of each prompt from `engine`."""
    args = trainer.args
    other = Rollouts(
        engine, trainer.processing_class, trainer.sampling, chat_template_kwargs=args.chat_template_kwargs
    )
    trainer.rollouts = OpponentRollouts(trainer.rollouts, other)


def check_sharding(trainer: Any) -> None:
    """ValueError under FSDP: the embedded engine samples the opponent."""
    if is_fsdp(trainer.accelerator):
        raise ValueError(
            f"{trainer._name} is not supported under FSDP: the embedded engine samples the opponent, and needs whole "
            "weights. Train with DDP."
        )


def shorten_prompts(batch: GenerationBatch, max_length: int) -> None:
    """Leave out the beginning of prompts for the loss, so that the longer completion of a pair fits."""
    for first, second in zip(batch.experiences[::2], batch.experiences[1::2], strict=True):
        longest = max(len(first.completion_ids), len(second.completion_ids))
        keep = max(max_length - longest, 1)
        for one in (first, second):
            one.prompt_ids = one.prompt_ids[-keep:]


def pair_scores(trainer: Any, batch: GenerationBatch) -> tuple[Tensor, Tensor]:
    """(B, 2) weighted rewards of this rank's pairs less `missing_eos_penalty`, NaN where none is known, and (B, 2)
    bool, whether the completions contain an end token. Pairs that cannot be compared, or with a completion without
    tokens, are not learned from, and counted in `frac_unranked`."""
    known, penalty = batch.rewards[batch.own], trainer.args.missing_eos_penalty
    scores = (known * trainer.rewards.weights).nansum(1).masked_fill(known.isnan().all(1), torch.nan)
    ends = set(trainer.end_ids)
    ended = torch.tensor([not ends.isdisjoint(one.completion_ids) for one in batch.samples], dtype=torch.bool)
    scores, ended = (scores if penalty is None else scores - penalty * ~ended).view(-1, 2), ended.view(-1, 2)
    pairs = list(zip(batch.experiences[::2], batch.experiences[1::2], strict=True))
    empty = torch.tensor([not one.completion_ids for one in batch.samples], dtype=torch.bool).view(-1, 2)
    unranked = (scores.isnan() | empty).any(1)
    for pair in (pairs[k] for k in unranked.nonzero()[:, 0].tolist()):
        forget(pair)
    metrics, (first, second) = trainer.metrics, scores.unbind(1)
    metrics.mean("frac_unranked", unranked.sum(), len(scores))
    metrics.mean("frac_reward_zero_std", (first == second).sum(), len(scores))
    return scores, ended


def rank_pairs(batch: GenerationBatch, scores: Tensor) -> Tensor:
    """(B,) 1 where the first completion of a pair scores at least as high, else -1; the experiences keep it."""
    better = torch.where(scores[:, 0] >= scores[:, 1], 1.0, -1.0)
    for place, one in enumerate(batch.experiences):
        one.values |= {"better": float(better[place // 2]), "score": float(scores[place // 2, place % 2])}
    return better


def record_known(metrics: Any, name: str, values: Tensor) -> None:
    """The mean of `values` that are not NaN."""
    known = values[~values.isnan()]
    metrics.mean(name, known.sum(), known.numel(), skip_empty=True)


def forget(experiences: Iterable[Any]) -> None:
    """Learn nothing from them."""
    for one in experiences:
        one.learned_at, one.tokens = one.learned_at[:0], {name: value[:0] for name, value in one.tokens.items()}


# The update


def mean_weights(step: Step) -> list[list[float]]:
    """For each part the weight of its experiences: of a mean over those that are learned from, averaged over parts."""
    counts = [max(sum(one.num_learned > 0 for one in part), 1) for part in step.parts]
    return [[1 / (count * step.num_micro)] * len(part) for part, count in zip(step.parts, counts, strict=True)]


@dataclass
class SampledPairs:
    """A batch of B pairs after its forward; rows are 2k and 2k + 1 for pair k."""

    loss: Tensor  # 0-dim
    result: PreferenceResult  # chosen and rejected are the first and second completion, except in rewards
    losses: Tensor  # (B,)
    logps: Tensor  # (B, 2) sums over completions, nats
    ref_logps: Tensor  # (B, 2)
    better: Tensor  # (B,) 1: the first one, -1: the second one

    def ordered(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the better and of the worse completion, (B,) each, of values (B, 2)."""
        first, second = values.unbind(1)
        return torch.where(self.better > 0, first, second), torch.where(self.better > 0, second, first)


def run_pairs(trainer: Any, model: nn.Module, batch: GroupBatch, *, alpha: float = 0.0) -> SampledPairs:
    """The forward of a batch of pairs: `sampled_pair_loss`, a mean over the pairs of each nominal micro-batch."""
    args, device = trainer.args, batch.targets.device
    better = [one.values.get("better", 1.0) for one in batch.experiences[::2]]
    of_parts = [weights[0] for weights in mean_weights(batch.step)]
    is_real = [one.group >= 0 for one in batch.experiences[::2]]
    weight = torch.tensor([2 * of_parts[n] * real for n, real in zip(batch.micro[::2], is_real, strict=True)])
    own = {"better": torch.tensor(better).to(device), "pair_weight": weight.to(device), "alpha": alpha}
    ref_logps = answer_logps(batch, batch.extras["ref_logp"])
    found = pair_loss(
        model,
        batch,
        sampled_pair_loss,  # pyright: ignore[reportArgumentType]
        outputs=(),
        router=trainer.router_inputs(),
        ref_logps=ref_logps,
        pair_divisor=1.0,
        beta=of_epoch(args.beta, trainer.state.epoch),
        loss_type=args.loss_type,
        **own,
    )
    result: PreferenceResult = found.result
    logps = torch.stack([result.chosen_logps, result.rejected_logps], 1)
    watch_drift(trainer.metrics, logps.flatten() - ref_logps.to(logps), batch.extras["lengths"])
    watch_pulls(trainer.metrics, result.pulls)
    return SampledPairs(
        trainer.with_router_loss(found.loss, found.aux_loss),
        result,
        result.losses / own["pair_weight"].clamp(min=1e-30),
        logps,
        ref_logps.to(logps).view(-1, 2),
        own["better"],
    )


def record_pairs(trainer: Any, batch: GroupBatch, found: SampledPairs, values: dict[str, Tensor]) -> None:
    """TRL's objective/kl and entropy (over completions), rewards/*, beta, and `values` (B,) or (B, 2) by name."""
    log, result = trainer.statistics(batch), found.result
    is_real = torch.tensor([one.group >= 0 for one in batch.experiences], device=found.logps.device)
    values = values | {
        "objective/kl": found.logps - found.ref_logps,
        "objective/entropy": -found.logps,
        "rewards/chosen": result.chosen_rewards,
        "rewards/rejected": result.rejected_rewards,
        "rewards/accuracies": result.accuracies,
        "rewards/margins": result.margins,
    }
    for name, value in values.items():
        by_row = value.flatten() if value.dim() == 2 else value.repeat_interleave(2)
        log.mean_of_rows(name, by_row * is_real)
    if batch.is_last:
        log.record(trainer.metrics)
        trainer.metrics.mean("beta", of_epoch(trainer.args.beta, trainer.state.epoch))
