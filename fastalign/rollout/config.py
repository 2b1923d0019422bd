"""Settings of trainers that sample: how, with which engine, how often, what it is worth, and what is shown of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from fastalign_kernels.losses.corrections import CORRECTION_MODES

from ..config import arg
from ..config_groups import at_least, deprecated, one_of
from .engine import Sampling

logger = logging.getLogger(__name__)
DICT_FIELDS = (  # that may be JSON
    *("model_init_kwargs", "generation_kwargs", "chat_template_kwargs", "transformers_continuous_batching_config"),
)


@dataclass
class SamplingArgs:
    """How completions are drawn."""

    max_completion_length: int | None = arg(512, "Longest completion, in tokens.")
    temperature: float = arg(1.0, "Divides the logits, of sampling and of the loss alike.")
    top_p: float = arg(1.0, "Sample from the smallest set of tokens with this probability; 1: from all.")
    top_k: int = arg(0, "Sample from this many most likely tokens; 0: from all.")
    min_p: float | None = arg(None, "Leave out tokens below this share of the likeliest one's probability.")
    generation_kwargs: dict[str, Any] | str | None = arg(
        None,
        "Further arguments of the engine (GenerationConfig, vLLM's SamplingParams), which win over the fields. The "
        "loss stays at `temperature`.",
    )
    chat_template_kwargs: dict[str, Any] | str | None = arg(None, "Arguments of the chat template.")
    repetition_penalty: float = arg(1.0, "Above 1: tokens that occurred before become less likely.")
    cache_implementation: str | None = arg(None, "Not supported: the engines bring their own caches.")

    def check_sampling_args(self) -> None:
        """ValueError for values that cannot be sampled or learned with."""
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ValueError(f"`max_completion_length` is {self.max_completion_length}; give at least 1 token.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` is {self.temperature}; it must be above 0: the loss divides by it.")
        given: Any = self.generation_kwargs or {}  # JSON was read by then
        if not given.get("temperature", 1.0) > 0:
            raise ValueError(
                f"`generation_kwargs` has a temperature of {given['temperature']}; it must be above 0: completions of "
                "a prompt would all be the same."
            )
        for name in ("max_new_tokens", "max_tokens"):
            if given.get(name, self.max_completion_length) != self.max_completion_length:
                raise ValueError(
                    f"`generation_kwargs` has {name}={given[name]}, but completions of "
                    f"{self.max_completion_length} tokens are what the loss counts with. Set the field "
                    f"`{'response_length' if hasattr(self, 'response_length') else 'max_completion_length'}` instead."
                )
        if "structured_outputs" in given and getattr(self, "vllm_structured_outputs_regex", None) is not None:
            raise ValueError(
                "`generation_kwargs` has structured_outputs, and `vllm_structured_outputs_regex` is set: give one."
            )
        if not 0 < self.top_p <= 1 or self.top_k < 0 or not 0 <= (self.min_p or 0) <= 1:
            raise ValueError(
                f"`top_p` is {self.top_p}, `top_k` {self.top_k}, `min_p` {self.min_p}: top_p must be above 0 and at "
                "most 1, top_k at least 0, min_p from 0 to 1 or None."
            )
        if self.cache_implementation is not None:
            raise ValueError(
                f"`cache_implementation={self.cache_implementation!r}` is not supported: the engines bring their own "
                "caches. Leave it unset."
            )

    def sampling(self, stop_ids: tuple[int, ...]) -> Sampling:
        """The same for the engine; a completion ends with one of `stop_ids`."""
        assert self.max_completion_length is not None
        given: Any = self.generation_kwargs or {}
        own = dict(given)
        values: dict[str, Any] = {
            "max_new_tokens": self.max_completion_length,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        values |= {name: own.pop(name) for name in list(own) if name in values}
        regex = getattr(self, "vllm_structured_outputs_regex", None)
        return Sampling(**values, stop_ids=stop_ids, regex=regex, options=own)


@dataclass
class EngineArgs:
    """What generates: the training model itself, vLLM in this process or as a server, Transformers."""

    use_vllm: bool = arg(False, "Generate with vLLM.")
    vllm_mode: str = arg(
        "colocate", "vLLM in this process, or a server that runs already.", choices=["server", "colocate"]
    )
    vllm_model_impl: str = arg("vllm", "Implementation of the model inside vLLM.", choices=["vllm", "transformers"])
    vllm_enable_sleep_mode: bool = arg(False, "Give back the engine's memory while the model trains.")
    vllm_structured_outputs_regex: str | None = arg(None, "Regular expression that every completion matches.")
    vllm_server_base_url: str | None = arg(
        None, "Address of the server, such as http://localhost:8000; wins over host and port."
    )
    vllm_server_host: str = arg("0.0.0.0", "Host of the server.")
    vllm_server_port: int = arg(8000, "Port of the server.")
    vllm_server_timeout: float = arg(240.0, "Seconds to wait for the server to be up.")
    vllm_group_port: int = arg(51216, "Port of the group that carries weights to the server.")
    vllm_gpu_memory_utilization: float = arg(0.3, "Share of the GPU's memory for vLLM in this process.")
    vllm_max_model_length: int | None = arg(
        None, "Longest prompt and completion together, in tokens; unset: the model's own limit."
    )
    vllm_tensor_parallel_size: int = arg(1, "GPUs over which vLLM in this process spreads the model.")
    use_transformers_continuous_batching: bool = arg(False, "Generate with Transformers' continuous batching.")
    transformers_continuous_batching_config: dict | str | None = arg(None, "Arguments of ContinuousBatchingConfig.")
    use_transformers_paged: bool = arg(False, "Deprecated: `use_transformers_continuous_batching`.")
    ds3_gather_for_generation: bool = arg(True, "Gather weights that DeepSpeed ZeRO-3 spreads; False has no effect.")

    def check_engine_args(self) -> None:
        """Read deprecated names; ValueError for values that contradict each other."""
        if self.use_transformers_paged:
            deprecated("`use_transformers_paged` is deprecated; use `use_transformers_continuous_batching`.")
            self.use_transformers_continuous_batching = True
        if not self.ds3_gather_for_generation:
            logger.warning(
                "`ds3_gather_for_generation=False` has no effect: weights of ZeRO-3 are gathered to sample."
            )
        one_of(self, "vllm_mode", ("server", "colocate"))
        one_of(self, "vllm_model_impl", ("vllm", "transformers"))
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise ValueError("`use_vllm` and `use_transformers_continuous_batching` are both True: set one of them.")


@dataclass
class RewardArgs:
    """What completions are worth."""

    reward_weights: list[float] | None = arg(None, "Weight of each reward function; unset: 1 each.")
    reward_timeout: float | None = arg(
        600.0, "Seconds that one call of a reward function may take; what is not done by then has no reward."
    )
    reward_on_error: str = arg(
        "skip",
        "What a reward function that raises costs: skip (the rewards of its call) or raise (the run).",
        choices=["skip", "raise"],
    )


@dataclass
class LayoutArgs:
    """In which order prompts are taken, and how they and their completions are laid out in batches."""

    shuffle_dataset: bool = arg(True, "Take the prompts in random order.")
    share_prefix: bool | None = arg(
        None, "Compute a prompt once for its completions in a micro-batch; unset: where that saves 15% of the tokens."
    )
    pad_to_multiple_of: int | str | None = arg("auto", "Pad batches to a multiple of this; 'auto': do not pad.")

    @property
    def padding_multiple(self) -> int | None:
        """`pad_to_multiple_of` as a number of tokens, None for no padding."""
        return self.pad_to_multiple_of if isinstance(self.pad_to_multiple_of, int) else None

    def check_layout_args(self) -> None:
        """Read `pad_to_multiple_of`, which may be a number as text."""
        if isinstance(self.pad_to_multiple_of, str):
            value = self.pad_to_multiple_of.lower()
            self.pad_to_multiple_of = int(value) if value.isdecimal() else None


@dataclass
class GroupArgs(LayoutArgs):
    """How many completions of which prompts, and how they are put into batches."""

    num_generations: int = arg(8, "Completions of each prompt.")
    num_generations_eval: int | None = arg(None, "Completions of each prompt in evaluation; unset: as in training.")

    def check_group_args(self, name: str, generation_batch_size: int, least_generations: int) -> None:
        """ValueError where batches do not hold whole groups; reads `pad_to_multiple_of`."""
        config: Any = self
        self.check_layout_args()
        if config.auto_find_batch_size:
            raise ValueError(
                f"`auto_find_batch_size` is not supported by {name}: a smaller batch may not hold whole groups of "
                "`num_generations`. Set it to False and lower `per_device_train_batch_size`."
            )
        if self.num_generations < least_generations:
            raise ValueError(
                f"`num_generations` is {self.num_generations}; {name} needs at least {least_generations}."
            )
        if generation_batch_size % self.num_generations:
            raise ValueError(
                f"`generation_batch_size` is {generation_batch_size} (per_device_train_batch_size * processes * "
                f"steps_per_generation); it must be a multiple of `num_generations`={self.num_generations}, so that "
                "it holds whole groups."
            )
        if config.do_eval and config.eval_strategy != "no":
            self.check_eval_batch()

    def check_eval_batch(self) -> None:
        """ValueError where a batch of evaluation does not hold whole groups."""
        config: Any = self
        groups_of = self.num_generations_eval or self.num_generations
        at_once = config.per_device_eval_batch_size * config.world_size
        if at_once % groups_of:
            raise ValueError(
                f"The batch of evaluation has {at_once} completions (per_device_eval_batch_size "
                f"{config.per_device_eval_batch_size} * processes {config.world_size}); it must be a multiple of the "
                f"{groups_of} of each prompt (`num_generations_eval`, or `num_generations`)."
            )


@dataclass
class BatchArgs(GroupArgs):
    """How many completions are generated at once, and learned from how often."""

    generation_batch_size: int | None = arg(
        None, "Completions generated at once, over all processes; unset: those of `steps_per_generation`."
    )
    steps_per_generation: int | None = arg(
        None, "Micro-batches that one generation fills; unset: `gradient_accumulation_steps`."
    )
    num_iterations: int = arg(1, "Times that a generation is learned from.")

    def check_batch_args(self, name: str, least_generations: int = 2) -> None:
        """Fill in what depends on other fields; ValueError where batches do not hold whole groups."""
        config: Any = self
        at_once = config.per_device_train_batch_size * config.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError(
                f"`generation_batch_size` is {self.generation_batch_size} and `steps_per_generation` "
                f"{self.steps_per_generation}: one follows from the other, set one of them."
            )
        if self.generation_batch_size is not None:
            if self.generation_batch_size % at_once:
                raise ValueError(
                    f"`generation_batch_size` is {self.generation_batch_size}; it must be a multiple of the "
                    f"{at_once} completions that all processes learn from at once (per_device_train_batch_size "
                    f"{config.per_device_train_batch_size} * processes {config.world_size})."
                )
            self.steps_per_generation = self.generation_batch_size // at_once
        elif self.steps_per_generation is None:
            self.steps_per_generation = config.gradient_accumulation_steps
        self.generation_batch_size = at_once * self.steps_per_generation
        for field in ("num_iterations", "steps_per_generation"):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` is {getattr(self, field)}; {name} needs at least 1.")
        self.check_group_args(name, at_once * self.steps_per_generation, least_generations)


@dataclass
class CompletionLogArgs:
    """What is shown of the completions."""

    log_completions: bool = arg(
        False, "Print completions with every log, and keep them as parquet files in output_dir/completions."
    )
    log_multimodal: bool = arg(True, "Without effect: completions are shown without the images of their prompts.")
    num_completions_to_print: int | None = arg(None, "Completions that are printed; unset: all.")
    log_unique_prompts: bool = arg(False, "Send one completion of each prompt to wandb or trackio, instead of all.")
    log_completions_hub_repo: str | None = arg(None, "Dataset repository of the Hub that the files are sent to.")

    def check_completion_log_args(self) -> None:
        """ValueError for a repository of nothing, and for fewer than no completions."""
        at_least(self, num_completions_to_print=0)
        if self.log_completions_hub_repo is not None and not self.log_completions:
            raise ValueError(
                f"`log_completions_hub_repo` is {self.log_completions_hub_repo!r}, but `log_completions` is False: "
                "set it to True, or leave the repository out."
            )


@dataclass
class CorrectionArgs:
    """What makes up for samples of other weights, or of an engine whose probabilities differ from the model's."""

    max_staleness: int = arg(
        0, "Generation batches that are sampled ahead, while another one is learned from; 0: one after the other."
    )

    vllm_importance_sampling_correction: bool = arg(
        True, "Weight tokens by how likely the training model finds what vLLM, or older weights, have sampled."
    )
    vllm_importance_sampling_mode: str = arg(
        "sequence_mask",
        "Weights of tokens or of whole completions, truncated or masked outside of the bounds; geometric_mask: "
        "completions kept where the mean ratio per token lies inside.",
        choices=[*CORRECTION_MODES],
    )
    vllm_importance_sampling_clip_max: float | None = arg(3.0, "Upper bound of these weights.")
    vllm_importance_sampling_clip_min: float | None = arg(None, "Lower bound of these weights.")
    vllm_importance_sampling_cap: float | None = arg(None, "Deprecated: `vllm_importance_sampling_clip_max`.")

    @property
    def corrects(self) -> bool:
        """Whether tokens are weighted by how the training model differs from what has sampled them."""
        config: Any = self
        return bool(config.use_vllm or self.max_staleness) and self.vllm_importance_sampling_correction

    @property
    def correction(self) -> dict[str, Any]:
        """The mode and bounds of these weights, empty without."""
        if not self.corrects:
            return {}
        bounds = {"max": self.vllm_importance_sampling_clip_max, "min": self.vllm_importance_sampling_clip_min}
        return {"mode": self.vllm_importance_sampling_mode} | bounds

    def check_correction_args(self) -> None:
        """Read the deprecated name; ValueError for bounds that make no sense."""
        self._check_staleness()
        one_of(self, "vllm_importance_sampling_mode", CORRECTION_MODES)
        if self.vllm_importance_sampling_cap is not None:
            deprecated("`vllm_importance_sampling_cap` is deprecated; use `vllm_importance_sampling_clip_max`.")
            self.vllm_importance_sampling_clip_max = self.vllm_importance_sampling_cap
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"`vllm_importance_sampling_clip_min` is {low} and `vllm_importance_sampling_clip_max` {high}: the "
                "first must be the smaller one."
            )
        truncates = self.vllm_importance_sampling_mode.endswith("truncate")
        if self.vllm_importance_sampling_correction and truncates and low is None and high is None:
            raise ValueError(
                f"`vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r}` needs "
                "`vllm_importance_sampling_clip_min` or `vllm_importance_sampling_clip_max`."
            )

    def _check_staleness(self) -> None:
        config: Any = self
        found = f"`max_staleness` is {self.max_staleness}"
        if self.max_staleness < 0:
            raise ValueError(f"{found}; it must be at least 0.")
        if not self.max_staleness:
            return
        if not self.vllm_importance_sampling_correction:
            raise ValueError(
                f"{found}, and `vllm_importance_sampling_correction` False: samples of older weights need it. Set it "
                "to True."
            )
        if config.use_transformers_continuous_batching or (config.use_vllm and config.vllm_mode == "colocate"):
            raise ValueError(
                f"{found}: vLLM in this process and Transformers' continuous batching change the state of the whole "
                "process while they sample, so that nothing can train meanwhile. Use a vLLM server "
                "(`vllm_mode='server'`) or the embedded engine, or set `max_staleness=0`."
            )
        if config.use_vllm and self.max_staleness > 1:
            raise ValueError(
                f"{found}: a vLLM server has one set of weights, so that one batch can be sampled ahead. Set it to 1."
            )
