"""No tensor of the head op is larger than one chunk of logits, gradients apart; frozen weights cost none."""

import subprocess
import sys
import weakref

import fastalign_kernels as fk
import pytest
import torch
from fastalign_kernels.head.chunks import chunk_size, chunk_spans
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

N, D, V, CHUNK = 640, 16, 3000, 64


class Allocations(TorchDispatchMode):
    """Sizes in elements of all storages that operators make."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs)
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in known:
                self.sizes.append(t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("mode", ["stats", "fused", "deferred"])
@pytest.mark.parametrize("frozen", [False, True])
def test_largest_tensor_is_one_chunk(monkeypatch, kernels, mode, frozen):
    monkeypatch.setenv("FASTALIGN_KERNELS", kernels)
    hidden = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=not frozen)
    targets = torch.randint(V, (N,))
    with Allocations() as made:
        if mode == "stats":
            fk.stats(hidden, weight, targets, outputs=fk.OUTPUTS, chunk=CHUNK)
        elif mode == "fused":
            loss, _ = fk.fused(hidden, weight, targets, lambda s, _: s.entropy.sum(), outputs=fk.OUTPUTS, chunk=CHUNK)
            loss.backward()
        else:
            fk.deferred(hidden, weight, targets, outputs=fk.OUTPUTS, chunk=CHUNK).entropy.sum().backward()
    assert max(made.sizes) == CHUNK * V  # the buffer itself: the mode sees the allocations
    if kernels == "native":
        assert sum(size == CHUNK * V for size in made.sizes) == (2 if mode == "deferred" else 1)
    num_weight_sized = sum(size == V * D for size in made.sizes)
    assert num_weight_sized == (0 if frozen or mode == "stats" else 1)


@pytest.mark.parametrize("mode", ["fused", "deferred"])
def test_low_rank_on_a_frozen_head_makes_nothing_of_its_size(mode):
    """No gradient and no copy of the weight, nor of the weight beside the adapter."""
    hidden, weight, targets = torch.randn(N, D, requires_grad=True), torch.randn(V, D), torch.randint(V, (N,))
    low_rank = torch.randn(N, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    with Allocations() as made:
        if mode == "fused":
            fk.fused(hidden, weight, targets, lambda s, _: s.logp.sum(), low_rank=low_rank, chunk=CHUNK)[0].backward()
        else:
            fk.deferred(hidden, weight, targets, low_rank=low_rank, chunk=CHUNK).logp.sum().backward()
    sizes = [size for size in made.sizes if size >= V]
    assert set(sizes) == {CHUNK * V, V * 4, N * D} and sizes.count(V * 4) <= 2
    assert low_rank[1].grad is not None and weight.grad is None


def test_main_grad_takes_the_gradient_without_a_buffer():
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.nn.Parameter(torch.randn(V, D))
    weight.main_grad = torch.zeros(V, D)
    with Allocations() as made:
        fk.deferred(hidden, weight, torch.randint(V, (N,)), chunk=CHUNK).logp.sum().backward()
    assert V * D not in made.sizes and weight.main_grad.any()


class Peak(TorchDispatchMode):
    """Most bytes of storages that operators made and that lived at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.highest, self.known = 0, 0, set()

    def _free(self, key, size):
        self.alive -= size
        self.known.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs)
        for t in tree_leaves(result):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.highest = max(self.highest, self.alive)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_takes_a_quarter_of_the_memory(dtype):
    """Extra memory of forward and backward, gradients included, against full logits and F.cross_entropy."""
    n, d, v = 2048, 512, 32000

    def operands(device):
        tensors = [torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for shape in ((n, d), (v, d))]
        return *tensors, torch.zeros(n, dtype=torch.int64, device=device)

    hidden, weight, targets = operands("meta")
    with Peak() as naive:
        torch.nn.functional.cross_entropy(hidden @ weight.t(), targets).backward()
    hidden, weight, targets = operands("cpu")
    with Peak() as ours:
        fk.linear_cross_entropy(hidden, weight, targets).backward()
    assert naive.highest >= 3 * n * v * dtype.itemsize  # logits, their logarithms of probabilities, and the gradient
    assert ours.highest <= naive.highest / 4, (ours.highest / 2**20, naive.highest / 2**20)


def test_chunks_cover_all_tokens():
    for num_tokens in (0, 1, 63, 64, 65, 1000, 2049):
        spans = chunk_spans(num_tokens, 256)
        assert [i for s in spans for i in range(s.start, s.stop)] == list(range(num_tokens))
        assert all(s.stop - s.start <= 256 for s in spans)
    assert [s.stop - s.start for s in chunk_spans(1100, 1024)] == [576, 524]  # even, not 1024 and 76
    assert chunk_spans(6, 4, torch.tensor([0, 0, 0, 1, 1, 1])) == [slice(0, 3), slice(3, 6)]
    assert chunk_spans(6, 2, torch.zeros(6)) == [slice(0, 6)]
    with pytest.raises(ValueError, match="must not decrease"):
        chunk_spans(4, 2, torch.tensor([0, 1, 0, 1]))


def test_chunk_size_on_cpu():
    cpu = torch.device("cpu")
    assert chunk_size(32000, 4, cpu) == 512 and chunk_size(32000, 2, cpu) == 768  # 62.5 and 47 MiB
    assert chunk_size(128256, 4, cpu) == chunk_size(262144, 4, cpu) == 256
    assert chunk_size(128256, 2, cpu) == 256 and chunk_size(100, 4, cpu) == 768


def test_standalone_import():
    """fastalign_kernels loads torch and triton only, and works where the C++ extension is missing."""
    code = """
import sys
import torch
before = set(sys.modules)
import fastalign_kernels as fk
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert new <= {"fastalign_kernels", "triton"} | set(sys.stdlib_module_names), new
sys.modules["fastalign._native"] = None  # an import of it now fails
hidden = torch.eye(3)
found = fk.stats(hidden, torch.zeros(5, 3), torch.arange(3)).logp
assert torch.allclose(found, torch.full((3,), -torch.log(torch.tensor(5.0)))), found
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
