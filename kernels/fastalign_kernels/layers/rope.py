"""Rotary position embedding, arXiv:2104.09864, in the rotate-half form, on queries and keys in one launch.

    y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin,  for the halves x1, x2 of the rotated dimensions of each head

fp32 inside, one rounding; the backward is the rotation by the opposite angle. Results lie in memory token by token
((B, L, H, K)), as the products around them do. Bytes moved for T tokens, H query and key heads together, size K, s
bytes: 2 T H K s, forward and backward, and T K / 2 of each table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign_kernels.layers import native
from fastalign_kernels.layers.choice import takes_triton, wide_dtype


def rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    heads_dim: int = 1,
    half_tables: bool = False,
) -> tuple[Tensor, Tensor]:
    """`rope` in plain torch."""
    half = cos.shape[-1] if half_tables else cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]

    def turned(x: Tensor) -> Tensor:
        x = x.movedim(heads_dim, -2)
        wide = wide_dtype(x)
        c, s = cos.unsqueeze(-2).to(wide), sin.unsqueeze(-2).to(wide)
        first, second = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
        both = torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)
        rest = x[..., 2 * half :]
        return (torch.cat((both, rest), dim=-1) if rest.shape[-1] else both).movedim(-2, heads_dim)

    return turned(q), turned(k)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rotate, q, k, cos, sin, positions, half):
        ctx.save_for_backward(cos, sin, positions)
        ctx.half, ctx.rotate = half, rotate
        return rotate(q, k, cos, sin, positions, half)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        cos, sin, positions = ctx.saved_tensors
        q, k = ctx.rotate(grads[0], grads[1], cos, sin, positions, ctx.half, inverse=True)
        return None, q, k, None, None, None, None


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    heads_dim: int = 1,
    half_tables: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """q and k rotated by the angles of their tokens; what lies behind the rotated dimensions is passed through.

    q, k: (B, H, L, K) or (T, H, K), with the heads in dimension `heads_dim`. cos, sin: (B or 1, L, R) or (L, R) of
    each token, or tables (P, R) with integer `positions` (B, L) or (T,) in them. R counts the rotated dimensions,
    each angle standing twice (the first of both is read), or half of them with `half_tables`. `in_place` overwrites q
    and k where no gradient is recorded. Raises ValueError for shapes that do not fit, and for tables with gradients.
    """
    _check(q, k, cos, sin, positions, heads_dim, half_tables)
    in_place = in_place and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
    half = cos.shape[-1] // (1 if half_tables else 2)
    if rotate := _kernel(q, k, cos, sin, positions, half):
        added = q.dim() == 3
        tokens = [x.movedim(heads_dim, -2) for x in (q, k)]
        tokens = [x.unsqueeze(0) for x in tokens] if added else tokens  # (B, L, H, K)
        if in_place and q.stride(-1) == k.stride(-1) == 1:
            rotate(tokens[0], tokens[1], cos, sin, positions, half, in_place=True)
            return q, k
        turned: tuple = _Rope.apply(rotate, *tokens, cos, sin, positions, half)  # pyright: ignore
        turned = tuple((x.squeeze(0) if added else x).movedim(-2, heads_dim) for x in turned)
    else:
        turned = rope_reference(q, k, cos, sin, positions=positions, heads_dim=heads_dim, half_tables=half_tables)
    return (q.copy_(turned[0]), k.copy_(turned[1])) if in_place else turned


def _kernel(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, half: int):
    """What rotates in Triton or C++; None: the reference."""
    if q.dtype != k.dtype:
        return None
    if takes_triton(q, k, cos, sin):
        from fastalign_kernels.layers.triton_rope import rotate

        return rotate
    return native.rotate if native.takes_rope(q, k, cos, sin, positions, half) else None


def _check(q, k, cos, sin, positions, heads_dim, half_tables) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
    if q.dim() not in (3, 4) or k.dim() != q.dim() or heads_dim % q.dim() == q.dim() - 1:
        raise ValueError(f"{shapes}: q and k must be (B, H, L, K) or (T, H, K), with heads_dim={heads_dim} among them")
    leading = [x.movedim(heads_dim, -2).shape[:-2] for x in (q, k)]
    width = cos.shape[-1] * (2 if half_tables else 1)
    if leading[0] != leading[1] or q.shape[-1] != k.shape[-1] or width > q.shape[-1] or width % 2:
        raise ValueError(f"{shapes}: q and k differ in more than heads, or the tables are wider than a head, or odd")
    tokens = cos.shape[:-1] if positions is None else positions.shape
    known = (leading[0], (1, *leading[0][1:]), leading[0][-1:])
    if cos.shape != sin.shape or tokens not in known or (positions is not None and cos.dim() != 2):
        raise ValueError(f"{shapes}: give cos and sin of each token, or tables (P, R) with positions of each token")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin get no gradient here: detach them, or rotate with rope_reference")
