"""Every model family on batches whose answers share a prompt, against the same answers with a prompt each."""

import copy
import itertools
import logging

import pytest
import torch
from fastalign_kernels.attention import Segments
from policy_batches import EAGER, FLAT, assert_same_gradients, gradients_of, weighted_nll
from tiny import tiny_model

from fastalign import flat_attention, policy
from fastalign.data.batch import TokenBatch
from fastalign.policy import policy_info, prepare_policy, token_loss, token_stats

# tokens of each prompt and of its answers; windows are 7 and 9
FAMILIES = [(13, [9, 4, 1]), (1, [6, 5]), (40, [30, 3]), (5, [12])]


def _ids(families, seed=3):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 331, (n,), generator=generator)  # noqa: E731
    return [(draw(prompt), [draw(n) for n in answers]) for prompt, answers in families]


def _batch(segments, positions, prefix, answers):
    """answers: per answer the places of its hidden states and its tokens, in the order of rows."""
    lengths = [len(s) for s in segments]
    source, targets = (torch.cat(x) for x in zip(*answers, strict=True))
    row = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor([len(t) for _, t in answers]))
    return TokenBatch(
        input_ids=torch.cat(segments),
        position_ids=torch.cat(positions),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        source=source,
        targets=targets,
        row=row,
        weight=torch.linspace(0.5, 1.5, len(targets)),
        max_seqlen=max(lengths),
        num_tokens=sum(lengths),
        prefix=None if prefix is None else torch.tensor(prefix, dtype=torch.int32),
    )


def _shared(families, plain=()):
    """Segments prompt, answer, answer, ...; behind them `plain` ones, scored like answers to their first token."""
    segments, positions, prefix, answers, total = [], [], [], [], 0
    for prompt, completions in families:
        root, last = len(segments), total + len(prompt) - 1
        for i, segment in enumerate([prompt, *completions]):
            segments.append(segment)
            prefix.append(root if i else -1)
            positions.append(torch.arange(len(segment)) + (len(prompt) if i else 0))
            if i:
                answers.append((torch.tensor([last, *range(total, total + len(segment) - 1)]), segment))
            total += len(segment)
    for sequence in plain:
        segments.append(sequence)
        prefix.append(-1)
        positions.append(torch.arange(len(sequence)))
        answers.append((torch.arange(total, total + len(sequence) - 1), sequence[1:]))
        total += len(sequence)
    return _batch(segments, positions, prefix, answers)


def _ordinary(families, plain=()):
    """Segments prompt + answer, one for each answer."""
    pairs = [(prompt, answer) for prompt, completions in families for answer in completions]
    pairs += [(sequence[:1], sequence[1:]) for sequence in plain]
    segments = [torch.cat(pair) for pair in pairs]
    starts = itertools.accumulate([0, *(len(s) for s in segments)])
    answers = [
        (torch.arange(start + len(p) - 1, start + len(p) + len(a) - 1), a)
        for start, (p, a) in zip(starts, pairs, strict=False)
    ]
    return _batch(segments, [torch.arange(len(s)) for s in segments], None, answers)


def _loss_and_gradients(model, batch):
    output = token_loss(model, batch, weighted_nll(batch))
    return output, gradients_of(model, output.loss)


@pytest.mark.parametrize("family", FLAT)
def test_shared_prompts_change_nothing(family):
    model, families = tiny_model(family, **EAGER.get(family, {})), _ids(FAMILIES)
    plain = [s for _, answers in _ids([(2, [17, 8])], seed=5) for s in answers]
    shared, ordinary = _shared(families, plain), _ordinary(families, plain)
    assert prepare_policy(model).shares_prefix, policy_info(model).reason
    expected, expected_gradients = _loss_and_gradients(model, ordinary)
    found, gradients = _loss_and_gradients(model, shared)
    torch.testing.assert_close(found.stats.logp, expected.stats.logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients, expected_gradients)
    torch.testing.assert_close(token_stats(model, shared).stats.logp, found.stats.logp, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss"])
def test_gradient_checkpointing(family, reentrant):
    model, families = tiny_model(family).train(), _ids(FAMILIES)
    _, expected = _loss_and_gradients(model, _ordinary(families))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    shared = _shared(families)
    token_loss(model, shared, weighted_nll(shared)).loss.backward()
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, expected)


def test_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, families = peft.get_peft_model(tiny_model("qwen2"), config), _ids(FAMILIES)
    assert prepare_policy(model).shares_prefix
    (expected, wanted), (found, gradients) = (
        _loss_and_gradients(model, make(families)) for make in (_ordinary, _shared)
    )
    torch.testing.assert_close(found.stats.logp, expected.stats.logp, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients, wanted)


def test_bf16_is_as_exact_as_with_a_prompt_each():
    exact, families = tiny_model("llama"), _ids(FAMILIES)
    half = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict({n: p.float() for n, p in half.state_dict().items()})  # the same rounded weights
    want, wanted = _loss_and_gradients(exact, _ordinary(families))
    errors = []
    for batch in (_ordinary(families), _shared(families)):
        found, gradients = _loss_and_gradients(half, batch)
        logp = (found.stats.logp - want.stats.logp).norm() / want.stats.logp.norm()
        gradient = torch.stack([(gradients[n] - g).norm() for n, g in wanted.items()]).norm()
        errors.append((logp.item(), gradient.item()))
    (logp, gradient), (shared_logp, shared_gradient) = errors
    assert shared_logp <= 1.3 * logp and shared_gradient <= 1.3 * gradient


def test_the_batch_moves_with_its_prefixes():
    batch = _shared(_ids(FAMILIES))
    batch.extras["margin"] = torch.arange(3.0)
    assert batch.max_shared == 33  # 30 + 3 tokens behind the prompt of 40
    moved = batch.to("meta")
    assert moved.prefix.is_meta and moved.extras["margin"].is_meta and moved.prefix.shape == batch.prefix.shape
    assert moved.max_shared == 33


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("fault", ["nothing is shared", "siblings see each other", "positions start over"])
def test_models_that_do_not_share_are_found_out(family, fault, caplog, monkeypatch):
    model, original = tiny_model(family), flat_attention.packed_attention
    with torch.no_grad():  # scores near 0, as those of so small a model, hardly feel positions
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(10)

    def attend(q, k, v, *args, segments, **kwargs):
        if segments.prefix is not None and fault == "nothing is shared":
            segments = Segments(segments.cu_seqlens, segments.max_seqlen)
        elif segments.prefix is not None and fault == "siblings see each other":
            segments = Segments(segments.cu_seqlens[[0, 1, 3]], 11, segments.prefix[:2])
        return original(q, k, v, *args, segments=segments, **kwargs)

    def from_zero(model, base, batch, original=policy._model_inputs):
        inputs = original(model, base, batch)
        if batch.prefix is not None:
            inputs["position_ids"] = inputs["position_ids"] - 7 * (torch.arange(len(batch.input_ids)) >= 7)
        return inputs

    monkeypatch.setattr(flat_attention, "packed_attention", attend)
    if fault == "positions start over":
        monkeypatch.setattr(policy, "_model_inputs", from_zero)
    with caplog.at_level(logging.WARNING):
        info = prepare_policy(model)
    assert info.flat and not info.shares_prefix and "no shared prefixes" in info.reason
    assert caplog.text.count("computes a prompt again") == 1
    families = _ids(FAMILIES)
    with pytest.raises(ValueError, match="share=False"):
        token_stats(model, _shared(families))
    token_stats(model, _ordinary(families))


def test_padded_models_share_nothing():
    assert not prepare_policy(tiny_model("mamba")).shares_prefix
    assert not prepare_policy(tiny_model("llama"), allow_flat=False).shares_prefix


def test_bidirectional_attention_is_not_shared():
    model = tiny_model("llama")
    prepare_policy(model)
    mask = flat_attention.FlatMask(Segments(torch.tensor([0, 2, 4]), 2, torch.tensor([-1, 0])), False, None)
    q = torch.randn(1, 4, 4, 8)
    with pytest.raises(ValueError, match="causal=True"):
        flat_attention._attention(model.model.layers[0].self_attn, q, q, q, mask, original="sdpa")
