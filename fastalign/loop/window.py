"""The logging window: loss summed on the device, and what a log line says about the steps since the last one."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers.trainer_utils import speed_metrics

from ..metrics import Metrics
from .health import split_hidden
from .plan import TrainingPlan


class LoggingWindow:
    """Loss, gradient norm and learning rate between two logs of one `train()` call."""

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), device=device)  # sum over the window's steps
        self.grad_norm: Tensor = torch.zeros((), device=device)  # of the last step
        self.learning_rate: float | None = None  # that the last step used
        self.first_step = 0
        self.last_logged = -1  # not known yet
        self.loss_before = 0.0  # sum over the steps of this call that were logged
        self.start_time = time.time()

    def begin(self, step: int) -> None:
        """Start the clock of a call that continues after `step`, in a window that a checkpoint may have brought."""
        self.first_step, self.start_time = step, time.time()
        if self.last_logged < 0:
            self.last_logged = step

    def close(self, metrics: Metrics, step: int) -> dict[str, float]:
        """The log line of the window that ends at `step`, averaged over ranks; a new window begins."""
        values = metrics.collect(loss=self.loss, grad_norm=self.grad_norm)
        loss, norm = values.pop("loss"), values.pop("grad_norm")
        logs = {"loss": loss / (step - self.last_logged), "grad_norm": norm, "learning_rate": self.learning_rate}
        self.loss.zero_()
        self.loss_before += loss
        self.last_logged = step
        return logs | values

    def finish(self, metrics: Metrics, step: int, plan: TrainingPlan) -> dict[str, float]:
        """The closing log line of the `train()` call: speed, mean loss, and what was not logged yet."""
        _, left = split_hidden(metrics.collect(loss=self.loss))
        total, steps = self.loss_before + left.pop("loss"), step - self.first_step
        samples = plan.num_train_samples * steps / max(plan.max_steps, 1)
        speed = speed_metrics("train", self.start_time, num_samples=samples, num_steps=steps)
        return (
            speed | {"total_flos": metrics.counts().get("total_flos", 0.0), "train_loss": total / max(steps, 1)} | left
        )

    def state_dict(self) -> dict:
        """What a checkpoint keeps of this rank's open window."""
        return {"loss": self.loss.cpu(), "last_logged": self.last_logged}

    def load_state_dict(self, state: dict) -> None:
        """Continue the window of a checkpoint; its earlier steps do not count for this call's mean loss."""
        self.loss.copy_(state["loss"])
        self.loss_before = -state["loss"].item()
        self.last_logged = state["last_logged"]
