"""Checkpoints of a training run in the layout of Transformers: saving, finding, resuming, the best model."""

from __future__ import annotations

import copy
import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerControl
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import set_seed

from .checkpoint_files import (
    PREFIX,
    CheckpointError,
    clean_up,
    find_last_checkpoint,
    last_good,
    problem,
    publish,
    read_manifest,
    rotate,
)
from .weights import load_optimizer_state, model_state, optimizer_state, read_model, whole, write_model

logger = logging.getLogger(__name__)

LOOP_STATE_NAME = "fastalign_state.pt"  # what the trainer's `state_dict()` holds, per rank
CALLBACKS_NAME = "fastalign_callbacks.pt"  # the tensors of callbacks that have any


# Saving


def save_checkpoint(trainer, *, metrics: dict[str, float] | None = None) -> str:
    """Write `output_dir/checkpoint-N` for the current step, rotate older ones, and return its path.

    All ranks must call it. Raises CheckpointError on all of them if it cannot be written (full disk, ...); then
    nothing on disk or in memory has changed. `metrics`, of the evaluation that led here, go into the manifest.
    """
    args, step = trainer.args, trainer.state.global_step
    final = Path(args.output_dir) / f"{PREFIX}{step}"
    state = _state_to_save(trainer, final)
    parts = _collect(trainer)
    details = {"global_step": step, "world_size": _world(), "metrics": metrics, "bytes": _num_bytes(trainer, parts)}
    details["save_only_model"] = args.save_only_model

    def write(folder: Path) -> None:
        write_model(trainer, folder, parts["model"])
        if not args.save_only_model:
            _write_training_state(trainer, folder, parts)
        state.save_to_json(str(folder / TRAINER_STATE_NAME))

    error = None
    if args.should_save:
        try:
            publish(final, write, details)
        except CheckpointError as failure:
            error = failure
    _raise_together(error)
    trainer.state.best_model_checkpoint = state.best_model_checkpoint
    trainer.state.stateful_callbacks = state.stateful_callbacks
    if args.should_save:
        best = state.best_model_checkpoint
        rotate(args.output_dir, args.save_total_limit, [str(final), *([best] if best else [])])
    return str(final)


def save_model(trainer, folder: str | os.PathLike) -> None:
    """Write the model as `from_pretrained` reads it, with processing class and arguments; all ranks must call it."""
    state = model_state(trainer.accelerator.unwrap_model(trainer.model), trainer.args.should_save)
    if trainer.args.should_save:
        write_model(trainer, folder, state)


def _collect(trainer) -> dict[str, Any]:
    """What only all ranks together know: whole weights and optimizer states, random states, the loop's own state."""
    keep = trainer.args.should_save
    _refuse_deepspeed(trainer)
    parts: dict[str, Any] = {"model": model_state(trainer.accelerator.unwrap_model(trainer.model), keep)}
    if trainer.args.save_only_model:
        return parts
    parts["optimizer"] = optimizer_state(trainer.optimizer, keep)
    parts["rng"] = _gather(_rng_state())
    parts["loop"] = _gather(trainer.state_dict())
    parts["callbacks"] = {
        key: {name: whole(tensor, keep) for name, tensor in callback.tensors().items()}
        for key, callback in _tensor_holders(trainer).items()
    }
    return parts


def _refuse_deepspeed(trainer) -> None:
    if getattr(trainer.accelerator.state, "deepspeed_plugin", None) is not None:
        raise NotImplementedError(
            "Checkpoints under DeepSpeed are not supported: set save_strategy='no', or use FSDP2."
        )


def _write_training_state(trainer, folder: Path, parts: dict[str, Any]) -> None:
    torch.save(parts["optimizer"], folder / OPTIMIZER_NAME)
    torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is not None:
        torch.save(scaler.state_dict(), folder / SCALER_NAME)
    for rank, rng in enumerate(parts["rng"]):
        torch.save(rng, folder / (f"rng_state_{rank}.pth" if len(parts["rng"]) > 1 else "rng_state.pth"))
    torch.save(parts["loop"], folder / LOOP_STATE_NAME)
    if parts["callbacks"]:
        torch.save(parts["callbacks"], folder / CALLBACKS_NAME)


def _state_to_save(trainer, final: Path) -> TrainerState:
    """A copy of the trainer's state, with the callbacks' states and the folder of the best model."""
    state = copy.copy(trainer.state)
    if state.best_global_step:
        best = final.with_name(f"{PREFIX}{state.best_global_step}")
        if best == final or best.is_dir():
            state.best_model_checkpoint = str(best)
    exported: dict[str, Any] = {}
    for callback in _exportable(trainer):
        exported.setdefault(type(callback).__name__, []).append(callback.state())
    state.stateful_callbacks = {name: states if states[1:] else states[0] for name, states in exported.items()}
    return state


def _exportable(trainer) -> list[ExportableState]:
    return [c for c in (*trainer.callback_handler.callbacks, trainer.control) if isinstance(c, ExportableState)]


def _tensor_holders(trainer) -> dict[str, Any]:
    """Callbacks with `tensors()`, whole or spread over ranks, and `load_tensors(state)`, by name and place."""
    holders = [c for c in trainer.callback_handler.callbacks if hasattr(c, "tensors") and hasattr(c, "load_tensors")]
    return {f"{type(callback).__name__} {i}": callback for i, callback in enumerate(holders)}


def _num_bytes(trainer, parts: dict[str, Any]) -> int:
    """Size of the tensors to be written, bytes."""
    states = (parts.get("optimizer") or {"state": {}})["state"]
    tensors: list = [v for values in states.values() for v in values.values()]
    if parts["model"] is None:
        is_adapter = hasattr(trainer.model, "peft_config")
        tensors += [p for p in trainer.model.parameters() if p.requires_grad or not is_adapter]
    else:
        tensors += list(parts["model"].values())
    tensors += [tensor for values in (parts.get("callbacks") or {}).values() for tensor in values.values()]
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


# Finding


def checkpoint_to_resume(trainer, resume_from_checkpoint: str | bool | os.PathLike | None) -> str | None:
    """Clean up after killed runs; the folder to resume from (True: the last complete one), None to start anew.

    The main process looks and tells the others. ValueError if there is none, or the one named is not complete.
    """
    if trainer.args.save_strategy != "no":
        _refuse_deepspeed(trainer)  # before any work is lost
    output_dir = trainer.args.output_dir
    answer: list[str | None] = [None, None]  # path, error
    if trainer.accelerator.is_main_process:
        try:
            clean_up(output_dir)
            answer[0] = _chosen(output_dir, resume_from_checkpoint)
        except ValueError as error:
            answer[1] = str(error)
    if _world() > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


def _chosen(output_dir: str, wanted: str | bool | os.PathLike | None) -> str | None:
    if wanted is None or wanted is False:
        return None
    if wanted is not True:
        _require_complete(Path(wanted))
        return str(wanted)
    path = find_last_checkpoint(output_dir)
    if path is None:
        raise ValueError(
            f"resume_from_checkpoint=True, but there is no complete checkpoint in {output_dir!r}: check output_dir, "
            "name a checkpoint, or leave resume_from_checkpoint out to start anew."
        )
    return path


def _require_complete(path: Path) -> None:
    reason = problem(path)
    if reason is not None:
        raise ValueError(f"The checkpoint {path} cannot be used: {reason}. {last_good(path.parent, besides=path)}")


# Loading


def load_checkpoint(trainer, path: str | os.PathLike) -> None:
    """Restore weights, optimizer, schedule, loss scale, trainer state, callbacks and random states from `path`.

    Call it on all ranks when model and optimizer are wrapped and the schedule exists. Raises ValueError naming the
    file and the last complete checkpoint if `path` is cut off or belongs to another model.
    """
    path = Path(path)
    _require_complete(path)
    _load_weights(trainer, path)
    if (path / OPTIMIZER_NAME).is_file():
        _load_training_state(trainer, path)
    else:
        logger.warning("%s has no optimizer state (save_only_model): optimizer and schedule start anew.", path)
    trainer.state = TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
    best = trainer.state.best_model_checkpoint
    if best is not None and not os.path.isdir(best):
        logger.warning("The best checkpoint %s is not there any more: load_best_model_at_end cannot use it.", best)
        trainer.state.best_model_checkpoint = None
    if trainer.args.restore_callback_states_from_checkpoint:
        _restore_callbacks(trainer)
    _load_loop_state(trainer, path)
    _load_callback_tensors(trainer, path)
    load_rng_state(trainer, path)


def load_best_model(trainer) -> None:
    """Put the weights of `state.best_model_checkpoint` into the model; all ranks must call it."""
    path = trainer.state.best_model_checkpoint
    if path is None:
        logger.warning("There is no best checkpoint to load: no evaluation was saved. The last weights stay.")
        return
    _require_complete(Path(path))
    _load_weights(trainer, Path(path))
    logger.info("Loaded the best model from %s (%s).", path, trainer.state.best_metric)


def _load_weights(trainer, path: Path) -> None:
    try:
        read_model(trainer, path)
    except ValueError as error:
        raise ValueError(f"Cannot resume from {path}: {error}. {last_good(path.parent, besides=path)}") from error


def _load_training_state(trainer, path: Path) -> None:
    name = OPTIMIZER_NAME
    try:
        state = _load(path / name, mmap=True)
        load_optimizer_state(trainer.optimizer, state, path / name)
        name = SCHEDULER_NAME
        trainer.lr_scheduler.load_state_dict(_load(path / name))
        name = SCALER_NAME
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None and (path / name).is_file():
            scaler.load_state_dict(_load(path / name))
    except Exception as error:
        other = last_good(path.parent, besides=path)
        raise ValueError(f"Cannot resume from {path}: {name} does not fit or is damaged ({error}). {other}") from error


def _load(file: Path, mmap: bool = False) -> Any:
    with safe_globals():
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def _restore_callbacks(trainer) -> None:
    """Give callbacks (and the control) the states that the checkpoint has for their class, in order."""
    pending = {n: list(s) if isinstance(s, list) else [s] for n, s in trainer.state.stateful_callbacks.items()}
    for callback in _exportable(trainer):
        if not (states := pending.get(type(callback).__name__)):
            continue
        saved = states.pop(0)
        if isinstance(callback, TrainerControl):
            trainer.control = type(callback).from_state(saved)
        else:
            vars(callback).update(vars(type(callback)(**saved.get("args", {}))), **saved.get("attributes", {}))
    unused = sorted(name for name, states in pending.items() if states)
    if unused:
        logger.warning("The checkpoint has states of callbacks that this run does not have: %s.", ", ".join(unused))


def _load_loop_state(trainer, path: Path) -> None:
    if not (path / LOOP_STATE_NAME).is_file():
        return
    states = _load(path / LOOP_STATE_NAME)
    if len(states) == _world():
        trainer.load_state_dict(states[_rank()])
    else:
        before = f"{path} was written by {len(states)} processes, now there are {_world()}"
        logger.warning("%s: sums of the current logging window start anew.", before)


def _load_callback_tensors(trainer, path: Path) -> None:
    states = _load(path / CALLBACKS_NAME) if (path / CALLBACKS_NAME).is_file() else {}
    for key, callback in _tensor_holders(trainer).items():
        if key in states:
            callback.load_tensors(states[key])
        else:
            logger.warning("%s has no tensors of %s, which starts anew.", path, key)


# Random states


def _rng_state() -> dict[str, Any]:
    """Random states of this rank, with Transformers' keys."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all() if _world() > 1 else torch.cuda.get_rng_state()
    return state


def load_rng_state(trainer, path: str | os.PathLike) -> None:
    """Set this rank's random states to those at saving; call it again after anything that draws random numbers.

    A rank that has none (other number of processes, `save_only_model`) is seeded by seed, rank and step.
    """
    path, rank = Path(path), _rank()
    file = path / (f"rng_state_{rank}.pth" if _world() > 1 else "rng_state.pth")
    manifest = read_manifest(path) or {}
    if not file.is_file() or manifest.get("world_size", _world()) != _world():
        set_seed(trainer.args.seed + 1_000_003 * rank + trainer.state.global_step)
        logger.warning("%s has no random state for rank %d of %d: it is seeded anew.", path, rank, _world())
        return
    state = _load(file)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        if isinstance(state["cuda"], list):
            torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
        else:
            torch.cuda.set_rng_state(state["cuda"])


# Ranks


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _gather(value: Any) -> list:
    """`value` of every rank."""
    values = [value] * _world()
    if _world() > 1:
        dist.all_gather_object(values, value)
    return values


def _raise_together(error: CheckpointError | None) -> None:
    """Raise on every rank if one of them failed, so that none waits for another."""
    failures = [args for args in _gather(None if error is None else error.args) if args is not None]
    if error is not None:
        raise error
    if failures:
        raise CheckpointError(*failures[0])
