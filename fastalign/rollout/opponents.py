"""Opponents of the policy: completions of the reference, or of a mixture of both, beside the policy's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from ..models import position_limit
from ..policy import policy_info, unwrap
from ..policy_check import is_whole
from .engine import Completion
from .episodes import Rollouts
from .native import NativeEngine
from .native_attention import configs_of
from .native_cache import PrefillCache, bytes_per_token
from .native_forward import Owners, next_tokens, second_head
from .samples import Group


class ReferenceEngine(NativeEngine):
    """The embedded engine on a trainer's reference, which may be the policy without its adapter."""

    name = "reference"

    def __init__(self, reference: Any, policy: Any, **options: Any):
        """`reference` is a `fastalign.reference.Reference` of the model `policy`."""
        self.reference, self._policy = reference, policy
        super().__init__(reference.model or policy, **options)

    def step(self) -> list[Completion]:
        """As the base's, with the reference's weights."""
        with self.reference.active(self._policy):
            return super().step()


class MixtureEngine(NativeEngine):
    """Samples from the geometric mixture p ~ policy^(1 - c) reference^c, c the `share()` of the reference.

    Each token is drawn from one pass over both heads; keys and values of both models are kept in one cache.
    """

    name = "mixture"

    def __init__(self, model: Any, reference: Any, share: Callable[[], float], **options: Any):
        """ValueError for models whose attention cannot be given from outside, or with spread weights."""
        super().__init__(model, **options)
        self.reference, self.share = reference, share
        with reference.active(model) as other:
            base = unwrap(other)
            unfit = next((info for info in (self.info, policy_info(other)) if not info.flat), None)
            whole, limits = is_whole(base), {position_limit(self.base), position_limit(base)} - {None}
        if unfit is not None or not whole or len(limits) > 1:
            reason = unfit.reason if unfit is not None else f"they have {limits} positions"
            raise ValueError(
                "Mixtures of policy and reference need two models that take flat batches and are alike: "
                f"{reason if whole else 'the weights of the reference are spread over ranks'}."
            )
        self._num_layers = self.base.config.get_text_config().num_hidden_layers
        self._bytes_per_token += bytes_per_token(base)
        self._configs = self._configs if base is self.base else [*self._configs, *configs_of(base)]

    def next_tokens(self, inputs: dict[str, Any], source: Tensor, owners: Owners) -> tuple[Tensor, Tensor, Any]:
        """Tokens of the mixture: the reference's forward first, then the policy's with both heads."""
        with self.reference.active(self.model) as other:
            base, own = (
                unwrap(other),
                inputs | {"past_key_values": _Behind(inputs["past_key_values"], self._num_layers)},
            )
            second = second_head(other, base, policy_info(other).form, own, source, self.share())
        return next_tokens(self.model, self.base, self.info.form, inputs, source, owners, second)


class _Behind(PrefillCache):
    """The layers of a second model in the cache of the first one, behind its own."""

    def __init__(self, cache: PrefillCache, num_layers: int):
        super().__init__()
        self.cache, self.num_layers = cache, num_layers

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        return self.cache.update(key_states, value_states, layer_idx + self.num_layers, *args, **kwargs)


class OpponentRollouts:
    """Groups of two samples for each prompt: the policy's, and one of its opponent."""

    def __init__(self, own: Any, other: Rollouts):
        self.own, self.other = own, other

    def run(self, rows: list[dict[str, Any]], num_generations: int, seed: int) -> Iterator[Group]:
        """As `Rollouts.run`, with `num_generations` 2."""
        assert num_generations == 2
        own = {group.index: group.samples for group in self.own.run(rows, 1, seed)}
        self.other.engine.sync(max(sample.version for samples in own.values() for sample in samples))
        for group in self.other.run(rows, 1, seed + 1):
            yield Group(group.index, [*own[group.index], *group.samples])
