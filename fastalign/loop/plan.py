"""How long training runs: epochs, optimizer steps and examples, from the data and the arguments."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass

from transformers import TrainerState
from transformers.trainer_utils import has_length


@dataclass
class TrainingPlan:
    """Lengths of a run; a batch is a micro-batch of one rank, a step is one optimizer update."""

    num_epochs: int
    steps_per_epoch: int
    batches_per_epoch: int
    max_steps: int
    num_train_samples: float  # that the whole run sees, over all ranks

    def position(self, state, accumulation: int) -> tuple[int, int]:
        """(epoch, optimizer steps done in it) of a run in `state`."""
        if self.num_epochs < sys.maxsize:
            return divmod(state.global_step, self.steps_per_epoch)
        epoch = int(state.epoch)  # passes over a stream, whose length only the run has seen
        return epoch, math.ceil((state.epoch - epoch) * self.batches_per_epoch / accumulation - 1e-6)


def starting_batch_size(args, batch_size: int, checkpoint: str | None) -> int:
    """The size that `auto_find_batch_size` had found when `checkpoint` was written, else `batch_size`."""
    if checkpoint is None or not args.auto_find_batch_size:
        return batch_size
    return TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json")).train_batch_size or batch_size


def plan_training(args, loader, batch_size: int, world: int) -> TrainingPlan:
    """The plan for this loader (transformers' rules). ValueError if it has no length and max_steps is not set."""
    accumulation = args.gradient_accumulation_steps
    examples_per_step = batch_size * accumulation * world
    if not has_length(loader):
        if args.max_steps <= 0:
            raise ValueError(
                f"The training data has no length, so max_steps must be positive; it is {args.max_steps}."
            )
        samples = args.max_steps * examples_per_step
        batches = args.max_steps * accumulation
        return TrainingPlan(sys.maxsize, args.max_steps, batches, args.max_steps, samples)
    num_batches = len(loader)
    if num_batches == 0:
        raise ValueError(
            f"The training data gives no batch: {_num_examples(loader, batch_size)} examples, batch size {batch_size} "
            f"on {world} processes, dataloader_drop_last={args.dataloader_drop_last}. Add data or use smaller batches."
        )
    steps = math.ceil(num_batches / accumulation)
    if args.max_steps > 0:
        max_steps, num_epochs = args.max_steps, math.ceil(args.max_steps / steps)
        samples = max_steps * examples_per_step
    else:
        max_steps, num_epochs = math.ceil(args.num_train_epochs * steps), math.ceil(args.num_train_epochs)
        samples = _num_examples(loader, batch_size) * args.num_train_epochs
    return TrainingPlan(num_epochs, steps, num_batches, max_steps, samples)


def _num_examples(loader, batch_size: int) -> int:
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if has_length(dataset) else len(loader) * batch_size
