"""Advantages from rewards: per completion within groups of one prompt, and per token from values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4  # added to standard deviations, as TRL does


@dataclass
class GroupAdvantages:
    """What the rewards of a generation batch say about each completion."""

    advantages: Tensor  # (B,)
    rewards: Tensor  # (B,) that the advantages came from; NaN where no function could score
    std_is_zero: Tensor  # (B,) bool: the completion's group (or batch) tells nothing


def _std(values: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Standard deviation with Bessel's correction that leaves NaN out; NaN for fewer than two values."""
    count = (~values.isnan()).sum() if dim is None else (~values.isnan()).sum(dim, keepdim=keepdim)
    mean = values.nanmean() if dim is None else values.nanmean(dim, keepdim=True)
    squares = (values - mean).square()
    total = squares.nansum() if dim is None else squares.nansum(dim, keepdim=keepdim)
    return torch.where(count > 1, (total / (count - 1)).sqrt(), torch.nan)


def _check_groups(num_rows: int, num_generations: int) -> None:
    if num_generations < 1 or num_rows % num_generations:
        raise ValueError(
            f"{num_rows} completions do not fall into groups of num_generations={num_generations}: "
            "give all completions of each prompt, one after another"
        )


def group_advantages(
    rewards_per_func: Tensor,
    num_generations: int,
    *,
    reward_weights: Tensor | None = None,
    scale_rewards: Literal["group", "batch", "none"] = "group",
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
) -> GroupAdvantages:
    """GRPO's advantages, arXiv:2402.03300 Sec. 4.1.2, of rewards (B, F), groups of `num_generations` in a row.

    sum_then_normalize: r = sum_k w_k r_k, A = (r - group mean) / (std + 1e-4), std of the group, of the batch, or none
    (Dr. GRPO, arXiv:2503.20783). normalize_then_sum (GDPO, arXiv:2601.05242): z-scores of each function in its group,
    weighted sum, z-score over the batch. NaN is a reward that could not be given; a completion with nothing else
    gets A = 0 and does not move the others. Raises ValueError.
    """
    num_rows, num_funcs = rewards_per_func.shape
    _check_groups(num_rows, num_generations)
    weights = rewards_per_func.new_ones(num_funcs) if reward_weights is None else reward_weights.to(rewards_per_func)
    unscorable = rewards_per_func.isnan().all(dim=1)

    def summed(values: Tensor) -> Tensor:
        return (values * weights).nansum(dim=1).masked_fill(unscorable, torch.nan)

    if multi_objective_aggregation == "normalize_then_sum":
        grouped = rewards_per_func.view(-1, num_generations, num_funcs)
        mean = grouped.nanmean(1, keepdim=True)
        std = _std(grouped, 1, keepdim=True) if num_generations > 1 else torch.zeros_like(mean)
        rewards = summed(((grouped - mean) / (std + EPSILON)).view(num_rows, num_funcs))
        std = _std(rewards) if num_rows > 1 else rewards.new_zeros(())
        centred, scale = rewards - rewards.nanmean(), True
    elif multi_objective_aggregation == "sum_then_normalize":
        if scale_rewards not in ("group", "batch", "none"):
            raise ValueError(f"scale_rewards={scale_rewards!r}: choose 'group', 'batch' or 'none'")
        rewards = summed(rewards_per_func)
        grouped = rewards.view(-1, num_generations)
        if scale_rewards == "batch":
            std = _std(rewards) if num_rows > 1 else rewards.new_zeros(())
        else:
            std = _std(grouped, 1) if num_generations > 1 else rewards.new_zeros(len(grouped))
            std = std.repeat_interleave(num_generations)
        centred, scale = (grouped - grouped.nanmean(1, keepdim=True)).flatten(), scale_rewards != "none"
    else:
        raise ValueError(
            f"multi_objective_aggregation={multi_objective_aggregation!r}: "
            "choose 'sum_then_normalize' or 'normalize_then_sum'"
        )
    advantages = centred / (std + EPSILON) if scale else centred
    std_is_zero = torch.isclose(std, torch.zeros_like(std)).expand(num_rows)
    return GroupAdvantages(advantages.nan_to_num(nan=0.0), rewards, std_is_zero)


def leave_one_out_advantages(rewards: Tensor, num_generations: int, *, normalize_advantages: bool = False) -> Tensor:
    """RLOO, arXiv:2402.14740 Eq. 8: each reward (B,) minus the mean of its group's others; NaN rewards give 0.

    A group with one reward gives 0. `normalize_advantages`: z-score over the batch. Raises ValueError.
    """
    _check_groups(len(rewards), num_generations)
    grouped = rewards.view(-1, num_generations)
    count = (~grouped.isnan()).sum(1, keepdim=True)
    others = (grouped.nansum(1, keepdim=True) - grouped) / (count - 1)
    advantages = torch.where(count > 1, grouped - others, torch.nan if num_generations > 1 else 0.0).flatten()
    if normalize_advantages:
        advantages = (advantages - advantages.nanmean()) / (_std(advantages) + EPSILON)
    return advantages.nan_to_num(nan=0.0)


def discounted_sums(values: Tensor, rows: Tensor, discount: float) -> Tensor:
    """(N,): x_t + discount * x_{t+1} + discount^2 * x_{t+2} + ... to the end of each token's row (ids (N,), runs).

    By doubling: log2(N) elementwise steps, no loop over tokens and nothing read back from a GPU.
    """
    sums = values.clone()
    num_tokens, step, factor = len(values), 1, discount
    while step < num_tokens and factor != 0:
        same = rows[step:] == rows[:-step]
        sums[:-step] += factor * torch.where(same, sums[step:], 0)
        step, factor = 2 * step, factor * factor
    return sums


def generalised_advantages(
    rewards: Tensor, values: Tensor, rows: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """GAE, arXiv:1506.02438 Eq. 16: (advantages, returns) (N,) of per-token rewards and values (N,), rows (N,) ids.

    The value after a row's last token is 0. returns = advantages + values. No gradient passes.
    """
    rewards, values = rewards.detach(), values.detach()
    following = torch.zeros_like(values)
    following[:-1] = torch.where(rows[1:] == rows[:-1], values[1:], 0)
    advantages = discounted_sums(rewards + gamma * following - values, rows, gamma * lam)
    return advantages, advantages + values


def whiten(values: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Values (N,) with variance 1 (Bessel's correction), and mean 0 unless `shift_mean` is False."""
    if values.numel() < 2:
        return values
    var, mean = torch.var_mean(values)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean
