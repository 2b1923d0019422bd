"""What vLLM changes in a process that it runs in, kept apart from what training sees there."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed.distributed_c10d as c10d
from torch import nn

# torch.distributed's tables of groups; the count of groups stays common, so that names of groups never meet
GROUP_TABLES = ("_pg_map", "_pg_names", "_pg_group_ranks", "_pg_backend_config", "_tags_to_pg", "_pg_to_tag")
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where its weights can be reached
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CONFIGURE_LOGGING": "1"}  # unless the user says otherwise


_replaced: dict[tuple[Any, str], Any] = {}  # functions of torch, that one of the two which is not in place
_left: list[bool] = []  # whether functions are put back at exit for an engine that failed
_original: dict[tuple[Any, str], Any] = {}  # as they were before vLLM was imported


class Surroundings:
    """Two states of one process, of which one is in place: training's, and inside `with inside()` that of an engine.

    They differ in random generators, the default process group of torch.distributed (so that
    a run of one process stays one for training), functions of torch that vLLM replaces on CPU
    (`torch.set_num_threads`, `torch.accelerator.synchronize`, ...), number of threads, precision of matrix products.
    Environment variables are changed only while an engine is built. Engines of one process share all this, as they
    share vLLM's own globals; see `surroundings`.
    """

    def __init__(self):
        if not _original:
            _original.update(_functions())
        self.num_engines = 0  # that are open
        self._inside = False
        self.environment = {k: os.environ.get(k, v) for k, v in QUIET.items()} | SETTINGS  # for building an engine
        self._random = _random_state()
        self._groups: dict[str, Any] = {name: {} for name in GROUP_TABLES}
        self._default_group: Any = None
        self._threads = torch.get_num_threads()
        self._precision = torch.get_float32_matmul_precision()

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """`inside()` where an engine is built, which has its environment and seeds Python's and numpy's generators."""
        state, outside = (random.getstate(), np.random.get_state()), dict(os.environ)
        try:
            with self.inside():
                os.environ.update(self.environment)
                try:
                    yield
                except BaseException:
                    if not self.num_engines:
                        self._clear_failed()
                    raise
                finally:
                    for key, function in _original.items():
                        if key not in _replaced and getattr(*key, function) is not function:
                            _replaced[key] = function
                self.num_engines += 1
        finally:
            for key in os.environ.keys() - outside.keys():
                del os.environ[key]
            os.environ.update(outside)
            random.setstate(state[0])
            np.random.set_state(state[1])
            gc.unfreeze()  # the engine hides all objects of now from the garbage collector

    @staticmethod
    def _clear_failed() -> None:
        """Make room for another engine where one could not be built."""
        if "vllm.distributed" not in sys.modules:
            return
        from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]

        cleanup_dist_env_and_memory()
        if _replaced and not _left:  # vLLM tidies up once more at exit, with its own functions only
            _left.append(True)
            atexit.register(_put, _replaced)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The engine's state, and training's again on the way out; may be nested."""
        if self._inside:
            yield
            return
        self._exchange()
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self._exchange()

    def close(self, engine: Any) -> None:
        """End an engine; with the last one vLLM's process groups, not those of training."""
        import vllm.v1.engine.core as core  # pyright: ignore[reportMissingImports]

        self.num_engines -= 1
        clean_up = core.cleanup_dist_env_and_memory
        with self.inside():
            if self.num_engines:  # the others need the groups
                core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None
            try:
                engine.engine_core.shutdown()
            finally:
                core.cleanup_dist_env_and_memory = clean_up
        if not self.num_engines:
            self._restore_groups()
        gc.unfreeze()

    def _restore_groups(self) -> None:
        """Tell torch of training's groups again, which it forgets when a default group is destroyed."""
        for group, name in c10d._pg_names.items():
            c10d._register_process_group(name, group)
        taken = [int(name) for name in c10d._pg_names.values() if str(name).isdecimal()]
        c10d._world.group_count = max([c10d._world.group_count, *(number + 1 for number in taken)])

    def _exchange(self) -> None:
        """Swap the state that is in place with the one that is kept."""
        kept, self._random = self._random, _random_state()
        _set_random_state(kept)
        for name, table in self._groups.items():
            self._groups[name] = getattr(c10d, name)
            setattr(c10d, name, table)
        c10d._world.default_pg, self._default_group = self._default_group, c10d._world.default_pg
        _put(_replaced)
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        if threads != self._threads:
            torch._C.set_num_threads(self._threads)  # torch.set_num_threads itself is what vLLM replaces
        if precision != self._precision:
            torch.set_float32_matmul_precision(self._precision)
        self._threads, self._precision = threads, precision


_surroundings: list[Surroundings] = []


def surroundings() -> Surroundings:
    """Those of this process; called before vLLM is imported, so that what it replaces is known."""
    if not _surroundings:
        _surroundings.append(Surroundings())
    return _surroundings[0]


def _put(functions: dict[tuple[Any, str], Any]) -> None:
    """Put `functions` in place and keep those that were there instead."""
    for key, function in functions.items():
        functions[key] = getattr(*key)
        setattr(*key, function)


class OwnClasses:
    """Classes of a training model that vLLM builds a model of its own from (its Transformers back end), and changes.

    Made before the engine; `give_back` leaves the changes with the engine's modules and undoes them for all others.
    """

    def __init__(self, model: nn.Module):
        self._before = {cls: (cls.__bases__, dict(cls.__dict__)) for cls in {type(m) for m in model.modules()}}

    def give_back(self, engine_model: nn.Module) -> None:
        for cls, (bases, members) in self._before.items():
            changed = {k: v for k, v in cls.__dict__.items() if k not in members or members[k] is not v}
            added = tuple(base for base in cls.__bases__ if base not in bases)
            if not added:
                continue
            cls.__bases__ = bases
            for name in changed:
                if name in members:
                    setattr(cls, name, members[name])
                else:
                    delattr(cls, name)
            theirs = type(cls.__name__, (cls, *added), changed | {"__module__": cls.__module__})
            for module in engine_model.modules():
                if type(module) is cls:
                    module.__class__ = theirs


def _functions() -> dict[tuple[Any, str], Any]:
    """What torch offers in the modules where vLLM puts its own functions."""
    modules = (torch, torch.accelerator, torch.cuda)
    return {(module, name): f for module in modules for name, f in vars(module).items() if callable(f)}


def _random_state() -> list[torch.Tensor]:
    """Of torch's generators: on the CPU and, where it is in use, on the device."""
    on_device = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_device]


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
