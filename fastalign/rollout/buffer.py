"""What updates learn from: samples as arrays of tokens, with all that is known of each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .samples import Sample


@dataclass(eq=False)
class Experience:
    """One sample as an update sees it. Its *learned* tokens are those that the policy drew and that have a loss."""

    prompt_ids: np.ndarray  # (P,) int64
    completion_ids: np.ndarray  # (C,) int64
    learned_at: np.ndarray  # (n,) int64 places of the learned tokens in the completion, ascending
    group: int  # samples of the same prompt have the same number, unique in the run's rank
    advantage: float = 0.0
    tokens: dict[str, Tensor] = field(default_factory=dict)  # name -> (n,) fp32, one for each learned token
    values: dict[str, float] = field(default_factory=dict)  # name -> a number of the whole sample
    version: int = 0  # of the oldest weights in it
    model_inputs: dict[str, Tensor] = field(default_factory=dict)  # of the prompt's images, the same for its group

    @property
    def num_learned(self) -> int:
        return len(self.learned_at)

    @classmethod
    def of(cls, sample: Sample, group: int, *, learn: bool = True) -> Experience:
        """`sample` without a loss where not `learn`; `tokens` has "sampling_logp" where the engine gave it."""
        ids = np.asarray(sample.completion_ids, np.int64)
        drawn = np.ones(len(ids), bool) if sample.mask is None else np.asarray(sample.mask, bool)
        if drawn.shape != ids.shape:
            raise ValueError(
                f"A completion has {len(ids)} tokens and a mask of {len(drawn)}: give one for each token."
            )
        places = np.flatnonzero(drawn) if learn else np.zeros(0, np.int64)
        made = cls(np.asarray(sample.prompt_ids, np.int64), ids, places, group, version=sample.version)
        made.model_inputs = sample.model_inputs
        if sample.logps is not None:
            logps = np.array([np.nan if logp is None else logp for logp in sample.logps], np.float32)
            if logps.shape != ids.shape:
                raise ValueError(f"A completion has {len(ids)} tokens and {len(logps)} log-probabilities of them.")
            made.tokens["sampling_logp"] = torch.from_numpy(logps[places])
        return made

    def state_dict(self) -> dict[str, Any]:
        """The same as tensors and numbers."""
        return {
            "prompt_ids": torch.from_numpy(self.prompt_ids),
            "completion_ids": torch.from_numpy(self.completion_ids),
            "learned_at": torch.from_numpy(self.learned_at),
            "numbers": (self.group, self.advantage, self.version),
            "tokens": {name: value.cpu() for name, value in self.tokens.items()},
            "values": dict(self.values),
            "model_inputs": self.model_inputs,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Experience:
        """What `state_dict` gave."""
        prompt, completion, learned_at = (
            state[name].numpy() for name in ("prompt_ids", "completion_ids", "learned_at")
        )
        group, advantage, version = state["numbers"]
        known = state["tokens"], state["values"], version, state.get("model_inputs") or {}
        return cls(prompt, completion, learned_at, group, advantage, *known)


@dataclass
class Buffer:
    """This rank's part of a generation batch, to be learned from in `len(parts)` nominal micro-batches."""

    parts: list[list[Experience]]
    num_items: float  # learned tokens of the whole generation batch, over all ranks, by the number of ranks
    step: int  # optimizer steps before it was generated

    def state_dict(self) -> dict[str, Any]:
        """The same as tensors and numbers."""
        parts = [[experience.state_dict() for experience in part] for part in self.parts]
        return {"parts": parts, "num_items": self.num_items, "step": self.step}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Buffer:
        """What `state_dict` gave."""
        parts = [[Experience.from_state(one) for one in part] for part in state["parts"]]
        return cls(parts, state["num_items"], state["step"])
