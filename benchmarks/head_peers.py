"""Other implementations of the head's cross-entropy and log-probabilities, each behind one signature."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """A peer: mean cross-entropy and log-probabilities of (hidden, weight, targets), where it has them."""

    name: str
    package: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    logps: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    needs_cuda: bool = False
    tolerance: float | None = None  # 16-bit logits are less exact than what is asked of everybody else


def _torch_op(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def _compiled_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets)


@functools.cache
def _compiled() -> Callable:
    return torch.compile(_compiled_cross_entropy)


def trl_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's per-token log-probabilities, differentiable."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    size = _CHUNKED_LOGPROB_CHUNK_SIZE
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, size, None, 1.0, ())[0]


def _trl_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    mask = targets != -100
    if hidden.is_cuda:
        return -trl_logps(hidden[mask], weight, targets[mask]).mean()
    logps = trl_logps(hidden, weight, targets.clamp(min=0))  # what TRL does where it has no Triton
    return -logps.masked_fill(~mask, 0).sum() / mask.sum()


def _liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(weight, hidden, targets)


def _cce_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets)


def _quack_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, targets, ignore_index=-100, reduction="mean")


_ALL = [
    Peer("torch", "torch", loss=_torch_op, tolerance=0.1),  # sums a 16-bit loss in 16 bits
    Peer("torch-compile", "torch", loss=lambda *inputs: _compiled()(*inputs)),
    Peer("trl", "trl", loss=_trl_loss, logps=trl_logps),
    Peer("liger", "liger-kernel", loss=_liger_loss, needs_cuda=True),
    Peer("cce", "cut-cross-entropy", loss=_cce_loss, needs_cuda=True),
    Peer("quack", "quack-kernels", loss=_quack_loss, needs_cuda=True),
]
PEERS = [peer.name for peer in _ALL]


def peers(what: str) -> list[Peer]:
    """Those that have `loss` or `logps`."""
    return [peer for peer in _ALL if getattr(peer, what) is not None]
