"""What a rollout leaves behind: one sample per completion, in groups of one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .engine import FinishReason


@dataclass
class Sample:
    """One completion of a prompt, all its turns and tool results included, as the update and the rewards see it."""

    row: dict[str, Any]  # of the dataset, the prompt in `row["prompt"]` as the user wrote it
    prompt_ids: list[int]
    completion_ids: list[int]  # everything behind the prompt; may be empty only where a rollout function made it so
    logps: list[float] | None  # as sampled, nats; NaN where the policy did not draw the token; None: unknown
    finish_reason: FinishReason
    completion: Any  # text, or messages where the prompt is messages: what rewards are given
    mask: list[bool] | None = None  # True: drawn by the policy; False: of a tool or an environment; None: all drawn
    version: int = 0  # of the oldest weights in it
    newest_version: int = 0
    environment: Any = None  # the environment object this sample acted in
    tool_calls: int = 0
    tool_failures: int = 0
    extras: dict[str, Any] = field(default_factory=dict)  # further fields of a rollout function: given to rewards
    model_inputs: dict[str, Any] = field(default_factory=dict)  # tensors of the prompt's images


@dataclass
class Group:
    """All samples of one prompt."""

    index: int  # place of the prompt in the generation batch
    samples: list[Sample]
