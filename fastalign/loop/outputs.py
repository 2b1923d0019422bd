"""What a trainer hands out: logs, callbacks, the saved model, its card, uploads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.trainer_pt_utils import log_metrics, save_metrics, save_state
from transformers.trainer_utils import speed_metrics

from . import checkpoint, hub, reporting

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerState
    from transformers.trainer_callback import CallbackHandler, TrainerControl


class RunOutputs:
    """The part of `Trainer` that writes and reports; transformers' names and meanings."""

    args: Any  # AlignConfig: its inherited fields are wider unions than what is left after __post_init__
    accelerator: Accelerator
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    rank: int
    _initial_tokens: int = 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Append `logs` to `state.log_history` and hand them to the callbacks."""
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            if start_time is not None:
                seen = self.state.num_input_tokens_seen - self._initial_tokens
                logs.update(speed_metrics("train", start_time, num_tokens=seen))
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, config and processing class for `from_pretrained`, and push them if `push_to_hub`."""
        checkpoint.save_model(self, output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=None) -> None:
        """Write `README.md` into `output_dir`: what was trained, on what, with which settings and results."""
        reporting.write_model_card(self, model_name, dataset_name, tags)

    def push_to_hub(
        self, commit_message: str = "End of training", blocking: bool = True, token=None, revision=None, **kw
    ):
        """Save the model and upload `output_dir`; returns the commit, or a future of it unless `blocking`."""
        return hub.push(self, commit_message, blocking, token, revision, **kw)

    log_metrics, save_metrics, save_state = log_metrics, save_metrics, save_state

    # Callbacks and processes

    def add_callback(self, callback) -> None:
        """Add a callback (class or object)."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback):
        """Remove a callback (class or object) and return it."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback) -> None:
        """Remove a callback (class or object)."""
        self.callback_handler.remove_callback(callback)

    def is_world_process_zero(self) -> bool:
        """Whether this is the first of all processes."""
        return self.rank == 0

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.accelerator.is_local_main_process
