"""The base of trainers whose data is sampled: prompts in, completions, rewards, batches of them, and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from .adapters import add_adapter
from .config import AlignConfig
from .given_data import as_config
from .loop import Trainer
from .loop.distributed import is_fsdp
from .loop.selective import enable_selective_checkpointing
from .models import LoadedModel, model_name, resolve_model, router_loss_coefficient, set_pad_token
from .pairs import disable_dropout
from .policy import prepare_policy, token_stats
from .policy_check import quiet
from .reference import Reference
from .rollout.buffer import Buffer, Experience
from .rollout.completions_log import CompletionsLog
from .rollout.function_rollouts import FunctionRollouts
from .rollout.generation import GenerationBatch, exchange, sample_share
from .rollout.group_batches import GroupBatch
from .rollout.health import findings_of, watch_samples
from .rollout.loader import BatchPlan, EvaluationLoader, RolloutLoader, Step
from .rollout.overlap import Ahead
from .rollout.prompts import check_prompts, end_ids, training_prompts
from .rollout.rewards import RewardPool
from .rollout.samples import Sample
from .rollout.setup import Sources, add_own_rewards, make_collator, make_own_engine, make_rewards, make_rollouts
from .rollout.statistics import UpdateStatistics, record_staleness
from .rollout.update import attach, batches_of_step, remember, run_pass


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
    rows_of_one = 1  # completions that batch sizes count as one,
    learned_of_one = 1  # and those of them that are learned from: they stay together in a batch
    attach = staticmethod(attach)
    _name, takes_images = "", False
    _tag_names: list[str] = []
    _synced_step = -1  # steps that the weights of the engine have made; -1: brought anew before it samples

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
        kind = {"has_environment": environment_factory is not None, "takes_images": self.takes_images}
        size = self.prompts_per_generation()
        train_dataset = training_prompts(train_dataset, config, size, **kind)
        eval_dataset = check_prompts("eval_dataset", eval_dataset, config, **kind)
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
        given: dict[str, Any] = {"callbacks": callbacks, "optimizers": optimizers} | loop_arguments
        own, data = self.loaded, {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(own.model, config, list, **data, processing_class=own.processing_class, **given)
        self._make_parts(Sources(tools, rollout_func, environment_factory), reward_funcs, reward_processing_classes)
        if self.needs_reference():
            self.reference = Reference.make(
                self, ref_model, (), has_new_adapter=peft_config is not None, quantization_config=quantization_config
            )
        for one in (self.model, self.reference and self.reference.model):
            if one is not None and getattr(config, "disable_dropout", False):
                disable_dropout(one)
        self.model.add_model_tags(self._tag_names)

    def _make_parts(self, sources: Sources, reward_funcs, processing_classes) -> None:
        """What turns prompts into batches."""
        args = self.args
        self.policy = prepare_policy(self.model)
        self.collator = make_collator(self)
        self.reference: Reference | None = None
        self.has_tools = sources.has_tools
        self.engine = make_own_engine(self, sources)
        self.rollouts = make_rollouts(self, sources)
        self.rewards = self.make_rewards(reward_funcs, processing_classes)
        add_own_rewards(self.rewards, self.rollouts)
        shown = args.log_completions and self.is_world_process_zero()
        self.completions_log = CompletionsLog(args) if shown else None
        self.train_loader: RolloutLoader | None = None
        self.ahead: Ahead | None = None

    # What algorithms override

    def check(self) -> None:
        """Raise ValueError where `self.args`, `self.sampling` and `self.loaded` contradict each other."""

    def prompts_per_generation(self) -> int:
        """Prompts of a generation batch, over all ranks."""
        return self.args.generation_batch_size // self.args.num_generations

    @property
    def loss_temperature(self) -> float:
        """Divides the logits of the loss, of the reference and of old log-probabilities."""
        return self.args.temperature

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
        size = batch.left * self.args.per_device_train_batch_size * self.rows_of_one
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

    def make_rewards(self, reward_funcs, processing_classes) -> RewardPool:
        """What scores completions."""
        return make_rewards(self.args, reward_funcs, processing_classes)

    def batch_plan(self) -> BatchPlan:
        """The sizes of training."""
        return BatchPlan.of_training(self.args, self.rank, self.world, self.rows_of_one)

    # Data

    def get_train_dataloader(self) -> Any:
        """Micro-batches of completions, sampled when they are asked for."""
        args, plan = self.args, self.batch_plan()
        depth, self._synced_step = getattr(args, "max_staleness", 0), -1
        self.train_loader = RolloutLoader(
            self.train_dataset,
            plan,
            generate=lambda rows, number, left, more: self.generate(rows, plan, number, left=left, following=more),
            cut=self.batches_of,
            current_step=lambda: self.state.global_step,
            shuffle=args.shuffle_dataset,
            seed=args.seed,
            ahead=depth,
            last_step=lambda: self.state.max_steps,
        )
        if depth:
            self.ahead = Ahead(self.engine, lambda *given: self._sample(plan, *given), depth, lambda: self.state)
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
        plan = BatchPlan.of_evaluation(args, self.rank, self.world, self.rows_of_one)
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
        self, rows: list[dict], plan: BatchPlan, number: int, *, training: bool = True, left: int = 0, following=()
    ) -> Buffer:
        """This rank's part of generation batch `number`: sampled, scored, ready to be learned from.

        `rows` are the prompts of all ranks, `left` the micro-batches that are learned from before the weights change,
        `following` the (number, rows) of batches whose sampling may begin now.
        """
        if training and self.ahead is not None:
            made, self._synced_step = self.ahead.take(number, rows, following), -1
            record_staleness(self.metrics, made.samples, self.state.global_step)
        else:
            self._sync_engine()
            made = self._sample(plan, rows, number, self.state, training)
            if self.engine is not None:
                self.engine.sleep()
        self.metrics.mean("time/sampling", made.seconds)
        ends = {*self.end_ids, self.loaded.tokenizer.pad_token_id}  # pyright: ignore[reportUnhashable]
        news = {"training": training, "left": left, "server": getattr(self.engine, "new_counts", dict)()}
        batch = GenerationBatch.of(made, plan.num_generations, ends, self.learns, **news)
        self.score_ahead(batch)
        batch.scores = made.scores()
        exchange(
            batch, self.metrics, self.rewards.weights, ends, world=self.world, rank=self.rank, tools=self.has_tools
        )
        if training:
            watch_samples(self.metrics, batch, self.rewards.weights, self.sampling.distortions(self.loss_temperature))
        self.score(batch)
        if self.args.log_completions:
            rows = gather_object(batch.shown()) if self.world > 1 else batch.shown()
            if self.completions_log is not None:
                self.completions_log.keep(rows)
        if self.has_tools:
            self.rollouts.release(made.samples)
        return batch.buffer(plan.micro_size if training else None, self.state.global_step)

    def _sample(self, plan: BatchPlan, rows: list[dict], number: int, state: Any, training: bool = True):
        return sample_share(self.rollouts, self.rewards, plan, rows, number, self.args.seed, training, state)

    def _sync_engine(self) -> None:
        """The engine samples from the weights as they are now."""
        if self.ahead is not None:
            self.ahead.wait()
        if self.engine is not None and self._synced_step != self.state.global_step:
            self._synced_step = self.state.global_step
            self.metrics.mean("time/sync", self.engine.sync(self._synced_step).seconds)

    def score_ahead(self, batch: GenerationBatch) -> None:
        """The forward passes that the loss needs of samples, while their rewards are computed."""
        if (reference := self.reference) is not None:
            by = self.loss_temperature
            logps = self.run_pass(batch.experiences, lambda b: reference.token_logps(self.model, b, by))
            self.attach("ref_logp", batch.experiences, logps)
        if old := self.needs_old(batch):
            self.attach("old_logp", old, self.run_pass(old, self.policy_logps))

    def policy_logps(self, batch: GroupBatch) -> Tensor:
        """(N,) log-probabilities of the policy as it is now, without gradient."""
        with quiet(self.model), self.accelerator.autocast():
            return token_stats(self.model, batch, temperature=self.loss_temperature).stats.logp

    @property
    def knows_old(self) -> bool:
        """Whether log-probabilities as sampled are the training model's, as the loss takes them."""
        given, s = isinstance(self.rollouts, FunctionRollouts), self.sampling
        plain = not s.distortions(self.loss_temperature)
        return self.engine is not None and self.engine.exact and plain and not given and self.ahead is None

    def run_pass(self, experiences: list[Experience], forward: Callable[[GroupBatch], Tensor]) -> list[Tensor]:
        """`forward(batch) -> (N,)` of all learned tokens, in batches of a token budget; (n,) for each experience."""
        return run_pass(
            experiences,
            self.collator,
            lambda batch: forward(self._prepare_inputs(batch)),  # pyright: ignore[reportArgumentType]
            budget=self.args.token_budget,
            rounds=self._rounds,
        )

    def _rounds(self, count: int) -> int:
        """Batches that this rank has to run: under FSDP, which gathers weights in each, as many as any rank."""
        return max(gather_object([count])) if is_fsdp(self.accelerator) and self.world > 1 else count

    # One step

    def batches_of(self, step: Step) -> list[GroupBatch]:
        """The batches of a step that this rank runs."""
        args = self.args
        if self.knows_old:
            for part, made in zip(step.parts, step.made, strict=True):
                for one in part if step.number > made else ():
                    one.tokens.setdefault("old_logp", one.tokens["sampling_logp"])
        size = args.per_device_train_batch_size if step.training else args.per_device_eval_batch_size
        return batches_of_step(
            step,
            self.weights(step),
            self.collator,
            skips=self.skips if step.training else lambda _: False,
            size=size * self.learned_of_one,
            together=self.learned_of_one,
            budget=args.token_budget if step.training else None,
            rounds=self._rounds,
        )

    def statistics(self, batch: GroupBatch) -> UpdateStatistics:
        """What is added up over the step of `batch`, ready for its values; `record` it where `batch.is_last`."""
        return UpdateStatistics.of_step(batch, self.args.device)

    def remember_old(self, batch: GroupBatch, logp: Tensor) -> None:
        """Keep the log-probabilities (N,) of the first update for the later ones of the same samples."""
        if self.args.num_iterations > 1 and batch.step.training:
            remember("old_logp", batch.experiences, logp)

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

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch=None) -> Tensor:
        """Forward and backward of a batch; its time, and that of generating, is logged with the step's last one."""
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        inputs.step.seconds += time.perf_counter() - start
        if inputs.is_last:
            self.metrics.mean("step_time", inputs.step.seconds)
        return loss

    def prediction_step(self, model, inputs: Any, prediction_loss_only: bool, ignore_keys=None):
        """(loss, None, None) of one batch of evaluation."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # Log and checkpoints

    def findings(self, found: dict, history: list[dict], past: list[dict]) -> dict[str, float]:
        """What the newest of the logs `history` shows of samples, besides what the loop has `found`."""
        return findings_of(self, found, history, past)

    def train(self, *args, **kwargs):
        """As the loop's; nothing is sampled any more when it returns or raises."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.ahead is not None:
                self.ahead.close()

    def _end(self, metrics: dict[str, float]):
        self._synced_step = -1  # the best weights may come back
        return super()._end(metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and show completions."""
        super().log(logs, start_time)
        if self.completions_log is not None:
            self.completions_log.show(self.state.global_step)

    def state_dict(self) -> dict:
        """The loop's, and the generation batch that is not used up."""
        buffer = None if self.train_loader is None else self.train_loader.buffer
        own = {"buffer": buffer and buffer.state_dict(), "ahead": self.ahead and self.ahead.state_dict()}
        return super().state_dict() | own | {"health": self.health.past}

    def load_state_dict(self, state: dict) -> None:
        """Continue in the middle of a generation batch."""
        super().load_state_dict(state)
        if state.get("buffer") is not None and self.train_loader is not None:
            self.train_loader.buffer = Buffer.from_state(state["buffer"])
        self.health.past = state.get("health") or []
        if self.ahead is not None:
            self.ahead.load_state_dict(state.get("ahead") or {})
