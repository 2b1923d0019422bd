"""The base of trainers whose data is sampled: prompts in, completions, rewards, batches of them, and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import TrainingArguments, set_seed

from .adapters import add_adapter
from .config import AlignConfig
from .data.formats import first_row, has_images
from .given_data import as_config
from .loop import Trainer
from .loop.distributed import is_fsdp
from .loop.selective import enable_selective_checkpointing
from .models import LoadedModel, model_name, position_limit, resolve_model, router_loss_coefficient, set_pad_token
from .pairs import disable_dropout
from .policy import prepare_policy, token_stats
from .policy_check import quiet
from .reference import Reference
from .rollout.buffer import Buffer, Experience
from .rollout.choose import make_engine
from .rollout.completions_log import CompletionsLog
from .rollout.episodes import Rollouts
from .rollout.function_rollouts import FunctionRollouts
from .rollout.group_batches import GroupBatch, GroupCollator, cut
from .rollout.loader import BatchPlan, EvaluationLoader, RolloutLoader, Step
from .rollout.rewards import PendingScores, RewardPool, join_scores
from .rollout.samples import Sample
from .rollout.statistics import (
    GenerationBatch,
    UpdateStatistics,
    record_rewards,
    record_samples,
    reordered,
    sample_facts,
)

PASS_TOKENS = 16384  # of a batch that runs without gradient, where no token budget is set


class SampledDataTrainer(Trainer):
    """Samples completions from the policy, scores them, and hands them out as batches; an algorithm learns from them.

    Algorithms set `config_class` (SamplingArgs, EngineArgs, RewardArgs, BatchArgs, CompletionLogArgs, ModelArgs,
    AlignConfig) and override `score` (rewards -> advantages or labels), `weights` (of tokens in the loss) and
    `compute_loss`; where they differ from GRPO also `needs_reference`, `needs_old`, `skips` and `learns`. The order of
    one generation batch: sample; `score_ahead` (forward passes, while rewards are computed); gather the rewards of all
    ranks; `score`. The order of one step: `skips`, `weights`, cut into batches, `compute_loss` for each.
    """

    config_class: type[AlignConfig]
    args: Any
    loss_is_normalized = True  # by `weights`
    _name = ""
    _tag_names: list[str] = []

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: AlignConfig | TrainingArguments | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        tools: list[Callable] | None = None,
        rollout_func: Callable[[list, Any], dict] | None = None,
        environment_factory: Any = None,
        *,
        ref_model=None,
        **loop_arguments,
    ):
        if not isinstance(model, str) and not hasattr(model, "config"):
            raise TypeError(f"`model` must be a name, a PreTrainedModel or a PeftModel, got `{type(model).__name__}`.")
        config: Any = as_config(args, self.config_class, f"{model_name(model).split('/')[-1]}-{self._name}")
        self.args = config
        train_dataset = _checked(self, train_dataset, eval_dataset, environment_factory)
        set_seed(config.seed)  # adapters start from random weights
        self.loaded: LoadedModel = resolve_model(model, config, quantization_config, processing_class)
        self.end_ids = end_ids(self.loaded)
        self.sampling = config.sampling(self.end_ids)
        self.check()
        add_adapter(self.loaded, peft_config, config)
        self.router_coefficient = router_loss_coefficient(self.loaded.model, config.router_aux_loss_coef)
        set_pad_token(self.loaded)
        if config.selective_checkpointing:
            enable_selective_checkpointing(self.loaded.model)
        super().__init__(
            model=self.loaded.model,
            args=config,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.loaded.processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            **loop_arguments,
        )
        self.policy = prepare_policy(self.model)
        if getattr(config, "disable_dropout", False):
            disable_dropout(self.model)
        self.collator = self.make_collator()
        self.reference = None
        if self.needs_reference():
            self.reference = Reference.make(
                self, ref_model, (), has_new_adapter=peft_config is not None, quantization_config=quantization_config
            )
            if getattr(config, "disable_dropout", False) and self.reference.model is not None:
                disable_dropout(self.reference.model)
        self.rewards = self.make_rewards(reward_funcs, reward_processing_classes)
        self.has_tools = bool(tools) or environment_factory is not None
        self.engine = None
        if rollout_func is None or config.use_vllm:
            self.engine = make_engine(
                config, self.model, self.processing_class, accelerator=self.accelerator, sampling=self.sampling
            )
        self.rollouts = self.make_rollouts(tools, rollout_func, environment_factory)
        self.completions_log = None
        if config.log_completions and self.is_world_process_zero():
            self.completions_log = CompletionsLog(config)
        self.train_loader: RolloutLoader | None = None
        self._buffer_state: dict | None = None
        self._synced_step = -1
        self.model.add_model_tags(self._tag_names)

    # What algorithms override

    def check(self) -> None:
        """Raise ValueError where `self.args`, `self.sampling` and `self.loaded` contradict each other."""

    def needs_reference(self) -> bool:
        """Whether experiences get `tokens["ref_logp"]`."""
        return bool(getattr(self.args, "beta", 0.0))

    def needs_old(self, batch: GenerationBatch) -> list[Experience]:
        """Experiences that get `tokens["old_logp"]` from a pass of the weights that sampled them.

        Only those that are learned from after these weights have changed: the first update makes the numbers of the
        others, and `knows_old` says when those as sampled do.
        """
        if not batch.training or self.knows_old:
            return []
        size = batch.left * self.args.per_device_train_batch_size
        return batch.experiences[size:]

    def learns(self, sample: Sample, truncated: bool) -> bool:
        """Whether the loss sees `sample` at all."""
        return not (truncated and getattr(self.args, "mask_truncated_completions", False))

    def score(self, batch: GenerationBatch) -> None:
        """Make of `batch.rewards` (N, K), of all ranks, what the loss needs of `batch.experiences` (n, this rank)."""
        raise NotImplementedError

    def weights(self, step: Step) -> list[list[float]]:
        """Weight of the loss of each token of an experience, for each nominal micro-batch of `step`; gradients are
        averaged over ranks and added up over the step."""
        raise NotImplementedError

    def skips(self, experience: Experience) -> bool:
        """Whether the loss of `experience` is a constant, so that it needs no forward."""
        return False

    # Parts, made once

    def make_collator(self) -> GroupCollator:
        """Batches that share prompts where that saves work and a router's balancing loss does not see the prompt."""
        args, policy = self.args, self.policy
        if args.share_prefix and not policy.shares_prefix:
            raise ValueError(
                f"`share_prefix=True`, but this model's completions cannot share a prompt: {policy.reason}. Set it to "
                "False."
            )
        share = args.share_prefix if policy.shares_prefix else False
        return GroupCollator(
            pad_token_id=self.loaded.tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType] (set by now)
            flat=policy.flat,
            share=False if share is None and self.router_coefficient else share,
            whole=bool(self.router_coefficient),
            longest=position_limit(self.model),
            pad_to_multiple_of=args.padding_multiple,
        )

    def make_rewards(self, reward_funcs, processing_classes) -> RewardPool:
        """The reward functions; ValueError where there are none."""
        args = self.args
        if reward_funcs is None or (isinstance(reward_funcs, (list, tuple)) and not reward_funcs):
            raise ValueError("`reward_funcs` is empty: give a function, a reward model, or a list of them.")
        return RewardPool(
            reward_funcs,
            args.reward_weights,
            processing_classes,
            device=args.device,
            timeout=args.reward_timeout,
            on_error=args.reward_on_error,
            chat_template_kwargs=args.chat_template_kwargs,
            model_init_kwargs=args.model_init_kwargs,
        )

    def make_rollouts(self, tools, rollout_func, environment_factory) -> Any:
        """What samples: `run(rows, num_generations, seed) -> Iterator[Group]`."""
        args = self.args
        if rollout_func is not None:
            if self.has_tools:
                raise ValueError(
                    "`rollout_func` makes whole rollouts, so `tools` and `environment_factory` are its own."
                )
            return FunctionRollouts(
                rollout_func,
                self,
                self.processing_class,
                self.end_ids,
                chat_template_kwargs=args.chat_template_kwargs,
            )
        options: dict[str, Any] = {}
        if self.has_tools:
            options = {"tools": tools, "environment_factory": environment_factory}
            options["max_tool_calling_iterations"] = args.max_tool_calling_iterations
        return Rollouts(
            self.engine,  # pyright: ignore[reportArgumentType]
            self.processing_class,
            self.sampling,
            chat_template_kwargs=args.chat_template_kwargs,
            **options,
        )

    # Data

    def batch_plan(self) -> BatchPlan:
        """The sizes of training."""
        args = self.args
        return BatchPlan(
            micro_size=args.per_device_train_batch_size,
            num_parts=args.steps_per_generation,
            num_iterations=args.num_iterations,
            accumulation=args.gradient_accumulation_steps,
            num_generations=args.num_generations,
            rank=self.rank,
            world=self.world,
        )

    def get_train_dataloader(self) -> Any:
        """Micro-batches of completions, sampled when they are asked for."""
        args, plan = self.args, self.batch_plan()
        self.train_loader = RolloutLoader(
            self.train_dataset,
            plan,
            generate=lambda rows, number, left: self.generate(rows, plan, number, left=left),
            cut=self.batches_of,
            current_step=lambda: self.state.global_step,
            shuffle=args.shuffle_dataset,
            seed=args.seed,
        )
        return self.train_loader

    def get_eval_dataloader(self, eval_dataset=None) -> Any:
        """Batches of completions of an evaluation set."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Evaluation needs an eval_dataset.")
        args = self.args
        args.check_eval_batch()
        plan = BatchPlan(
            micro_size=args.per_device_eval_batch_size,
            num_parts=1,
            num_iterations=1,
            accumulation=1,
            num_generations=args.num_generations_eval or args.num_generations,
            rank=self.rank,
            world=self.world,
        )
        return EvaluationLoader(
            dataset,
            plan,
            generate=lambda rows, number: self.generate(rows, plan, number, training=False),
            cut=self.batches_of,
            current_step=lambda: self.state.global_step,
            seed=args.seed,
        )

    # One generation batch

    def generate(
        self, rows: list[dict], plan: BatchPlan, number: int, *, training: bool = True, left: int = 0
    ) -> Buffer:
        """This rank's part of generation batch `number`: sampled, scored, ready to be learned from.

        `rows` are the prompts of all ranks; `left`: micro-batches that are learned from before the weights change.
        """
        shares = plan.share(rows)
        self._sync_engine()
        entropy = (self.args.seed, int(training), number, self.rank)
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        samples, pending, order = self._sample([(rows[place], count) for place, count in shares], seed)
        places = [place for place, count in shares for _ in range(count)]
        facts = sample_facts(samples, {*self.end_ids, self.loaded.tokenizer.pad_token_id})
        experiences = [
            Experience.of(one, number * len(rows) + place, learn=self.learns(one, bool(truncated)))
            for one, place, truncated in zip(samples, places, facts["truncated"], strict=True)
        ]
        batch = GenerationBatch(samples, experiences, plan.num_generations, training, left)
        self.score_ahead(batch)
        batch.scores = reordered(join_scores([one.result() for one in pending]), order)
        self._gather(batch, facts)
        self.score(batch)
        if self.args.log_completions:
            self._keep_completions(batch)
        size = plan.micro_size if training else max(len(experiences), 1)
        parts = [experiences[i : i + size] for i in range(0, len(experiences), size)] or [[]]
        return Buffer(parts, self._num_items, self.state.global_step)

    def _sync_engine(self) -> None:
        """The engine samples from the weights as they are now."""
        step = self.state.global_step
        if self.engine is not None and self._synced_step != step:
            self.engine.sync(step)
            self._synced_step = step

    def _sample(
        self, wanted: list[tuple[dict, int]], seed: int
    ) -> tuple[list[Sample], list[PendingScores], list[int]]:
        """(samples row by row, scores of them being made, the place of each scored sample among the samples)."""
        repeats = math.gcd(*(count for _, count in wanted)) if wanted else 1
        rows = [row for row, count in wanted for _ in range(count // repeats)]
        found: list[list[Sample]] = [[] for _ in rows]
        pending, order, waiting = [], [], []
        at_once = max(1, len(rows) // 8)  # calls of reward functions see a few groups each, and begin early

        def submit() -> None:
            pending.append(self.rewards.submit([one for index in waiting for one in found[index]], self.state))
            order.extend(index * repeats + i for index in waiting for i in range(repeats))
            waiting.clear()

        for group in self.rollouts.run(rows, repeats, seed):
            found[group.index] = group.samples
            waiting.append(group.index)
            if len(waiting) >= at_once:
                submit()
        if waiting or not pending:
            submit()
        if self.engine is not None:
            self.engine.sleep()
        return [sample for group in found for sample in group], pending, order

    def score_ahead(self, batch: GenerationBatch) -> None:
        """The forward passes that the loss needs of samples, while their rewards are computed."""
        if self.reference is not None:
            reference = self.reference
            logps = self.run_pass(
                batch.experiences, lambda b: reference.token_logps(self.model_wrapped, b, self.args.temperature)
            )
            self.attach("ref_logp", batch.experiences, logps)
        if old := self.needs_old(batch):
            self.attach("old_logp", old, self.run_pass(old, self._policy_logps))

    def _policy_logps(self, batch: GroupBatch) -> Tensor:
        with quiet(self.model), self.accelerator.autocast():
            return token_stats(self.model, batch, temperature=self.args.temperature).stats.logp

    @property
    def knows_old(self) -> bool:
        """Whether log-probabilities as sampled are those of the training model over the whole vocabulary."""
        plain = not (self.sampling.truncates or self.sampling.options or self.sampling.regex)
        return (
            self.engine is not None
            and self.engine.exact
            and plain
            and self.sampling.repetition_penalty == 1.0
            and (not isinstance(self.rollouts, FunctionRollouts))
        )

    def run_pass(self, experiences: Sequence[Experience], forward: Callable[[GroupBatch], Tensor]) -> list[Tensor]:
        """`forward(batch) -> (N,)` over all learned tokens, in batches of a token budget; (n,) for each experience."""
        kept = [one for one in experiences if one.num_learned]
        share = self.collator.shares(kept)
        budget = self.args.token_budget or PASS_TOKENS
        batches = cut(kept, self.collator, size=len(kept), budget=budget, share=share) if kept else []
        found: dict[int, Tensor] = {}
        for number in range(self._rounds(len(batches))):
            batch = self.collator(batches[min(number, len(batches) - 1)], share)
            values = forward(self._prepare_inputs(batch))
            for one, part in zip(batch.experiences, values.split([e.num_learned for e in batch.experiences])):
                found[id(one)] = part
        return [found.get(id(one), torch.zeros(0)) for one in experiences]

    def _rounds(self, count: int) -> int:
        """Batches that this rank has to run: under FSDP, which gathers weights in each, as many as any rank."""
        if not is_fsdp(self.accelerator) or self.world == 1:
            return count
        return max(gather_object([count]))

    @staticmethod
    def attach(name: str, experiences: Sequence[Experience], values: Sequence[Tensor]) -> None:
        """Keep (n,) values of the learned tokens of each experience as `tokens[name]`."""
        for one, value in zip(experiences, values, strict=True):
            one.tokens[name] = value

    def _gather(self, batch: GenerationBatch, facts: dict[str, np.ndarray]) -> None:
        """Rewards and facts of all ranks' samples into `batch` and the metrics: one exchange per generation batch."""
        scores, metrics = batch.scores, self.metrics
        assert scores is not None
        learned = sum(one.num_learned for one in batch.experiences)
        mine = {"rewards": scores.rewards, "lost": scores.lost, "facts": facts, "learned": learned}
        mine |= {"metrics": scores.metrics, "failures": scores.failures}
        ranks = gather_object([mine]) if self.world > 1 else [mine]
        sizes = [len(part["rewards"]) for part in ranks]
        batch.own = slice(sum(sizes[: self.rank]), sum(sizes[: self.rank + 1]))
        batch.rewards = torch.cat([part["rewards"] for part in ranks])
        if batch.training:
            replace(scores, rewards=batch.rewards, lost=torch.cat([part["lost"] for part in ranks])).check()
        self._num_items = max(sum(part["learned"] for part in ranks), 1) / self.world
        metrics.tokens(int(facts["prompt"].sum() + facts["drawn"].sum()))
        everywhere = {name: np.concatenate([part["facts"][name] for part in ranks]) for name in facts}
        record_samples(metrics, everywhere, self.has_tools)
        record_rewards(metrics, self.rewards.names, batch.rewards, self.rewards.weights)
        for name in sorted({name for part in ranks for name in part["metrics"]}):
            values = [value for part in ranks for value in part["metrics"].get(name, [])]
            metrics.mean(name, sum(values), len(values))
        for name in sorted({name for part in ranks for name in part["failures"]}):
            failed = sum(part["failures"].get(name, 0) for part in ranks)
            metrics.mean(f"rewards/{name}/failures", failed)

    def _keep_completions(self, batch: GenerationBatch) -> None:
        """Completions of all ranks for the log of the main process."""
        assert batch.scores is not None
        advantages = batch.advantages[batch.own].tolist()
        rows = []
        for i, sample in enumerate(batch.samples):
            row = {"prompt": sample.row.get("prompt"), "completion": sample.completion}
            row |= dict(zip(batch.scores.names, batch.scores.rewards[i].tolist(), strict=True))
            row |= {name: values[i] for name, values in batch.scores.columns.items()}
            rows.append(row | ({"advantage": advantages[i]} if advantages else {}))
        rows = gather_object(rows) if self.world > 1 else rows
        if self.completions_log is not None:
            self.completions_log.keep(rows)

    # One step

    def batches_of(self, step: Step) -> list[GroupBatch]:
        """The batches of a step that this rank runs; one at least, so that there is a gradient."""
        entries: dict[int, tuple[int, float]] = {}
        experiences: list[Experience] = []
        for micro, (part, weights) in enumerate(zip(step.parts, self.weights(step), strict=True)):
            for experience, weight in zip(part, weights, strict=True):
                if experience.num_learned and not (step.training and self.skips(experience)):
                    one = copy.copy(experience)  # it may be in the step more than once
                    if step.number > step.made[micro] and self.knows_old:
                        one.tokens.setdefault("old_logp", one.tokens["sampling_logp"])
                    entries[id(one)] = micro, weight
                    experiences.append(one)
        if not experiences:
            experiences = [_without_loss(step)]
            entries[id(experiences[0])] = 0, 0.0
        budget = self.args.token_budget if step.training else None
        size = self.args.per_device_train_batch_size if step.training else len(experiences)
        share = self.collator.shares(experiences)
        parts = cut(experiences, self.collator, size=size, budget=budget, share=share)
        if (most := self._rounds(len(parts))) > len(parts):
            parts = cut(experiences, self.collator, size=size, budget=budget, share=share, at_least=most)
            while len(parts) < most:
                parts.append([_without_loss(step)])
                entries[id(parts[-1][0])] = 0, 0.0
        made = [self._batch(part, entries, step, share) for part in parts]
        made[-1].is_last = True
        return made

    def _batch(self, part: list[Experience], entries: dict, step: Step, share: bool) -> GroupBatch:
        batch = self.collator(part, share)
        counts = [one.num_learned for one in part]
        batch.micro = [entries[id(one)][0] for one in part]
        batch.weight = torch.from_numpy(np.repeat(np.float32([entries[id(one)][1] for one in part]), counts))
        advantages = torch.from_numpy(np.repeat(np.float32([one.advantage for one in part]), counts))
        batch.extras.setdefault("advantages", advantages)
        batch.step, batch.is_last = step, False
        return batch

    def statistics(self, batch: GroupBatch) -> UpdateStatistics:
        """What is added up over the step of `batch`, ready for its values; `record` it where `batch.is_last`."""
        state = batch.step.state
        found = state.get("statistics") or state.setdefault(
            "statistics", UpdateStatistics(batch.step, self.args.device)
        )
        found.begin(batch)
        return found

    def remember_old(self, batch: GroupBatch, logp: Tensor) -> None:
        """Keep the log-probabilities (N,) of the first update for the later ones of the same samples."""
        if self.args.num_iterations == 1 or not batch.step.training:
            return
        counts = [one.num_learned for one in batch.experiences]
        for one, part in zip(batch.experiences, logp.split(counts), strict=True):
            one.tokens.setdefault("old_logp", part)

    def router_inputs(self) -> dict:
        """Arguments that make a mixture of experts return its balancing loss, where that is weighted."""
        return {"output_router_logits": True} if self.router_coefficient else {}

    def with_router_loss(self, loss: Tensor, aux_loss: Tensor | None) -> Tensor:
        """`loss` plus the weighted balancing loss, a mean over the step's batches."""
        if not self.router_coefficient or aux_loss is None:
            return loss
        self.metrics.mean("aux_loss", aux_loss.detach(), 1)
        steps = self.current_gradient_accumulation_steps if self.metrics.training else 1
        return loss + self.router_coefficient * aux_loss / steps

    def prediction_step(self, model, inputs: Any, prediction_loss_only: bool, ignore_keys=None):
        """(loss, None, None) of one batch of evaluation."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # Log and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and show completions."""
        super().log(logs, start_time)
        if self.completions_log is not None:
            self.completions_log.show(self.state.global_step)

    def state_dict(self) -> dict:
        """The loop's, and the generation batch that is not used up."""
        buffer = None if self.train_loader is None else self.train_loader.buffer
        return super().state_dict() | {"buffer": None if buffer is None else buffer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue in the middle of a generation batch."""
        super().load_state_dict(state)
        if state.get("buffer") is not None and self.train_loader is not None:
            self.train_loader.buffer = Buffer.from_state(state["buffer"])


def _without_loss(step: Step) -> Experience:
    """A stand-in that is run for nothing but its gradient of zero: the shortest sequence of the step, one token."""
    known = [one for part in step.parts for one in part if len(one.prompt_ids) and len(one.completion_ids)]
    shortest = min(known, key=lambda one: len(one.prompt_ids))
    zero = torch.zeros(1)
    names = {name for one in known for name in one.tokens}
    return Experience(
        shortest.prompt_ids,
        shortest.completion_ids[:1],
        np.zeros(1, np.int64),
        -1,
        tokens=dict.fromkeys(names, zero),
    )


def end_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's end token and all that the model's generation config names."""
    known = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    ids = [] if known is None else [known] if isinstance(known, int) else list(known)
    own = loaded.tokenizer.eos_token_id
    return tuple(ids if own is None or own in ids else [own, *ids])


def _checked(trainer: SampledDataTrainer, train_dataset, eval_dataset, environment_factory) -> Any:
    """The training set, checked; with environments alone it is rows without a prompt."""
    args = trainer.args
    if train_dataset is None:
        if environment_factory is None:
            raise ValueError("`train_dataset` is required, unless `environment_factory` makes the prompts.")
        if args.max_steps <= 0:
            raise ValueError(f"Without `train_dataset`, `max_steps` must be above 0; it is {args.max_steps}.")
        rows = args.generation_batch_size // args.num_generations
        train_dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * rows})
    parts = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for name, dataset in [("train_dataset", train_dataset), *(("eval_dataset", part) for part in parts)]:
        if dataset is None:
            continue
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise TypeError(f"`{name}` must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`.")
        sample = first_row(dataset, name)
        if "prompt" not in sample and environment_factory is None:
            raise ValueError(
                f"`{name}` has the columns {sorted(sample)}, but no `prompt`: rename the column that holds the "
                "prompts (text or messages)."
            )
        if has_images(sample):
            raise ValueError(f"`{name}` has images, which {type(trainer).__name__} does not take: drop those columns.")
    if isinstance(train_dataset, Dataset):
        size = args.generation_batch_size // args.num_generations
        if len(train_dataset) < size:
            raise ValueError(
                f"`train_dataset` has {len(train_dataset)} prompts, fewer than the {size} of one generation batch "
                "(generation_batch_size / num_generations). Add prompts, or lower `steps_per_generation`, "
                "`gradient_accumulation_steps` or `per_device_train_batch_size`."
            )
    return train_dataset
