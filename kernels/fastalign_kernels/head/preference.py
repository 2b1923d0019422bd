"""Preference losses of a linear head, over whole pairs of answers, without the logits in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastalign_kernels.head.answers import Answers, total_over_groups
from fastalign_kernels.head.products import as_one_op
from fastalign_kernels.head.rows import stats_dtype
from fastalign_kernels.head.stats import stats as head_stats
from fastalign_kernels.head.token_stats import LogitForm, TokenStats
from fastalign_kernels.head.vocabulary_parallel import VocabularyShard
from fastalign_kernels.losses.odds import cpo_loss, orpo_loss, tpo_loss
from fastalign_kernels.losses.preference import COUPLE_PAIRS, PairLosses, preference_loss
from fastalign_kernels.losses.sequences import row_sums, wpo_weights
from fastalign_kernels.losses.unpaired import RowLosses, bco_loss, kto_loss

PairFunction = Callable[..., "PairLosses | Tensor"]


@dataclass(frozen=True)
class ReferenceHead:
    """A frozen head that log-probabilities of the reference come from: one product, no gradient."""

    hidden: Tensor  # (N, D'), the tokens of the policy's hidden states in the same order
    weight: Tensor  # (V, D')
    bias: Tensor | None = None  # (V,)
    form: LogitForm = LogitForm()  # noqa: RUF009 (frozen)


@dataclass
class PreferenceResult:
    """Loss of B pairs with its graph, and detached numbers in the order of the pairs."""

    loss: Tensor  # 0-dim
    losses: Tensor  # (B,) without the NLL term
    chosen_logps: Tensor  # (B,) nats, sums or token means
    rejected_logps: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    stats: TokenStats  # (N,) in the order of the tokens
    nll: Tensor | None = None  # 0-dim, nats per token, before its factor; None without that term
    pulls: Tensor | None = None  # (B,) sum over the pair's tokens of |d loss / d logp|; None without gradients

    @property
    def margins(self) -> Tensor:
        """(B,) chosen minus rejected reward."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def accuracies(self) -> Tensor:
        """(B,) 1 where the chosen answer has the larger reward, else 0."""
        return (self.margins > 0).to(self.margins.dtype)


@dataclass
class UnpairedResult:
    """Loss of R answers with its graph, and detached numbers in the order of the answers."""

    loss: Tensor  # 0-dim
    losses: Tensor  # (R,)
    logps: Tensor  # (R,) nats
    rewards: Tensor  # (R,)
    baseline: Tensor | None  # 0-dim: KTO's z or BCO's delta
    stats: TokenStats  # (N,) in the order of the tokens
    pulls: Tensor | None = None  # (R,) sum over the answer's tokens of |d loss / d logp|; None without gradients


def _reference_logps(
    answers: Answers,
    ref_logps: Tensor | None,
    reference: ReferenceHead | None,
    targets: Tensor,
    chunk: int | None,
    shard: VocabularyShard | None,
    average: bool,
) -> Tensor | None:
    """(R,) log-probabilities of the reference in the order of groups, given or from its head."""
    if ref_logps is not None and reference is not None:
        raise ValueError("ref_logps and reference are both given: give one of them")
    if ref_logps is not None:
        if not isinstance(ref_logps, Tensor):
            kind = type(ref_logps).__name__
            raise ValueError(f"ref_logps is a {kind}: give a tensor ({answers.counts.numel()},), one per answer")
        if ref_logps.shape != answers.counts.shape:
            raise ValueError(f"ref_logps {tuple(ref_logps.shape)}: give ({answers.counts.numel()},), one per answer")
        return answers.to_groups(ref_logps.detach().to(answers.counts.device, non_blocking=True))
    if reference is None:
        return None
    head = {"bias": reference.bias, "form": reference.form, "chunk": chunk, "shard": shard}
    found = head_stats(reference.hidden, reference.weight, targets, **head)
    return answers.logps(answers.sorted(found.logp), slice(None), slice(None), average)


@dataclass
class _PairObjective:
    """The loss of the pairs that lie in a span of tokens."""

    answers: Answers
    loss: str | PairFunction
    settings: dict[str, Any]
    ref_logps: Tensor | None  # (R,) in the order of groups
    average: bool
    nll_alpha: float
    nll_answer: int
    use_weighting: bool
    pair_divisor: float
    nll_divisor: float

    def __call__(self, stats: TokenStats, span: slice) -> tuple[Tensor, list[Tensor]]:
        """0-dim share of the loss, and [losses, logps of both answers, rewards of both, NLL where there is one]."""
        rows = self.answers.rows_of(span)
        logps = self.answers.logps(stats.logp, span, rows, self.average)
        chosen, rejected = self._pair(logps)
        found = self._losses(stats, span, rows, chosen, rejected)
        total = found.losses.sum() / self.pair_divisor
        details = [found.losses, chosen, rejected, found.chosen_rewards, found.rejected_rewards]
        if self.nll_alpha:
            nll = -(stats.logp * self.answers.of_answer(self.nll_answer, span)).sum() / self.nll_divisor
            total = total + self.nll_alpha * nll
            details.append(nll)
        return _as_logp(stats, total, details)

    def _pair(self, values: Tensor) -> tuple[Tensor, Tensor]:
        by_answer = values.view(-1, self.answers.per_group)
        return by_answer[:, 0], by_answer[:, 1]

    def _losses(self, stats: TokenStats, span: slice, rows: slice, chosen: Tensor, rejected: Tensor) -> PairLosses:
        references = () if self.ref_logps is None else self._pair(self.ref_logps[rows])
        if callable(self.loss):
            pairs = slice(rows.start // self.answers.per_group, rows.stop // self.answers.per_group)
            own = {k: v[pairs] if isinstance(v, Tensor) and v.dim() else v for k, v in self.settings.items()}
            found = self.loss(chosen, rejected, *references, **own)
            if isinstance(found, PairLosses):
                return found
            ratios = zip((chosen, rejected), references or (0.0, 0.0), strict=True)
            rewards = ((logps - ref).detach() for logps, ref in ratios)
            return PairLosses(found, *rewards)
        if self.loss != "dpo":
            return METHODS[self.loss](chosen, rejected, **self.settings)
        answers = self.answers
        chosen_lengths, rejected_lengths = self._pair(answers.lengths[rows])
        weights = chosen_nll = None
        if self.use_weighting:
            assert stats.log_sum_p2 is not None
            counted = None if answers.scored is None else answers.scored[span]
            factors = wpo_weights(stats.logp, stats.log_sum_p2, answers.counts[rows], counted)
            chosen_factor, rejected_factor = self._pair(factors)
            weights = chosen_factor * rejected_factor
        if "sft" in _types(self.settings):
            values = stats.logp if answers.scored is None else stats.logp * answers.scored[span]
            sums, _ = self._pair(row_sums(values, answers.counts[rows]))
            chosen_nll = -sums * (self.pair_divisor / self.nll_divisor)
        lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        own = {"chosen_nll": chosen_nll, "weights": weights}
        return preference_loss(chosen, rejected, *references, **lengths, **own, **self.settings)  # pyright: ignore


def _as_logp(stats: TokenStats, total: Tensor, details: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A loss and its details, made of fp64 sums, in the type of the tokens' logp."""
    return total.to(stats.logp.dtype), [value.to(stats.logp.dtype) for value in details]


def _types(settings: dict[str, Any]) -> list[str]:
    found = settings.get("loss_type", "sigmoid")
    return [found] if isinstance(found, str) else list(found)


def _takes_means(loss: str | PairFunction, types: list[str]) -> bool:
    """Whether a method reads token means of log-probabilities rather than their sums."""
    return loss == "orpo" or (loss in ("cpo", "tpo") and not {"ipo", "simpo", "alphapo", "tpo-l"}.isdisjoint(types))


def linear_preference_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    *,
    num_pairs: int,
    fn: PairFunction,
    ref_logp: Tensor | None = None,
    layout: Literal["pairs", "blocks"] = "pairs",
    average_log_prob: bool = False,
    nll_alpha: float = 0.0,
    nll_answer: int = 0,
    per_pair: int = 2,
) -> Tensor:
    """The specification, from full logits: mean of fn over pairs + nll_alpha * mean NLL of one answer's tokens.

    fn(chosen, rejected[, ref_chosen, ref_rejected]) -> (B,) losses of sums or means of answers' logp; ref_logp (N,).
    """
    logp = torch.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None]).squeeze(1)

    def of_answer(values: Tensor, pair: int, answer: int) -> Tensor:
        number = pair * per_pair + answer if layout == "pairs" else answer * num_pairs + pair
        return values[rows == number]

    def answers(values: Tensor, answer: int) -> Tensor:
        tokens = [of_answer(values, k, answer) for k in range(num_pairs)]
        return torch.stack([t.sum() / (max(1, len(t)) if average_log_prob else 1) for t in tokens])

    references = () if ref_logp is None else (answers(ref_logp, 0), answers(ref_logp, 1))
    loss = fn(answers(logp, 0), answers(logp, 1), *references)
    loss = (loss.losses if isinstance(loss, PairLosses) else loss).mean()
    if nll_alpha:
        loss = loss - nll_alpha * torch.cat([of_answer(logp, k, nll_answer) for k in range(num_pairs)]).mean()
    return loss


@as_one_op
def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    *,
    num_pairs: int,
    loss: str | PairFunction = "dpo",
    layout: Literal["pairs", "blocks"] = "pairs",
    ref_logps: Tensor | None = None,
    reference: ReferenceHead | None = None,
    scored: Tensor | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    average_log_prob: bool | None = None,
    nll_alpha: float | None = None,
    pair_divisor: float | None = None,
    nll_divisor: float | None = None,
    couples_pairs: bool = False,
    bias: Tensor | None = None,
    form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
    outputs: Sequence[str] = (),
    chunk: int | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    shard: VocabularyShard | None = None,
    **settings: Any,
) -> PreferenceResult:
    """Loss of `num_pairs` B pairs: hidden (N, D) of scored positions, weight (V, D), targets (N,), rows (N,) int64.

    `rows` numbers each token's answer; its tokens keep their order. layout "pairs": answers 2k and 2k + 1 are pair k's
    chosen and rejected one; "blocks": k and B + k, as TRL's batches have it. TPO has three, the gold answer last (two
    if nll_alpha=0). Keep `rows` on the CPU: elsewhere it is read back once. Tokens that do not lie pair by pair cost
    one copy of `hidden`. An answer may have no token.

    `loss`: "dpo" (`preference_loss`; needs the reference), "cpo", "orpo", "tpo", or fn(chosen_logps, rejected_logps
    [, ref_chosen_logps, ref_rejected_logps], **settings) of (b,) tensors of any part of the pairs (of all, where
    `couples_pairs`), without side effects, which returns losses (b,) or `PairLosses`. `settings` go to the loss:
    loss_type, beta, ...; a function gets tensors (B,) among them in the same parts. The reference: `ref_logps`, one
    per answer as rows number them, or a `ReferenceHead`.

    loss = sum of losses / pair_divisor (B) + nll_alpha * NLL / nll_divisor (its tokens), NLL over all tokens of the
    chosen answers (TPO: gold answers). nll_alpha (TRL's rpo_alpha, cpo_alpha, tpo_alpha) is 1 by default for cpo, orpo
    and tpo, 0 for alphapo and all others.
    `scored` (N,) bool: false for tokens that only the NLL sees (ORPO: the chosen prompts). `ld_alpha`: LD-DPO.
    `use_weighting`: WPO. `average_log_prob`: token means, by default where the method has them (ipo and sigmoid_norm
    of dpo make their own from sums, and refuse it). `outputs` are further
    statistics to return, such as entropy, mean_logit, top1. `low_rank` and `shard` (also of the reference): `fused`.

    Three products where pairs fit into chunks; four, through `deferred`, for losses that couple pairs of several
    chunks (aot, aot_unpaired) and for a pair of more than two chunks. Raises ValueError.
    """
    types = _types(settings)
    if not callable(loss) and loss not in METHODS:
        raise ValueError(f"loss={loss!r}: choose among {', '.join(METHODS)} or give a function")
    if use_weighting and loss != "dpo":
        raise ValueError(f"use_weighting=True with loss={loss!r}: WPO weights belong to dpo")
    if nll_alpha is None:
        nll_alpha = 0.0 if loss not in ("cpo", "orpo", "tpo") or types == ["alphapo"] else 1.0
    average = _takes_means(loss, types) if average_log_prob is None else average_log_prob
    per_token = sorted({"ipo", "sigmoid_norm"}.intersection(types))
    if average and loss == "dpo" and per_token:
        raise ValueError(
            f"average_log_prob=True with loss_type {per_token}, which divide sums by lengths: leave it out"
        )
    per_pair, nll_answer = (3, 2) if loss == "tpo" and nll_alpha else (2, 0)
    answers = Answers(hidden, rows, num_pairs, per_pair, layout == "blocks", scored)
    if ld_alpha is not None:
        answers.fade_tails(ld_alpha)
    known = _reference_logps(answers, ref_logps, reference, targets, chunk, shard, average)
    if loss == "dpo" and known is None:
        raise ValueError("loss='dpo' without reference: give ref_logps, one per answer, or a ReferenceHead")
    if nll_divisor is None:
        nll_divisor = max(1, answers.num_tokens[:, nll_answer].sum().item())
    divisor = max(1, num_pairs) if pair_divisor is None else pair_divisor
    args = (known, average, nll_alpha, nll_answer, use_weighting, divisor, nll_divisor)
    objective = _PairObjective(answers, loss, settings, *args)
    names = ["logp", *(["log_sum_p2"] if use_weighting else []), *outputs]
    coupled = couples_pairs or (loss == "dpo" and not COUPLE_PAIRS.isdisjoint(types))
    head = {"bias": bias, "form": form, "chunk": chunk, "low_rank": low_rank, "shard": shard}
    found = total_over_groups(hidden, weight, targets, answers, objective, coupled, names, **head)
    total, details, stats, pulls = found
    losses, chosen, rejected, chosen_rewards, rejected_rewards, *nll = details
    values = (total, losses, chosen, rejected, chosen_rewards, rejected_rewards, stats, *nll)
    return PreferenceResult(*values, pulls=pulls)


def linear_unpaired_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    labels: Tensor,
    *,
    fn: Callable[[Tensor, Tensor, Tensor], RowLosses],
    ref_logp: Tensor,
) -> Tensor:
    """The specification, from full logits: mean of fn(logps, ref_logps, labels), (R,); ref_logp (N,)."""
    logp = torch.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None]).squeeze(1)
    sums = [torch.stack([v[rows == row].sum() for row in range(len(labels))]) for v in (logp, ref_logp)]
    return fn(sums[0], sums[1], labels).losses.mean()


@as_one_op
def linear_unpaired_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    labels: Tensor,
    *,
    loss_type: Literal["kto", "apo_zero_unpaired", "bco"] = "kto",
    baseline: float | Tensor | Callable[[Tensor], Tensor] | None = None,
    ref_logps: Tensor | None = None,
    reference: ReferenceHead | None = None,
    row_divisor: float | None = None,
    bias: Tensor | None = None,
    form: LogitForm = LogitForm(),  # noqa: B008 (frozen)
    outputs: Sequence[str] = (),
    chunk: int | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    shard: VocabularyShard | None = None,
    **settings: Any,
) -> UnpairedResult:
    """Loss of R answers with labels (R,) bool: hidden (N, D), weight (V, D), targets (N,), rows (N,) int64.

    `rows` numbers each token's answer; keep it on the CPU. `baseline`: KTO's z (`kl_baseline`) or BCO's delta, 0-dim
    or a number, or a function that is called once with the detached rewards (R,) of all answers and returns it (BCO's
    `running_mean`, a mean over ranks): then answers are coupled and several chunks cost a fourth product.
    `settings` go to `kto_loss` or `bco_loss`. The loss is the sum over answers / row_divisor (R). Raises ValueError.
    """
    answers = Answers(hidden, rows, labels.numel(), 1, False, None)
    known = _reference_logps(answers, ref_logps, reference, targets, chunk, shard, False)
    if known is None or (baseline is None and loss_type != "apo_zero_unpaired"):
        raise ValueError(
            f"loss_type={loss_type!r} without reference or baseline: give ref_logps or a ReferenceHead, and z"
        )
    labels = labels.to(hidden.device, torch.bool, non_blocking=True)
    weights = settings.pop("undesirable_weights", None) if loss_type == "bco" else None
    divisor = max(1, labels.numel()) if row_divisor is None else row_divisor
    if isinstance(baseline, int | float):
        baseline = torch.full((), baseline, dtype=stats_dtype(hidden.dtype), device=hidden.device)
    shift = None if callable(baseline) else baseline

    def objective(stats: TokenStats, span: slice) -> tuple[Tensor, list[Tensor]]:
        nonlocal shift
        part = answers.rows_of(span)
        logps = answers.logps(stats.logp, span, part, False)
        if shift is None and callable(baseline):
            shift = baseline(settings.get("beta", 0.1) * (logps - known[part]).detach())
        if loss_type == "bco":
            own = settings if weights is None else {**settings, "undesirable_weights": weights[part]}
            losses, rewards = bco_loss(logps, known[part], labels[part], shift, **own)  # pyright: ignore
        else:
            losses, rewards = kto_loss(logps, known[part], labels[part], shift, loss_type=loss_type, **settings)
        return _as_logp(stats, losses.sum() / divisor, [losses, logps, rewards])

    names, coupled = ["logp", *outputs], callable(baseline)
    head = {"bias": bias, "form": form, "chunk": chunk, "low_rank": low_rank, "shard": shard}
    found = total_over_groups(hidden, weight, targets, answers, objective, coupled, names, **head)
    total, details, stats, pulls = found
    losses, logps, rewards = details
    return UnpairedResult(total, losses, logps, rewards, shift, stats, pulls)


METHODS = {"dpo": preference_loss, "cpo": cpo_loss, "orpo": orpo_loss, "tpo": tpo_loss}
