"""Norms, gated activations, RoPE, LoRA and embedding gradients: Triton kernels and formulas against fp64 torch."""

import pytest
import torch
import torch.nn.functional as F
from fastalign_kernels.layers import (
    add_rms_norm,
    embedding,
    glu,
    glu_packed,
    lora_linear,
    rms_norm,
    rope,
    triton_embedding,
)
from fastalign_kernels.layers.embedding import embedding_gradient_reference
from fastalign_kernels.layers.glu import ACTIVATIONS, glu_reference
from fastalign_kernels.layers.rms_norm import rms_norm_reference
from fastalign_kernels.layers.rope import rope_reference
from triton_checks import DEVICE, DTYPES, assert_guards, guarded, relative_error, triton_backend

# One rounding of each result to 2^-9 (2^-12) besides fp32 arithmetic; Llama's norm rounds twice.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
PAIRS = [(dtype, shape) for dtype in DTYPES for shape in ((5, 37), (3, 128), (1, 1), (0, 8), (2, 3000))]


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def exact(*tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def compare(found, true, dtype):
    for a, b in zip(found, true, strict=True):
        assert a.shape == b.shape
        a, b = a.double(), b.double()
        assert a.isfinite().all(), "NaN or infinity: a kernel read outside of its tensors, or overflowed"
        assert (a - b).norm() <= BOUND[dtype] * b.norm().clamp_min(min(1, b.numel()))  # a row of one has no gradient


def gradients(outputs, inputs, upstream):
    """The gradients, with an upstream gradient that is not contiguous."""
    strided = [torch.stack((g, g), dim=-1)[..., 0].to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
    return torch.autograd.grad(outputs, inputs, strided)


@pytest.mark.parametrize(("dtype", "shape"), PAIRS)
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, False)])
def test_rms_norm(dtype, shape, offset, round_first):
    x = guarded(normal(*shape, dtype=dtype), row_gap=3).requires_grad_()
    weight = guarded(normal(shape[1], dtype=dtype)).requires_grad_()
    options = {"eps": 1e-5, "offset": offset, "round_first": round_first}
    with triton_backend():
        out = rms_norm(x, weight, **options)
        upstream = [torch.randn_like(out)]
        found = gradients([out], [x, weight], upstream)
    true = exact(x, weight)
    out_true = rms_norm_reference(*true, **options)
    compare([out, *found], [out_true, *gradients([out_true], true, upstream)], dtype)


@pytest.mark.parametrize(("dtype", "shape"), PAIRS)
def test_add_rms_norm(dtype, shape):
    given = [normal(2, *shape, dtype=dtype).requires_grad_() for _ in range(2)]
    weight = normal(shape[1], dtype=dtype).requires_grad_()
    with triton_backend():
        outs = add_rms_norm(*given, weight)
        upstream = [torch.randn_like(out) for out in outs]
        found = gradients(outs, [*given, weight], upstream)
        sum_alone = torch.autograd.grad(add_rms_norm(*given, weight)[1], given, upstream[1])
    x, residual, w = exact(*given, weight)
    summed = (given[0] + given[1]).detach().double() - (x + residual).detach() + x + residual  # as it is stored
    true = [rms_norm_reference(summed, w), summed]
    compare([*outs, *found], [*true, *gradients(true, [x, residual, w], upstream)], dtype)
    assert all(torch.equal(grad, upstream[1]) for grad in sum_alone)


def test_rms_norm_of_several_dtypes():
    """fp32 weights meet 16-bit rows under autocast; a residual stream may be wider than what is added to it."""
    x, weight = normal(4, 40, dtype=torch.float16).requires_grad_(), normal(40).requires_grad_()
    residual = normal(4, 40).requires_grad_()
    with triton_backend():
        out = rms_norm(x, weight)
        both = add_rms_norm(x, residual, weight)
        found = torch.autograd.grad(sum(t.square().sum() for t in both), [x, residual, weight])
    assert out.dtype == both[0].dtype == both[1].dtype == torch.float32
    assert torch.allclose(out, rms_norm_reference(x, weight), atol=2e-3)
    wide, stream, w = exact(x, residual, weight)
    true = rms_norm_reference(wide + stream, w), wide + stream
    compare(both, true, torch.float32)
    compare(found, torch.autograd.grad(sum(t.square().sum() for t in true), [wide, stream, w]), torch.float16)


def test_rows_that_exceed_registers_take_the_reference():
    x, weight = normal(1, 8193), normal(8193)
    with triton_backend():
        assert torch.equal(rms_norm(x, weight), rms_norm_reference(x, weight))


@pytest.mark.parametrize("size", [16384, 9001])
def test_rms_norm_of_the_longest_rows(size):
    x, weight = normal(2, size, dtype=torch.bfloat16).requires_grad_(), normal(size, dtype=torch.bfloat16)
    with triton_backend():
        outs = add_rms_norm(x, x, weight)
        found = torch.autograd.grad(outs, x, [torch.ones_like(out) for out in outs])
    (wide,) = exact(x)
    true = rms_norm_reference(2 * wide, weight.double()), 2 * wide
    compare([*outs, *found], [*true, *torch.autograd.grad(sum(t.sum() for t in true), wide)], torch.bfloat16)


def test_rms_norm_sums_many_rows_and_leaves_frozen_weights(monkeypatch):
    monkeypatch.setattr("fastalign_kernels.launch.MULTIPROCESSORS_ELSEWHERE", 1)
    x, weight = normal(19, 2048).requires_grad_(), normal(2048)
    with triton_backend():
        assert torch.autograd.grad(rms_norm(x, weight).sum(), x)[0].shape == x.shape  # no gradient of the weight
        found = torch.autograd.grad(rms_norm(x, weight.requires_grad_()).square().sum(), weight)
    true = exact(x, weight)
    compare(found, torch.autograd.grad(rms_norm_reference(*true).square().sum(), true[1]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 5, 37), (2, 2500), (0, 4)])
def test_glu(dtype, activation, shape):
    given = [(3 * normal(*shape)).to(dtype).requires_grad_() for _ in range(2)]
    true = exact(*given)
    out_true = ACTIVATIONS[activation](true[0]) * true[1]
    upstream = [torch.randn_like(given[0])]
    grads = gradients([out_true], true, upstream)
    with triton_backend():
        out = glu(*given, activation)
        compare([out, *gradients([out], given, upstream)], [out_true, *grads], dtype)
        rows = guarded(torch.cat(given, dim=-1).detach().reshape(-1, 2 * shape[-1]), row_gap=5).requires_grad_()
        packed = glu_packed(rows, activation)
        (grad,) = torch.autograd.grad(packed, rows, upstream[0].reshape(packed.shape))
    assert_guards(rows, row_gap=5)
    assert torch.equal(packed, out.reshape(packed.shape))
    compare(grad.chunk(2, dim=-1), [g.reshape(packed.shape) for g in grads], dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_glu_overwrites_what_it_was_given(packed):
    x, weight = normal(3, 8), normal(20, 8).requires_grad_()
    with triton_backend():
        linear = F.linear(x, weight)
        parts = [F.linear(x, half) for half in weight.chunk(2)]
        out = glu_packed(linear, overwrite=True) if packed else glu(*parts, overwrite=True)
        held = (linear if packed else parts[1]).square().sum()  # its backward needs the values
        found = torch.autograd.grad(out.sum(), weight, retain_graph=True)
        for again in (out.sum(), held):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                again.backward()
    wide = weight.detach().double().requires_grad_()
    true = glu_reference(*F.linear(x.double(), wide).chunk(2, dim=-1))
    compare(found, torch.autograd.grad(true.sum(), wide), torch.float32)


def angles(*shape, dtype=torch.float32):
    turn = torch.rand(*shape, device=DEVICE) * 6.3
    return turn.cos().to(dtype), turn.sin().to(dtype)


def rope_by_complex_numbers(x, cos, sin, half):
    """x (B, L, H, K), cos and sin (B, L, half)."""
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin).unsqueeze(-2)
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size", "half"), [((3, 1), 16, 8), ((2, 2), 15, 5), ((80, 8), 128, 64)])
@pytest.mark.parametrize("form", ["tables", "each", "once"])
def test_rope(dtype, heads, size, half, form):
    rows, length = 2, 3
    fused = normal(rows, length, (heads[0] + heads[1]) * size, dtype=dtype).requires_grad_()
    q, k = (part.unflatten(-1, (-1, size)) for part in fused.split([h * size for h in heads], dim=-1))
    positions = torch.tensor([[4, 0, 6], [1, 1, 2]], device=DEVICE) if form == "tables" else None
    leading = {"tables": (7,), "each": (rows, length), "once": (1, length)}[form]
    cos, sin = angles(*leading, half, dtype=dtype)
    tables = [torch.cat((t, t), dim=-1) for t in (cos, sin)]
    with triton_backend():
        outs = rope(q.transpose(1, 2), k.transpose(1, 2), *tables, positions=positions)  # (B, H, L, K)
        halves = rope(q, k, cos, sin, positions=positions, heads_dim=2, half_tables=True)
        upstream = [torch.randn_like(out) for out in outs]
        (found,) = gradients(outs, [fused], upstream)
    assert all(torch.equal(a.transpose(1, 2), b) for a, b in zip(outs, halves, strict=True))
    (wide,) = exact(fused)
    cos, sin = (t.double() if positions is None else t[positions].double() for t in (cos, sin))
    parts = [part.unflatten(-1, (-1, size)) for part in wide.split([h * size for h in heads], dim=-1)]
    true = [rope_by_complex_numbers(part, cos, sin, half).transpose(1, 2) for part in parts]
    compare([*outs, found], [*true, torch.autograd.grad(true, wide, [g.double() for g in upstream])[0]], dtype)
    reference = rope_reference(*(p.transpose(1, 2) for p in parts), cos, sin, half_tables=True)
    compare(reference, true, torch.float32)


def test_rope_of_packed_tokens_in_place():
    q, k = normal(6, 3, 8), normal(6, 1, 8)
    positions = torch.tensor([0, 1, 2, 0, 1, 0], device=DEVICE)
    tables = angles(3, 4)
    true = rope_reference(q, k, *tables, positions=positions, half_tables=True)
    transposed = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k)]  # the last dimension is strided
    for given in ((guarded(q.view(18, 8), 8)).view(6, 3, 8), k), transposed:
        with triton_backend():
            outs = rope(*given, *tables, positions=positions, half_tables=True, in_place=True)
        assert all(a is b for a, b in zip(outs, given, strict=True))
        compare(outs, true, torch.float32)
    leaf = q.clone().requires_grad_()
    with triton_backend():
        out = rope(leaf, k, *tables, positions=positions, half_tables=True, in_place=True)[0]
    assert torch.equal(leaf, q) and not torch.equal(out, q)  # a gradient is recorded: new tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_lora_linear(dtype, frozen):
    shapes = {"x": (2, 5, 12), "weight": (9, 12), "bias": (9,), "lora_a": (3, 12), "lora_b": (9, 3)}
    given = {name: normal(*shape, dtype=dtype) for name, shape in shapes.items()}
    learnt = [tensor.requires_grad_() for name, tensor in given.items() if name[0] in "xl" or not frozen]
    out = lora_linear(**given, scale=0.7)
    upstream = [torch.randn_like(out)]
    found = gradients([out], learnt, upstream)
    true = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in given.items()}
    weight = true["weight"] + 0.7 * true["lora_b"] @ true["lora_a"]
    out_true = F.linear(true["x"], weight, true["bias"])
    wide = [tensor for tensor in true.values() if tensor.requires_grad]
    compare([out, *found], [out_true, *gradients([out_true], wide, upstream)], dtype)


def test_lora_linear_of_no_rows():
    x, weight, a, b = normal(0, 6).requires_grad_(), normal(5, 6), normal(2, 6).requires_grad_(), normal(5, 2)
    out = lora_linear(x, weight, None, a, b, 2.0)
    out.sum().backward()
    assert out.shape == (0, 5) and x.grad.shape == (0, 6) and not a.grad.any()


def test_lora_linear_follows_autocast():
    x, weight, a, b = normal(4, 6).requires_grad_(), normal(5, 6), normal(2, 6).requires_grad_(), normal(5, 2)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = lora_linear(x, weight, None, a, b, 2.0)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and a.grad.dtype == x.grad.dtype == torch.float32
    assert relative_error(out, x.double() @ (weight + 2 * b @ a).double().t()) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "ids",
    [
        torch.randint(0, 7, (3, 6)),
        torch.full((14,), 4),  # one segment over several pieces
        torch.arange(8).repeat_interleave(2)[1:],  # segments that end with a piece, or one token later
        torch.cat((torch.full((9,), 2), torch.full((3,), 3), torch.arange(4, 10))),
        torch.tensor([5]),
        torch.tensor([], dtype=torch.int64),
    ],
    ids=["random", "one", "pairs", "borders", "single", "none"],
)
@pytest.mark.parametrize("padding", [None, 4])
def test_embedding(dtype, ids, padding, monkeypatch):
    monkeypatch.setattr(triton_embedding, "PIECE", 4)
    ids = ids.to(DEVICE)
    weight = normal(11, 37, dtype=dtype).requires_grad_()
    with triton_backend():
        out = embedding(ids, weight, padding)
        upstream = torch.randn_like(out)
        strided = torch.stack((upstream, upstream), dim=-1)[..., 0]
        (found,) = torch.autograd.grad(out, weight, strided)
        (again,) = torch.autograd.grad(embedding(ids, weight, padding), weight, strided)
    (wide,) = exact(weight)
    out_true = F.embedding(ids, wide, padding)
    (true,) = torch.autograd.grad(out_true, wide, upstream.double())
    assert torch.equal(out, out_true.to(dtype)) and torch.equal(found, again)
    compare([found], [true], dtype)
    flat = upstream.reshape(-1, 37)
    compare([embedding_gradient_reference(flat, ids.reshape(-1), 11, padding)], [true], dtype)


def test_formulas_run_in_every_dtype_and_are_traced_whole():
    """Without Triton, and under torch.compile, the formulas in torch run: no break of the graph, same numbers."""
    x, w, up = (normal(*shape).double().requires_grad_() for shape in ((3, 10), (10,), (3, 10)))
    cos, sin = angles(3, 5)

    def layers(x, w, up):
        y, summed = add_rms_norm(glu(x, up), x, w)
        q, _ = rope(y.view(3, 1, 10), y.view(3, 1, 10), cos, sin, half_tables=True)
        return q.sum(1) + rms_norm(glu_packed(torch.cat((summed, y), -1), "gelu"), w, offset=1.0, round_first=False)

    assert torch.autograd.gradcheck(layers, (x, w, up))
    narrow = [t.detach().float() for t in (x, w, up)]
    with triton_backend():
        compiled = torch.compile(layers, backend="eager", fullgraph=True)
        assert relative_error(compiled(*narrow), layers(*narrow)) < 1e-6


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: rms_norm(normal(2, 3), normal(4)), r"x \(2, 3\) and weight \(4,\)"),
        (lambda: add_rms_norm(normal(2, 3), normal(3), normal(3)), r"residual \(3,\)"),
        (lambda: glu(normal(2, 3), normal(2, 4)), r"gate \(2, 3\)"),
        (lambda: glu(normal(2), normal(2), "relu"), "activation='relu': choose one of silu"),
        (lambda: glu_packed(normal(2, 3)), "must be even"),
        (lambda: lora_linear(normal(2, 3), normal(4, 3), None, normal(2, 3), normal(3, 2), 1.0), r"lora_b \(3, 2\)"),
        (lambda: rope(normal(2, 3), normal(2, 3), *angles(2, 2)), "q and k must be"),
        (lambda: rope(normal(2, 3, 4), normal(2, 3, 4), *angles(2, 6)), "wider than a head"),
        (lambda: rope(normal(2, 3, 4), normal(2, 3, 4), *angles(3, 4)), "cos and sin of each token"),
    ],
)
def test_refused_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
    cos, sin = angles(2, 4)
    with pytest.raises(ValueError, match="no gradient"):
        rope(normal(2, 3, 4), normal(2, 3, 4), cos.requires_grad_(), sin)
