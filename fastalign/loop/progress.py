"""The progress bar: step, loss, tokens per second, time left; and where the results are at the end."""

from __future__ import annotations

import time

from tqdm.auto import tqdm
from transformers import ProgressCallback


class TrainingProgress(ProgressCallback):
    """A bar with the last logged loss, tokens/s since then and the time left; logged lines are printed above it."""

    def __init__(self, max_str_len: int = 100):
        super().__init__(max_str_len)
        self._tokens: float | None = None
        self._since = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar at the step that training starts from."""
        self.current_step = state.global_step
        self._tokens, self._since = None, time.perf_counter()
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                unit="step",
                desc="training",
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print the log line and refresh loss and speed."""
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4g}"}
            now, tokens = time.perf_counter(), logs.get("num_tokens", logs.get("num_input_tokens_seen"))
            if tokens is not None and self._tokens is not None and now > self._since:
                shown["tokens/s"] = f"{(tokens - self._tokens) / (now - self._since):,.0f}"
            self._tokens, self._since = tokens, now
            self.training_bar.set_postfix(shown, refresh=False)
        super().on_log(args, state, control, logs=logs, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar and say where the results are."""
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(f"Trained {state.global_step} steps; results are in {args.output_dir}")
        super().on_train_end(args, state, control, **kwargs)
