"""The C++ kernels of norms, SwiGLU and RoPE against formulas in fp64: values, gradients, strides, instruction sets."""

import pytest
import torch
from fastalign_kernels.layers import add_rms_norm, glu, glu_packed, native, rms_norm, rope
from fastalign_kernels.layers.glu import glu_reference
from fastalign_kernels.layers.rms_norm import rms_norm_reference
from fastalign_kernels.layers.rope import rope_reference

BOUND = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


@pytest.fixture(params=["avx512", "avx2", "plain"])
def isa(request, monkeypatch):
    monkeypatch.setattr(native, "ISA", request.param)
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels that ran."""
    made, module = [], native.native_module()

    class Watched:
        def __getattr__(self, name):
            if name in ("norm_forward", "norm_backward", "glu", "rope"):
                made.append(name)
            return getattr(module, name)

    monkeypatch.setattr(native, "_module", Watched)
    return made


def spread(tensor):
    """The same numbers with gaps of NaN between the rows."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 16), torch.nan, dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def inputs(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [spread(torch.randn(shape).to(dtype)).requires_grad_() for shape in shapes]


def assert_close(function, reference, given, dtype=torch.float32):
    """Results and gradients of `function` are those of `reference` in fp64."""
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found, true = function(*given), reference(*exact)
    pairs = list(zip(found, true, strict=True))
    upstream = [torch.randn_like(one) for one in true]
    sides = []
    for outs, tensors in ((found, given), (true, exact)):
        grads = [spread(g.to(o.dtype)) for g, o in zip(upstream, outs, strict=True)]
        sides.append(torch.autograd.grad(outs, [t for t in tensors if t.requires_grad], grads))
    for a, b in pairs + list(zip(*sides, strict=True)):
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= BOUND[dtype] * b.norm()


@pytest.mark.parametrize("rows", [1, 63, 200])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(isa, calls, rows, offset):
    given = inputs((rows, 48), (rows, 48), (48,))
    given[2] = given[2].detach().clone().requires_grad_()
    options = {"eps": 1e-5, "offset": offset, "round_first": not offset}
    assert_close(
        lambda x, r, w: [rms_norm(x, w, **options), r],
        lambda x, r, w: [rms_norm_reference(x, w, **options), r],
        given,
    )
    assert_close(
        lambda x, r, w: add_rms_norm(x, r, w, **options),
        lambda x, r, w: (rms_norm_reference(x + r, w, **options), x + r),
        given,
    )
    assert calls.count("norm_forward") == 2 and calls.count("norm_backward") == 2


@pytest.mark.parametrize("dtype", BOUND)
def test_glu(isa, calls, dtype):
    given = inputs((3, 5, 80), (3, 5, 80), dtype=dtype)
    assert_close(lambda g, u: [glu(g, u)], lambda g, u: [glu_reference(g, u)], given, dtype)
    extreme = torch.tensor([-200.0, -88.0, -1e-3, 0.0, 1e-3, 88.0, 200.0, 3e4] * 2)[None].to(dtype).requires_grad_()
    one = torch.ones_like(extreme).detach().requires_grad_()
    assert_close(lambda g, u: [glu(g, u)], lambda g, u: [glu_reference(g, u)], [extreme, one], dtype)
    (whole,) = inputs((7, 64), dtype=dtype)
    assert_close(lambda x: [glu_packed(x)], lambda x: [glu_reference(*x.chunk(2, -1))], [whole], dtype)
    assert set(calls) == {"glu"} and len(calls) == 6


def test_glu_overwrites_what_is_of_no_further_use(calls):
    gate, up = (torch.randn(6, 32) for _ in range(2))
    kept = [x.clone().requires_grad_() for x in (gate, up)]
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    made = [leaf * 1.0 for leaf in leaves]
    glu(*made, overwrite=True).sum().backward()
    glu(*kept).sum().backward()
    for one, other, overwritten in zip(leaves, kept, made, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
        assert torch.equal(overwritten, one.grad)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("size", "half_tables", "rows"), [(32, False, 2), (48, False, 1), (48, True, 2)])
def test_rope(isa, calls, dtype, size, half_tables, rows):
    """Behind the 32 rotated dimensions, those of a wider head pass through."""
    q, k = inputs((2, 4, 7, size), (2, 2, 7, size), dtype=dtype)
    angle = torch.rand(rows, 7, 16) * 6
    cos, sin = (f(angle if half_tables else torch.cat((angle, angle), -1)) for f in (torch.cos, torch.sin))
    options = {"half_tables": half_tables}
    assert_close(
        lambda q, k: rope(q, k, cos, sin, **options),
        lambda q, k: rope_reference(q, k, cos.double(), sin.double(), **options),
        [q, k],
        dtype,
    )
    assert calls == ["rope"] * 4


def test_the_number_of_threads_changes_nothing(monkeypatch):
    x, weight = torch.randn(4096, 256, requires_grad=True), torch.randn(256, requires_grad=True)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = rms_norm(x, weight)
        found.append((out, *torch.autograd.grad((out * out.detach()).sum(), (x, weight))))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_the_kernels_do_not_take_is_computed_by_the_formula(calls):
    weight = torch.randn(40)
    rms_norm(torch.randn(3, 40), weight)  # no whole vectors
    rms_norm(torch.randn(3, 48).bfloat16(), torch.randn(48))
    glu(*(torch.randn(3, 32, dtype=torch.float64) for _ in range(2)))
    glu(*(torch.randn(3, 32) for _ in range(2)), activation="gelu")
    torch.compile(lambda x: rms_norm(x, torch.ones(32)), backend="eager", fullgraph=True)(torch.randn(2, 32))
    assert calls == []
