"""Uploads to the Hugging Face Hub: at the end, or at every checkpoint while training goes on."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

logger = logging.getLogger(__name__)

NOT_UPLOADED = ["_*", "tmp-*", "checkpoint-*"]
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.jinja", "*.model", "*.txt")
RUN_FILES = ("trainer_state.json", "fastalign_manifest.json")


def init_repo(trainer, token: str | None = None) -> None:
    """Create the repository (named by `hub_model_id`, else by `output_dir`) if it is not there."""
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    url = HfApi().create_repo(name, token=token or args.hub_token, private=args.hub_private_repo, exist_ok=True)
    trainer.hub_model_id = url.repo_id
    trainer.push_in_progress = None


def quiet_uploads(args):
    """No upload progress bars amid training."""
    if not args.push_to_hub:
        return contextlib.nullcontext()
    from transformers.trainer_utils import suppress_progress_bars

    return suppress_progress_bars()


def push(trainer, commit_message: str, blocking: bool, token: str | None, revision: str | None, **card):
    """Save the model and upload `output_dir` without checkpoints; on the first process only."""
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    if trainer.hub_model_id is None:
        init_repo(trainer, token)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    trainer.create_model_card(**card)
    wait_for_uploads(trainer)
    options: dict[str, Any] = {"repo_id": trainer.hub_model_id, "token": token or args.hub_token}
    options |= {"run_as_future": not blocking, "revision": revision or args.hub_revision}
    return HfApi().upload_folder(
        folder_path=args.output_dir, commit_message=commit_message, ignore_patterns=NOT_UPLOADED, **options
    )


def push_checkpoint(trainer, folder: str) -> None:
    """Upload a checkpoint's model (and the checkpoint itself, by `hub_strategy`) in the background."""
    args = trainer.args
    if not args.push_to_hub or not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    running = trainer.push_in_progress
    if running is not None and not running.is_done() and not args.hub_always_push:
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    for pattern in MODEL_FILES:
        for file in Path(folder).glob(pattern):
            if file.name not in RUN_FILES:
                shutil.copy(file, args.output_dir)
    torch.save(args, Path(args.output_dir, TRAINING_ARGS_NAME))
    message = f"Training in progress, step {trainer.state.global_step}"
    options: dict[str, Any] = {"repo_id": trainer.hub_model_id, "token": args.hub_token, "run_as_future": True}
    options["revision"] = args.hub_revision
    jobs = [
        HfApi().upload_folder(
            folder_path=args.output_dir, commit_message=message, ignore_patterns=NOT_UPLOADED, **options
        )
    ]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        target = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(folder).name
        message += ", checkpoint"
        jobs.append(HfApi().upload_folder(folder_path=folder, path_in_repo=target, commit_message=message, **options))
    if running is None or running.is_done():
        trainer.push_in_progress = PushInProgress(jobs)  # pyright: ignore
    else:
        running.jobs.extend(jobs)


def wait_for_uploads(trainer) -> None:
    """Wait for uploads that run in the background."""
    running = getattr(trainer, "push_in_progress", None)
    if running is not None and not running.is_done():
        logger.info("Waiting for the upload of a checkpoint.")
        running.wait_until_done()
