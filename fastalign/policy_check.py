"""A few random tokens through a model: is its head what its logits say, do packed sequences stay apart, can answers
share a prompt?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .data.batch import TokenBatch
from .data.collate import collate_flat
from .free_tokens import Layer, reading, teach_layers
from .scoring_head import body_dtype

logger = logging.getLogger(__name__)

LENGTHS = (7, 5)  # tokens of the two segments
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-4, torch.float16: 0.03, torch.bfloat16: 0.2}  # nats, logits to 10
ROUNDING = {torch.float64: 1e-9, torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 0.02}  # never called a leak
SHARE_OF_LEAK = 0.1  # packed segments may differ from each alone by this share of what no isolation at all would do
Score = Callable[[TokenBatch], Tensor]  # logp (N,) of the scored tokens
Logits = Callable[[TokenBatch], Tensor]  # ordinary logits (1, T, V)
Alone = Callable[[Tensor], tuple[Tensor, float]]  # ids of a segment -> what `score` says of it, size of its logits


def is_whole(model: nn.Module) -> bool:
    """Every weight is here: none on the meta device, sharded by FSDP2 or held back by ZeRO-3."""
    return not any(p.is_meta or hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random state are restored."""
    flags = [(module, module.training) for module in model.modules()]
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    with torch.no_grad(), torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training


def head_error(base: Any, score: Score, logits: Logits) -> str | None:
    """How far `score` is from the model's ordinary logits on one sequence; None where they agree."""
    segment = random_segments(base)[0]
    expected, size = _own_logp(logits, segment)
    error, tolerance = (score(batch_of([segment])) - expected).abs().max().item(), _limit(base, size, TOLERANCE)
    return None if error <= tolerance else f"log-probabilities differ by {error:.3g} (allowed {tolerance:.3g})"


def flat_errors(base: Any, score: Score, logits: Logits) -> tuple[str | None, str | None]:
    """`packed_errors` of log-probabilities."""
    return packed_errors(base, score, lambda segment: _own_logp(logits, segment))


def packed_errors(base: Any, score: Score, alone: Alone) -> tuple[str | None, str | None]:
    """How far `score` of two packed segments is from each `alone`, and of two answers behind one prefix from an answer
    with its prefix; None where they agree.

    The limit is a share of what a full leak does to this model, so that it also holds for weights near their start.
    """
    first, second = random_segments(base)
    own, size = zip(*(alone(segment) for segment in (first, second)), strict=True)
    joined, _ = alone(torch.cat([first, second]))
    half = _dtype(base).itemsize < 4
    # in half precision an expert may flip for single tokens: a leak between segments moves most of them
    worst = torch.median if half else torch.max
    leak = worst((joined[-len(own[1]) :] - own[1]).abs()).item()
    limit = min(_limit(base, max(size), TOLERANCE), SHARE_OF_LEAK * leak)
    limit = max(limit, _limit(base, max(size), ROUNDING))

    def error_of(batch: TokenBatch, expected: Tensor, what: str) -> str | None:
        try:
            difference = (score(batch) - expected).abs()
        except Exception as error:  # whatever a model does with a mask it does not know
            return f"{type(error).__name__}: {error}"
        error = worst(difference[-len(own[1]) :]).item()
        if not half:
            error = max(error, difference.max().item())
        return None if error <= limit else f"{what} by {error:.3g} nats"

    packed = error_of(batch_of([first, second]), torch.cat(own), "two packed sequences differ from each alone")
    if packed is not None:
        return packed, packed
    shared = _shared_batch(first, second[1:].flip(0), second)
    return None, error_of(shared, joined, "an answer behind a shared prompt differs from both written out")


def teach_reading(model: nn.Module, base: Any, score: Score) -> None:
    """Let the last layer of `base` skip what nobody reads (`free_tokens.reading`) if `score` stays what it is.

    Sharded and meta weights cannot be checked, so there it computes everything.
    """
    if is_whole(base) and teach_layers(base):
        with quiet(model):
            error = _reading_error(base, score)
        if error is None:
            return
        logger.info("The last layer of %s computes every token: %s.", type(base).__name__, error)
    for module in base.modules():
        if isinstance(layer := module.__dict__.get("forward"), Layer):
            layer.is_last = False


def _reading_error(base: Any, score: Score) -> str | None:
    batch = batch_of(random_segments(base))
    last = (batch.row != batch.row.roll(-1)).nonzero()[:, 0]
    names = ("source", "targets", "row", "weight")
    batch = replace(batch, **{name: getattr(batch, name)[last] for name in names})
    named = replace(batch, extras={"read": batch.source})
    try:
        expected = score(batch)
        with reading(named):
            error = (score(named) - expected).abs().max().item()
    except Exception as failure:  # whatever a layer does with what it does not know
        return f"{type(failure).__name__}: {failure}"
    limit = _limit(base, 10 * expected.abs().max().item(), ROUNDING)
    return None if error <= limit else f"without the tokens that are not read, others differ by {error:.3g}"


def _shared_batch(prompt: Tensor, other: Tensor, answer: Tensor) -> TokenBatch:
    """Two answers behind one prompt; scored are the prompt after its first token and the second answer."""
    batch = batch_of([prompt, other, answer])
    start = len(prompt) + len(other)
    positions = [torch.arange(len(prompt)), *(torch.arange(len(x)) + len(prompt) for x in (other, answer))]
    source = [torch.arange(len(prompt)), torch.arange(start, start + len(answer) - 1)]
    num_scored = len(prompt) + len(answer) - 1
    return replace(
        batch,
        position_ids=torch.cat(positions).to(batch.input_ids.device),
        source=torch.cat(source).to(batch.input_ids.device),
        targets=torch.cat([prompt[1:], answer]),
        row=batch.row.new_zeros(num_scored),
        weight=batch.weight.new_ones(num_scored),
        prefix=batch.cu_seqlens.new_tensor([-1, 0, 0]),
    )


def random_segments(base: Any) -> list[Tensor]:
    """Random ids, without those that have a meaning to the model (an image token asks for an image)."""
    rows = base.get_input_embeddings().weight.shape[0]
    fields = base.config.to_dict().items()
    special = [v for k, v in fields if k.endswith(("token_id", "token_index")) and isinstance(v, int)]
    num_ids = sum(LENGTHS)
    ids = torch.randint(0, rows, (8 * num_ids,), generator=torch.Generator().manual_seed(1))
    ids = ids[~torch.isin(ids, torch.tensor(special, dtype=ids.dtype))][:num_ids]
    return list(ids.to(base.device).split(LENGTHS))


def batch_of(segments: list[Tensor]) -> TokenBatch:
    """A flat batch of `segments` with every token but the first of each scored."""
    return collate_flat([s.tolist() for s in segments]).to(segments[0].device)


def _own_logp(logits: Logits, segment: Tensor) -> tuple[Tensor, float]:
    """Log-probabilities of `segment` after its first token from ordinary logits, and the largest logit."""
    found = logits(batch_of([segment]))[0, -len(segment) :]  # a soft prompt stands before it
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    logp = found[:-1].log_softmax(-1).gather(1, segment[1:, None])[:, 0]
    return logp, found.abs().max().item()


def _dtype(base: Any) -> torch.dtype:
    """What its layers compute in."""
    return body_dtype(base) or base.get_input_embeddings().weight.dtype


def _limit(base: Any, size: float, limits: dict[torch.dtype, float]) -> float:
    weight = base.get_input_embeddings().weight
    limit = limits.get(_dtype(base), limits[torch.bfloat16])
    if weight.is_cuda:
        limit = max(limit, limits[torch.float16])  # fp32 may be multiplied in TF32
    return limit * max(1.0, size / 10)
