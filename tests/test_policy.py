"""Every model family on flat and padded batches against plain Transformers, one sequence at a time."""

import copy
import json
import pickle

import pytest
import torch
from policy_batches import (
    EAGER,
    FLAT,
    LENGTHS,
    assert_same_gradients,
    batch_of,
    build_model,
    gradients_of,
    plain_logps,
    scored_positions,
    sequences_of,
    weighted_nll,
)
from tiny import tiny_model

from fastalign.policy import logits_forward, prepare_policy, token_loss, token_stats


@pytest.mark.parametrize("family", [*FLAT, "mamba"])
def test_flat_and_padded_equal_one_sequence_at_a_time(family):
    model, sequences = build_model(family), sequences_of()
    batch, padded = batch_of(sequences), batch_of(sequences, padded=True)
    expected_logp, loss = plain_logps(model, sequences, batch)
    expected = gradients_of(model, loss)
    info = prepare_policy(model)
    assert info.flat == (family != "mamba"), info.reason
    for current in [batch, padded] if info.flat else [padded]:
        output = token_loss(model, current, weighted_nll(current))
        torch.testing.assert_close(output.stats.logp, expected_logp.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=1e-5)
        assert_same_gradients(gradients_of(model, output.loss), expected)
        torch.testing.assert_close(token_stats(model, current).stats.logp, output.stats.logp, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss"])
def test_gradient_checkpointing_runs_layers_again_with_their_bounds(family, reentrant):
    model, sequences = build_model(family).train(), sequences_of()
    batch = batch_of(sequences)
    prepare_policy(model)
    assert model.training
    expected = gradients_of(model, token_loss(model, batch, weighted_nll(batch)).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.zero_grad()
    token_loss(model, batch, weighted_nll(batch)).loss.backward()
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, expected, tolerance=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "cohere", "granite", "gpt_oss", "mamba"])
def test_ordinary_calls_and_saved_files_are_as_before(family, tmp_path):
    model = build_model(family)
    ids = torch.randint(3, 331, (2, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    generated = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    keys, before = list(model.state_dict()), model.generate(ids, attention_mask=mask, **generated)
    logits = model(input_ids=ids, attention_mask=mask).logits
    model.save_pretrained(tmp_path / "before")
    prepare_policy(model)
    batch = batch_of(sequences_of(), padded=family == "mamba")
    token_loss(model, batch, weighted_nll(batch)).loss.backward()
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
    model, sequences = build_model("llama"), sequences_of()
    prepare_policy(model)
    flat = logits_forward(model, batch_of(sequences)).logits[0].split(list(LENGTHS))
    padded = logits_forward(model, batch_of(sequences, padded=True)).logits
    for i, sequence in enumerate(sequences):
        alone = model(input_ids=sequence[None]).logits[0]
        torch.testing.assert_close(flat[i], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(padded[i, : len(sequence)], alone, atol=1e-5, rtol=1e-5)


def test_statistics_with_gradient_and_temperature():
    model, sequences = build_model("gemma2"), sequences_of()
    batch = batch_of(sequences)
    prepare_policy(model)
    temperature = torch.linspace(0.5, 2.0, batch.num_scored)
    asked = ("entropy", "top1", "logp")
    stats = token_stats(model, batch, outputs=asked, grad=True, temperature=temperature).stats
    logits = torch.cat(
        [model(input_ids=s[None]).logits[0, j] for s, j in zip(sequences, scored_positions(sequences), strict=True)]
    )
    logp = (logits / temperature[:, None]).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(1, batch.targets[:, None])[:, 0]
    torch.testing.assert_close(stats.logp, chosen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy, entropy, atol=1e-5, rtol=1e-5)
    assert torch.equal(stats.top1, logits.argmax(-1) == batch.targets)
    found = gradients_of(model, (stats.logp * batch.weight).mean() + stats.entropy.square().mean())
    assert_same_gradients(found, gradients_of(model, (chosen * batch.weight).mean() + entropy.square().mean()))
    assert not token_stats(model, batch, outputs=("entropy",)).stats.entropy.requires_grad


@pytest.mark.parametrize("padded", [False, True])
def test_load_balancing_loss_is_the_models_own(padded):
    model = tiny_model("qwen3_moe", output_router_logits=True)
    sequences = sequences_of((9,)) if padded else sequences_of()
    batch = batch_of(sequences, padded=padded)
    prepare_policy(model)
    if padded:
        expected = model(input_ids=sequences[0][None]).aux_loss
    else:  # over all tokens of the flat row: the same as from the routers of each sequence
        from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

        routers = zip(*(model(input_ids=s[None]).router_logits for s in sequences), strict=True)
        expected = load_balancing_loss_func(tuple(torch.cat(r) for r in routers), 4, 2)
    output = token_loss(model, batch, weighted_nll(batch))
    torch.testing.assert_close(output.aux_loss, expected, atol=1e-5, rtol=1e-5)
    assert output.aux_loss.requires_grad
    assert token_stats(tiny_model("llama"), batch).aux_loss is None


def test_two_models_nested_calls_and_exceptions():
    policy, reference = build_model("cohere"), build_model("llama", seed=1)
    batch, inner = batch_of(sequences_of()), batch_of(sequences_of((4, 6), seed=9))
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
    model, batch = build_model("gemma3"), batch_of(sequences_of())
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
    model, sequences = tiny_model("qwen2"), sequences_of()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    batch = batch_of(sequences)
    _, loss = plain_logps(model, sequences, batch)
    expected = gradients_of(model, loss)
    output = token_loss(model, batch, weighted_nll(batch))
    assert_same_gradients(gradients_of(model, output.loss), expected)


def test_autocast_multiplies_in_bf16_and_keeps_statistics_in_fp32():
    model, sequences = build_model("llama"), sequences_of()
    batch = batch_of(sequences)
    prepare_policy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = token_loss(model, batch, weighted_nll(batch))
        expected, _ = plain_logps(model, sequences, batch)
    assert output.stats.logp.dtype == torch.float32
    torch.testing.assert_close(output.stats.logp, expected, atol=0.1, rtol=0.02)
    output.loss.backward()
    assert model.get_output_embeddings().weight.grad.dtype == torch.float32
    exact = token_stats(model, batch).stats.logp
    assert (output.stats.logp - exact).abs().max() > 1e-4  # it did use bf16


def test_compiled_model():
    model, batch = build_model("llama", num_hidden_layers=1), batch_of(sequences_of())
    prepare_policy(model)
    expected = token_loss(model, batch, weighted_nll(batch))
    gradients = gradients_of(model, expected.loss)
    compiled = torch.compile(model, backend="eager")
    output = token_loss(compiled, batch, weighted_nll(batch))
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=1e-6)
    assert_same_gradients(gradients_of(model, output.loss), gradients, tolerance=1e-6)
    other = batch_of(sequences_of((3, 4, 8, 30), seed=8))
    torch.testing.assert_close(
        token_stats(compiled, other).stats.logp, token_stats(model, other).stats.logp, atol=1e-6, rtol=1e-6
    )


def test_nothing_scored():
    model, batch = tiny_model("llama"), batch_of(sequences_of((1, 1)))
    output = token_loss(model, batch, lambda stats, span: stats.logp.sum())
    assert output.loss.item() == 0.0
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())  # DDP waits for each


def test_model_prepared_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model, batch = build_model("llama"), batch_of(sequences_of())
    prepare_policy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = token_loss(model, batch, weighted_nll(batch)).loss
    gradients = gradients_of(model, expected)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # earlier tests chose another precision
    wrapped = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    output = token_loss(wrapped, batch, weighted_nll(batch))
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, atol=1e-6, rtol=1e-6)
    assert_same_gradients(gradients_of(model, output.loss), gradients, tolerance=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FLAT)
def test_flat_equals_one_sequence_at_a_time_on_a_gpu(family):
    model, sequences = (
        build_model(family, head_dim=16, dtype=torch.bfloat16).cuda(),
        [s.cuda() for s in sequences_of()],
    )
    batch = batch_of([s.cpu() for s in sequences]).to("cuda")
    expected = []
    for s, j in zip(sequences, scored_positions(sequences), strict=True):
        logp = model(input_ids=s[None]).logits[0, j.cuda()].float().log_softmax(-1)
        expected.append(logp.gather(1, s[j.cuda() + 1, None])[:, 0])
    assert prepare_policy(model).flat
    torch.testing.assert_close(token_stats(model, batch).stats.logp, torch.cat(expected), atol=0.1, rtol=0.02)
