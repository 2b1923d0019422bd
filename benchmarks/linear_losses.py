"""Preference, policy and divergence losses straight from hidden states, for benchmarks/kernels.py."""

from __future__ import annotations

import fastalign_kernels
import torch
import torch.nn.functional as F
from head_peers import trl_logps
from measure import Case, Provider, Tensors, device

PAIR_TOKENS = 128  # scored tokens of one answer
BETA = 0.1


def _full_logps(inputs: Tensors, hidden: str = "hidden", weight: str = "weight") -> torch.Tensor:
    logits = inputs[hidden] @ inputs[weight].T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, inputs["targets"][:, None])[:, 0]


def _trl(inputs: Tensors) -> torch.Tensor:
    return trl_logps(inputs["hidden"], inputs["weight"], inputs["targets"])


def _inputs(n: int, d: int, v: int, dtype: torch.dtype) -> Tensors:
    def matrix(rows: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, d, device=device()) * scale).to(dtype)

    answers = n // PAIR_TOKENS + n // PAIR_TOKENS % 2 or 2
    return {
        "hidden": matrix(n, 1.0).requires_grad_(),
        "weight": matrix(v, 2 / d**0.5).requires_grad_(),
        "targets": torch.randint(0, v, (n,), device=device()),
        "rows": torch.arange(n) * answers // n,  # on the CPU, as a collator gives them
        "ref_logps": -torch.rand(answers, device=device()) * 100,
        "old_logp": -torch.rand(n, device=device()) * 10 - 2,
        "advantages": torch.randn(n, device=device()),
        "teacher_hidden": matrix(n, 1.0),
        "teacher_weight": matrix(v, 2 / d**0.5),
    }


def _backward(loss) -> object:
    def run(inputs: Tensors) -> Tensors:
        value = loss(inputs)
        value.backward()
        return {"loss": value}

    return run


def _dpo(logps: torch.Tensor, inputs: Tensors) -> torch.Tensor:
    """DPO with the sigmoid loss, from per-token log-probabilities."""
    answers = len(inputs["ref_logps"])
    sums = logps.new_zeros(answers).index_add(0, inputs["rows"].to(logps.device), logps)
    margin = (sums - inputs["ref_logps"].to(sums.dtype)).view(-1, 2)
    return -F.logsigmoid(BETA * (margin[:, 0] - margin[:, 1])).mean()


def _own_dpo(inputs: Tensors) -> torch.Tensor:
    return fastalign_kernels.linear_preference_loss(
        inputs["hidden"], inputs["weight"], inputs["targets"], inputs["rows"],
        num_pairs=len(inputs["ref_logps"]) // 2, ref_logps=inputs["ref_logps"], beta=BETA,
    ).loss  # fmt: skip


def _dapo(logps: torch.Tensor, inputs: Tensors) -> torch.Tensor:
    """The clipped policy loss, a mean over tokens."""
    ratio = torch.exp(logps - inputs["old_logp"].to(logps.dtype))
    advantages = inputs["advantages"].to(logps.dtype)
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def _own_dapo(inputs: Tensors) -> torch.Tensor:
    n = len(inputs["targets"])
    return fastalign_kernels.linear_policy_loss(
        inputs["hidden"], inputs["weight"], inputs["targets"], inputs["advantages"],
        old_logp=inputs["old_logp"], weights=torch.full((n,), 1 / n, device=device()), loss_type="dapo",
    )[0]  # fmt: skip


def _kl(inputs: Tensors) -> torch.Tensor:
    """Mean forward KL of the student from the teacher."""
    student = inputs["hidden"] @ inputs["weight"].T
    teacher = inputs["teacher_hidden"] @ inputs["teacher_weight"].T
    if student.dtype != torch.float64:
        student, teacher = student.float(), teacher.float()
    teacher = teacher.log_softmax(-1).detach()
    return (teacher.exp() * (teacher - student.log_softmax(-1))).sum(-1).mean()


def _own_kl(inputs: Tensors) -> torch.Tensor:
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    return fastalign_kernels.linear_divergence(*(inputs[name] for name in names))[0]


def _trl_kl(inputs: Tensors) -> torch.Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = ("hidden", "weight"), ("teacher_hidden", "teacher_weight")
    operands = [x for pair in (student, teacher) for x in (*(inputs[name] for name in pair), None)]
    return ChunkedDivergenceFunction.apply(*operands, 0.0, 1.0)[0].mean()


OPS = {  # name -> (products, ours, specification, TRL's)
    "linear_preference_loss": (3, _own_dpo, lambda i: _dpo(_full_logps(i), i), lambda i: _dpo(_trl(i), i)),
    "linear_policy_loss": (3, _own_dapo, lambda i: _dapo(_full_logps(i), i), lambda i: _dapo(_trl(i), i)),
    "linear_divergence": (4, _own_kl, _kl, _trl_kl),
}


def cases(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Case]:
    """Forward and backward of each loss at a shape (scored tokens, hidden size, vocabulary)."""
    n, d, v = shape
    size = torch.empty(0, dtype=dtype).element_size()
    return [
        Case(
            op=op,
            mode={"linear_preference_loss": "dpo", "linear_policy_loss": "dapo", "linear_divergence": "KL"}[op],
            shape=f"N={n} H={d} V={v}",
            dtype=dtype,
            make=lambda: _inputs(n, d, v, dtype),
            exact=_backward(specification),
            providers=[
                Provider("fastalign", _backward(ours), "fastalign"),
                Provider("naive", _backward(specification)),
                Provider("trl", _backward(trl), "trl", tolerance=0.1 if dtype != torch.float32 else None),
            ],
            flops=products * 2 * n * d * v,
            bytes=size * (2 * n * d + 2 * v * d),
        )
        for op, (products, ours, specification, trl) in OPS.items()
    ]
