"""Watches a run for what goes wrong without an error; says cause and remedy once, and stops the run where asked.

Trends compare means of 5 logs, once there are 12. `fastalign.findings` has names and bounds.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from torch import Tensor

from ..findings import ALL, PREFIX, bounds, sentence
from ..metrics import Metrics

logger = logging.getLogger(__name__)
HIDDEN = "_health/"  # of metrics that are read here and not logged

SPAN, LEAST_LOGS = 5, 12  # logs that are averaged, logs before a trend is judged
CHANCE = 0.55  # accuracy up to which pairs are ranked as by chance
KEPT = 50  # logs of which the hidden means are kept: samples may serve for several
LEAST_ROWS = 64  # rows of a log from which it is judged how many of them the gradient comes from


class HealthError(RuntimeError):
    """Raised by `train()` at the end of a run that a finding of `stop_on_health` has stopped."""


# What losses record, on the device


def watch_drift(metrics: Metrics, log_ratios: Tensor, num_tokens: Tensor) -> None:
    """(R,) answers' log-probabilities minus those under the reference, in nats, and their tokens, (R,)."""
    if metrics.training:
        metrics.mean(f"{HIDDEN}drift", log_ratios.abs().sum(), num_tokens.sum())


def watch_pulls(metrics: Metrics, pulls: Tensor | None) -> None:
    """(B,) sizes of the rows' parts in the gradient, in any unit."""
    if metrics.training and pulls is not None:
        metrics.mean(f"{HIDDEN}pull", pulls.sum())
        metrics.mean(f"{HIDDEN}pull_squared", pulls.square().sum())
        metrics.mean(f"{HIDDEN}rows", pulls.numel())


# What a log shows


def findings(history: list[dict[str, float]], hidden: dict[str, float], *, progress: float, **limits) -> dict:
    """Finding -> number, for the newest of the logs `history`; `progress` is the share of the run that is done.

    `hidden`: means over the micro-batches of the newest log. `limits`: drift (nats per token), rows (of the log),
    bounds (in place of those of `fastalign.findings`).
    """
    bound = bounds(limits.get("bounds"))
    drift = hidden.get("drift", hidden.get("sampled_drift", 0.0))  # the loss's, else that of the samples as drawn
    found = {
        "margin_collapse": _margin_collapse(history, progress),
        "chosen_falling": _chosen_falling(history, bound["chosen_falling"]),
        "kl_drift": drift if drift > limits["drift"] else None,
        "few_rows": _few_rows(hidden, limits["rows"], bound["few_rows"]),
        "loss_spike": jump(series(history, "loss"), bound["loss_spike"], 0.5),
        "grad_norm_spike": jump(series(history, "grad_norm"), bound["grad_norm_spike"], 1.0),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def series(history: list[dict[str, float]], *keys: str) -> np.ndarray:
    """The values of the first of `keys` that the newest log has, where it was logged."""
    key = next((key for key in keys if key in history[-1]), None)
    return np.array([entry[key] for entry in history if key in entry], float) if key else np.zeros(0)


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1)) / len(values) ** 0.5


def _margin_collapse(history: list[dict[str, float]], progress: float) -> float | None:
    """At chance after having been clearly above it, or still at chance in the second half of the run."""
    margins = series(history, "rewards/margins", "margin")
    accuracies = series(history, "rewards/accuracies", "accuracy")[-SPAN:]
    if len(margins) < LEAST_LOGS or (len(accuracies) and accuracies.mean() > CHANCE):
        return None
    spans = np.lib.stride_tricks.sliding_window_view(margins, SPAN)
    means, errors = spans.mean(1), spans.std(1, ddof=1) / SPAN**0.5
    had_risen = bool((means[:-SPAN] > 3 * errors[:-SPAN]).any())
    above_zero = means[-1] > 2 * errors[-1] and means[-1] > 0.1 * means.max()
    return None if above_zero or not (had_risen or progress >= 0.5) else means[-1]


def _chosen_falling(history: list[dict[str, float]], share: float) -> float | None:
    """A fall since the first logs by a share of its size that is no noise, while the loss falls too."""
    logps, losses = series(history, "logps/chosen"), series(history, "loss")
    if len(logps) < LEAST_LOGS or losses[-SPAN:].mean() >= losses[:SPAN].mean():
        return None
    first, last = logps[:SPAN], logps[-SPAN:]
    fall = first.mean() - last.mean()
    return fall if fall > max(share * abs(first.mean()), 3 * np.hypot(_error(first), _error(last))) else None


def _few_rows(hidden: dict[str, float], num_rows: float, bound: float) -> float | None:
    """(sum of pulls)^2 / (rows * sum of squares): 1 where all rows pull alike, 1 / rows where one has it all."""
    if num_rows < LEAST_ROWS or not hidden.get("pull_squared"):
        return None
    share = hidden["pull"] ** 2 / (hidden["pull_squared"] * hidden["rows"])
    return share if share < bound else None


def jump(values: np.ndarray, factor: float, of_start: float) -> float | None:
    """The last value, if above `factor` times the median of the ten before, by `of_start` times the first ones."""
    if len(values) < LEAST_LOGS:
        return None
    usual, start = float(np.median(values[-11:-1])), float(np.abs(values[:SPAN]).mean())
    return values[-1] if values[-1] > factor * usual and values[-1] - usual > of_start * start else None


class Health:
    """The findings of a trainer's runs: `health/<name>` in `state.log_history`, the first time a warning in words."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.of_data: dict[str, float] = {}  # findings of the training data, from its preparation
        self.pending: dict[str, float] = {}  # of these, what no log has yet
        self.past: list[dict[str, float]] = []  # what only this class reads of the last logs
        self.reasons: list[str] = []  # why this run is stopped

    def begin(self) -> None:
        """Before the first step: warn of what the data show; it goes to the first log, or to one of its own here."""
        self.reasons = []
        if not self.trainer.state.log_history:
            self.past = []
        known = {key for entry in self.trainer.state.log_history for key in entry}
        logs = self._tell(self.of_data)
        self.pending = {key: value for key, value in logs.items() if key not in known}
        if self.reasons and self.pending:
            self.trainer.log(self.pending)

    def judge(self, logs: dict[str, float]) -> dict[str, float]:
        """The newest `logs`, with what they show, without what only this class reads."""
        trainer = self.trainer
        hidden, logs = split_hidden(logs)
        state, args = trainer.state, trainer.args
        history = [entry for entry in state.log_history if "loss" in entry]
        num_steps = state.global_step - (history[-1]["step"] if history else 0)
        rows = hidden.get("rows", 0.0) * num_steps * args.gradient_accumulation_steps * trainer.world
        limits: dict = {"drift": getattr(args, "kl_drift_bound", 0.0), "rows": rows}
        limits["bounds"] = getattr(args, "health_bounds", None)
        history, self.past = [*history, logs], [*self.past, hidden][-KEPT:]
        found = findings(history, hidden, progress=state.global_step / max(state.max_steps, 1), **limits)
        if (further := getattr(trainer, "findings", None)) is not None:
            found = further(found, history, self.past)
        pending, self.pending = self.pending, {}
        return logs | pending | self._tell(found)

    def _tell(self, found: dict[str, float]) -> dict[str, float]:
        """Warn of what is new, ask for a stop where that is wanted; returns what the log gets."""
        trainer, state = self.trainer, self.trainer.state
        wanted = getattr(trainer.args, "stop_on_health", ())
        for name, value in found.items():
            text = f"step {state.global_step}, {sentence(name, value)}"
            if not any(PREFIX + name in entry for entry in state.log_history) and trainer.is_world_process_zero():
                logger.warning("Health: %s", text)
            if name in wanted or ALL in wanted:
                self.reasons.append(text)
        if self.reasons:
            trainer.control.should_training_stop = True
            trainer.control.should_save |= state.global_step > 0 and trainer.args.save_strategy != "no"
        return {PREFIX + name: value for name, value in found.items()}

    def end(self) -> None:
        """After training: say how often findings came again. HealthError if one of them stopped the run."""
        history = self.trainer.state.log_history
        keys = dict.fromkeys(key for entry in history for key in entry if key.startswith(PREFIX))
        counts = {key: sum(key in entry for entry in history) for key in keys}
        again = [f"{key.removeprefix(PREFIX)} in {n} logs" for key, n in counts.items() if n > 1]
        if again and self.trainer.is_world_process_zero():
            logger.warning("Health, over the whole run: %s.", ", ".join(again))
        if self.reasons:
            raise HealthError(f"Stopped by stop_on_health at {' | '.join(self.reasons)}")


def split_hidden(logs: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """(what only `Health` reads, by its short name; the rest)."""
    hidden = {key.removeprefix(HIDDEN): value for key, value in logs.items() if key.startswith(HIDDEN)}
    return hidden, {key: value for key, value in logs.items() if not key.startswith(HIDDEN)}
