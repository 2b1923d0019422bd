"""The head in fp64 from full logits and autograd, independent of the library: the oracle of the head tests."""

import torch
from torch import Tensor

NAMES = ("logp", "entropy", "mean_logp", "mean_logit", "log_sum_p2")  # what row kernels differentiate
DIFFERENTIABLE = (*NAMES, "lse")  # the differentiable statistics


def oracle_stats(hidden, weight, targets, bias=None, *, scale=1.0, softcap=None, temperature=1.0) -> dict[str, Tensor]:
    """Statistics (N,) fp64 of fp64 inputs, with a graph."""
    z = (hidden @ weight.t() + (0 if bias is None else bias)) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None].double() if isinstance(temperature, Tensor) else temperature)
    logp_all = torch.log_softmax(z, dim=-1)
    return {
        "logp": logp_all[torch.arange(len(targets)), targets],
        "entropy": torch.distributions.Categorical(logits=z).entropy(),
        "top1": z.argmax(-1) == targets,
        "mean_logp": logp_all.mean(-1),
        "mean_logit": z.mean(-1),
        "log_sum_p2": torch.logsumexp(2 * logp_all, dim=-1),
        "lse": torch.logsumexp(z, dim=-1),
    }


def leaves(*tensors, dtype=torch.float64):
    """fp64 copies that need gradients."""
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp_min(1e-30))
