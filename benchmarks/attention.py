"""Attention on flat tokens against padded rows, one dense mask, and each CUDA back end that is there.

    python benchmarks/attention.py --shapes 16x512x14x64

A shape is sequences x mean length x heads x head size; lengths are log-normal with sigma 0.6, as answers are.
`--ops prefix`: answers behind one prompt, against the same answers with a copy of the prompt each.
"""

from __future__ import annotations

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


def _segments(bounds: torch.Tensor) -> Segments:
    return Segments(bounds, int(bounds.diff().max()))


def _ours(q, k, v, bounds):
    return packed_attention(q, k, v, None, None, segments=_segments(bounds), scale=q.shape[-1] ** -0.5)


def _one_by_one(q, k, v, bounds):
    parts = zip(*(x.split(bounds.diff().tolist()) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), is_causal=True) for part in parts]
    return torch.cat([out.transpose(0, 1) for out in outs])


def _padded(q, k, v, bounds):
    lengths = bounds.diff().tolist()
    q, k, v = (torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])


def _dense_mask(q, k, v, bounds):
    number = torch.bucketize(torch.arange(q.shape[0], device=q.device), bounds[1:], right=True)
    mask = (number[:, None] == number[None]).tril()
    return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), mask).transpose(0, 1)


def _flash_attn(q, k, v, bounds):
    how = {"scale": q.shape[-1] ** -0.5, "causal": True, "window": None, "softcap": None, "dropout": 0.0}
    return flash_attn_attention(q, k, v, _segments(bounds), **how)


def _varlen(q, k, v, bounds):
    return varlen_attention(q, k, v, _segments(bounds), scale=q.shape[-1] ** -0.5, causal=True, window=None)


def _flex(q, k, v, bounds):
    how = {"scale": q.shape[-1] ** -0.5, "causal": True, "window": None, "softcap": None, "sinks": None}
    return flex_attention(q, k, v, _segments(bounds), **how)


PROVIDERS = [
    Provider("fastalign", _with_backward(_ours), "fastalign"),
    Provider("padded", _with_backward(_padded)),
    Provider("dense-mask", _with_backward(_dense_mask)),
    Provider("flash-attn", _with_backward(_flash_attn), "flash-attn", needs_cuda=True),
    Provider("varlen", _with_backward(_varlen), needs_cuda=True),
    Provider("flex", _with_backward(_flex), needs_cuda=True),
]


def case_of(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    """Forward and backward of causal attention; 2 products forward, 5 backward, half of each is masked."""
    count, mean, heads, size = shape
    lengths = lengths_of(count, mean)
    squares = float(lengths.double().pow(2).sum())
    itemsize = torch.empty(0, dtype=dtype).element_size()
    return Case(
        op="packed_attention",
        shape=f"{count} sequences of {mean}, {heads} heads of {size}",
        dtype=dtype,
        make=lambda: make_inputs(lengths, heads, size, dtype),
        exact=_with_backward(_one_by_one),
        providers=PROVIDERS,
        flops=7 * squares * heads * size,
        bytes=itemsize * 8 * int(lengths.sum()) * heads * size,
    )


def _prompt_and_answers(answers: int, prompt: int, tokens: int) -> Segments:
    bounds = torch.tensor([0, prompt, *[tokens] * answers]).cumsum(0).to(device=device(), dtype=torch.int32)
    prefix = torch.tensor([-1, *[0] * answers], dtype=torch.int32, device=device())
    return Segments(bounds, max(prompt, tokens), prefix, answers * tokens)


def _without_sharing(q, k, v, segments: Segments, bounds):
    """Each answer with its own copy of the prompt; of the prompt's results the first copy's count."""
    index, prompt = [], torch.arange(segments.lengths[0], device=q.device)
    for start, stop in zip(bounds[1:-1].tolist(), bounds[2:].tolist(), strict=True):
        index += [prompt, torch.arange(start, stop, device=q.device)]
    rows, lengths = torch.cat(index), bounds.diff()[1:] + len(prompt)
    out = _ours(q[rows], k[rows], v[rows], F.pad(lengths.cumsum(0), (1, 0)).int())
    parts = out.split([len(x) for x in index])
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
            Provider("unshared", _with_backward(lambda q, k, v, b: _without_sharing(q, k, v, segments, b))),
            Provider("dense-mask", _with_backward(dense)),
        ],
        flops=7 * pairs * heads * size,
        bytes=torch.empty(0, dtype=dtype).element_size() * 8 * int(lengths.sum()) * heads * size,
    )


def main() -> int:
    names = [*(provider.name for provider in PROVIDERS[1:]), "unshared"]
    options = parser_of(__doc__, names, "sequences x mean length x heads x head size").parse_args()
    shapes = shapes_of(options, GPU_SHAPES if device().type == "cuda" else CPU_SHAPES, (3, 20, 2, 16))
    cases = [case_of(shape, dtype) for shape in shapes for dtype in dtypes_of(options)]
    prompts = [(2, 30, 8)] if options.dry_run else PROMPTS
    heads, size = shapes[0][2:]
    cases += [prefix_case_of(sizes, heads, size, dtype) for sizes in prompts for dtype in dtypes_of(options)]
    return run_cases(cases, options)


if __name__ == "__main__":
    sys.exit(main())
