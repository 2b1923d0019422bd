"""What `prepare_policy` finds out about a model: its logits, whether packed sequences stay apart, why padding."""

import logging

import pytest
import torch
import transformers
from policy_batches import (
    assert_same_gradients,
    batch_of,
    build_model,
    gradients_of,
    plain_logps,
    sequences_of,
    weighted_nll,
)
from tiny import SIZES, tiny_model

from fastalign import flat_attention
from fastalign.logit_form import head_output_kept
from fastalign.policy import prepare_policy, token_loss, token_stats


def test_half_precision_model_prepares_and_scores():
    model, sequences = build_model("llama", dtype=torch.bfloat16), sequences_of()
    batch = batch_of(sequences)
    assert prepare_policy(model).flat
    expected, _ = plain_logps(model, sequences, batch)
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
    model = build_model(family, dtype=dtype)
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
        token_stats(model, batch_of(sequences_of()))


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
        token_stats(model, batch_of(sequences_of()), outputs=("nonsense",))


def test_preparing_changes_no_state():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    prepare_policy(model)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def _lfm2():
    config = transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    return transformers.Lfm2ForCausalLM(config)


def _bloom():
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=331, hidden_size=32, n_layer=2, n_head=4))


@pytest.mark.parametrize(("build", "reason"), [(_lfm2, "layers of the kind conv"), (_bloom, "attention functions")])
def test_state_and_alibi_run_padded(build, reason):
    model, sequences = build().eval(), sequences_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    padded = batch_of(sequences, padded=True)
    expected_logp, loss = plain_logps(model, sequences, padded)
    expected = gradients_of(model, loss)
    info = prepare_policy(model)
    assert not info.flat and reason in info.reason
    output = token_loss(model, padded, weighted_nll(padded))
    torch.testing.assert_close(output.stats.logp, expected_logp.detach(), atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients_of(model, output.loss), expected)


def test_ordinary_calls_of_flash_models_see_their_own_name():
    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, attention_mask))
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )

    transformers.AttentionInterface.register("my_flash", flash)
    transformers.AttentionMaskInterface.register("my_flash", transformers.masking_utils.sdpa_mask)
    model, batch = build_model("llama"), batch_of(sequences_of())
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


def test_attention_set_after_the_preparation_does_not_leak():
    model, sequences = build_model("gpt_oss"), sequences_of()
    batch = batch_of(sequences)
    expected, _ = plain_logps(model, sequences, batch)
    assert prepare_policy(model).flat
    model.set_attn_implementation("eager")
    torch.testing.assert_close(token_stats(model, batch).stats.logp, expected.detach(), atol=1e-5, rtol=1e-5)
