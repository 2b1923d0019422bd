"""Layer kernels against plain torch, torch.compile and Liger: time, peak memory, share of the memory bandwidth.

    python benchmarks/layers.py --against torch,liger --shapes 16384x4096x14336

A shape is tokens x hidden size x intermediate size.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fastalign_kernels import layers
from fastalign_kernels.layers.rms_norm import rms_norm_reference
from fastalign_kernels.layers.rope import rope_reference
from measure import Case, Provider, Tensors, device, dtypes_of, parser_of, run_cases, shapes_of

CPU_SHAPES = [(2048, 512, 1408)]
GPU_SHAPES = [(16384, 896, 4864), (16384, 4096, 14336)]
HEAD_SIZE = 64
Op = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def _run(op: Op, names: tuple[str, ...]) -> Callable[[Tensors], Tensors]:
    """`run` of a provider: the outputs of `op`, and the gradients of their products with fixed directions."""

    def run(inputs: Tensors) -> Tensors:
        outs = op(*(inputs[name] for name in names))
        outs = outs if isinstance(outs, tuple) else (outs,)
        torch.autograd.backward(outs, [inputs[f"direction{i}"] for i in range(len(outs))])
        return {f"out{i}": out for i, out in enumerate(outs)}

    return run


def _tensor(*shape: int, dtype: torch.dtype, gradient: bool = True) -> torch.Tensor:
    return torch.randn(*shape, device=device()).to(dtype).requires_grad_(gradient)


def _case(
    op: str, shape: tuple, dtype: torch.dtype, make: Callable[[], Tensors], names: tuple[str, ...],
    ours: Op, plain: Op, liger: Op | None, elements: int,
) -> Case:  # fmt: skip
    """`elements`: how many numbers of `dtype` the forward and the backward must read and write."""
    size = torch.empty(0, dtype=dtype).element_size()
    compiled = functools.cache(lambda: torch.compile(plain))
    providers = [
        Provider("fastalign", _run(ours, names), "fastalign"),
        Provider("torch", _run(plain, names)),
        Provider("torch-compile", _run(lambda *inputs: compiled()(*inputs), names)),
    ]
    if liger is not None:
        providers.append(Provider("liger", _run(liger, names), "liger-kernel", needs_cuda=True))
    return Case(
        op=op, shape="x".join(map(str, shape)), dtype=dtype, make=make, exact=_run(plain, names),
        providers=providers, flops=0, bytes=size * elements,
    )  # fmt: skip


def _liger_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, 1e-6, 0.0, "llama", False)


def _liger_glu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _plain_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor):
    summed = x + residual
    return rms_norm_reference(summed, weight, 1e-6), summed


def cases_of(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Case]:
    """Fused add and norm, SwiGLU, RoPE, and the gradient of the embedding."""
    n, d, inner = shape
    heads = max(1, d // HEAD_SIZE)

    def norm() -> Tensors:
        inputs = {name: _tensor(n, d, dtype=dtype) for name in ("x", "residual")}
        inputs["weight"] = _tensor(d, dtype=dtype)
        return inputs | {f"direction{i}": _tensor(n, d, dtype=dtype, gradient=False) for i in range(2)}

    def gated() -> Tensors:
        inputs = {name: _tensor(n, inner, dtype=dtype) for name in ("gate", "up")}
        return inputs | {"direction0": _tensor(n, inner, dtype=dtype, gradient=False)}

    def rotation() -> Tensors:
        inputs = {name: _tensor(1, heads, n, HEAD_SIZE, dtype=dtype) for name in ("q", "k")}
        angles = torch.outer(torch.arange(n), 1e4 ** (-torch.arange(0, 1, 2 / HEAD_SIZE))).repeat(1, 2)[None]
        inputs |= {"cos": angles.cos().to(device(), dtype), "sin": angles.sin().to(device(), dtype)}
        shape = (1, heads, n, HEAD_SIZE)
        return inputs | {f"direction{i}": _tensor(*shape, dtype=dtype, gradient=False) for i in range(2)}

    def table() -> Tensors:
        ids = torch.randint(0, 32000, (n,), device=device())
        weight = _tensor(32000, d, dtype=dtype)
        return {"ids": ids, "weight": weight, "direction0": _tensor(n, d, dtype=dtype, gradient=False)}

    norm_names, rope_names = ("x", "residual", "weight"), ("q", "k", "cos", "sin")
    return [
        _case(
            "add_rms_norm", (n, d), dtype, norm, norm_names, layers.add_rms_norm, _plain_norm, _liger_norm, 9 * n * d
        ),
        _case(
            "swiglu", (n, inner), dtype, gated, ("gate", "up"), layers.glu,
            lambda gate, up: F.silu(gate) * up, _liger_glu, 8 * n * inner,
        ),
        _case(
            "rope", (n, heads, HEAD_SIZE), dtype, rotation, rope_names, layers.rope, rope_reference, None, 8 * n * d
        ),
        _case(
            "embedding", (n, 32000, d), dtype, table, ("ids", "weight"), layers.embedding,
            F.embedding, None, 3 * n * d + 32000 * d,
        ),
    ]  # fmt: skip


def main() -> int:
    names = ["torch", "torch-compile", "liger"]
    options = parser_of(__doc__, names, "tokens x hidden size x intermediate size").parse_args()
    shapes = shapes_of(options, GPU_SHAPES if device().type == "cuda" else CPU_SHAPES, (12, 64, 96))
    return run_cases([case for s in shapes for dtype in dtypes_of(options) for case in cases_of(s, dtype)], options)


if __name__ == "__main__":
    sys.exit(main())
