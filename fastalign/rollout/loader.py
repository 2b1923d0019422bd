"""Lazy batches of sampled data: a generation is made when its first micro-batch is asked for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import has_length

from .buffer import Buffer, Experience
from .group_batches import GroupBatch

Numbered = list[tuple[int, list[dict]]]  # generation batches: their numbers and prompts


@dataclass
class Step:
    """One optimizer step, or one batch of evaluation: what its nominal micro-batches hold on this rank.

    The loss is normalised by these, however the step is cut into batches.
    """

    parts: list[list[Experience]]
    num_items: list[float]  # of the generation batch of each part: its learned tokens over all ranks, by their number
    made: list[int]  # optimizer steps before that generation
    number: int  # optimizer steps before this one
    training: bool = True
    seconds: float = 0.0  # that generating took
    state: dict[str, Any] = field(default_factory=dict)  # what the trainer adds up over the step

    @property
    def num_micro(self) -> int:
        return len(self.parts)


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of the batch algebra; all count on this rank unless said."""

    micro_size: int  # completions of a nominal micro-batch
    num_parts: int  # nominal micro-batches of a generation (`steps_per_generation`)
    num_iterations: int  # times that a generation is gone through
    accumulation: int  # nominal micro-batches of an optimizer step
    num_generations: int  # completions of a prompt
    rank: int = 0
    world: int = 1

    @classmethod
    def of_training(cls, args: Any, rank: int, world: int, rows_of_one: int = 1) -> BatchPlan:
        """The sizes that `BatchArgs` ask for, whose batch size counts `rows_of_one` completions as one."""
        return cls(
            micro_size=args.per_device_train_batch_size * rows_of_one,
            num_parts=args.steps_per_generation,
            num_iterations=args.num_iterations,
            accumulation=args.gradient_accumulation_steps,
            num_generations=args.num_generations,
            rank=rank,
            world=world,
        )

    @classmethod
    def of_evaluation(cls, args: Any, rank: int, world: int, rows_of_one: int = 1) -> BatchPlan:
        """One micro-batch for each generation."""
        size, groups_of = args.per_device_eval_batch_size * rows_of_one, args.num_generations_eval
        return cls(size, 1, 1, 1, groups_of or args.num_generations, rank=rank, world=world)

    @property
    def num_prompts(self) -> int:
        """Prompts of a generation batch over all ranks."""
        return self.micro_size * self.num_parts * self.world // self.num_generations

    def share(self, prompts: list[Any]) -> list[tuple[int, int]]:
        """(place in `prompts`, number of completions) of this rank's part: ranks take neighbouring completions."""
        size = len(prompts) * self.num_generations // self.world
        first, last = self.rank * size, (self.rank + 1) * size
        found = []
        for place in range(first // self.num_generations, -(-last // self.num_generations)):
            begin, end = place * self.num_generations, (place + 1) * self.num_generations
            found.append((place, min(end, last) - max(begin, first)))
        return found


class RolloutLoader:
    """Iterates over the micro-batches of an epoch; the loop takes it as loader and as batch sampler.

    `generate(rows, number, left, following) -> Buffer` makes the part of this rank of generation batch `number` from
    the prompts of all ranks, `left` of whose micro-batches at most belong to the present optimizer step; `following`
    are (number, rows) of the `ahead` batches after it, as far as steps are left. `cut(step) -> list[GroupBatch]`
    makes the batches of an optimizer step. `current_step()` counts optimizer steps. An epoch takes
    the prompts in the order that TRL takes them for the same seed, and leaves out those that do not fill a generation
    batch.
    """

    def __init__(
        self,
        dataset: Any,
        plan: BatchPlan,
        *,
        generate: Callable[[list[dict], int, int, Numbered], Buffer],
        cut: Callable[[Step], list[GroupBatch]],
        current_step: Callable[[], int],
        shuffle: bool,
        seed: int,
        ahead: int = 0,
        last_step: Callable[[], int] = lambda: 0,
    ):
        self.dataset, self.plan = dataset, plan
        self.ahead, self.last_step = ahead, last_step
        self.generate, self.cut, self.current_step = generate, cut, current_step
        self.shuffle, self.seed = shuffle, seed
        self.epoch = self.skip_steps = 0
        self.sizes: deque[tuple[int, int]] = deque()  # of each step: micro-batches, and how many there are nominally
        self.left = plan.accumulation
        self.buffer: Buffer | None = None  # what the next micro-batches come from

    @property
    def batch_sampler(self) -> RolloutLoader:
        return self

    @property
    def uses(self) -> int:
        """Nominal micro-batches that a generation gives."""
        return self.plan.num_parts * self.plan.num_iterations

    def __len__(self) -> int:
        if not has_length(self.dataset):
            raise TypeError("a stream has no length")
        return len(self.dataset) // self.plan.num_prompts * self.uses

    def seek(self, epoch: int, step: int = 0) -> None:
        """Start the next iteration at this optimizer step of this epoch."""
        self.epoch, self.skip_steps = epoch, step

    def __iter__(self) -> Iterator[GroupBatch]:
        self.sizes.clear()
        done = self.skip_steps * self.plan.accumulation  # nominal micro-batches
        self.skip_steps = 0
        if done % self.uses == 0:
            self.buffer = None
        place, buffer, seconds = done % self.uses, self.buffer, 0.0
        goes_on = place > 0 and buffer is not None  # else, without a buffer in the checkpoint, it is made again
        generations = self._generations(done // self.uses + goes_on)
        if place and not goes_on:
            buffer, seconds = next(generations, (None, 0.0))
        while True:
            step = Step([], [], [], self.current_step(), seconds=seconds)
            while step.num_micro < self.plan.accumulation:
                if buffer is None or place == self.uses:
                    self.left = self.plan.accumulation - step.num_micro
                    buffer, seconds = next(generations, (None, 0.0))
                    step.seconds += seconds
                    place = 0
                    if buffer is None:
                        break
                step.parts.append(buffer.parts[place % self.plan.num_parts])
                step.num_items.append(buffer.num_items)
                step.made.append(buffer.step)
                place += 1
            seconds = 0.0
            if not step.parts:
                return
            self.buffer = buffer if buffer is not None and place < self.uses else None
            batches = self.cut(step)
            self.sizes.append((len(batches), step.num_micro))
            yield from batches

    def _generations(self, first: int) -> Iterator[tuple[Buffer, float]]:
        """(buffer, seconds that it took) of each generation batch of the epoch from number `first` on."""
        per_epoch = len(self) // self.uses if has_length(self.dataset) else 0
        known: deque[tuple[int, list[dict]]] = deque()
        before = self.epoch * per_epoch if per_epoch else self.epoch << 32  # of a stream nobody knows how many
        coming = enumerate(self._prompts(first), before + first)
        while True:
            known.extend(islice(coming, self.ahead + 1 - len(known)))
            if not known or (per_epoch and known[0][0] >= (self.epoch + 1) * per_epoch):
                return
            number, rows = known.popleft()
            start = time.perf_counter()
            steps = self.last_step() - self.current_step() - 1  # after the present one
            more = -(-(self.left + steps * self.plan.accumulation) // self.uses) - 1
            buffer = self.generate(rows, number, self.left, [*islice(known, max(more, 0))])
            yield buffer, time.perf_counter() - start

    def _prompts(self, first: int) -> Iterator[list[dict]]:
        """Rows of each generation batch from number `first` of the epoch on, and of later epochs of a dataset."""
        size = self.plan.num_prompts
        if not has_length(self.dataset):
            stream = self.dataset.shuffle(seed=self.seed + self.epoch) if self.shuffle else self.dataset
            rows = islice(iter(stream), first * size, None)
            while len(chunk := list(islice(rows, size))) == size:
                yield chunk
            return
        dataset: Any = self.dataset
        for epoch in count(self.epoch) if len(dataset) >= size else ():
            order = prompt_order(len(dataset), self.seed, epoch) if self.shuffle else np.arange(len(dataset))
            for start in range(first * size, len(order) - size + 1, size):
                yield [dataset[int(i)] for i in order[start : start + size]]
            first = 0


class EvaluationLoader:
    """Iterates over batches of an evaluation set, each generated when it is asked for."""

    def __init__(self, dataset: Any, plan: BatchPlan, *, generate, cut, current_step, seed: int):
        self.dataset, self.plan, self.seed = dataset, plan, seed
        self.generate, self.cut, self.current_step = generate, cut, current_step

    def __iter__(self) -> Iterator[GroupBatch]:
        size = self.plan.num_prompts
        for number, rows in enumerate(self._rows(size)):
            buffer = self.generate(rows, number)
            parts = [experience for part in buffer.parts for experience in part]
            now = self.current_step()
            yield from self.cut(Step([parts], [buffer.num_items], [now], now, training=False))

    def _rows(self, size: int) -> Iterator[list[dict]]:
        if not has_length(self.dataset):
            rows = iter(self.dataset.shuffle(seed=self.seed))
            while chunk := list(islice(rows, size)):
                yield self._whole(chunk, size)
            return
        dataset: Any = self.dataset
        order = prompt_order(len(dataset), self.seed, 0)
        for start in range(0, len(order), size):
            yield self._whole([dataset[int(i)] for i in order[start : start + size]], size)

    def _whole(self, rows: list[dict], size: int) -> list[dict]:
        """Ranks take equal parts, so that the last batch is filled up with its own prompts; a single process's not."""
        return rows if self.plan.world == 1 else [rows[i % len(rows)] for i in range(size)]


def prompt_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of the rows in `epoch`: the draw number `epoch` of one generator, as TRL's sampler makes it."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epoch):
        torch.randperm(num_rows, generator=generator)
    return torch.randperm(num_rows, generator=generator).numpy()
