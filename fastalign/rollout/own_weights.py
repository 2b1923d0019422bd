"""The embedded engine on weights of its own, so that it can sample while the model trains."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .engine import SyncReport
from .native import NativeEngine


class OwnWeights:
    """A copy of `model` to sample from: what is trained is copied, frozen weights are the model's own."""

    def __init__(self, model: Any):
        self.source = model
        frozen: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model: Any = copy.deepcopy(model, frozen).requires_grad_(False).eval()
        pairs = zip(model.parameters(), self.model.parameters(), strict=True)
        self._pairs = [(trained, own) for trained, own in pairs if trained is not own]

    def snapshot(self) -> list[Tensor]:
        """The trained weights as they are now, to be brought later."""
        return [trained.detach().clone() for trained, _ in self._pairs]

    def bring(self, values: Sequence[Tensor] | None = None) -> int:
        """Copy the trained weights as they are now, or a `snapshot` of them; returns the bytes.

        RuntimeError where weights are trained that were frozen at first: they are not copies.
        """
        known = {id(trained) for trained, _ in self._pairs}
        if any(p.requires_grad and id(p) not in known for p in self.source.parameters()):
            raise RuntimeError(
                "Weights that were frozen when the trainer was made are trained now, while the engine samples from "
                "them. Unfreeze them before, or set `max_staleness=0`."
            )
        given = [trained for trained, _ in self._pairs] if values is None else values
        with torch.no_grad():
            for value, (_, own) in zip(given, self._pairs, strict=True):
                own.copy_(value)
        return sum(own.numel() * own.element_size() for _, own in self._pairs)


class OwnWeightsEngine(NativeEngine):
    """`NativeEngine` on a copy of the model: one thread may sample while another trains.

    It leaves the process's random state alone. `sync` copies; call it while the weights do not change and nothing is
    sampled.
    """

    def __init__(self, model: Any, **options: Any):
        self.weights = OwnWeights(model)
        super().__init__(self.weights.model, **options)
        self._still = torch.no_grad  # the copy never trains

    def sync(self, version: int, values: Sequence[Tensor] | None = None) -> SyncReport:
        """Sample from the training model's weights, as they are now or as `values`, a snapshot, has them."""
        start = time.perf_counter()
        num_bytes = self.weights.bring(values)
        super().sync(version)
        return SyncReport("in place", time.perf_counter() - start, num_bytes)
