"""What trainers on judged single answers share: set-up, batches, the forward that gives the loss, metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from fastalign_kernels import head as head_ops
from fastalign_kernels.head.preference import UnpairedResult, linear_unpaired_loss
from fastalign_kernels.losses.sequences import row_sums
from torch import Tensor, nn

from .data.batch import TokenBatch
from .data.formats import column_names
from .data.pair_batches import UnpairedCollator
from .data.preferences import check_image_dataset, prepare_unpaired_dataset
from .flat_attention import free_tokens
from .free_tokens import FreeTokens, reading, set_free
from .loop.health import watch_drift, watch_pulls
from .models import set_pad_token
from .pairs import answer_collator
from .policy import HeadLoss, head_loss, token_stats

OUTPUTS = ("entropy", "mean_logit")  # statistics of tokens that the metrics need


def prepare_judged(trainer: Any, dataset: Any, name: str) -> Any:
    """Raw rows -> `prompt_ids`, `completion_ids`, `label`; with images the rows as they are."""
    args, processing_class = trainer.args, trainer.loaded.processing_class
    if trainer.has_images:
        if {"chosen", "rejected"} & {*column_names(dataset)}:
            raise ValueError(
                f"The {name} dataset has images and pairs (`chosen`, `rejected`), which {trainer._name} would have to "
                "copy to judge them one by one. Give it `completion` and `label`: see `unpair_preference_dataset`."
            )
        check_image_dataset(dataset, ("completion", "label"), name)
        return dataset
    options = {"max_length": args.max_length, "num_proc": args.dataset_num_proc, "name": name}
    options["bad_rows"] = args.bad_rows
    return prepare_unpaired_dataset(dataset, processing_class, **options)


def judged_collator(trainer: Any) -> Any:
    """A `JudgedCollator`: flat batches, with shared prompts where that saves work, or padded ones."""
    return answer_collator(trainer, lambda answers, **options: JudgedCollator(kl=len(answers) > 1, **options))


def adapt_judged(trainer: Any, given: Any) -> JudgedAdapter:
    """The collator that a user gave, made to return batches of judged answers. ValueError for data with images."""
    if trainer.has_images:
        raise ValueError(
            f"`data_collator` is not supported for vision datasets by {type(trainer).__name__}: leave it out, and the "
            "trainer's own runs the processor."
        )
    set_pad_token(trainer.loaded, trainer.args.pad_token)
    return JudgedAdapter(given, trainer.make_collator())


class JudgedCollator(UnpairedCollator):
    """`UnpairedCollator` whose mismatched answers are free tokens (`set_free`) in flat batches."""

    def __call__(self, rows) -> TokenBatch:
        batch = super().__call__(rows)
        if batch.is_padded or len(self.answers) == 1:
            return batch
        shared = np.zeros(batch.num_segments, bool)
        if batch.prefix is not None:
            shared[batch.prefix[batch.prefix >= 0].numpy()] = True
        sequences = np.flatnonzero(~shared)[: batch.num_rows]  # what follows only fills the batch up
        free = np.zeros(batch.num_segments, bool)
        free[sequences[1::2]] = True
        return set_free(batch, free)


class JudgedAdapter:
    """Wraps a collator that returns TRL's dictionary for unpaired data, so that `collator` makes a batch of its rows.

    It needs `input_ids`, `attention_mask`, `completion_mask`, (B, L) each, and `label`; for the KL term `KL_input_ids`
    and so on, too. `ref_logps` and `ref_KL_logps` are optional. Raises TypeError for a result of another kind.
    """

    def __init__(self, given, collator: JudgedCollator):
        self.given, self.collator = given, collator

    @property
    def flat(self) -> bool:
        return self.collator.flat

    def __call__(self, rows) -> TokenBatch:
        made = self.given(rows)
        if isinstance(made, TokenBatch):
            return made
        kinds = {"": "completion"} | ({"KL_": "kl_completion"} if len(self.collator.answers) > 1 else {})
        parts = ("input_ids", "attention_mask", "completion_mask")
        names = [f"{kind}{part}" for kind in kinds for part in parts]
        if not hasattr(made, "keys") or (missing := {*names, "label"} - set(made)):
            found = f"missing {sorted(missing)}" if hasattr(made, "keys") else type(made).__name__
            raise TypeError(f"`data_collator` must return a dictionary with {', '.join(names)} and label: {found}.")
        taken: list[dict] = [{"label": bool(label)} for label in made["label"]]
        for kind, name in kinds.items():
            for row, *tensors in zip(taken, *(made[f"{kind}{part}"] for part in parts), strict=True):
                ids, mask, of_answer = (torch.as_tensor(tensor) for tensor in tensors)
                real = mask.bool()
                row["prompt_ids"] = ids[real & (of_answer == 0)].tolist()
                row[f"{name}_ids"] = ids[real & (of_answer == 1)].tolist()
        for source, name in {"ref_logps": "ref_logps", "ref_KL_logps": "ref_kl_logps"}.items():
            for row, value in zip(taken, made.get(source, ()), strict=False):
                row[name] = float(value)
        return self.collator(taken)


def unpaired_loss(
    model: nn.Module,
    batch: TokenBatch,
    ref_logps: Tensor,
    *,
    baseline: Tensor | Callable[[Tensor], Tensor] | None = None,
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    router: dict[str, Any] | None = None,
    **settings: Any,
) -> HeadLoss:
    """The mean loss of B judged answers through `linear_unpaired_loss(**settings)`; its result is `result`.

    `ref_logps` has one number for each sequence of `batch`. Where sequence 2b + 1 is a mismatched answer to prompt b,
    KTO's z, arXiv:2402.01306 Eq. 8, is `mean_over_ranks` of their mean log-ratios, at least 0. They need no gradient:
    flat ones are free tokens of the one forward, padded ones have a forward of their own.
    """
    labels = batch.extras["label"]
    rows, judged = judged_rows(batch)
    references = ref_logps.view(labels.numel(), -1)
    z_of = None
    if judged is not None:
        assert mean_over_ranks is not None
        z_of = _Baseline(batch, references[:, 1], mean_over_ranks)
        if batch.is_padded:
            baseline, z_of = z_of(token_stats(model, every_second(batch, 1)).stats.logp), None
            batch = every_second(batch, 0)
    device = batch.targets.device
    splits = () if z_of is None or judged is None else (judged, ~judged)
    places = [split.nonzero()[:, 0].to(device) for split in splits]

    def op(hidden: Tensor, weight: Tensor, *, low_rank=None, **head) -> tuple[Tensor, UnpairedResult]:
        shift, tokens = baseline, (hidden, batch.targets, low_rank)
        if z_of is not None:
            of_judged, of_mismatched = (_select(tokens, place) for place in places)
            tokens = of_judged
            with torch.no_grad():
                states, targets, low = of_mismatched
                shift = z_of(head_ops.stats(states, weight, targets, low_rank=low, **head).logp)
        found = linear_unpaired_loss(
            tokens[0],
            weight,
            tokens[1],
            rows,
            labels,
            baseline=shift,
            ref_logps=references[:, 0],
            outputs=OUTPUTS,
            low_rank=tokens[2],
            **head,
            **settings,
        )
        return found.loss, found

    found = None if z_of is None else FreeTokens.of(batch)
    with reading(batch) if found is None and not router else free_tokens(found):  # a router sees every token
        return head_loss(model, batch, op, **(router or {}))


def judged_rows(batch: TokenBatch) -> tuple[Tensor, Tensor | None]:
    """On the host: the judged answer (N',) of each of its targets, and which targets (N,) these are (None: all)."""
    rows = batch.row if batch.host_row is None else batch.host_row
    if batch.num_rows == batch.extras["label"].numel():
        return rows, None
    judged = rows % 2 == 0
    return rows[judged] // 2, judged


def _select(tokens: tuple[Tensor, Tensor, Any], index: Tensor) -> tuple[Tensor, Tensor, Any]:
    hidden, targets, low_rank = tokens
    low_rank = None if low_rank is None else (low_rank[0].index_select(0, index), low_rank[1])
    return hidden.index_select(0, index), targets.index_select(0, index), low_rank


class _Baseline:
    """KTO's z from the log-probabilities (N',) of the mismatched answers' tokens and the reference's (B,) of them."""

    def __init__(self, batch: TokenBatch, references: Tensor, mean_over_ranks: Callable[[Tensor], Tensor]):
        rows = batch.row if batch.host_row is None else batch.host_row
        counts = torch.bincount(rows[rows % 2 == 1] // 2, minlength=references.numel())
        self.counts, self.references, self.mean_over_ranks = counts.to(references.device), references, mean_over_ranks

    def __call__(self, logp: Tensor) -> Tensor:
        logp = logp if logp.device.type == "mps" else logp.double()
        ratios = row_sums(logp, self.counts) - self.references
        return self.mean_over_ranks(ratios.sum() / max(1, ratios.numel())).clamp(min=0)


def every_second(batch: TokenBatch, first: int) -> TokenBatch:
    """The padded sequences first, first + 2, ... of `batch`, without `extras`."""
    assert batch.is_padded
    half = len(batch.input_ids) // 2
    part = slice(first * half, (first + 1) * half) if batch.by_answer else slice(first, None, 2)
    rows = batch.row if batch.host_row is None else batch.host_row
    taken = (rows % 2 == first).nonzero()[:, 0].to(batch.source.device)
    width = batch.input_ids.shape[1]
    source = batch.source[taken]
    bounds = torch.nn.functional.pad(batch.cu_seqlens.diff()[part].cumsum(0), (1, 0))
    place = source // width - first * half if batch.by_answer else source // width // 2
    inputs = {k: v.chunk(2)[first] for k, v in batch.model_inputs.items()} if batch.by_answer else batch.model_inputs
    return replace(
        batch,
        input_ids=batch.input_ids[part],
        position_ids=batch.position_ids[part],
        attention_mask=None if batch.attention_mask is None else batch.attention_mask[part],
        cu_seqlens=bounds.to(torch.int32),
        source=place * width + source % width,
        targets=batch.targets[taken],
        row=batch.row[taken] // 2,
        weight=batch.weight[taken],
        model_inputs=inputs,
        extras={},
        by_answer=False,
        host_row=rows[rows % 2 == first] // 2,
    )


def record_unpaired(trainer, batch: TokenBatch, found: UnpairedResult) -> None:
    """TRL's metrics of judged answers: rewards/*, logps/*, logits/* of desirable ("chosen") and undesirable
    ("rejected") ones where a micro-batch has any, rewards/margins where it has both, entropy (nats), num_tokens."""
    labels, metrics, stats = batch.extras["label"], trainer.metrics, found.stats
    rows, _ = judged_rows(batch)
    of_token = labels[rows.to(labels.device)]
    parts = []
    for wanted, tokens in ((labels, of_token), (~labels, ~of_token)):
        pairs = ((found.rewards, wanted), (found.logps, wanted), (cast(Tensor, stats.mean_logit), tokens))
        parts += [torch.where(mask, values, 0).sum() for values, mask in pairs]
        parts += [wanted.sum(), tokens.sum()]
    sums = torch.stack([part.to(found.loss.dtype) for part in (*parts, cast(Tensor, stats.entropy).sum())])
    sums = torch.zeros_like(sums) if metrics.muted else sums
    sums = trainer._sum_over_ranks(sums) if trainer.world > 1 else sums
    chosen, rejected = sums[:5], sums[5:10]
    for name, (reward, logp, logit, answers, tokens) in {"chosen": chosen, "rejected": rejected}.items():
        metrics.mean(f"rewards/{name}", reward, answers, skip_empty=True)
        metrics.mean(f"logps/{name}", logp, answers, skip_empty=True)
        metrics.mean(f"logits/{name}", logit, tokens, skip_empty=True)
    both = (chosen[3] > 0) & (rejected[3] > 0)
    margin = torch.where(both, chosen[0] / chosen[3] - rejected[0] / rejected[3], 0)
    metrics.mean("rewards/margins", margin, both.to(margin.dtype), skip_empty=True)
    metrics.mean("entropy", sums[10], chosen[4] + rejected[4])
    metrics.tokens(batch.num_tokens)
    watch_pulls(metrics, found.pulls)
    if trainer.args.beta:
        lengths = batch.extras["lengths"].view(labels.numel(), -1)[:, 0]
        watch_drift(metrics, found.rewards / trainer.args.beta, lengths)
