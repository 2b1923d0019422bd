"""Metrics by hand: means of ratios, counters, one reduction per log."""

import pytest
import torch

from fastalign.metrics import FOLD, Metrics, RunCounters

CPU = torch.device("cpu")


def test_mean_is_the_mean_over_micro_batches_of_the_ratio():
    metrics = Metrics(CPU)
    metrics.mean("accuracy", torch.tensor(3.0), 4)
    metrics.mean("accuracy", torch.tensor(1.0, requires_grad=True), torch.tensor(1))
    metrics.mean("accuracy", torch.tensor(0.0), 0)  # nothing scored counts as 0
    metrics.last("temperature", 0.5)
    metrics.last("temperature", torch.tensor(0.75))
    assert metrics.collect() == {"temperature": 0.75, "accuracy": pytest.approx((0.75 + 1.0 + 0.0) / 3)}
    assert metrics.collect() == {}


def test_empty_micro_batches_can_be_left_out():
    metrics = Metrics(CPU)
    for total, count in [(3.0, 4), (0.0, 0), (1.0, 1)]:
        metrics.mean("chosen", torch.tensor(total), torch.tensor(count), skip_empty=True)
        metrics.mean("rejected", torch.tensor(0.0), 0, skip_empty=True)
    assert metrics.collect() == {"chosen": pytest.approx((0.75 + 1.0) / 2)}
    for step in range(2 * FOLD + 3):
        metrics.mean("chosen", torch.tensor(float(step)), torch.tensor(step % 2), skip_empty=True)
    odd = [step for step in range(2 * FOLD + 3) if step % 2]
    assert metrics.collect() == {"chosen": pytest.approx(sum(odd) / len(odd))}


def test_training_and_evaluation_are_kept_apart():
    metrics = Metrics(CPU)
    metrics.mean("entropy", 2.0)
    metrics.tokens(10)
    metrics.training = False
    metrics.mean("entropy", 8.0)
    metrics.tokens(99)
    assert metrics.collect() == {"entropy": 8.0, "num_tokens": 10}
    metrics.training = True
    metrics.tokens(5)
    assert metrics.collect() == {"entropy": 2.0, "num_tokens": 15}


def test_sums_and_counters():
    metrics = Metrics(CPU)
    metrics.count("hidden", 7, logged=False)
    metrics.tokens(2**40)
    metrics.tokens(1)
    assert metrics.collect(loss=torch.tensor(1.5)) == {"loss": 1.5, "num_tokens": 2**40 + 1}
    assert metrics.counts() == {"hidden": 7, "num_tokens": 2**40 + 1}
    metrics.tokens(4)
    metrics.reduce_counts()
    assert metrics.counts()["num_tokens"] == 2**40 + 5
    assert metrics.collect() == {"num_tokens": 2**40 + 5}


class TwoRanks:
    """Adds what the other rank sends: here the same names with other numbers."""

    def __init__(self, other):
        self.other, self.calls = other, 0

    def __call__(self, vector):
        self.calls += 1
        return vector + torch.tensor(self.other, dtype=vector.dtype)


def test_one_reduction_over_ranks():
    # order: sums, latest, counters, (total, count) of each micro-batch, 1 per rank
    reduce = TwoRanks([5.0, 3.0, 20.0, 2.0, 8.0, 1.0, 0.0, 1.0])
    metrics = Metrics(CPU, reduce)
    metrics.mean("accuracy", torch.tensor(4.0), 4)
    metrics.mean("accuracy", torch.tensor(1.0), torch.tensor(4.0))
    metrics.last("temperature", 1.0)
    metrics.tokens(10)
    expected = {"loss": 3.0, "temperature": 2.0, "accuracy": (6 / 12 + 2 / 4) / 2, "num_tokens": 30}
    assert metrics.collect(loss=torch.tensor(1.0)) == expected
    assert reduce.calls == 1


def test_long_windows_are_folded():
    class Doubled:
        def __call__(self, vector):
            return 2 * vector

    for reduce in (None, Doubled()):
        metrics, values = Metrics(CPU, reduce), []
        for i in range(2 * FOLD + 3):
            total, count = float(i % 7), i % 5  # zero counts give 0
            values.append(total / count if count else 0.0)
            metrics.mean("entropy", torch.tensor(total), count)
        assert len(metrics._ratios[True]["entropy"]) == 3
        again = Metrics(CPU, reduce)
        again.load_state_dict(metrics.state_dict())
        for found in (metrics, again):
            assert found.collect()["entropy"] == pytest.approx(sum(values) / len(values), rel=1e-12)
            found.mean("entropy", 1.0)
            assert found.collect() == {"entropy": 1.0}


def test_open_window_and_counters_survive():
    metrics = Metrics(CPU)
    metrics.tokens(3)
    metrics.mean("entropy", torch.tensor(2.0), 4)
    metrics.last("temperature", 0.5)
    metrics.reduce_counts()
    window, counters = metrics.state_dict(), RunCounters(metrics).state()
    again = Metrics(CPU)
    again.set_counts(RunCounters.from_state(counters).counts)
    again.load_state_dict(window)
    again.mean("entropy", torch.tensor(6.0), 4)
    assert again.collect() == {"temperature": 0.5, "entropy": 1.0, "num_tokens": 3}
    again.reset()
    assert again.collect() == {} and again.counts() == {}
