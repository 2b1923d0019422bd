"""What can be wrong with a run that trains without an error: the findings' names, what they mean and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Finding(NamedTuple):
    """One kind of finding."""

    says: str  # what was seen; {value} is the number that is logged as `health/<name>`
    remedy: str


ALL = "all"  # stands for every name in `stop_on_health`
PREFIX = "health/"  # of the keys of findings in logs
FINDINGS: dict[str, Finding] = {
    "margin_collapse": Finding(
        "the reward margin is at chance: {value:.3g} on average over the last 5 logs",
        "If it had risen before, lower learning_rate or raise beta; if it never rose, raise learning_rate, and see "
        "whether chosen and rejected are mixed up, or preferences random.",
    ),
    "chosen_falling": Finding(
        "chosen answers become unlikely while the loss falls: their log-probability fell by {value:.3g} nats",
        "The margin grows because rejected answers fall faster. Add a likelihood term (DPO: loss_type=['sigmoid', "
        "'sft'], CPO: cpo_alpha), lower learning_rate, or raise beta.",
    ),
    "kl_drift": Finding(
        "the policy is far from the reference: {value:.3g} nats per token on average (|log ratio| of answers)",
        "Raise beta, lower learning_rate or stop earlier; where answers are short and this is meant, raise "
        "kl_drift_bound.",
    ),
    "few_rows": Finding(
        "few rows make up the gradient: it is as uneven as if {value:.1%} of the rows had all of it",
        "Most rows are learnt, or a few are outliers. Stop earlier, look for wrong labels among the rows with the "
        "largest loss, or use a loss that bounds their weight (label_smoothing, loss_type='ipo').",
    ),
    "truncation": Finding(
        "{value:.1%} of the rows fill max_length, so that answers are cut",
        "Raise max_length, or leave such rows out: the model is taught answers without an end.",
    ),
    "duplicate_pairs": Finding(
        "{value:.1%} of the rows repeat an earlier one", "Remove repeated rows: they are learnt by heart."
    ),
    "contradictory_pairs": Finding(
        "{value:.1%} of the rows contradict another one: same prompt and answers, opposite judgement",
        "Remove both rows of each contradiction, or set label_smoothing to their share.",
    ),
    "loss_spike": Finding(
        "the loss jumped to {value:.3g}, over twice what it was in the last 10 logs",
        "Look for broken rows among those of the step; lower learning_rate or max_grad_norm, or warm up longer.",
    ),
    "grad_norm_spike": Finding(
        "the gradient norm jumped to {value:.3g}, over ten times what it was in the last 10 logs",
        "Look for broken rows among those of the step; lower learning_rate or max_grad_norm, or warm up longer.",
    ),
}


def check_names(names: Iterable[str]) -> None:
    """ValueError for what `stop_on_health` does not know."""
    if unknown := [name for name in names if name not in FINDINGS and name != ALL]:
        raise ValueError(f"stop_on_health has {unknown}: allowed are {ALL!r} and {', '.join(FINDINGS)}.")


def sentence(name: str, value: float) -> str:
    """What was found, and what to do."""
    finding = FINDINGS[name]
    return f"{name}: {finding.says.format(value=value)}. {finding.remedy}"
