"""Token embedding whose gradient is summed in fp32 and in a fixed order: tokens are sorted, no atomics.

Rows of the gradient are read in the order of their token ids, in pieces of fixed length; what belongs to an id is
summed in fp32 and rounded once. A piece leaves the sums of ids that reach into its neighbours as fp32 partials, which
a second kernel adds up. Bytes moved for N tokens of D elements of s bytes and V rows of which U occur: N D s read,
V D s written with zeros, U D s written, 16 N D / 64 of partials at most.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign_kernels.layers.choice import as_rows, takes_triton


def embedding_gradient_reference(grad: Tensor, ids: Tensor, num_rows: int, padding_idx: int | None = None) -> Tensor:
    """(V, D) gradient of the table for the gradient (N, D) of its rows `ids` (N,), in plain torch."""
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    result = torch.zeros(num_rows, grad.shape[1], dtype=wide.dtype, device=grad.device).index_add_(0, ids, wide)
    if padding_idx is not None:
        result[padding_idx] = 0
    return result.to(grad.dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, padding_idx):
        ctx.save_for_backward(ids)
        ctx.options = weight.shape[0], weight.dtype, padding_idx
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        from fastalign_kernels.layers.triton_embedding import gradient

        (ids,) = ctx.saved_tensors
        num_rows, dtype, padding_idx = ctx.options
        return None, gradient(as_rows(grads[0]), ids.reshape(-1), num_rows, dtype, padding_idx), None


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows `ids` (...) of weight (V, D) as (..., D); the row `padding_idx` gets no gradient."""
    if weight.requires_grad and torch.is_grad_enabled() and takes_triton(weight):
        padding_idx = None if padding_idx is None else padding_idx % weight.shape[0]
        return _Embedding.apply(ids, weight, padding_idx)  # pyright: ignore
    return F.embedding(ids, weight, padding_idx)
