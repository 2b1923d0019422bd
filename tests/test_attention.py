"""Attention on flat tokens against one dense mask in fp64, its memory and its cost."""

import pytest
import torch
from fastalign_kernels.attention import Segments, choose_backend, packed_attention, packed_attention_reference
from fastalign_kernels.attention import device as device_backends
from fastalign_kernels.attention.segments import SMALL_PIECE, band
from torch.utils._python_dispatch import TorchDispatchMode

RAGGED = [1, 40, 3, 150, 1, 0, 77, 20, 20, 70, 1]
FEATURES = {
    "plain": {},
    "bidirectional": {"causal": False},
    "window": {"window": 9},
    "window_1": {"window": 1},
    "window_long": {"window": 100},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "softcap_window": {"softcap": 1.5, "window": 9},
    "sinks_window": {"sinks": True, "window": 5},
    "all": {"softcap": 2.0, "sinks": True, "window": 33},
}


def _bounds(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def _inputs(lengths, *, heads=4, kv_heads=2, size=16, value_size=16, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, size), (kv_heads, size), (kv_heads, value_size)]
    tensors = [torch.randn(sum(lengths), h, d, generator=generator, dtype=torch.float64) for h, d in shapes]
    return [x.to(device, dtype).requires_grad_() for x in tensors]


def _options(features, heads, dtype, device="cpu"):
    options = {"scale": 0.3, **features}
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1, 2, heads, dtype=dtype, device=device).requires_grad_()
    return options


def _gradients(out, tensors, seed=1):
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(out, tensors, upstream.to(out.device, out.dtype))


def _assert_equals_reference(attend, features, lengths=RAGGED, *, tolerance=1e-10, **shape):
    tensors = _inputs(lengths, **shape)
    options = _options(features, tensors[0].shape[1], tensors[0].dtype, tensors[0].device)
    exact = [x.detach().double().cpu().requires_grad_() for x in tensors]
    exact_options = dict(options)
    if "sinks" in options:
        exact_options["sinks"] = options["sinks"].detach().double().cpu().requires_grad_()
        tensors.append(options["sinks"])
        exact.append(exact_options["sinks"])
    bounds = _bounds(lengths, tensors[0].device)
    out = attend(*tensors[:3], bounds, max(lengths), **options)
    expected = packed_attention_reference(*exact[:3], bounds.cpu(), **exact_options)
    torch.testing.assert_close(out.double().cpu(), expected, atol=tolerance, rtol=tolerance)
    for got, want in zip(_gradients(out, tensors), _gradients(expected, exact), strict=True):
        torch.testing.assert_close(got.double().cpu(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", FEATURES)
def test_equals_dense_reference_with_gradients(name):
    _assert_equals_reference(packed_attention, FEATURES[name])


@pytest.mark.parametrize("shape", [{"heads": 6, "kv_heads": 1}, {"kv_heads": 4}, {"value_size": 8}])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_head_layouts(shape, name):
    _assert_equals_reference(packed_attention, FEATURES[name], [5, 90, 2], **shape)


def test_long_segments_are_tiled_exactly():
    for name in ("softcap", "window", "sinks_window"):
        _assert_equals_reference(
            packed_attention, FEATURES[name], [1100, 30], heads=2, kv_heads=1, size=4, value_size=4
        )


def test_fp32_and_strided_inputs():
    lengths = [30, 7, 90]
    _assert_equals_reference(packed_attention, {}, lengths, dtype=torch.float32, tolerance=2e-5)
    fused = torch.randn(sum(lengths), 12, 16, dtype=torch.float64, requires_grad=True)
    q, k, v = fused.split([4, 4, 4], dim=1)  # views with the strides of one projection
    out = packed_attention(q, k, v, _bounds(lengths), 90, scale=0.3)
    expected = packed_attention_reference(q, k, v, _bounds(lengths), scale=0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(_gradients(out, [fused]), _gradients(expected, [fused]))


def test_a_segment_does_not_depend_on_its_neighbours():
    lengths = [33, 80, 5]
    q, k, v = (x.detach() for x in _inputs(lengths, dtype=torch.float32))
    together = packed_attention(q, k, v, _bounds(lengths), 80, scale=0.3)
    other = [x.clone() for x in (q, k, v)]
    for x in other:
        x[:33], x[113:] = torch.nan, torch.nan
    alone = packed_attention(*other, _bounds(lengths), 80, scale=0.3)
    assert torch.equal(together[33:113], alone[33:113])


def test_dropout_keeps_the_mean_and_the_isolation():
    lengths = [100, 3, 3]
    q, k, _ = _inputs(lengths, dtype=torch.float32)
    v = torch.ones(106, 2, 16)
    for sinks in (None, torch.full((4,), -30.0)):
        out = packed_attention(q, k, v, _bounds(lengths), 100, scale=0.1, dropout=0.5, sinks=sinks, causal=False)
        assert abs(out[:100].mean().item() - 1.0) < 0.1
        assert out[:100].std() > 0.02


class _Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an op makes, and the scores that SDPA computes."""

    def __init__(self):
        super().__init__()
        self.numel, self.scores = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.scores += args[0].shape[2] * args[1].shape[2]
        return out


@pytest.mark.parametrize("features", [{}, {"window": 64}, {"softcap": 5.0}, {"sinks": True, "window": 64}])
def test_memory_and_cost_follow_the_segments(features):
    lengths = [64] * 62 + [1] * 128
    q, k, v = _inputs(lengths, heads=1, kv_heads=1, size=2, value_size=2, dtype=torch.float32)
    options = _options(features, 1, torch.float32)
    with _Largest() as seen:
        out = packed_attention(q, k, v, _bounds(lengths), 64, **options)
        out.sum().backward()
    assert seen.numel <= 2 * sum(lengths) * 2  # 4096 tokens x 2 numbers, not 4096 x 4096 scores
    if not (features.keys() & {"softcap", "sinks"}):
        assert seen.scores <= sum(n * n for n in lengths) + SMALL_PIECE * sum(lengths) / 16


def test_cost_with_a_window_is_linear():
    q, k, v = _inputs([2048], heads=1, kv_heads=1, size=2, value_size=2, dtype=torch.float32)
    with _Largest() as seen:
        packed_attention(q, k, v, _bounds([2048]), 2048, scale=1.0, window=64)
    assert seen.scores <= 2048 * 3 * 64
    assert seen.numel <= 2048 * 4


def test_the_cuts_are_made_once_for_all_layers():
    segments = Segments(_bounds([5, 100]), 100)
    assert segments.pieces(causal=True, window=7, explicit=False) is segments.pieces(
        causal=True, window=7, explicit=False
    )
    assert band(2, 3, 1, 2, torch.device("cpu")).tolist() == [[True, True, False], [False, True, True]]


def test_wrong_inputs_are_named():
    q, k, v = _inputs([4, 4])
    with pytest.raises(ValueError, match="end at the 8 tokens"):
        packed_attention(q, k, v, _bounds([4, 3]), 4, scale=1.0)
    with pytest.raises(ValueError, match="never decrease"):
        packed_attention(q, k, v, torch.tensor([0, 9, 8]), 9, scale=1.0)
    with pytest.raises(ValueError, match="window"):
        packed_attention(q, k, v, _bounds([4, 4]), 4, scale=1.0, window=3, causal=False)
    with pytest.raises(ValueError, match="multiple of H_kv"):
        packed_attention(q[:, :3], k, v, _bounds([4, 4]), 4, scale=1.0)
    with pytest.raises(ValueError, match="cu_seqlens"):
        packed_attention(q, k, v, None, None, scale=1.0)


def test_no_tokens():
    q, k, v = _inputs([0])
    assert packed_attention(q, k, v, _bounds([0]), 0, scale=1.0).shape == (0, 4, 16)


@pytest.mark.parametrize("name", FEATURES)
def test_flex_block_mask_and_sinks(name):
    """FlexAttention without compilation runs forward on CPU: the block mask and the sink's share are checked there."""
    q, k, v = (x.detach() for x in _inputs(RAGGED, dtype=torch.float32))
    options = {"causal": True, "window": None, "softcap": None, "sinks": None} | _options(
        FEATURES[name], 4, torch.float32
    )
    with torch.no_grad():
        out = device_backends.flex_attention(q, k, v, Segments(_bounds(RAGGED), 150), **options)
        expected = packed_attention_reference(q, k, v, _bounds(RAGGED), **options)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    mask = Segments(_bounds(RAGGED), 150).block_mask(sum(RAGGED), options["causal"], options["window"])
    if options["window"] == 9:
        assert mask.kv_num_blocks.tolist() == [[[1, 2, 2]]]


def test_cpu_attends_segment_by_segment():
    q, k, v = _inputs([4])
    assert choose_backend(q, k, v) == "segments"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_backends(name, dtype):
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-3
    _assert_equals_reference(packed_attention, FEATURES[name], dtype=dtype, device="cuda", tolerance=tolerance)


def test_flash_attn_leaves_dropout_with_a_softcap_to_the_segments(monkeypatch):
    """Its kernels have either; head sizes, dtypes and sinks that none of them takes are left out too."""
    monkeypatch.setattr(device_backends, "has_flash_attn", lambda: True)
    monkeypatch.setattr(device_backends, "_capability", lambda index: 9)
    plain = {"window": None, "softcap": None, "sinks": False, "dropout": 0.0}

    def fits(dtype=torch.bfloat16, head_size=64, **wanted):
        q = torch.empty(4, 2, head_size, dtype=dtype)
        return device_backends.fitting_backends(q, q, q, **plain | wanted)

    assert fits() == ["flash_attn", "varlen", "flex"]
    assert fits(dropout=0.1) == ["flash_attn"]
    assert fits(softcap=30.0) == ["flash_attn", "flex"]
    assert fits(softcap=30.0, dropout=0.1) == []
    assert fits(sinks=True) == fits(head_size=36) == ["flex"]
    assert fits(dtype=torch.float32) == []


@pytest.mark.parametrize("window", [None, 3])
def test_varlen_takes_our_arguments(window):
    """On the meta device, where torch checks the call without computing."""
    q, k = torch.empty(9, 6, 16, device="meta"), torch.empty(9, 2, 16, device="meta")
    segments = Segments(torch.tensor([0, 4, 9], dtype=torch.int32, device="meta"), 5)
    out = device_backends.varlen_attention(q, k, k, segments, scale=0.25, causal=True, window=window)
    assert out.is_meta and out.shape == q.shape
