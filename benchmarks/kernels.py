"""The language-model head and the losses on it against other implementations: time, peak memory, share of the roof.

    python benchmarks/kernels.py --against torch,trl,liger --shapes 2048x512x32000

A shape is scored tokens x hidden size x vocabulary. Peers that are not installed are named and left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import fastalign_kernels
import torch
import torch.nn.functional as F
from head_peers import PEERS, peers
from linear_losses import cases as linear_losses
from measure import Case, Provider, Tensors, device, dtypes_of, parser_of, run_cases, shapes_of

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
CPU_SHAPES = [(2048, 512, 32000)]
GPU_SHAPES = [(8192, 896, 151936), (8192, 2048, 128256), (16384, 4096, 128256)]


def make_inputs(n: int, d: int, v: int, dtype: torch.dtype, masked: float = 0.0, gradient: bool = True) -> Tensors:
    """Hidden states of unit scale, a head whose logits have a standard deviation of 2, and targets."""
    hidden = torch.randn(n, d, device=device()).to(dtype).requires_grad_(gradient)
    weight = (torch.randn(v, d, device=device()) * (2 / d**0.5)).to(dtype).requires_grad_(gradient)
    targets = torch.randint(0, v, (n,), device=device())
    targets[torch.rand(n, device=device()) < masked] = -100
    return {"hidden": hidden, "weight": weight, "targets": targets}


def backward_of(loss: Loss) -> Callable[[Tensors], Tensors]:
    """`run` of a provider: the loss of the inputs, and its gradients."""

    def run(inputs: Tensors) -> Tensors:
        value = loss(inputs["hidden"], inputs["weight"], inputs["targets"])
        value.backward()
        return {"loss": value}

    return run


def logps_of(logps: Loss) -> Callable[[Tensors], Tensors]:
    """`run` of a provider of log-probabilities without gradient."""

    def run(inputs: Tensors) -> Tensors:
        with torch.no_grad():
            return {"logp": logps(inputs["hidden"], inputs["weight"], inputs["targets"])}

    return run


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The specification of the cross-entropy."""
    logits = hidden @ weight.T
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)


def full_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The specification of the log-probabilities."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def cross_entropy_cases(shape: tuple[int, int, int], dtype: torch.dtype, masked: float) -> Case:
    """Forward and backward of the cross-entropy of a head."""
    n, d, v = shape
    size = torch.empty(0, dtype=dtype).element_size()
    scored = n * (1 - masked)
    return Case(
        op="linear_cross_entropy",
        mode=f"{masked:.0%} masked" if masked else "",
        shape=f"N={n} H={d} V={v}",
        dtype=dtype,
        make=lambda: make_inputs(n, d, v, dtype, masked),
        exact=backward_of(full_logits),
        providers=[
            Provider("fastalign", backward_of(fastalign_kernels.linear_cross_entropy), "fastalign"),
            Provider("naive", backward_of(full_logits)),
            *[Provider(p.name, backward_of(p.loss), p.package, p.needs_cuda, p.tolerance) for p in peers("loss")],
        ],
        flops=3 * 2 * scored * d * v,
        bytes=size * (2 * n * d + 2 * v * d),
    )


def logps_case(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    """Log-probabilities of targets, without gradient."""
    n, d, v = shape
    size = torch.empty(0, dtype=dtype).element_size()
    return Case(
        op="linear_logprobs",
        mode="no gradient",
        shape=f"N={n} H={d} V={v}",
        dtype=dtype,
        make=lambda: make_inputs(n, d, v, dtype, gradient=False),
        exact=logps_of(full_logps),
        providers=[
            Provider("fastalign", logps_of(fastalign_kernels.linear_logprobs), "fastalign"),
            Provider("naive", logps_of(full_logps)),
            *[Provider(p.name, logps_of(p.logps), p.package, p.needs_cuda, p.tolerance) for p in peers("logps")],
        ],
        flops=2 * n * d * v,
        bytes=size * (n * d + v * d),
    )


def main() -> int:
    names = ["naive", *PEERS]
    options = parser_of(__doc__, names, "scored tokens x hidden size x vocabulary").parse_args()
    default = GPU_SHAPES if device().type == "cuda" else CPU_SHAPES
    cases = []
    for shape in shapes_of(options, default, (96, 32, 500)):
        for dtype in dtypes_of(options):
            cases += [cross_entropy_cases(shape, dtype, masked) for masked in (0.0, 0.5)]
            cases.append(logps_case(shape, dtype))
            cases += linear_losses(shape, dtype)
    return run_cases(cases, options)


if __name__ == "__main__":
    sys.exit(main())
