"""What two ranks do in the tests of distributed training; started by `accelerate launch rank_runs.py FOLDER RUNS`."""

import errno
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from loop_runs import history, trainer

from fastalign.loop.checkpoint import CheckpointError

# Adam divides by the size of the gradient: with a larger epsilon, rounding stays rounding
COMMON = {"max_steps": 4, "max_grad_norm": 0.5, "adam_epsilon": 1e-3}
CASES = {
    "llama": COMMON,
    "tied": COMMON | {"family": "qwen2", "gradient_checkpointing": True},
    "adapter": COMMON | {"peft": True, "lora_dropout": 0.0},
}
DROPOUT = COMMON | {"family": "gpt2", "model_kwargs": {"resid_pdrop": 0.1, "embd_pdrop": 0.1}}
ALONE = {"dropout": DROPOUT, "bf16": COMMON | {"bf16": True}}  # not compared with one process to the last digits


def train(folder: Path, name: str, accumulation: int, resume: str | None = None) -> None:
    """Four steps with a checkpoint after each; log, checkpoints and saved model end up in `folder`.

    Two ranks see the same global batch as one process with twice the accumulation.
    """
    made = trainer(folder, **(CASES | ALONE)[name], gradient_accumulation_steps=accumulation)
    made.train(resume_from_checkpoint=resume)
    made.save_model(str(folder / "final"))
    if made.is_world_process_zero():
        kind = f"{made.accelerator.distributed_type.name} {type(made.model_wrapped).__name__} {made.world}"
        (folder / "log.json").write_text(json.dumps({"history": history(made.state), "kind": kind}))


def fill_disk(folder: Path) -> None:
    """The first rank cannot write its second checkpoint: every rank must hear of it, and none may wait for ever."""
    made = trainer(folder, **COMMON)
    save = torch.save

    def full(value, file, *args, **kwargs):
        if isinstance(file, Path) and file.name == "scheduler.pt" and made.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, file, *args, **kwargs)

    torch.save = full
    try:
        made.train()
    except CheckpointError as error:
        (folder / f"error_{made.rank}.txt").write_text(f"{error.errno} {error}")
    torch.save = save


def leave_after_collective() -> None:
    """Have gloo's thread still wait for the interpreter's lock, to release the tensor, when the script ends."""
    values = torch.ones(4)
    sys.setswitchinterval(10)  # the main thread keeps the lock
    dist.all_reduce(values)


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for spec in json.loads(sys.argv[2]):
        train(root / spec.pop("folder"), **spec)
    fill_disk(root / "full")
    leave_after_collective()
