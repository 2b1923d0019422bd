"""Checkpoint folders on disk: written aside and renamed, checked for completeness, rotated, cleaned up.

A folder `checkpoint-N` appears by one rename, when all its files and a manifest of their sizes are on the disk. So a
process may be killed at any moment: what is there afterwards is complete, or is named `tmp-...` and is never read.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)

MANIFEST = "fastalign_manifest.json"
PREFIX = "checkpoint-"
ASIDE = "tmp-"  # a checkpoint being written
REPLACED = "tmp-old-"  # a checkpoint on its way out


class CheckpointError(OSError):
    """A checkpoint could not be written; the state in memory and the checkpoints on disk are as before."""


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-N` in `output_dir`, ascending in N, complete or not."""
    found = [(int(m[1]), path) for path in Path(output_dir).glob(PREFIX + "*") if (m := _numbered(path)) is not None]
    return [path for _, path in sorted(found)]


def _numbered(path: Path):
    return re.fullmatch(PREFIX + r"(\d+)", path.name) if path.is_dir() else None


# Writing


def publish(final: Path, write: Callable[[Path], None], details: dict) -> None:
    """Let `write(folder)` fill a folder aside, put it on the disk with a manifest, and rename it to `final`.

    `details` goes into the manifest. An existing `final` is replaced. If anything fails the folder aside is removed
    and CheckpointError says why, with the space that is free and the last complete checkpoint.
    """
    aside = final.with_name(ASIDE + final.name)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        _write_manifest(aside, details)
        if final.exists():
            old = final.with_name(REPLACED + final.name)
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
            os.rename(aside, final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(aside, final)
        _sync(final.parent)
    except Exception as error:
        raise _write_error(final, aside, error, details) from error


def _write_manifest(folder: Path, details: dict) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        _sync(path)
    versions = {name: version(name) for name in ("fastalign", "torch", "transformers")}
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": 1, **details, "versions": versions, "files": sizes}, indent=1) + "\n")
    _sync(manifest)
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(final: Path, aside: Path, error: Exception, details: dict) -> CheckpointError:
    existing = next(path for path in (final.parent, *final.parent.parents) if path.exists())
    written = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file()) if aside.exists() else 0
    needed = max(written, details.get("bytes", 0))
    free = shutil.disk_usage(existing).free  # with the partly written folder still there
    shutil.rmtree(aside, ignore_errors=True)
    code = getattr(error, "errno", None) or errno.EIO
    if free + written < needed or code == errno.ENOSPC or "os error 28" in str(error):
        code = errno.ENOSPC
        reason = (
            f"the disk is full: it needs about {_megabytes(needed)}, and {_megabytes(free + written)} are free in "
            f"{existing}. Free some space (or set save_total_limit or save_only_model)"
        )
    else:
        reason = f"{type(error).__name__}: {error}"
    message = (
        f"Could not write {final}: {reason}. {last_good(final.parent)} The training state in memory is untouched."
    )
    return CheckpointError(code, message)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def rotate(output_dir: str | os.PathLike, limit: int | None, keep: list[str]) -> None:
    """Remove the oldest checkpoints (by time written) beyond `limit`; those in `keep` stay, and count."""
    if limit is None or limit <= 0:
        return
    kept = {Path(path).resolve() for path in keep}
    by_age = sorted(checkpoints(output_dir), key=lambda path: (path.stat().st_mtime_ns, int(path.name[len(PREFIX) :])))
    removable = [path for path in by_age if path.resolve() not in kept]
    for path in removable[: max(0, len(by_age) - limit)]:
        old = path.with_name(REPLACED + path.name)
        os.rename(path, old)  # at once, so that no half-removed checkpoint keeps its name
        shutil.rmtree(old, ignore_errors=True)
        logger.info("Removed %s (save_total_limit=%d).", path, limit)


def clean_up(output_dir: str | os.PathLike) -> None:
    """Remove what a killed process left: folders `tmp-...`, or finish their last rename if they are complete."""
    for path in sorted(Path(output_dir).glob(f"{ASIDE}*{PREFIX}*")):
        final = path.with_name(path.name.removeprefix(REPLACED).removeprefix(ASIDE))
        if re.fullmatch(PREFIX + r"\d+", final.name) is None or not path.is_dir():
            continue
        finished = not path.name.startswith(REPLACED) and (path / MANIFEST).is_file() and problem(path) is None
        if finished and not final.exists():
            os.rename(path, final)
            logger.info("Recovered %s, which was complete but not yet renamed.", final)
        else:
            shutil.rmtree(path, ignore_errors=True)
            logger.info("Removed %s, left by a run that was killed.", path)


# Reading


def find_last_checkpoint(output_dir: str | os.PathLike, besides: str | os.PathLike | None = None) -> str | None:
    """Path of the last complete checkpoint in `output_dir` (other than `besides`), or None; logs what it skips."""
    for path in reversed(checkpoints(output_dir)):
        if besides is not None and path.resolve() == Path(besides).resolve():
            continue
        reason = problem(path)
        if reason is None:
            return str(path)
        logger.warning("Skipped the checkpoint %s: %s.", path, reason)
    return None


def last_good(output_dir: str | os.PathLike, besides: str | os.PathLike | None = None) -> str:
    """A sentence that names the last complete checkpoint."""
    path = find_last_checkpoint(output_dir, besides)
    if path is None:
        return f"There is no other complete checkpoint in {output_dir}."
    return f"The last complete checkpoint is {path}."


def read_manifest(path: str | os.PathLike) -> dict | None:
    """The manifest of a checkpoint, None where there is none (one that transformers or TRL wrote)."""
    file = Path(path) / MANIFEST
    return json.loads(file.read_text()) if file.is_file() else None


def problem(path: str | os.PathLike) -> str | None:
    """Why the checkpoint cannot be used (a file missing, cut off, unreadable), or None if it is complete."""
    path = Path(path)
    if not path.is_dir():
        return "there is no such folder"
    try:
        manifest = read_manifest(path)
        if manifest is None:
            return _problem_without_manifest(path)
        for name, size in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} is unreadable ({error})"
    return None


def _problem_without_manifest(path: Path) -> str | None:
    """Check a checkpoint of transformers or TRL, whose last file is `trainer_state.json`."""
    state = path / TRAINER_STATE_NAME
    if not state.is_file():
        return f"{TRAINER_STATE_NAME} is missing"
    try:
        json.loads(state.read_text())
    except ValueError as error:
        return f"{TRAINER_STATE_NAME} is unreadable ({error})"
    try:
        weights = weight_files(path)
    except ValueError as error:
        return str(error)
    for name in weights:
        if (reason := _unreadable(path / name)) is not None:
            return reason
    training = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if (path / name).exists()]
    if not training and not list(path.glob("rng_state*.pth")):
        return None  # saved with save_only_model
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
        if (reason := _unreadable(path / name)) is not None:
            return reason
    return None


def weight_files(path: Path) -> list[str]:
    """Names of the files that hold the weights (or the first adapter's). ValueError if there are none."""
    for index in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (path / index).is_file():
            try:
                return sorted(set(json.loads((path / index).read_text())["weight_map"].values()))
            except (ValueError, KeyError) as error:
                raise ValueError(f"{index} is unreadable ({error})") from error
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME, "adapter_model.bin"):
        if (path / name).is_file():
            return [name]
    nested = [p.relative_to(path).as_posix() for p in sorted(path.glob(f"*/{ADAPTER_SAFE_WEIGHTS_NAME}"))]
    if nested:
        return nested
    if list(path.glob("pytorch_model_fsdp*")) or list(path.glob("global_step*")):
        raise ValueError(
            "its weights are sharded (FSDP or DeepSpeed format): merge them with `accelerate merge-weights` or "
            "zero_to_fp32.py"
        )
    raise ValueError("it has no weights (model.safetensors, adapter_model.safetensors, or an index with shards)")


def _unreadable(file: Path) -> str | None:
    """Why a safetensors or torch file cannot be whole, judged by its header or its zip directory (at its end)."""
    if not file.is_file():
        return f"{file.name} is missing"
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length)) if 8 + length <= size else None
            if header is None:
                return f"{file.name} is cut off in its header"
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (struct.error, ValueError, KeyError, TypeError) as error:
            return f"{file.name} has no readable header ({error})"
        return None if size == expected else f"{file.name} has {size} bytes, its header says {expected}"
    return None if zipfile.is_zipfile(file) else f"{file.name} is cut off or not a torch file"
