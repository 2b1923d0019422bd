"""Every model family on flat and padded batches against plain Transformers, one sequence at a time."""

import copy
import json
import logging
import pickle

import pytest
import torch
import transformers
from tiny import SIZES, tiny_model

from fastalign import flat_attention
from fastalign.data.batch import TokenBatch
from fastalign.logit_form import head_output_kept
from fastalign.policy import logits_forward, prepare_policy, token_loss, token_stats

FLAT = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3", "olmo"]
FLAT += ["cohere", "granite", "qwen3_moe", "gpt_oss"]
LENGTHS = (5, 13, 1, 22, 9)  # longer and shorter than the windows (7, 9), one of a single token
EAGER = {  # the soft-cap exists in Transformers' eager attention only; small, so that small scores feel it
    "gemma2": {"attn_implementation": "eager", "attn_logit_softcapping": 0.05},
}


def _model(family, **overrides):
    return tiny_model(family, **EAGER.get(family, {}), **overrides)


def _sequences(lengths=LENGTHS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 331, (n,), generator=generator) for n in lengths]


def _scored(sequences):
    """Per sequence the indices j whose next token is scored: all but every fourth."""
    return [torch.tensor([j for j in range(len(s) - 1) if j % 4 != 2], dtype=torch.int64) for s in sequences]


def _batch(sequences, padded=False):
    scored = _scored(sequences)
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


def _loss_fn(batch):
    return lambda stats, span: -(stats.logp * batch.weight[span].to(stats.logp.dtype)).sum() / batch.weight.sum()


def _plain(model, sequences, batch):
    """Log-probabilities (N,) and the loss by the ordinary forward of each sequence alone."""
    logps = []
    for sequence, scored in zip(sequences, _scored(sequences), strict=True):
        logits = model(input_ids=sequence[None], use_cache=False).logits[0]
        logps.append(logits[scored].float().log_softmax(-1).gather(1, sequence[scored + 1, None])[:, 0])
    logp = torch.cat(logps)
    return logp, -(logp * batch.weight).sum() / batch.weight.sum()


def _gradients(model, loss):
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
    return {n: g for (n, _), g in zip(parameters, grads, strict=True)}


def _assert_same_gradients(found, expected, tolerance=1e-5):
    assert any(g is not None and g.abs().max() > 0 for g in expected.values())
    largest = max(g.abs().max().item() for g in expected.values() if g is not None)
    for name, want in expected.items():
        got = found[name]
        if want is None or got is None:  # an expert without tokens
            assert (want is None or want.abs().max() == 0) and (got is None or got.abs().max() == 0), name
            continue
        scale = max(want.abs().max().item(), 1e-3 * largest)  # each its own: queries get far less than the head
        assert (got - want).abs().max().item() <= tolerance * scale, (name, (got - want).abs().max().item(), scale)


@pytest.mark.parametrize("family", [*FLAT, "mamba"])
def test_flat_and_padded_equal_one_sequence_at_a_time(family):
    model, sequences = _model(family), _sequences()
    batch, padded = _batch(sequences), _batch(sequences, padded=True)
    expected_logp, loss = _plain(model, sequences, batch)
    expected = _gradients(model, loss)
    info = prepare_policy(model)
    assert info.flat == (family != "mamba"), info.reason
    for current in [batch, padded] if info.flat else [padded]:
        output = token_loss(model, current, _loss_fn(current))
        torch.testing.assert_close(output.stats.logp, expected_logp.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=1e-5)
        _assert_same_gradients(_gradients(model, output.loss), expected)
        torch.testing.assert_close(token_stats(model, current).stats.logp, output.stats.logp, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss"])
def test_gradient_checkpointing_runs_layers_again_with_their_bounds(family, reentrant):
    model, sequences = _model(family).train(), _sequences()
    batch = _batch(sequences)
    prepare_policy(model)
    assert model.training
    expected = _gradients(model, token_loss(model, batch, _loss_fn(batch)).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.zero_grad()
    token_loss(model, batch, _loss_fn(batch)).loss.backward()
    _assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, expected, tolerance=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "cohere", "granite", "gpt_oss", "mamba"])
def test_ordinary_calls_and_saved_files_are_as_before(family, tmp_path):
    model = _model(family)
    ids = torch.randint(3, 331, (2, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    generated = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    keys, before = list(model.state_dict()), model.generate(ids, attention_mask=mask, **generated)
    logits = model(input_ids=ids, attention_mask=mask).logits
    model.save_pretrained(tmp_path / "before")
    prepare_policy(model)
    batch = _batch(_sequences(), padded=family == "mamba")
    token_loss(model, batch, _loss_fn(batch)).loss.backward()
    assert torch.equal(model.generate(ids, attention_mask=mask, **generated), before)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "after" / name).read_text() == (tmp_path / "before" / name).read_text()
    assert "fastalign" not in json.dumps(model.config.to_dict(), default=str)
    again = type(model).from_pretrained(tmp_path / "after")
    expected = logits if family in ("gpt_oss", "mamba", *EAGER) else again(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(expected, logits)


def test_logits_forward_is_the_isolated_forward():
    model, sequences = _model("llama"), _sequences()
    prepare_policy(model)
    flat = logits_forward(model, _batch(sequences)).logits[0].split(list(LENGTHS))
    padded = logits_forward(model, _batch(sequences, padded=True)).logits
    for i, sequence in enumerate(sequences):
        alone = model(input_ids=sequence[None]).logits[0]
        torch.testing.assert_close(flat[i], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(padded[i, : len(sequence)], alone, atol=1e-5, rtol=1e-5)


def test_statistics_with_gradient_and_temperature():
    model, sequences = _model("gemma2"), _sequences()
    batch = _batch(sequences)
    prepare_policy(model)
    temperature = torch.linspace(0.5, 2.0, batch.num_scored)
    asked = ("entropy", "top1", "logp")
    stats = token_stats(model, batch, outputs=asked, grad=True, temperature=temperature).stats
    logits = torch.cat(
        [model(input_ids=s[None]).logits[0, j] for s, j in zip(sequences, _scored(sequences), strict=True)]
    )
    logp = (logits / temperature[:, None]).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(1, batch.targets[:, None])[:, 0]
    torch.testing.assert_close(stats.logp, chosen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy, entropy, atol=1e-5, rtol=1e-5)
    assert torch.equal(stats.top1, logits.argmax(-1) == batch.targets)
    found = _gradients(model, (stats.logp * batch.weight).mean() + stats.entropy.square().mean())
    _assert_same_gradients(found, _gradients(model, (chosen * batch.weight).mean() + entropy.square().mean()))
    assert not token_stats(model, batch, outputs=("entropy",)).stats.entropy.requires_grad


@pytest.mark.parametrize("padded", [False, True])
def test_load_balancing_loss_is_the_models_own(padded):
    model = tiny_model("qwen3_moe", output_router_logits=True)
    sequences = _sequences((9,)) if padded else _sequences()
    batch = _batch(sequences, padded=padded)
    prepare_policy(model)
    if padded:
        expected = model(input_ids=sequences[0][None]).aux_loss
    else:  # over all tokens of the flat row: the same as from the routers of each sequence
        from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

        routers = zip(*(model(input_ids=s[None]).router_logits for s in sequences), strict=True)
        expected = load_balancing_loss_func(tuple(torch.cat(r) for r in routers), 4, 2)
    output = token_loss(model, batch, _loss_fn(batch))
    torch.testing.assert_close(output.aux_loss, expected, atol=1e-5, rtol=1e-5)
    assert output.aux_loss.requires_grad
    assert token_stats(tiny_model("llama"), batch).aux_loss is None


def test_two_models_nested_calls_and_exceptions():
    policy, reference = _model("cohere"), _model("llama", seed=1)
    batch, inner = _batch(_sequences()), _batch(_sequences((4, 6), seed=9))
    alone = token_stats(reference, inner).stats.logp
    expected = token_stats(policy, batch).stats.logp
    scale = policy.logit_scale
    plain = policy(input_ids=inner.input_ids[None]).logits

    def nested(stats, span):
        assert torch.equal(token_stats(reference, inner).stats.logp, alone)
        assert reference(input_ids=inner.input_ids[None]).logits.shape == (1, 10, 331)
        return -stats.logp.sum()

    assert torch.equal(token_loss(policy, batch, nested).stats.logp, expected)

    def broken(stats, span):
        raise RuntimeError("from the loss")

    with pytest.raises(RuntimeError, match="from the loss"):
        token_loss(policy, batch, broken)
    assert policy.logit_scale == scale == policy.config.logit_scale
    assert torch.equal(policy(input_ids=inner.input_ids[None]).logits, plain)
    assert torch.equal(token_stats(policy, batch).stats.logp, expected)


def test_copied_and_pickled_models_score_alike():
    model, batch = _model("gemma3"), _batch(_sequences())
    prepare_policy(model)
    expected = token_stats(model, batch).stats.logp
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.get_output_embeddings(), torch.nn.Linear)
        assert other.get_output_embeddings() is not model.get_output_embeddings()
        assert torch.equal(token_stats(other, batch).stats.logp, expected)
        with torch.no_grad():
            other.get_output_embeddings().weight.zero_()
    assert torch.equal(token_stats(model, batch).stats.logp, expected)


def test_tied_weights_get_both_gradients():
    model, sequences = tiny_model("qwen2"), _sequences()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    batch = _batch(sequences)
    _, loss = _plain(model, sequences, batch)
    expected = _gradients(model, loss)
    output = token_loss(model, batch, _loss_fn(batch))
    _assert_same_gradients(_gradients(model, output.loss), expected)


def test_autocast_multiplies_in_bf16_and_keeps_statistics_in_fp32():
    model, sequences = _model("llama"), _sequences()
    batch = _batch(sequences)
    prepare_policy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = token_loss(model, batch, _loss_fn(batch))
        expected, _ = _plain(model, sequences, batch)
    assert output.stats.logp.dtype == torch.float32
    torch.testing.assert_close(output.stats.logp, expected, atol=0.1, rtol=0.02)
    output.loss.backward()
    assert model.get_output_embeddings().weight.grad.dtype == torch.float32
    exact = token_stats(model, batch).stats.logp
    assert (output.stats.logp - exact).abs().max() > 1e-4  # it did use bf16


def test_compiled_model():
    model, batch = _model("llama", num_hidden_layers=1), _batch(_sequences())
    prepare_policy(model)
    expected = token_loss(model, batch, _loss_fn(batch))
    gradients = _gradients(model, expected.loss)
    compiled = torch.compile(model, backend="eager")
    output = token_loss(compiled, batch, _loss_fn(batch))
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=1e-6)
    _assert_same_gradients(_gradients(model, output.loss), gradients, tolerance=1e-6)
    other = _batch(_sequences((3, 4, 8, 30), seed=8))
    torch.testing.assert_close(
        token_stats(compiled, other).stats.logp, token_stats(model, other).stats.logp, atol=1e-6, rtol=1e-6
    )


def test_half_precision_model_prepares_and_scores():
    model, sequences = _model("llama", dtype=torch.bfloat16), _sequences()
    batch = _batch(sequences)
    assert prepare_policy(model).flat
    expected, _ = _plain(model, sequences, batch)
    torch.testing.assert_close(token_stats(model, batch).stats.logp, expected, atol=0.15, rtol=0.02)


def test_unknown_transform_after_the_head_is_refused():
    model = tiny_model("granite")
    model.config.model_type = "minicpm3"  # its field of the same name means something else
    with pytest.raises(ValueError, match=r"after the head.*logit_form"):
        prepare_policy(model)
    model.config.model_type = "granite"
    assert prepare_policy(model).form.scale == pytest.approx(1 / 3)


def test_neutral_softcap_is_exact():
    model = tiny_model("gemma2")
    with head_output_kept(model):
        cap = model.config.final_logit_softcapping
        x = torch.tensor([1e-3, 0.7, 123.456, 9e4], requires_grad=True)
        y = torch.tanh(x / cap) * cap
        assert torch.equal(y, x)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(4))
    assert model.config.final_logit_softcapping == 3.0


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((f, torch.float32) for f in ("llama", "gpt2", "cohere", "granite", "gpt_oss")), ("llama", torch.bfloat16)],
)
def test_models_that_leak_get_padded_batches(family, dtype, caplog, monkeypatch):
    model = _model(family, dtype=dtype)
    before, original = model.config._attn_implementation, flat_attention.packed_attention

    def leaking(q, k, v, *args, segments, **kwargs):
        whole = flat_attention.Segments(segments.cu_seqlens[[0, -1]], q.shape[0])
        return original(q, k, v, *args, segments=whole, **kwargs)

    if dtype == torch.bfloat16:
        with torch.no_grad():  # the leak of so small a model is below bf16's rounding
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(20)
    monkeypatch.setattr(flat_attention, "packed_attention", leaking)
    with caplog.at_level(logging.WARNING):
        info = prepare_policy(model)
    assert not info.flat and "differ" in info.reason and "padded" in caplog.text
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="TokenCollator"):
        token_stats(model, _batch(_sequences()))


def test_decisions():
    assert prepare_policy(tiny_model("mamba")).reason.startswith("it carries a recurrent state")
    model = tiny_model("llama")
    assert prepare_policy(model) is prepare_policy(model)
    assert not prepare_policy(model, allow_flat=False).flat
    assert model.config._attn_implementation == "sdpa"
    assert prepare_policy(model).flat
    meta = tiny_model("llama").to("meta")
    assert prepare_policy(meta).flat
    with pytest.raises(ValueError, match="output embedding"):
        prepare_policy(tiny_model("llama").model)
    with pytest.raises(ValueError, match="nonsense"):
        token_stats(model, _batch(_sequences()), outputs=("nonsense",))


def test_preparing_changes_no_state():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    prepare_policy(model)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_scored():
    model, batch = tiny_model("llama"), _batch(_sequences((1, 1)))
    output = token_loss(model, batch, lambda stats, span: stats.logp.sum())
    assert output.loss.item() == 0.0
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.abs().max() == 0 for g in gradients)


def _lfm2():
    config = transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    return transformers.Lfm2ForCausalLM(config)


def _bloom():
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=331, hidden_size=32, n_layer=2, n_head=4))


@pytest.mark.parametrize(("build", "reason"), [(_lfm2, "layers of the kind conv"), (_bloom, "attention functions")])
def test_state_and_alibi_run_padded(build, reason):
    model, sequences = build().eval(), _sequences()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    padded = _batch(sequences, padded=True)
    expected_logp, loss = _plain(model, sequences, padded)
    expected = _gradients(model, loss)
    info = prepare_policy(model)
    assert not info.flat and reason in info.reason
    output = token_loss(model, padded, _loss_fn(padded))
    torch.testing.assert_close(output.stats.logp, expected_logp.detach(), atol=1e-5, rtol=1e-5)
    _assert_same_gradients(_gradients(model, output.loss), expected)


def test_model_prepared_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model, batch = _model("llama"), _batch(_sequences())
    prepare_policy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = token_loss(model, batch, _loss_fn(batch)).loss
    gradients = _gradients(model, expected)
    wrapped = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    output = token_loss(wrapped, batch, _loss_fn(batch))
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, atol=1e-6, rtol=1e-6)
    _assert_same_gradients(_gradients(model, output.loss), gradients, tolerance=1e-6)


def test_ordinary_calls_of_flash_models_see_their_own_name():
    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, attention_mask))
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )

    transformers.AttentionInterface.register("my_flash", flash)
    transformers.AttentionMaskInterface.register("my_flash", transformers.masking_utils.sdpa_mask)
    model, batch = _model("llama"), _batch(_sequences())
    model.config._attn_implementation = "my_flash"
    prepare_policy(model)
    assert model.config._attn_implementation == "fastalign_my_flash"
    seen.clear()
    token_stats(model, batch)
    assert not seen
    model(input_ids=batch.input_ids[None])
    assert [name for name, _ in seen] == ["my_flash"] * 2
    assert model.config._attn_implementation == "fastalign_my_flash"


def test_a_softcap_that_sdpa_leaves_out_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        prepare_policy(tiny_model("gemma2"))
    assert "attn_logit_softcapping=5.0" in caplog.text and "eager" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FLAT)
def test_flat_equals_one_sequence_at_a_time_on_a_gpu(family):
    model, sequences = _model(family, head_dim=16, dtype=torch.bfloat16).cuda(), [s.cuda() for s in _sequences()]
    batch = _batch([s.cpu() for s in sequences]).to("cuda")
    expected = []
    for s, j in zip(sequences, _scored(sequences), strict=True):
        logp = model(input_ids=s[None]).logits[0, j.cuda()].float().log_softmax(-1)
        expected.append(logp.gather(1, s[j.cuda() + 1, None])[:, 0])
    assert prepare_policy(model).flat
    torch.testing.assert_close(token_stats(model, batch).stats.logp, torch.cat(expected), atol=0.1, rtol=0.02)
