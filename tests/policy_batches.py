"""Ragged batches, flat and padded, and what plain Transformers says about each of their sequences alone."""

import torch
from tiny import tiny_model

from fastalign.data.batch import TokenBatch

FLAT = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3", "olmo"]
FLAT += ["cohere", "granite", "qwen3_moe", "gpt_oss"]
LENGTHS = (5, 13, 1, 22, 9)  # longer and shorter than the windows (7, 9), one of a single token
EAGER = {  # the soft-cap exists in Transformers' eager attention only; small, so that small scores feel it
    "gemma2": {"attn_implementation": "eager", "attn_logit_softcapping": 0.05},
}


def build_model(family, **overrides):
    return tiny_model(family, **EAGER.get(family, {}), **overrides)


def sequences_of(lengths=LENGTHS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 331, (n,), generator=generator) for n in lengths]


def scored_positions(sequences):
    """Per sequence the indices j whose next token is scored: all but every fourth."""
    return [torch.tensor([j for j in range(len(s) - 1) if j % 4 != 2], dtype=torch.int64) for s in sequences]


def batch_of(sequences, padded=False):
    scored = scored_positions(sequences)
    lengths = [len(s) for s in sequences]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    width = max(lengths)
    starts = [i * width for i in range(len(sequences))] if padded else bounds[:-1].tolist()
    source = torch.cat([j + start for j, start in zip(scored, starts, strict=True)])
    targets = torch.cat([s[j + 1] for s, j in zip(sequences, scored, strict=True)])
    row = torch.cat([torch.full_like(j, i) for i, j in enumerate(scored)])
    if padded:
        ids = torch.stack([torch.nn.functional.pad(s, (0, width - len(s))) for s in sequences])
        mask = torch.stack([(torch.arange(width) < n).long() for n in lengths])
        positions = torch.arange(width).expand_as(ids) * mask
    else:
        ids, mask = torch.cat(sequences), None
        positions = torch.cat([torch.arange(n) for n in lengths])
    weight = torch.linspace(0.5, 1.5, len(source))
    return TokenBatch(
        input_ids=ids,
        position_ids=positions,
        cu_seqlens=bounds.to(torch.int32),
        source=source,
        targets=targets,
        row=row,
        weight=weight,
        max_seqlen=width,
        num_tokens=sum(lengths),
        attention_mask=mask,
    )


def weighted_nll(batch):
    return lambda stats, span: -(stats.logp * batch.weight[span].to(stats.logp.dtype)).sum() / batch.weight.sum()


def plain_logps(model, sequences, batch):
    """Log-probabilities (N,) and the loss by the ordinary forward of each sequence alone."""
    logps = []
    for sequence, scored in zip(sequences, scored_positions(sequences), strict=True):
        logits = model(input_ids=sequence[None], use_cache=False).logits[0]
        logps.append(logits[scored].float().log_softmax(-1).gather(1, sequence[scored + 1, None])[:, 0])
    logp = torch.cat(logps)
    return logp, -(logp * batch.weight).sum() / batch.weight.sum()


def gradients_of(model, loss):
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
    return {n: g for (n, _), g in zip(parameters, grads, strict=True)}


def assert_same_gradients(found, expected, tolerance=1e-5):
    assert any(g is not None and g.abs().max() > 0 for g in expected.values())
    largest = max(g.abs().max().item() for g in expected.values() if g is not None)
    for name, want in expected.items():
        got = found[name]
        if want is None or got is None:  # an expert without tokens
            assert (want is None or want.abs().max() == 0) and (got is None or got.abs().max() == 0), name
            continue
        scale = max(want.abs().max().item(), 1e-3 * largest)  # each its own: queries get far less than the head
        assert (got - want).abs().max().item() <= tolerance * scale, (name, (got - want).abs().max().item(), scale)
