"""The demo's progress bar: one line, with loss and held-out loss."""

from __future__ import annotations

from tqdm.auto import tqdm
from transformers import TrainerCallback


class OneLine(TrainerCallback):
    """A bar over the steps of a run; what the trainer logs updates it instead of being printed."""

    def __init__(self, title: str):
        self.title = title
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar."""
        self.bar = tqdm(total=state.max_steps, desc=self.title, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        """Move on by one step."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the losses."""
        names = {"loss": "loss", "eval_loss": "held-out loss"}
        self.shown |= {names[key]: f"{value:.3f}" for key, value in (logs or {}).items() if key in names}
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
