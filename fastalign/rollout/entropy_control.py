"""The weight of the entropy in a loss: fixed, or moved after every step towards a target (Skywork-OR1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .group_batches import GroupBatch
from .loader import Step


class EntropyControl:
    """`entropy_coef` of a config, adapted under `use_adaptive_entropy` as in arXiv:2505.22312 Sec. 4.3."""

    def __init__(self, args: Any):
        self.args = args
        self.coefficient: float = args.entropy_coef
        self.last = math.inf  # nats per token of the last step, over all ranks

    @property
    def has_bonus(self) -> bool:
        """Whether the loss may reward entropy."""
        return self.args.entropy_coef != 0.0 or self.args.use_adaptive_entropy

    def bonus(self, step: Step) -> float:
        """Weight of the entropy in `step`; under an entropy mask, which makes means of micro-batches, their share."""
        args = self.args
        if not self.has_bonus or (args.use_adaptive_entropy and self.last > args.entropy_target):
            return 0.0
        return self.coefficient / (step.num_micro if args.top_entropy_quantile < 1.0 else 1)

    def weights(self, batch: GroupBatch) -> Tensor | None:
        """(N,): the bonus is the mean over a nominal micro-batch's tokens, averaged over micro-batches."""
        if not self.has_bonus or self.args.top_entropy_quantile < 1.0:
            return None
        tokens = [max(sum(one.num_learned for one in part), 1) for part in batch.step.parts]
        shares = torch.tensor([1 / (tokens[micro] * batch.step.num_micro) for micro in batch.micro])
        counts = torch.tensor([one.num_learned for one in batch.experiences])
        return shares.repeat_interleave(counts).to(batch.weight.device)

    def adapt(
        self, batch: GroupBatch, entropy: Tensor, mask: Tensor | None, over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """Take a batch's entropy (N,), of the tokens in `mask`; after the step's last one move the weight.

        Costs one host sync per step.
        """
        args = self.args
        if not args.use_adaptive_entropy or not batch.step.training:
            return
        mask = torch.ones_like(entropy) if mask is None else mask
        state, sums = batch.step.state, torch.stack([(entropy * mask).sum(), mask.sum()])
        state["entropy"] = sums if "entropy" not in state else state["entropy"] + sums
        if not batch.is_last:
            return
        total, count = over_ranks(state["entropy"]).tolist()
        self.last = total / max(count, 1.0)
        change = args.entropy_coef_delta if self.last <= args.entropy_target else -args.entropy_coef_delta
        self.coefficient = min(max(self.coefficient + change, args.entropy_coef_min), args.entropy_coef_max)
