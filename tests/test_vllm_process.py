"""Two states of one process, and the sleep of an engine, without vLLM: what must be called, put back and kept."""

import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from fastalign.loop.distributed import await_gloo_threads
from fastalign.rollout import vllm_process
from fastalign.rollout.vllm_process import OwnClasses, Surroundings
from fastalign.rollout.vllm_sleep import Sleep


def test_changes_inside_stay_inside(monkeypatch):
    """Environment, generators, torch's functions, precision: each side finds its own again."""
    monkeypatch.setattr(vllm_process, "_replaced", {})
    monkeypatch.setenv("FASTALIGN_CHANGED", "outside")
    monkeypatch.setenv("FASTALIGN_REMOVED", "outside")
    sides = Surroundings()
    original, random_before = torch.set_num_threads, (random.getstate(), np.random.get_state()[1].copy())
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    with sides.building():
        os.environ.update(FASTALIGN_CHANGED="inside", FASTALIGN_ADDED="inside")
        del os.environ["FASTALIGN_REMOVED"]
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        drawn = torch.randn(2)
        torch.set_num_threads = lambda x: None
        torch.set_float32_matmul_precision("high")
    assert torch.set_num_threads is original and torch.get_float32_matmul_precision() == "highest"
    assert os.environ["FASTALIGN_CHANGED"] == os.environ["FASTALIGN_REMOVED"] == "outside"
    assert "FASTALIGN_ADDED" not in os.environ and "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
    assert torch.equal(torch.randn(3), expected)
    assert random.getstate() == random_before[0] and (np.random.get_state()[1] == random_before[1]).all()
    with sides.inside():
        assert torch.set_num_threads is not original and torch.get_float32_matmul_precision() == "high"
        after = torch.randn(2)
        with sides.inside():  # nested
            assert torch.set_num_threads is not original
    assert torch.set_num_threads is original
    torch.manual_seed(5)
    assert torch.equal(torch.cat([drawn, after]), torch.cat([torch.randn(2), torch.randn(2)]))


def test_an_error_inside_puts_everything_back(monkeypatch):
    sides = Surroundings()
    state = torch.get_rng_state()
    with pytest.raises(KeyError), sides.building():
        os.environ["FASTALIGN_ADDED"] = "inside"
        torch.randn(3)
        raise KeyError
    assert "FASTALIGN_ADDED" not in os.environ and torch.equal(torch.get_rng_state(), state)
    assert sides.num_engines == 0


def test_groups_of_training_survive_the_engines(tmp_path):
    """An engine's default group is invisible outside, and its end leaves training's group working."""

    def start(name):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / name}", rank=0, world_size=1)
        return torch.distributed.new_group([0])

    sides, ones = Surroundings(), torch.ones(2)
    with sides.inside():
        start("engine")
    assert not torch.distributed.is_initialized()
    group = start("training")
    default = torch.distributed.group.WORLD
    with sides.inside():
        assert torch.distributed.is_initialized() and torch.distributed.group.WORLD is not default
        await_gloo_threads()  # joined with the interpreter's lock held
        torch.distributed.destroy_process_group()
    sides._restore_groups()
    try:
        assert torch.distributed.group.WORLD is default
        for kind in (None, group):
            torch.distributed.all_reduce(ones, group=kind)
        from torch.distributed._functional_collectives import all_reduce

        assert all_reduce(ones, "sum", default).tolist() == [1.0, 1.0]  # found by name, as DTensors do
        torch.distributed.all_reduce(ones, group=torch.distributed.new_group([0]))
    finally:
        await_gloo_threads()  # joined with the interpreter's lock held
        torch.distributed.destroy_process_group()


def test_classes_that_an_engine_patches_are_given_back():
    class Mixin:
        pass

    class Layer(nn.Linear):
        def __call__(self, x):
            return super().forward(x) + 1

    model, engine = nn.Sequential(Layer(2, 2)), nn.Sequential(Layer(2, 2))
    own = OwnClasses(model)
    call = Layer.__call__
    Layer.__bases__ += (Mixin,)
    Layer.__call__, Layer.extra = (lambda self, x: x * 0), True
    own.give_back(engine)
    x = torch.ones(1, 2)
    assert Layer.__call__ is call and Mixin not in Layer.__mro__ and not hasattr(Layer, "extra")
    assert torch.equal(model(x), model[0].forward(x) + 1)
    assert torch.equal(engine(x), x * 0) and isinstance(engine[0], Layer) and isinstance(engine[0], Mixin)


class FakeEngine:
    def __init__(self):
        self.calls = []

    def sleep(self, level=1, mode="abort"):
        self.calls.append(("sleep", level, mode))

    def wake_up(self, tags=None):
        self.calls.append(("wake", *tags))


class FakeNewEngine(FakeEngine):
    def release_kv_cache_memory(self):
        self.calls.append("release")


class FakeOldEngine(FakeEngine):
    def sleep(self, level=1):
        self.calls.append(("sleep", level))


AWAKE = [("wake", "weights"), "sync", ("wake", "kv_cache")]


@pytest.mark.parametrize(
    ("kind", "options", "calls"),
    [
        # weights that training uses stay; the cache goes where vLLM can do that alone
        (FakeNewEngine, {"shared": True}, [("sleep", 0, "keep"), "release", ("wake", "kv_cache")]),
        (FakeEngine, {"shared": True}, []),
        # weights that every sync writes are dropped, and there again before they are written
        (
            FakeEngine,
            {"brought_anew": True},
            [("sleep", 2, "keep"), ("wake", "weights"), "sync", ("wake", "kv_cache")],
        ),
        # weights below an adapter wait in host memory
        (FakeEngine, {}, [("sleep", 1, "keep"), ("wake", "weights"), "sync", ("wake", "kv_cache")]),
        # before vLLM could keep requests while it sleeps
        (FakeOldEngine, {"brought_anew": True}, [("sleep", 2), ("wake", "weights"), "sync", ("wake", "kv_cache")]),
        (FakeOldEngine, {"brought_anew": True, "pending": True}, []),
    ],
)
def test_sleep_levels(kind, options, calls):
    engine = kind()
    sleep = Sleep(engine, enabled=True)
    for _ in range(2):  # the second time it sleeps already
        sleep.sleep(**({"shared": False, "brought_anew": False, "pending": False} | options))
    assert sleep.weights_lost == (any(call[0] == "sleep" and call[1] == 2 for call in calls))
    sleep.wake_weights()
    if "sync" in calls:
        engine.calls.append("sync")
    for _ in range(2):
        sleep.wake()
    assert engine.calls == calls


def test_sleep_is_for_those_who_ask():
    engine = FakeNewEngine()
    sleep = Sleep(engine, enabled=False)
    sleep.sleep(shared=True, brought_anew=False, pending=False)
    sleep.wake()
    assert engine.calls == []
