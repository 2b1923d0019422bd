"""Triton kernels of layers/embedding.py: segments of sorted tokens, first inside pieces, then across them."""
# launch options, such as num_warps, are no parameters of a kernel
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels.launch import on_its_card
from fastalign_kernels.numerics import rounded, wide

PIECE = 32  # sorted tokens of a program


def tile(columns: int) -> tuple[int, int]:
    """Columns of a program and its warps: 8 elements of a thread."""
    block = min(max(triton.next_power_of_2(columns), 16), 1024)
    return block, max(block // 256, 1)


@triton.jit
def _columns(column, condition, D: tl.constexpr):
    """Mask of the columns inside, or of none; the interpreter takes no tensor & scalar as a mask."""
    return column < tl.where(condition, D, 0)


@triton.jit
def _embedding_pieces_kernel(
    grad_ptr,
    ids_ptr,
    order_ptr,
    out_ptr,
    partial_ptr,
    num_tokens,
    grad_stride,
    column_blocks,
    D: tl.constexpr,
    SKIP: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    piece = (program // column_blocks).to(tl.int64)
    column = (program % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    previous = tl.load(ids_ptr + piece * PIECE - 1, mask=piece > 0, other=-1)
    kind = 0  # of the segment's sum: 0, it began in an earlier piece; 1, in this one
    for step in range(PIECE):
        at = piece * PIECE + step
        token = tl.load(ids_ptr + at, mask=at < num_tokens, other=-1)
        following = tl.load(ids_ptr + at + 1, mask=at + 1 < num_tokens, other=-1)
        source = tl.load(order_ptr + at, mask=at < num_tokens, other=0)
        inside = _columns(column, at < num_tokens, D)
        grad = tl.load(grad_ptr + source * grad_stride + column, mask=inside, other=0.0)
        total = tl.where(token != previous, 0.0, total) + wide(grad)
        kind = tl.where(token != previous, 1, kind)
        ends = (token != following) & (at < num_tokens)
        whole = _columns(column, ends & (kind == 1) & (token != SKIP), D)
        tl.store(out_ptr + token * D + column, rounded(total, out_ptr.dtype.element_ty), mask=whole)
        tl.store(partial_ptr + 2 * piece * D + column, total, mask=_columns(column, ends & (kind == 0), D))
        previous = token
    following = tl.load(ids_ptr + (piece + 1) * PIECE, mask=(piece + 1) * PIECE < num_tokens, other=-2)
    goes_on = _columns(column, previous == following, D)
    tl.store(partial_ptr + (2 * piece + kind) * D + column, total, mask=goes_on)


@triton.jit
def _embedding_joints_kernel(
    ids_ptr,
    out_ptr,
    partial_ptr,
    num_tokens,
    column_blocks,
    D: tl.constexpr,
    SKIP: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The segment that begins in piece `piece` and reaches beyond its end, if there is one."""
    program = tl.program_id(0)
    piece = (program // column_blocks).to(tl.int64)
    column = (program % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    end = (piece + 1) * PIECE
    token = tl.load(ids_ptr + end - 1, mask=end - 1 < num_tokens, other=-1)
    following = tl.load(ids_ptr + end, mask=end < num_tokens, other=-2)
    before = tl.load(ids_ptr + piece * PIECE - 1, mask=piece > 0, other=-1)
    if (token == following) & (before != token) & (token != SKIP):
        total = tl.load(partial_ptr + (2 * piece + 1) * D + column, mask=inside, other=0.0)
        while following == token:
            piece += 1
            total += tl.load(partial_ptr + (2 * piece) * D + column, mask=inside, other=0.0)
            end = (piece + 1) * PIECE  # a segment that fills the piece and goes on has its end's id there too
            following = tl.load(ids_ptr + end, mask=end < num_tokens, other=-2)
        done = _columns(column, following != token, D)  # always; Triton 3.6 fails where the loop's variable is dropped
        tl.store(out_ptr + token * D + column, rounded(total, out_ptr.dtype.element_ty), mask=done)


@on_its_card
def gradient(grad: Tensor, ids: Tensor, num_rows: int, dtype: torch.dtype, padding_idx: int | None) -> Tensor:
    """`embedding_gradient_reference` as (num_rows, D) of `dtype`, for rows (N, D)."""
    tokens, columns = grad.shape
    out = torch.zeros((num_rows, columns), dtype=dtype, device=grad.device)
    if not grad.numel():
        return out
    ids, order = ids.to(torch.int64).sort(stable=True)
    pieces = triton.cdiv(tokens, PIECE)
    partial = torch.empty((2 * pieces, columns), dtype=torch.float32, device=grad.device)
    block, num_warps = tile(columns)
    blocks = triton.cdiv(columns, block)
    options = {"D": columns, "SKIP": -1 if padding_idx is None else padding_idx, "PIECE": PIECE, "BLOCK": block}
    _embedding_pieces_kernel[(pieces * blocks,)](
        grad, ids, order, out, partial, tokens, grad.stride(0), blocks, **options, num_warps=num_warps
    )
    _embedding_joints_kernel[(pieces * blocks,)](ids, out, partial, tokens, blocks, **options, num_warps=num_warps)
    return out
