"""Bytes that launches of the head read and write, counted by Triton's interpreter: those of scored rows alone."""

import contextlib
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from fastalign_kernels import linear_cross_entropy, linear_logprobs
from torch.utils._python_dispatch import TorchDispatchMode
from triton_checks import triton_backend

interpreter = pytest.importorskip("triton.runtime.interpreter")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, and cannot be counted", allow_module_level=True)

D, V, SCORED = 16, 600, 12
PRODUCTS = ("mm", "addmm")


class Products(TorchDispatchMode):
    """Multiplications of all matrix products, as a product of the sizes that meet."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            left, right = args[-2:]
            self.found["products"] += 1
            self.found["multiplications"] += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted():
    """Inside, every launch is noted: [kernel, programs, bytes read, bytes written]; and every product of torch."""
    launches: list[list] = []
    call, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def launch(self, *args, **kwargs):
        launches.append([self.fn.__name__, self.grid[0], 0, 0])
        return call(self, *args, **kwargs)

    def size(pointers, mask):
        return int(np.asarray(mask.data).sum()) * max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def counted_load(self, pointers, mask, *args, **kwargs):
        launches[-1][2] += size(pointers, mask)
        return load(self, pointers, mask, *args, **kwargs)

    def counted_store(self, pointers, value, mask, *args, **kwargs):
        launches[-1][3] += size(pointers, mask)
        return store(self, pointers, value, mask, *args, **kwargs)

    products = Products()
    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        triton_backend(),
        products,
    ):
        yield launches, products.found


def operands(masked: int, dtype: torch.dtype):
    """Operands with SCORED targets, and `masked` others between them."""
    hidden = torch.randn(SCORED + masked, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    targets = torch.randint(V, (SCORED + masked,))
    targets[torch.randperm(SCORED + masked)[:masked]] = -100
    return hidden, weight, targets


def record(op, masked: int, dtype: torch.dtype = torch.float32):
    hidden, weight, targets = operands(masked, dtype)
    with counted() as (launches, products):
        op(hidden, weight, targets).sum().backward()
    return launches, products


def test_cross_entropy_of_half_masked_targets():
    """A row's logits are read once for its statistics, read once and written once for its gradient."""
    launches, products = record(linear_cross_entropy, masked=SCORED)
    fp32, int64 = 4, 8
    target_logit, statistics = fp32, 2 * fp32  # logp and lse
    assert launches == [
        ["_row_stats_fwd_kernel", SCORED, SCORED * (V * fp32 + target_logit + int64), SCORED * statistics],
        ["_row_gradient_bwd_kernel", SCORED, SCORED * (V * fp32 + statistics + int64), SCORED * V * fp32],
    ]
    assert products == {"products": 3, "multiplications": 3 * SCORED * D * V}


@pytest.mark.parametrize("form", ["rows", "offset"])
@pytest.mark.parametrize(("op", "products"), [(linear_cross_entropy, 3), (linear_logprobs, 4)])
def test_masked_targets_cost_nothing(op, products, form, monkeypatch):
    """The same launches and products, and as many bytes, as where the masked rows are not there."""
    monkeypatch.setenv("FASTALIGN_HEAD", form)
    dtype = torch.float32 if form == "rows" else torch.bfloat16
    alone = record(op, masked=0, dtype=dtype)
    assert record(op, masked=SCORED + 1, dtype=dtype) == alone
    launches, found = alone
    own = [written for name, _, _, written in launches if name == "score_product_kernel"]
    assert len(own) + found["products"] == products
    if form == "offset":  # its exponentials are written once, the last time, and nothing else passes over them
        assert SCORED * V * 2 <= own[-1] < SCORED * V * 2.1 and sum(own[:-1]) < SCORED * V * 0.1
        rest = [launch for launch in launches if launch[0] != "score_product_kernel"]
        assert all(read + written < SCORED * V for _, _, read, written in rest)
