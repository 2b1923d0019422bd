"""What a run tells: callbacks that watch it, counters in its state, its model card."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import DefaultFlowCallback, PrinterCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler
from transformers.utils.import_utils import is_in_notebook

from ..metrics import RunCounters
from .progress import TrainingProgress


def make_callbacks(trainer, callbacks) -> CallbackHandler:
    """transformers' flow control, `report_to`, the user's callbacks, then progress bar or printer."""
    if trainer.args.disable_tqdm:
        display = PrinterCallback
    elif is_in_notebook():
        from transformers.utils.notebook import NotebookProgressCallback as display
    else:
        display = TrainingProgress
    watching = [DefaultFlowCallback, *get_reporting_integration_callbacks(trainer.args.report_to)]
    return CallbackHandler(
        [*watching, *(callbacks or []), RunCounters(trainer.metrics), display],
        trainer.model,
        trainer.processing_class,
        trainer.optimizer,
        trainer.lr_scheduler,
    )


def update_counted_state(trainer) -> None:
    """Copy the run's counters, as of the last reduction, into `state`."""
    counts = trainer.metrics.counts()
    trainer.state.num_input_tokens_seen = int(counts.get("num_input_tokens_seen", 0))
    trainer.state.total_flos = counts.get("total_flos", 0.0)


def restore_counters(trainer) -> None:
    """Continue the counters of a checkpoint (also of one that transformers or TRL wrote)."""
    state = trainer.state
    saved = state.stateful_callbacks.get(RunCounters.__name__) or {}
    counts = dict(saved.get("attributes", {}).get("counts", {}))
    logged = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
    counts |= {"num_tokens": logged[-1]} if logged and not saved else {}  # TRL logs it, but starts anew
    counts.setdefault("num_input_tokens_seen", state.num_input_tokens_seen)
    counts.setdefault("total_flos", state.total_flos)
    trainer.metrics.set_counts(counts)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RunCounters):  # restoring callback states makes new objects
            callback.metrics = trainer.metrics


def write_model_card(trainer, model_name: str | None = None, dataset_name: str | None = None, tags=None) -> None:
    """Write `output_dir/README.md` with metadata that the Hub reads."""
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    source = getattr(getattr(trainer.model, "config", None), "_name_or_path", None) or None
    known = Path(source).is_dir() if source else True
    model_name = model_name or (args.hub_model_id or Path(args.output_dir).absolute().name).split("/")[-1]
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    tags = list(dict.fromkeys([*getattr(trainer, "_tag_names", ["fastalign"]), *tags]))
    header = {"library_name": "peft" if hasattr(trainer.model, "peft_config") else "transformers", "tags": tags}
    header |= {"model_name": model_name}
    header |= {} if known else {"base_model": source}
    header |= {"datasets": [dataset_name]} if dataset_name else {}
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in header.items()),
        "---",
        "",
        f"# {model_name}",
        "",
    ]
    method = getattr(trainer, "_name", None) or "fine-tuning"
    lines += [f"A model trained with fastalign ({method})" + (f" from `{source}`." if source else "."), ""]
    lines += ["## Settings", "", "| setting | value |", "|---|---|"]
    for name in ("learning_rate", "lr_scheduler_type", "optim", "num_train_epochs", "max_steps", "seed"):
        value = getattr(args, name)
        lines.append(f"| {name} | {getattr(value, 'value', value)} |")
    batch = trainer._train_batch_size * args.gradient_accumulation_steps * trainer.world
    lines += [f"| examples per optimizer step | {batch} |", ""]
    results = {key: value for entry in trainer.state.log_history[-20:] for key, value in entry.items()}
    shown = [key for key in ("loss", "train_loss", "eval_loss", "mean_token_accuracy", "step") if key in results]
    if shown:
        lines += ["## Results", "", "| metric | last value |", "|---|---|"]
        lines += [f"| {key} | {results[key]:.5g} |" for key in shown] + [""]
    Path(args.output_dir, "README.md").write_text("\n".join(lines), encoding="utf-8")
