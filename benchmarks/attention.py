"""Attention on flat tokens against padded rows, one dense mask, and each CUDA back end that is there.

    python benchmarks/attention.py --shapes 16x512x14x64

A shape is sequences x mean length x heads x head size; lengths are log-normal with sigma 0.6, as answers are.
`--ops prefix`: answers behind one prompt, against the same answers with a copy of the prompt each.
"""

from __future__ import annotations

import itertools
import sys

import torch
import torch.nn.functional as F
from fastalign_kernels.attention import Segments, packed_attention, packed_attention_reference
from fastalign_kernels.attention.device import flash_attn_attention, flex_attention, varlen_attention
from measure import Case, Provider, Tensors, device, dtypes_of, parser_of, run_cases, shapes_of

CPU_SHAPES = [(8, 256, 8, 64)]
GPU_SHAPES = [(16, 512, 14, 64), (8, 2048, 32, 128)]
PROMPTS = [(2, 512, 128), (8, 512, 128)]  # answers, tokens of the prompt, tokens of an answer


def lengths_of(count: int, mean: int) -> torch.Tensor:
    """`count` lengths of the given mean, (count,) int64."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(0.6).exp()
    return (drawn / drawn.mean() * mean).round().long().clamp_min(1)


def make_inputs(lengths: torch.Tensor, heads: int, size: int, dtype: torch.dtype) -> Tensors:
    """q, k, v (T, heads, size), and the bounds of the sequences."""
    shape = (int(lengths.sum()), heads, size)
    q, k, v = (torch.randn(shape, device=device()).to(dtype).requires_grad_() for _ in range(3))
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(device=device(), dtype=torch.int32)
    return {"q": q, "k": k, "v": v, "bounds": bounds}


def _with_backward(attend):
    """`run` of a provider: the output, and gradients of the mean of its squares."""

    def run(inputs: Tensors) -> Tensors:
        out = attend(inputs["q"], inputs["k"], inputs["v"], inputs["bounds"])
        out.pow(2).mean().backward()
        return {"out": out}

    return run


def _ours(q, k, v, segments: Segments):
    return packed_attention(q, k, v, None, None, segments=segments, scale=q.shape[-1] ** -0.5)


def _one_by_one(q, k, v, bounds):
    parts = zip(*(x.split(bounds.diff().tolist()) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), is_causal=True) for part in parts]
    return torch.cat([out.transpose(0, 1) for out in outs])


def _padded(q, k, v, bounds):
    lengths = bounds.diff().tolist()
    q, k, v = (torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])


def _dense_mask(q, k, v, segments: Segments):
    number = segments.numbers(q.shape[0])
    mask = segments.kept("dense mask", lambda: (number[:, None] == number[None]).tril())
    return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)


def _flash_attn(q, k, v, segments: Segments):
    how = {"scale": q.shape[-1] ** -0.5, "causal": True, "window": None, "softcap": None, "dropout": 0.0}
    return flash_attn_attention(q, k, v, segments, **how)


def _varlen(q, k, v, segments: Segments):
    return varlen_attention(q, k, v, segments, scale=q.shape[-1] ** -0.5, causal=True, window=None)


def _flex(q, k, v, segments: Segments):
    how = {"scale": q.shape[-1] ** -0.5, "causal": True, "window": None, "softcap": None, "sinks": None}
    return flex_attention(q, k, v, segments, **how)


PEERS = ["padded", "dense-mask", "flash-attn", "varlen", "flex"]


def providers_of(segments: Segments) -> list[Provider]:
    """All of them on one batch: what follows from its bounds is made once, as for the layers of a model."""

    def on(attend):
        return _with_backward(lambda q, k, v, bounds: attend(q, k, v, segments))

    return [
        Provider("fastalign", on(_ours), "fastalign"),
        Provider("padded", _with_backward(_padded)),
        Provider("dense-mask", on(_dense_mask)),
        Provider("flash-attn", on(_flash_attn), "flash-attn", needs_cuda=True),
        Provider("varlen", on(_varlen), needs_cuda=True),
        Provider("flex", on(_flex), needs_cuda=True),
    ]


def case_of(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    """Forward and backward of causal attention; 2 products forward, 5 backward, half of each is masked."""
    count, mean, heads, size = shape
    lengths = lengths_of(count, mean)
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(device=device(), dtype=torch.int32)
    squares = float(lengths.double().pow(2).sum())
    itemsize = torch.empty(0, dtype=dtype).element_size()
    return Case(
        op="packed_attention",
        shape=f"{count} sequences of {mean}, {heads} heads of {size}",
        dtype=dtype,
        make=lambda: make_inputs(lengths, heads, size, dtype),
        exact=_with_backward(_one_by_one),
        providers=providers_of(Segments(bounds, int(lengths.max()))),
        flops=7 * squares * heads * size,
        bytes=itemsize * 8 * int(lengths.sum()) * heads * size,
    )


def _prompt_and_answers(answers: int, prompt: int, tokens: int) -> Segments:
    bounds = torch.tensor([0, prompt, *[tokens] * answers]).cumsum(0).to(device=device(), dtype=torch.int32)
    prefix = torch.tensor([-1, *[0] * answers], dtype=torch.int32, device=device())
    return Segments(bounds, max(prompt, tokens), prefix, answers * tokens)


def _without_sharing(q, k, v, segments: Segments):
    """Each answer with its own copy of the prompt; of the prompt's results the first copy's count."""

    def copies() -> tuple[list[torch.Tensor], Segments]:
        prompt, index = torch.arange(segments.lengths[0], device=q.device), []
        for start, stop in itertools.pairwise(segments.cu_seqlens.tolist()[1:]):
            index += [prompt, torch.arange(start, stop, device=q.device)]
        lengths = segments.cu_seqlens.diff()[1:] + len(prompt)
        return index, Segments(F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max()))

    index, apart = segments.kept("copies", copies)
    rows = segments.kept("rows of copies", lambda: torch.cat(index))
    parts = _ours(q[rows], k[rows], v[rows], apart).split([len(x) for x in index])
    return torch.cat([parts[0], *parts[1::2]])


def prefix_case_of(sizes: tuple[int, int, int], heads: int, size: int, dtype: torch.dtype) -> Case:
    """Forward and backward of one layer's attention on one prompt and its answers."""
    answers, prompt, tokens = sizes
    segments, scale = _prompt_and_answers(*sizes), size**-0.5
    lengths = torch.tensor([prompt, *[tokens] * answers])
    pairs = prompt**2 + answers * (tokens**2 + 2 * prompt * tokens)  # twice the scores, as in `case_of`

    def shared(q, k, v, bounds):
        return packed_attention(q, k, v, None, None, segments=segments, scale=scale)

    def dense(q, k, v, bounds):
        return packed_attention_reference(q, k, v, bounds, prefix=segments.prefix, scale=scale)

    return Case(
        op="prefix_attention",
        shape=f"{answers} answers of {tokens} to {prompt}, {heads} heads of {size}",
        dtype=dtype,
        make=lambda: make_inputs(lengths, heads, size, dtype),
        exact=_with_backward(dense),
        providers=[
            Provider("fastalign", _with_backward(shared), "fastalign"),
            Provider("unshared", _with_backward(lambda q, k, v, b: _without_sharing(q, k, v, segments))),
            Provider("dense-mask", _with_backward(dense)),
        ],
        flops=7 * pairs * heads * size,
        bytes=torch.empty(0, dtype=dtype).element_size() * 8 * int(lengths.sum()) * heads * size,
    )


def main() -> int:
    options = parser_of(__doc__, [*PEERS, "unshared"], "sequences x mean length x heads x head size").parse_args()
    shapes = shapes_of(options, GPU_SHAPES if device().type == "cuda" else CPU_SHAPES, (3, 20, 2, 16))
    cases = [case_of(shape, dtype) for shape in shapes for dtype in dtypes_of(options)]
    prompts = [(2, 30, 8)] if options.dry_run else PROMPTS
    heads, size = shapes[0][2:]
    cases += [prefix_case_of(sizes, heads, size, dtype) for sizes in prompts for dtype in dtypes_of(options)]
    return run_cases(cases, options)


if __name__ == "__main__":
    sys.exit(main())
