"""Draws from a head: frequencies, log-probabilities and truncation against Transformers' processors."""

import pytest
import torch
from fastalign_kernels.head.sampling import Distribution, invert, sample_tokens
from fastalign_kernels.head.token_stats import LogitForm
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

DISTRIBUTIONS = [
    Distribution(),
    Distribution(temperature=0.7),
    Distribution(top_k=5),
    Distribution(top_p=0.8),
    Distribution(min_p=0.1),
    Distribution(temperature=1.3, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.4),
]


def processed(logits, distribution, seen_ids):
    """Log-probabilities (N, V) as Transformers forms them, one row at a time."""
    steps = LogitsProcessorList()
    if distribution.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(distribution.repetition_penalty))
    steps.append(TemperatureLogitsWarper(distribution.temperature))
    if distribution.top_k:
        steps.append(TopKLogitsWarper(distribution.top_k))
    if distribution.top_p < 1:
        steps.append(TopPLogitsWarper(distribution.top_p))
    if distribution.min_p:
        steps.append(MinPLogitsWarper(distribution.min_p))
    return torch.stack([steps(s[None], row[None])[0] for row, s in zip(logits, seen_ids, strict=True)]).log_softmax(1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("form", [LogitForm(), LogitForm(scale=0.5, softcap=2.0)], ids=["plain", "capped"])
def test_draws_follow_the_distribution(distribution, form):
    torch.manual_seed(0)
    vocabulary, draws = 23, 6000
    hidden, weight, bias = torch.randn(1, 8), torch.randn(vocabulary, 8), torch.randn(vocabulary)
    logits = form.scale * (hidden @ weight.T + bias)
    logits = logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)
    seen_ids = torch.tensor([[1, 4, 4, 20]])
    logp = processed(logits, distribution, seen_ids)[0]
    seen = torch.zeros(draws, vocabulary, dtype=torch.bool)
    seen[:, seen_ids[0]] = True
    uniform = torch.rand(draws, dtype=torch.float64)
    ids, logps = sample_tokens(
        hidden.expand(draws, -1), weight, uniform, distribution, bias=bias, form=form, seen=seen
    )
    assert torch.allclose(logps, logp[ids], atol=1e-5)
    expected = logp.exp() * draws
    counts = torch.bincount(ids, minlength=vocabulary)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8


@pytest.mark.parametrize("vocabulary", [1, 5, 127, 128, 129, 1000])
def test_inversion_finds_the_token_of_every_uniform(vocabulary):
    torch.manual_seed(1)
    p = torch.rand(40, vocabulary) * (torch.rand(40, vocabulary) < 0.4)
    p[:, 0] += (p.sum(1) == 0).float()
    p = p / p.sum(1, keepdim=True)
    uniform = torch.rand(40, dtype=torch.float64)
    uniform[:4] = torch.tensor([0.0, 1 - 2**-53, 2**-53, 0.5], dtype=torch.float64)
    exact = p.double().cumsum(1)
    found = invert(p, uniform)
    assert (p.gather(1, found[:, None]) > 0).all()
    ends = exact.gather(1, found[:, None])[:, 0]
    starts = ends - p.double().gather(1, found[:, None])[:, 0]
    target = uniform * exact[:, -1]
    assert (starts - 1e-6 <= target).all() and (target <= ends + 1e-6).all()


def test_rare_tokens_are_reached():
    p = torch.full((1, 300), 2.0**-40)
    p[0, 200] = 1.0
    uniform = torch.tensor([100.5 * 2.0**-40], dtype=torch.float64) / p.double().sum()
    assert invert(p, uniform).item() == 100


def test_greedy_tokens_have_the_log_probability_of_temperature_one():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8), torch.randn(700, 8)
    greedy = Distribution(temperature=0.0, top_k=3)
    ids, logps = sample_tokens(hidden, weight, torch.rand(9, dtype=torch.float64), greedy)
    logp = (hidden @ weight.T).log_softmax(1)
    assert torch.equal(ids, logp.argmax(1))
    assert torch.allclose(logps, logp.amax(1), atol=1e-5)


def test_rows_do_not_see_each_other_or_the_blocks_they_fall_in():
    torch.manual_seed(0)
    hidden, weight = torch.randn(150, 8), torch.randn(9000, 8)  # several chunks of rows, and blocks within
    low_rank = torch.randn(150, 2), torch.randn(9000, 2)
    uniform = torch.rand(150, dtype=torch.float64)
    ids, logps = sample_tokens(hidden, weight, uniform, Distribution(), low_rank=low_rank)
    logp = (hidden @ weight.T + low_rank[0] @ low_rank[1].T).log_softmax(1)
    assert torch.equal(ids, invert(logp.exp(), uniform))
    assert torch.allclose(logps, logp.gather(1, ids[:, None])[:, 0], atol=1e-5)
