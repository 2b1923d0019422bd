"""Adapters on and around the output embedding: what the head scores equals the adapted model's own logits."""

import pytest
import torch
from policy_batches import (
    assert_same_gradients,
    batch_of,
    gradients_of,
    plain_logps,
    sequences_of,
    weighted_nll,
)
from tiny import tiny_model

from fastalign.policy import logits_forward, prepare_policy, token_loss, token_stats

peft = pytest.importorskip("peft")


def _adapted(family="llama", **settings):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def _assert_equals_plain(model):
    sequences = sequences_of()
    batch = batch_of(sequences)
    expected_logp, loss = plain_logps(model, sequences, batch)
    expected = gradients_of(model, loss)
    assert prepare_policy(model).flat
    for current in (batch, batch_of(sequences, padded=True)):
        output = token_loss(model, current, weighted_nll(current))
        torch.testing.assert_close(output.stats.logp, expected_logp.detach(), atol=1e-5, rtol=1e-5)
        assert_same_gradients(gradients_of(model, output.loss), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_bias": True},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 7], "embed_tokens": [3, 7]}},
    ],
)
def test_adapters_equal_the_adapted_model(settings):
    _assert_equals_plain(_adapted(**settings))


def test_tied_head_with_trainable_tokens():
    _assert_equals_plain(_adapted("qwen2", target_modules=["q_proj"], trainable_token_indices=[3, 7, 100]))


def test_logit_scale_and_adapter_together():
    _assert_equals_plain(_adapted("granite"))


def test_two_active_adapters_on_the_head():
    model = _adapted(target_modules=["lm_head"])
    second = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"], init_lora_weights=False)
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    _assert_equals_plain(model.eval())


def test_disabled_and_merged_adapters():
    model, sequences = _adapted(), sequences_of()
    batch = batch_of(sequences)
    prepare_policy(model)
    adapted = token_stats(model, batch).stats.logp
    with model.disable_adapter():
        expected, _ = plain_logps(model, sequences, batch)
        bare = token_stats(model, batch).stats.logp
    torch.testing.assert_close(bare, expected, atol=1e-5, rtol=1e-5)
    assert (bare - adapted).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(token_stats(model, batch).stats.logp, adapted, atol=1e-5, rtol=1e-5)


def test_head_dropout_acts_on_the_adapter_alone():
    model, sequences = _adapted(lora_dropout=0.5, target_modules=["lm_head"]).train(), sequences_of()
    batch = batch_of(sequences)
    prepare_policy(model)
    head = model.get_base_model().lm_head
    hidden = logits_forward(model, batch, output_hidden_states=True).hidden_states[-1][0, batch.source]
    torch.manual_seed(4)
    found = token_loss(model, batch, weighted_nll(batch))
    torch.manual_seed(4)
    logp = head(hidden).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    torch.testing.assert_close(found.stats.logp, logp.detach(), atol=1e-5, rtol=1e-5)
    expected = gradients_of(model, -(logp * batch.weight).sum() / batch.weight.sum())
    assert_same_gradients(gradients_of(model, found.loss), expected)


def test_adapter_added_after_preparing():
    base = tiny_model("llama")
    prepare_policy(base)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    _assert_equals_plain(model.eval())


def test_prompt_tuning_is_padded_and_equal():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model, sequences = peft.get_peft_model(tiny_model("llama"), config).eval(), sequences_of()
    padded = batch_of(sequences, padded=True)
    logps = []
    for i, s in enumerate(sequences):
        logits = model(input_ids=s[None]).logits[0, 5:]
        j = padded.source[padded.row == i] - i * padded.input_ids.shape[1]
        logps.append(logits[j].log_softmax(-1).gather(1, s[j + 1, None])[:, 0])
    expected = torch.cat(logps)
    info = prepare_policy(model)
    assert not info.flat and "soft prompts" in info.reason
    output = token_loss(model, padded, weighted_nll(padded))
    torch.testing.assert_close(output.stats.logp, expected.detach(), atol=1e-5, rtol=1e-5)
    loss = -(expected * padded.weight).sum() / padded.weight.sum()
    assert_same_gradients(gradients_of(model, output.loss), gradients_of(model, loss))


def test_dora_on_the_head_is_refused():
    with pytest.raises(ValueError, match=r"variant of LoRA.*modules_to_save"):
        prepare_policy(_adapted(use_dora=True))
    with pytest.raises(ValueError, match="cannot be scored"):
        config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=["lm_head"])
        prepare_policy(peft.get_peft_model(tiny_model("llama"), config))
