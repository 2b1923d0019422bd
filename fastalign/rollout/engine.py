"""The contract of everything that samples completions: token ids in, token ids and their log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length"]
NEUTRAL: dict[str, tuple] = {  # settings of the distribution that tokens are drawn from, and the values without effect
    "top_p": (1.0,),
    "top_k": (0, -1, None),
    "min_p": (None, 0.0),
    "do_sample": (True, None),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "min_tokens": (0,),
    **dict.fromkeys(("logit_bias", "allowed_token_ids", "bad_words", "thinking_token_budget"), (None, {}, [])),
    **dict.fromkeys(("vllm_structured_outputs_regex", "structured_outputs"), (None,)),
}


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are drawn."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # probability mass that is kept
    top_k: int = 0  # number of tokens that are kept, 0: all
    min_p: float | None = None  # least probability, as a share of the largest
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()  # a completion ends with the first of them, which belongs to it
    regex: str | None = None  # every completion matches it
    banned: tuple[int, ...] = ()  # tokens that are never drawn; log-probabilities do not know of it
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # the engine's own (`generation_kwargs`)

    @property
    def truncates(self) -> bool:
        """Whether tokens are left out, so that log-probabilities as sampled are not those of the whole vocabulary."""
        return self.top_p < 1.0 or self.top_k > 0 or bool(self.min_p)

    def distortions(self, temperature: float) -> dict[str, Any]:
        """Settings that make log-probabilities as sampled others than the model's at `temperature`; name -> value."""
        given = {**vars(self), "vllm_structured_outputs_regex": self.regex, **self.options}
        found = {name: given[name] for name, plain in NEUTRAL.items() if name in given and given[name] not in plain}
        return found if given["temperature"] == temperature else {"temperature": given["temperature"]} | found


@dataclass
class Request:
    """One completion that is wanted. Requests with equal prompts share the work of the prompt where an engine can."""

    key: Any  # comes back with the completion; unique among those pending
    prompt_ids: list[int]
    sampling: Sampling
    seed: int | None = None  # the same request with the same seed and weights gives the same tokens
    model_inputs: dict[str, Any] = field(default_factory=dict)  # what the processor made of the prompt besides ids


@dataclass
class Completion:
    """What was sampled for a request."""

    key: Any
    ids: list[int]  # never empty; the stop token included
    logps: list[float]  # of each id, nats, of the distribution it was drawn from (temperature, truncation)
    finish_reason: FinishReason  # "stop": with one of `stop_ids`; "length": after `max_new_tokens`
    version: int = 0  # of the weights that gave the first token
    newest_version: int = 0  # of those that gave the last one; above `version` where weights changed in between


@dataclass(frozen=True)
class SyncReport:
    """How the engine's weights became those of the training model."""

    way: Literal["shared", "in place", "reloaded", "adapter", "same model"]
    seconds: float
    num_bytes: int = 0  # that were copied


class Engine(Protocol):
    """Samples completions. Not thread-safe: one thread calls it."""

    name: str
    exact: bool  # log-probabilities equal the training model's to fp32 rounding (1e-4) while the weights are the same
    version: int  # of the weights that sample now

    @property
    def pending(self) -> int:
        """Requests that are submitted and not finished."""
        ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests; ValueError for a prompt that is empty or too long, naming its key. Nothing runs yet."""
        ...

    def step(self) -> list[Completion]:
        """Work for a moment; returns what is finished by now, in any order. Not calling it is a pause."""
        ...

    def abort(self) -> None:
        """Forget what is pending."""
        ...

    def sync(self, version: int) -> SyncReport:
        """Sample from the training model's weights as they are now, from the next token on; caches of older ones go.

        Requests that are pending go on under the new weights.
        """
        ...

    def sleep(self) -> None:
        """Give back what memory training can use meanwhile; `submit` wakes the engine."""
        ...

    def close(self) -> None:
        """End the engine; the training model stays usable."""
        ...


def generate(engine: Engine, requests: Sequence[Request]) -> Iterator[Completion]:
    """Completions of `requests` as they finish."""
    engine.submit(requests)
    while engine.pending:
        yield from engine.step()
