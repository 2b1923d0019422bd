"""Rollouts: prompts go in, whole groups of samples come out as they finish."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .chat_tokens import ChatTokens
from .engine import Completion, Engine, Request, Sampling
from .samples import Group, Sample


@dataclass
class _Episode:
    """One sample in the making."""

    row: dict[str, Any]
    prompt_ids: list[int]
    seed: int


class Rollouts:
    """Samples episodes from an engine. One thread uses it; the groups of a paused run wait inside the engine."""

    def __init__(
        self,
        engine: Engine,
        processing_class: Any,
        sampling: Sampling,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.engine = engine
        self.sampling = sampling
        self.tokens = ChatTokens(processing_class, chat_template_kwargs)

    def run(self, rows: list[dict[str, Any]], num_generations: int, seed: int) -> Iterator[Group]:
        """`num_generations` samples of each row's `prompt`, group by group as they finish (`Group.index`: the row).

        Same weights, rows and `seed` give the same samples. ValueError for a prompt without tokens and for one that
        the engine finds too long. An iterator that is not read to its end leaves nothing behind in the engine.
        """
        ids = self.tokens.prompt_ids([row["prompt"] for row in rows])
        waiting = {
            (index, number): _Episode(rows[index], ids[index], episode_seed(seed, index, number))
            for index in range(len(rows))
            for number in range(num_generations)
        }
        samples: list[list[Sample | None]] = [[None] * num_generations for _ in rows]
        try:
            self.engine.submit([self._request(key, episode) for key, episode in waiting.items()])
            while waiting:
                if not self.engine.pending:
                    raise RuntimeError(f"The engine {self.engine.name!r} has lost {len(waiting)} requests.")
                for completion in self.engine.step():
                    episode = waiting.pop(completion.key)
                    index, number = completion.key
                    samples[index][number] = self._sample(episode, completion)
                    if None not in samples[index]:
                        yield Group(index, samples[index])  # pyright: ignore[reportArgumentType]
        finally:
            if waiting:
                self.engine.abort()

    def _request(self, key: Any, episode: _Episode) -> Request:
        return Request(key, episode.prompt_ids, self.sampling, episode.seed)

    def _sample(self, episode: _Episode, completion: Completion) -> Sample:
        return Sample(
            row=episode.row,
            prompt_ids=episode.prompt_ids,
            completion_ids=completion.ids,
            logps=completion.logps,
            finish_reason=completion.finish_reason,
            completion=self.tokens.completion(episode.row["prompt"], episode.prompt_ids, completion.ids),
            version=completion.version,
            newest_version=completion.newest_version,
        )


def episode_seed(seed: int, index: int, number: int, turn: int = 0) -> int:
    """A seed of 63 bits for one turn of a sample, unrelated to those of its neighbours."""
    entropy = (seed & (2**64 - 1), index, number, turn)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
