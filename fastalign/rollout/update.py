"""From experiences to forwards: the batches of an optimizer step, and passes without gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .buffer import Experience
from .group_batches import GroupBatch, GroupCollator, cut
from .loader import Step

PASS_TOKENS = 16384  # of a batch that runs without gradient, where no token budget is set


def batches_of_step(
    step: Step,
    weights: list[list[float]],
    collator: GroupCollator,
    *,
    skips: Callable[[Experience], bool],
    size: int,
    budget: int | None = None,
    rounds: Callable[[int], int] = lambda count: count,
    together: int = 1,
) -> list[GroupBatch]:
    """The batches of `step` that this rank runs, `weights` (of each token) of its parts' experiences in them.

    Experiences without learned tokens, and those that `skips` names, are left out; one batch at least is made, so that
    there is a gradient. `rounds(number of batches)` says how many this rank has to run. Groups are cut at multiples of
    `together`.
    """
    numbers: dict[int, tuple[int, float]] = {}  # id -> micro-batch, weight
    experiences: list[Experience] = []
    for micro, (part, of_part) in enumerate(zip(step.parts, weights, strict=True)):
        for experience, weight in zip(part, of_part, strict=True):
            if experience.num_learned and not skips(experience):
                one = copy.copy(experience)  # it may be in the step more than once
                numbers[id(one)] = micro, weight
                experiences.append(one)
    everything = [one for part in step.parts for one in part]
    experiences = experiences or [_without_loss(everything)] * together
    options = {"size": size, "budget": budget, "share": collator.shares(experiences), "together": together}
    parts = cut(experiences, collator, **options)
    if (most := rounds(len(parts))) > len(parts):
        parts = cut(experiences, collator, **options, at_least=most)
        parts += [[_without_loss(everything)] * together for _ in range(most - len(parts))]
    made = []
    for part in parts:
        batch = collator(part, options["share"])
        found = [numbers.get(id(one), (0, 0.0)) for one in part]
        counts = [one.num_learned for one in part]
        batch.micro = [micro for micro, _ in found]
        batch.weight = _repeated([weight for _, weight in found], counts)
        batch.extras.setdefault("advantages", _repeated([one.advantage for one in part], counts))
        batch.step, batch.is_last = step, False
        made.append(batch)
    made[-1].is_last = True
    return made


def _repeated(values: list[float], counts: list[int]) -> Tensor:
    return torch.from_numpy(np.repeat(np.asarray(values, np.float32), counts))


def _without_loss(experiences: Sequence[Experience]) -> Experience:
    """A stand-in that is run for nothing but its gradient of zero: the shortest of their prompts, one token."""
    known = [one for one in experiences if len(one.prompt_ids)]
    shortest = min(known, key=lambda one: len(one.prompt_ids))
    names = {name for one in known for name in one.tokens}
    zeros = {name: torch.zeros(1) for name in names}
    made = Experience(shortest.prompt_ids, np.zeros(1, np.int64), np.zeros(1, np.int64), -1, tokens=zeros)
    made.model_inputs = shortest.model_inputs
    return made


def loss_weights(
    step: Step, kind: str, *, steps_per_generation: int, max_completion_length: int | None = None
) -> list[list[float]]:
    """Weight of each token of the experiences of `step.parts`, by `kind` (`policy_gradient.WEIGHTINGS`).

    Nominal micro-batches are averaged, as TRL does, and gradients over ranks; experiences without tokens count.
    """
    found = []
    for part, num_items in zip(step.parts, step.num_items, strict=True):
        lengths = [max(one.num_learned, 1) for one in part]
        if kind == "row_mean":
            found.append([1 / (length * len(part) * step.num_micro) for length in lengths])
            continue
        if kind == "batch_tokens":  # of the whole generation batch, of which the step may be a part
            weight = 1 / (num_items * (step.num_micro / steps_per_generation if step.training else 1.0))
        elif kind == "token_mean":
            weight = 1 / (max(sum(one.num_learned for one in part), 1) * step.num_micro)
        elif kind == "max_length":
            assert max_completion_length is not None
            weight = 1 / (len(part) * max_completion_length * step.num_micro)
        else:
            assert kind == "row_sum", kind
            weight = 1 / (len(part) * step.num_micro)
        found.append([weight] * len(part))
    return found


def run_pass(
    experiences: Sequence[Experience],
    collator: GroupCollator,
    forward: Callable[[GroupBatch], Tensor],
    *,
    budget: int | None = None,
    rounds: Callable[[int], int] = lambda count: count,
) -> list[Tensor]:
    """`forward(batch) -> (N,)` of all learned tokens, in batches of `budget` tokens; (n,) for each experience.

    The last batch is repeated where `rounds(number of batches)` asks for more; without one, a stand-in runs.
    """
    kept = [one for one in experiences if one.num_learned]
    share = collator.shares(kept)
    batches = cut(kept, collator, size=len(kept), budget=budget or PASS_TOKENS, share=share) if kept else []
    found: dict[int, Tensor] = {}
    count = rounds(len(batches))
    batches = batches or [[_without_loss(experiences)] for _ in range(min(count, 1))]
    for number in range(count):
        batch = collator(batches[min(number, len(batches) - 1)], share)
        values = forward(batch).split([one.num_learned for one in batch.experiences])
        found |= {id(one): part for one, part in zip(batch.experiences, values, strict=True)}
    return [found.get(id(one), torch.zeros(0)) for one in experiences]


def attach(name: str, experiences: Sequence[Experience], values: Sequence[Tensor]) -> None:
    """Keep (n,) values of the learned tokens of each experience as `tokens[name]`."""
    for one, value in zip(experiences, values, strict=True):
        one.tokens[name] = value


def remember(name: str, experiences: Sequence[Experience], values: Tensor) -> None:
    """`attach` of the values (N,) of all learned tokens, where there are none yet."""
    for one, value in zip(experiences, values.split([one.num_learned for one in experiences]), strict=True):
        one.tokens.setdefault(name, value)
