"""Attention of segments that share a prefix, against one dense mask, and against the same sequences written out."""

import itertools

import pytest
import torch
from fastalign_kernels.attention import Segments, cascade, choose_backend, packed_attention, packed_attention_reference
from fastalign_kernels.attention import device as device_backends
from test_attention import FEATURES, _bounds, _gradients, _inputs, _Largest, _options

CAUSAL = {name: features for name, features in FEATURES.items() if features.get("causal", True)}
LAYOUTS = {  # lengths and prefixes of the segments
    "pair": ([100, 30, 50], [-1, 0, 0]),
    "group": ([40, 70, 1, 0, 33, 9, 90], [-1, 0, 0, 0, 0, 0, 0]),
    "mixed": ([20, 80, 7, 90, 75, 1, 5, 3, 66, 2, 2, 1], [-1, -1, 1, 1, 1, -1, 5, 5, 5, -1, -1, -1]),
    "small": ([5, 3, 1, 4, 2, 9, 1, 1, 30, 20, 25], [-1, 0, 0, -1, 3, -1, 5, -1, -1, 8, 8]),
    "apart": ([70, 12, 68, 30, 5, 80], [-1, 5, -1, 0, 2, -1]),  # not next to their prefix, and before it
    "between": ([66, 70, 65, 70, 3], [-1, 0, -1, 0, 2]),  # others stand between those that share
    "empty_prefix": ([0, 10, 70, 3], [-1, 0, 0, -1]),
    "nobody_shares": ([70, 3], [-1, -1]),
}


def _segments(layout, device="cpu"):
    lengths, prefix = LAYOUTS[layout]
    shared = [sum(n for n, p in zip(lengths, prefix, strict=True) if p == s) for s in range(len(lengths))]
    prefix = torch.tensor(prefix, dtype=torch.int32, device=device)
    return Segments(_bounds(lengths, device), max(lengths), prefix, max(shared))


def _values_and_gradients(attend, tensors, options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    options = dict(options)
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].detach().to(tensors[0].dtype).requires_grad_()
        leaves.append(options["sinks"])
    out = attend(*leaves[:3], **options)
    return [out.detach(), *_gradients(out, leaves)]


def _compare(layout, features, *, tolerance=1e-10, attend=None, **shape):
    segments = _segments(layout)
    tensors = _inputs(LAYOUTS[layout][0], **shape)
    options = _options(features, tensors[0].shape[1], tensors[0].dtype)
    attend = attend or (lambda q, k, v, **how: packed_attention(q, k, v, None, None, segments=segments, **how))

    def oracle(q, k, v, **how):
        return packed_attention_reference(q, k, v, segments.cu_seqlens, prefix=segments.prefix, **how)

    found = _values_and_gradients(attend, tensors, options)
    expected = _values_and_gradients(oracle, [x.double() for x in tensors], options)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CAUSAL)
def test_equals_dense_reference_with_gradients(layout, name):
    _compare(layout, CAUSAL[name])


@pytest.mark.parametrize("layout", ["mixed", "group"])
@pytest.mark.parametrize("name", ["plain", "sinks", "softcap_window", "window_long"])
def test_fp32(layout, name):
    _compare(layout, CAUSAL[name], dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("name", ["plain", "sinks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_without_sharing(name, dtype):
    """Inputs rounded; the error against fp64 is at most 1.5 times that of the sequences written out."""
    segments, lengths = _segments("mixed"), LAYOUTS["mixed"][0]
    tensors = [x.to(dtype) for x in _inputs(lengths, dtype=torch.float32)]
    options = _options(CAUSAL[name], 4, torch.float32)

    def shared(q, k, v, **how):
        return packed_attention(q, k, v, None, None, segments=segments, **how)

    index, bounds, longest = segments.keys_with_prefixes(None)

    def written_out(q, k, v, **how):
        out = packed_attention(q[index], k[index], v[index], bounds, longest, **how)
        places = [torch.arange(b - n, b) for b, n in zip(bounds[1:].tolist(), lengths, strict=True)]
        return out[torch.cat(places)]

    def oracle(q, k, v, **how):
        return packed_attention_reference(q, k, v, segments.cu_seqlens, prefix=segments.prefix, **how)

    exact = _values_and_gradients(oracle, [x.double() for x in tensors], options)
    ours, theirs = (_values_and_gradients(f, tensors, options) for f in (shared, written_out))
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert (got.double() - want).norm() <= 1.5 * (other.double() - want).norm() + 1e-6


@pytest.mark.parametrize("shape", [{"heads": 6, "kv_heads": 1}, {"kv_heads": 4}, {"value_size": 8}, {"size": 7}])
@pytest.mark.parametrize("name", ["plain", "sinks", "all"])
def test_head_layouts(shape, name):
    _compare("mixed", CAUSAL[name], **{"value_size": shape.get("size", 16)} | shape)


def test_long_segments_are_tiled_exactly(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "long", ([700, 600, 530, 40], [-1, 0, -1, 2]))
    for name in ("plain", "softcap", "window", "sinks_window", "window_long"):
        _compare("long", CAUSAL[name], heads=2, kv_heads=1, size=4, value_size=4)


def test_the_cascade_is_taken_where_it_fits():
    q, _, v = _inputs([4], value_size=8)
    assert choose_backend(q, q, q, shared=True) == "cascade"
    assert choose_backend(q, q, q) == "segments"
    for how in ({"window": 3}, {"softcap": 2.0}, {"dropout": 0.1}):
        assert choose_backend(q, q, q, shared=True, **how) == "segments"
    assert choose_backend(q, q, v, shared=True) == "segments"
    segments = _segments("pair")
    assert [segments.reach(w) for w in (None, 149, 150)] == [None, 149, None]  # 100 + 50 tokens


def test_strided_inputs_and_upstream_gradients():
    segments = _segments("mixed")
    fused = torch.randn(sum(LAYOUTS["mixed"][0]), 12, 16, dtype=torch.float64, requires_grad=True)
    q, k, v = fused.split([4, 4, 4], dim=1)
    out = packed_attention(q, k, v, None, None, segments=segments, scale=0.3)
    expected = packed_attention_reference(q, k, v, segments.cu_seqlens, prefix=segments.prefix, scale=0.3)
    for loss in (lambda x: x.sum(), lambda x: x.transpose(0, 2).pow(2).sum()):
        found, wanted = (torch.autograd.grad(loss(x), fused, retain_graph=True)[0] for x in (out, expected))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["plain", "window", "softcap", "sinks"])
def test_siblings_and_neighbours_do_not_show(name):
    """NaN in every other family and in every sibling leaves a segment's values untouched."""
    lengths, prefix = LAYOUTS["mixed"]
    segments, tensors = _segments("mixed"), [x.detach() for x in _inputs(lengths)]
    options = _options(CAUSAL[name], 4, torch.float64)
    together = packed_attention(*tensors, None, None, segments=segments, **options)
    bounds = [0, *itertools.accumulate(lengths)]
    for s in (3, 4, 8):
        keep = torch.zeros(sum(lengths), dtype=torch.bool)
        for x in (s, prefix[s]):
            keep[bounds[x] : bounds[x + 1]] = True
        other = [torch.where(keep[:, None, None], x, 1e6) for x in tensors]
        alone = packed_attention(*other, None, None, segments=segments, **options)
        torch.testing.assert_close(alone[keep], together[keep], rtol=0, atol=1e-12)


def test_dropout_keeps_the_mean():
    segments = _segments("pair")
    q, k, _ = _inputs(LAYOUTS["pair"][0], dtype=torch.float32)
    v = torch.ones(180, 2, 16)
    out = packed_attention(q, k, v, None, None, segments=segments, scale=0.1, dropout=0.5)
    assert abs(out[100:].mean().item() - 1.0) < 0.1 and out[100:].std() > 0.02


def test_cost_and_memory_of_a_group():
    """8 answers of 64 behind 512 tokens: scores are those of one prompt, the answers, and answers x prompt."""
    segments = Segments(_bounds([512] + [64] * 8), 512, torch.tensor([-1] + [0] * 8))
    q, k, v = _inputs([1024], heads=1, kv_heads=1, size=2, value_size=2, dtype=torch.float32)
    with _Largest() as seen:
        packed_attention(q, k, v, None, None, segments=segments, scale=1.0).sum().backward()
    assert seen.scores == 512**2 + 8 * 64**2 + 512 * 512
    assert seen.numel <= 1024 * 2
    with _Largest() as seen:
        packed_attention(q, k, v, None, None, segments=segments, scale=1.0, softcap=5.0).sum().backward()
    assert seen.numel <= 512 * 576


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CAUSAL)
def test_flex_block_mask(layout, name):
    segments = _segments(layout)
    q, k, v = (x.detach() for x in _inputs(LAYOUTS[layout][0], dtype=torch.float32))
    options = {"causal": True, "window": None, "softcap": None, "sinks": None}
    options |= _options(CAUSAL[name], 4, torch.float32)
    with torch.no_grad():
        out = device_backends.flex_attention(q, k, v, segments, **options)
        expected = packed_attention_reference(q, k, v, segments.cu_seqlens, prefix=segments.prefix, **options)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_flex_skips_blocks_that_nobody_sees():
    segments = Segments(_bounds([128, 128, 256]), 256, torch.tensor([-1, -1, 0]))
    mask = segments.block_mask(512, True, None)
    assert mask.kv_num_blocks.tolist() == [[[1, 1, 2, 3]]]
    assert mask.kv_indices[0, 0, 3, :3].sort().values.tolist() == [0, 2, 3]
    assert segments.block_mask(512, True, 64).kv_num_blocks.tolist() == [[[1, 1, 2, 2]]]


def _varlen_scores(q, k, cu_q, cu_k, causal, window, scale):
    """Scores (H, T, T') with what no sequence sees at -inf; queries stand at the end of their keys."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    seen = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for (a, b), (c, d) in zip(*(itertools.pairwise(x.tolist()) for x in (cu_q, cu_k)), strict=True):
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        part = torch.ones(b - a, d - c, dtype=torch.bool) if not causal else distance >= 0
        seen[a:b, c:d] = part if window is None else part & (distance < window)
    return (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~seen, -torch.inf)


def _flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
    """What `aten::_flash_attention_forward` promises: nothing is written for queries behind the last bound."""
    scores = _varlen_scores(q, k, cu_q, cu_k, causal, None, scale)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    out, lse = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)
    out[cu_q[-1] :], lse[:, cu_q[-1] :] = torch.nan, torch.nan
    assert max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max()
    return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)


def _flash_backward(d, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *, scale):
    assert lse.is_contiguous() and lse.shape == (q.shape[1], q.shape[0])
    repeats = q.shape[1] // k.shape[1]
    shares = torch.exp(_varlen_scores(q, k, cu_q, cu_k, causal, None, scale) - lse[..., None])
    long_k, long_v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    d_shares = torch.einsum("qhd,khd->hqk", d, long_v)
    d_scores = shares * (d_shares - (d * out).sum(-1).T[..., None]) * scale
    dq = torch.einsum("hqk,khd->qhd", d_scores, long_k)
    dk, dv = torch.einsum("hqk,qhd->khd", d_scores, q), torch.einsum("hqk,qhd->khd", shares, d)
    dq[cu_q[-1] :] = torch.nan
    return dq, *(x.unflatten(1, (-1, repeats)).sum(2) for x in (dk, dv))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "sinks"])
def test_two_varlen_calls(layout, name, monkeypatch):
    """The CUDA way, with its two kernels written out: no host copy of the bounds is read."""

    class Kernels:
        _flash_attention_forward = staticmethod(_flash_forward)
        _flash_attention_backward = staticmethod(_flash_backward)

    monkeypatch.setattr(cascade, "aten", Kernels)
    monkeypatch.setattr(cascade, "_cpu_parts", lambda dtype, s: cascade._varlen_parts(sum(LAYOUTS[layout][0]), s))
    segments = _segments(layout)

    def attend(q, k, v, **how):
        return cascade.cascade_attention(q, k, v, segments, **how)

    _compare(layout, CAUSAL[name], attend=attend)
    assert not {"lengths", "parents"} & segments.__dict__.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 9, 100])
def test_gathered_keys_for_windows_on_cuda(layout, window, monkeypatch):
    """varlen attention with queries at the end of their keys sees what the dense mask shows."""
    import torch.nn.attention.varlen as varlen

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=True):
        assert max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max() and window_size[1] == 0
        scores = _varlen_scores(q, k, cu_q, cu_k, True, window_size[0] + 1, scale)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(q.shape[1] // v.shape[1], dim=1))

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    segments = _segments(layout)

    def attend(q, k, v, **how):
        return device_backends.varlen_attention(q, k, v, segments, causal=True, **how)

    _compare(layout, {"window": window}, attend=attend)


def test_wrong_prefixes_are_named():
    q, k, v = _inputs([4, 4, 4])
    for prefix, message in (([-1, 0, 1], r"prefix\[2\] is 1"), ([-1, 0], "3 segments, found 2"), ([3, 0, 0], "is 3")):
        segments = Segments(_bounds([4, 4, 4]), 4, torch.tensor(prefix))
        with pytest.raises(ValueError, match=message):
            packed_attention(q, k, v, None, None, segments=segments, scale=1.0)
    segments = Segments(_bounds([4, 4, 4]), 4, torch.tensor([-1, 0, 0]))
    with pytest.raises(ValueError, match="need causal=True"):
        packed_attention(q, k, v, None, None, segments=segments, scale=1.0, causal=False)
    with pytest.raises(ValueError, match="end at the 11 tokens"):
        packed_attention(q[1:], k[1:], v[1:], None, None, segments=segments, scale=1.0)


def test_no_tokens():
    q, k, v = _inputs([0])
    segments = Segments(_bounds([0, 0]), 0, torch.tensor([-1, 0]))
    assert packed_attention(q, k, v, None, None, segments=segments, scale=1.0).shape == (0, 4, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(layout, name, dtype):
    segments, on_device = _segments(layout), _segments(layout, "cuda")
    tensors = _inputs(LAYOUTS[layout][0], dtype=dtype)
    options = _options(CAUSAL[name], 4, dtype)

    def attend(q, k, v, **how):
        return packed_attention(q, k, v, None, None, segments=on_device, **how)

    def oracle(q, k, v, **how):
        return packed_attention_reference(q, k, v, segments.cu_seqlens, prefix=segments.prefix, **how)

    cuda_options = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    found = _values_and_gradients(attend, [x.cuda() for x in tensors], cuda_options)
    expected = _values_and_gradients(oracle, [x.double() for x in tensors], options)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-3
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double().cpu(), want, atol=tolerance, rtol=tolerance)
