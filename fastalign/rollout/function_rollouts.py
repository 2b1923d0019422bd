"""Rollouts that a function of the user makes (`rollout_func`), as groups of samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from ..data.formats import has_images, is_conversational
from .chat_tokens import ChatTokens
from .samples import Group, Sample

REQUIRED = ("prompt_ids", "completion_ids", "logprobs")


class FunctionRollouts:
    """Runs `function(prompts, trainer)`, which gets every prompt once for each of its completions, with its
    images in the messages.

    It returns a dict of lists, one entry per prompt: `prompt_ids`, `completion_ids`, `logprobs` (nats as sampled, None
    where they are not known), and optionally `env_mask` (1: a token of the policy, 0: of the environment). What else
    it holds goes to the reward functions. ValueError for missing keys and for lists of the wrong length.
    """

    def __init__(
        self,
        function: Callable[[list, Any], dict],
        trainer: Any,
        processing_class: Any,
        end_ids: tuple[int, ...],
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.function, self.trainer, self.end_ids = function, trainer, set(end_ids)
        self.tokens = ChatTokens(processing_class, end_ids, chat_template_kwargs)

    def run(self, rows: list[dict[str, Any]], num_generations: int, seed: int) -> Iterator[Group]:
        """Groups of `num_generations` samples, one for each row; `seed` is the function's own affair."""
        found = [self.tokens.with_images(row) if has_images(row) else (row, [], {}) for row in rows]
        repeated = [row for row, _, _ in found for _ in range(num_generations)]
        output = dict(self.function(copy.deepcopy([row["prompt"] for row in repeated]), self.trainer))
        if missing := sorted(set(REQUIRED) - set(output)):
            raise ValueError(f"`rollout_func` must return {', '.join(REQUIRED)}; {', '.join(missing)} missing.")
        prompt_ids, completion_ids, logps = (output.pop(name) for name in REQUIRED)
        mask = output.pop("env_mask", None)
        given = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logps, "env_mask": mask}
        for name, values in given.items():
            if values is not None and len(values) != len(repeated):
                raise ValueError(
                    f"`rollout_func` returned {len(values)} entries of `{name}` for {len(repeated)} prompts; give one "
                    "for each."
                )
        samples = []
        for i, row in enumerate(repeated):
            ids = [int(token) for token in completion_ids[i]]
            samples.append(
                Sample(
                    row=row,
                    prompt_ids=[int(token) for token in prompt_ids[i]],
                    completion_ids=ids,
                    logps=None if logps is None or logps[i] is None else [*logps[i]],
                    finish_reason="stop" if ids and ids[-1] in self.end_ids else "length",
                    completion=self._completion(row["prompt"], prompt_ids[i], ids),
                    mask=None if mask is None else [bool(one) for one in mask[i]],
                    extras=_fields(output, i),
                    model_inputs=found[i // num_generations][2],
                )
            )
        for index in range(len(rows)):
            yield Group(index, samples[index * num_generations : (index + 1) * num_generations])

    def _completion(self, prompt: Any, prompt_ids: Any, ids: list[int]) -> Any:
        if is_conversational({"prompt": prompt}):
            return [self.tokens.message([*prompt_ids], ids)]
        return self.tokens.tokenizer.decode(ids, skip_special_tokens=True)


def _fields(output: dict[str, Any], i: int) -> dict[str, Any]:
    """What further fields say of sample i: an entry of a list, or what holds for all."""
    return {
        name: values[i] if isinstance(values, list) else values
        for name, values in output.items()
        if not isinstance(values, list) or i < len(values)
    }
