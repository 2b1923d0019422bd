"""A vLLM server as the engine: token ids and log-probabilities over HTTP, weights through NCCL or shared memory."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from .engine import Completion, Request, Sampling, SyncReport
from .vllm_http import HEALTH, START, Client, ServerError
from .vllm_push import POLICY, make_push

logger = logging.getLogger(__name__)

CONCURRENCY = 256  # requests that are under way at once
KEPT_OPTIONS = ("n", "best_of", "logprobs", "stream", "echo", "prompt", "return_token_ids")
MOMENT = 0.1  # seconds that `step` waits for something to finish
SILENCE = 60.0  # seconds without a completion after which the server is asked whether it is well


@dataclass
class _Sent:
    request: Request
    version: int


class VLLMServerEngine:
    """Samples on a server that runs already (`vllm serve`); each process sends its own requests.

    `config` gives `vllm_server_base_url`, or `vllm_server_host` and `vllm_server_port`; `vllm_server_timeout`, in
    seconds; `vllm_group_port`. ConnectionError, naming address and end point, where the server cannot be reached for
    that long, at the start or later; ValueError for a server that was started with other settings than are needed.
    One that takes requests and answers none of them is asked for its health, and counts as away where it gives none.
    """

    name = "vllm server"
    exact = False

    def __init__(self, model: Any, processing_class: Any, config: Any, *, sampling: Sampling):
        start = time.perf_counter()
        host, port = getattr(config, "vllm_server_host", "0.0.0.0"), getattr(config, "vllm_server_port", 8000)
        url = getattr(config, "vllm_server_base_url", None) or f"http://{host}:{port}"
        self.version = 0
        self.client = Client(url, float(getattr(config, "vllm_server_timeout", 240.0)))
        self._pool = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="vllm")
        self._sent: dict[Future, _Sent] = {}
        self._heard = 0.0  # time.monotonic() of its last sign of life
        self._told: Counter[str] = Counter()
        self.client.get(HEALTH)
        served = self.client.get("/v1/models")["data"][0]
        self._model, self._max_length = served["id"], served.get("max_model_len") or 2**31
        self._push = make_push(self.client, model, self._settings(sampling), getattr(config, "vllm_group_port", 51216))
        self.start_seconds = time.perf_counter() - start
        self.sync(0)

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        """The server's own configuration; ValueError where it was started in a way that cannot train."""
        try:
            settings = self.client.get("/server_info", config_format="json")["vllm_config"]
        except ServerError as error:
            if error.status != 404:
                raise
            raise ValueError(
                f"The vLLM server at {self.client.host}:{self.client.port} does not take weights: it was started "
                f"without VLLM_SERVER_DEV_MODE=1. Start it with: {START}"
            ) from error
        mode = (settings.get("model_config") or {}).get("logprobs_mode", "processed_logprobs")
        if "processed_logprobs" not in str(mode) and (sampling.temperature != 1.0 or sampling.truncates):
            raise ValueError(
                f"The vLLM server reports {mode}, which leave out temperature ({sampling.temperature}), top_p and "
                f"top_k. Start it with --logprobs-mode processed_logprobs, or sample with temperature 1 from the "
                "whole vocabulary."
            )
        return settings

    @property
    def way(self) -> str:
        """How weights reach the server: "in place" (NCCL), "reloaded" (files in memory) or "adapter"."""
        return self._push.way

    @property
    def counts(self) -> dict[str, int]:
        """How often calls were tried again, were given up, and weights were brought to a server that had restarted."""
        return dict(self.client.counts)

    def new_counts(self) -> dict[str, int]:
        """What was added to `counts` since the last call of this."""
        told, self._told = self._told, Counter(self.client.counts)
        return dict(self._told - told)

    @property
    def pending(self) -> int:
        return len(self._sent)

    def submit(self, requests: Sequence[Request]) -> None:
        payloads = [self._payload(request) for request in requests]
        for request, payload in zip(requests, payloads, strict=True):
            future = self._pool.submit(self._complete, payload)
            self._sent[future] = _Sent(request, self.version)
        self._heard = time.monotonic()

    def _payload(self, request: Request) -> dict[str, Any]:
        length, sampling = len(request.prompt_ids), request.sampling
        if not length:
            raise ValueError(f"The prompt of request {request.key!r} is empty.")
        if length >= self._max_length:
            raise ValueError(
                f"The prompt of request {request.key!r} has {length} tokens, but the server takes {self._max_length} "
                "for prompt and completion. Start it with a larger --max-model-len, or shorten the prompts."
            )
        if request.model_inputs:
            raise ValueError(f"Request {request.key!r} has {sorted(request.model_inputs)}; the server gets text only.")
        if refused := [name for name in sampling.options if name in KEPT_OPTIONS]:
            raise ValueError(f"`generation_kwargs` has {refused}, which the trainer decides itself.")
        payload = {
            "model": POLICY if self._push.way == "adapter" else self._model,
            "prompt": list(request.prompt_ids),
            "max_tokens": min(sampling.max_new_tokens, self._max_length - length),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,  # `stop_ids` alone decide
            "seed": request.seed,
            "logprobs": 0,
            "return_token_ids": True,
        }
        if sampling.regex is not None:
            payload["structured_outputs"] = {"regex": sampling.regex}
        return payload | sampling.options

    def _complete(self, payload: dict[str, Any]) -> dict[str, Any]:
        return self.client.post("/v1/completions", payload)["choices"][0]

    def step(self) -> list[Completion]:
        if not self._sent:
            return []
        done, _ = wait(self._sent, timeout=MOMENT, return_when=FIRST_COMPLETED)
        if done or time.monotonic() - self._heard > SILENCE:
            if not done:
                self.client.get(HEALTH)
            self._heard = time.monotonic()
        for future in done:
            if (error := future.exception()) is not None:
                del self._sent[future]
                raise error
        if done and self._push.lost():  # sampled from the weights it was started with
            logger.warning("The vLLM server has restarted: weights and %d requests go there again.", len(self._sent))
            self.client.counts["restarts"] += 1
            requests = [sent.request for sent in self._sent.values()]
            self.abort()
            self._push.again(self.version)
            self.submit(requests)
            return []
        return [self._completion(self._sent.pop(future), future.result()) for future in done]

    def _completion(self, sent: _Sent, choice: dict[str, Any]) -> Completion:
        if choice["finish_reason"] not in ("stop", "length") or not choice.get("token_ids"):
            raise RuntimeError(
                f"The vLLM server ended request {sent.request.key!r} with {choice['finish_reason']!r} and "
                f"{len(choice.get('token_ids') or ())} token ids."
            )
        return Completion(
            key=sent.request.key,
            ids=list(choice["token_ids"]),
            logps=[float("nan") if p is None else p for p in choice["logprobs"]["token_logprobs"]],
            finish_reason=choice["finish_reason"],
            version=sent.version,
            newest_version=self.version,
        )

    def abort(self) -> None:
        sent, self._sent = self._sent, {}
        for future in sent:
            future.cancel()
        self.client.hang_up()

    def sync(self, version: int) -> SyncReport:
        start = time.perf_counter()
        num_bytes = self._push(version)
        self.version = version
        return SyncReport(self._push.way, time.perf_counter() - start, num_bytes)

    def sleep(self) -> None:
        """Nothing: the server's memory is its own."""

    def close(self) -> None:
        self._sent.clear()
        self.client.hang_up()
        self._push.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
