"""Divergences between a student's and a teacher's distribution over one support; (..., S) log-probabilities in nats.

    forward_kl  sum_v q_v (log q_v - log p_v)          p the student, q the teacher
    reverse_kl  sum_v p_v (log p_v - log q_v)
    jsd         beta KL(q, m) + (1 - beta) KL(p, m)    with m = beta q + (1 - beta) p

The generalised Jensen-Shannon divergence is GKD's, arXiv:2306.13649 Eq. 1; as in TRL, beta 0 stands for forward_kl and
beta 1 for reverse_kl, which are its limits after division by beta (1 - beta).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
FLOOR = -1e30  # stands for the log of 0, so that 0 times it is 0


def resolved(divergence: str, beta: float) -> str:
    """The divergence that is meant. Raises ValueError for an unknown one, or beta outside of 0 to 1."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r}: choose one of {', '.join(DIVERGENCES)}")
    if divergence == "jsd" and not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta}: give a number from 0 (forward_kl) to 1 (reverse_kl)")
    if divergence == "jsd" and beta in (0.0, 1.0):
        return "forward_kl" if beta == 0.0 else "reverse_kl"
    return divergence


def support_divergence(student_logp: Tensor, teacher_logp: Tensor, divergence: str, beta: float = 0.5) -> Tensor:
    """(...,) divergence of distributions (..., S); -inf is a probability of 0. Differentiable."""
    kind = resolved(divergence, beta)
    log_p, log_q = student_logp.clamp(min=FLOOR), teacher_logp.clamp(min=FLOOR)
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return (q * (log_q - log_p)).sum(-1)
    if kind == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1)


def _with_tail(logp: Tensor) -> Tensor:
    """(..., k+1): the last entry holds the probability that the k others leave."""
    covered = logp.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logp, torch.log(-torch.expm1(covered))], dim=-1)


def topk_divergence(
    student_logp: Tensor, teacher_logp: Tensor, divergence: str, beta: float = 0.5, *, add_tail: bool = True
) -> Tensor:
    """(...,) divergence on the teacher's k most probable tokens (..., k); entries of -inf in the teacher do not count.

    Both are log-probabilities over the whole vocabulary. `add_tail`: what they leave forms one more entry; else both
    are normalised to the support. Differentiable with respect to the student.
    """
    student_logp = torch.where(teacher_logp > -torch.inf, student_logp, -torch.inf)
    if add_tail:
        return support_divergence(_with_tail(student_logp), _with_tail(teacher_logp), divergence, beta)
    student_logp = student_logp - student_logp.logsumexp(-1, keepdim=True)
    teacher_logp = teacher_logp - teacher_logp.logsumexp(-1, keepdim=True)
    return support_divergence(student_logp, teacher_logp, divergence, beta)
