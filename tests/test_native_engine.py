"""The embedded engine against the model it samples from, Transformers' generate, and itself under another batch."""

import pytest
import torch
import transformers
from tiny import FAMILIES, tiny_model

from fastalign.data.collate import collate_flat, collate_padded
from fastalign.policy import policy_info, token_stats
from fastalign.rollout import native, native_cohort
from fastalign.rollout.engine import Request, Sampling, generate
from fastalign.rollout.native import NativeEngine
from fastalign.rollout.native_sampling import uniforms

SAMPLING = Sampling(16, stop_ids=(2, 7, 9))


def prompts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 331, (n,), generator=generator).tolist() for n in lengths]


def requests_of(prompts, num=2, sampling=SAMPLING):
    return [Request((i, j), p, sampling, seed=100 * i + j) for i, p in enumerate(prompts) for j in range(num)]


def run(engine, requests):
    return {completion.key: completion for completion in generate(engine, requests)}


def trained_logps(model, prompt, ids, temperature=1.0):
    """Log-probabilities of `ids` after `prompt` as training computes them."""
    rows = [prompt + ids], [[-100] * len(prompt) + ids]
    batch = collate_flat(*rows) if policy_info(model).flat else collate_padded(*rows, pad_token_id=0)
    return token_stats(model, batch, temperature=temperature).stats.logp


def worst_error(model, requests, completions, temperature=1.0):
    model.eval()
    errors = []
    for request in requests:
        completion = completions[request.key]
        expected = trained_logps(model, request.prompt_ids, completion.ids, temperature)
        errors.append((expected - torch.tensor(completion.logps)).abs().max().item())
    return max(errors)


def same(found, expected):
    return {k: c.ids for k, c in found.items()} == {k: c.ids for k, c in expected.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_log_probabilities_are_the_training_models(family):
    model = tiny_model(family).train()
    engine = NativeEngine(model, max_rows=7, tokens_per_step=3)
    requests = requests_of(prompts_of(3, 9, 1, 70))
    completions = run(engine, requests)
    assert worst_error(model, requests, completions) < 1e-5
    assert engine.exact and engine.pending == 0


def test_softcapped_attention_of_the_eager_implementation():
    model = tiny_model("gemma2")
    model.set_attn_implementation("eager")
    requests = requests_of(prompts_of(3, 9))
    assert worst_error(model, requests, run(NativeEngine(model), requests)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "gpt_oss", "mamba"])
def test_greedy_completions_are_those_of_generate(family):
    model = tiny_model(family)
    prompts = prompts_of(4, 11, 2)
    completions = run(NativeEngine(model), requests_of(prompts, 1, Sampling(14, temperature=0.0, stop_ids=(7,))))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "eos_token_id": 7, "pad_token_id": 0}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, **options)
        assert completions[i, 0].ids == expected[0, len(prompt) :].tolist()
        assert torch.allclose(
            torch.tensor(completions[i, 0].logps), trained_logps(model, prompt, completions[i, 0].ids), atol=1e-5
        )


def test_repetition_penalty_is_that_of_generate():
    model = tiny_model("qwen2")
    (prompt,) = prompts_of(6)
    sampling = Sampling(20, temperature=0.0, repetition_penalty=1.7)
    completions = run(NativeEngine(model), requests_of([prompt], 2, sampling))
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": 1.7}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, **options)
    assert completions[0, 0].ids == completions[0, 1].ids == expected[0, 6:].tolist()


def test_temperature_is_in_the_log_probabilities():
    model = tiny_model()
    requests = requests_of(prompts_of(3, 8), sampling=Sampling(12, temperature=0.6))
    assert worst_error(model, requests, run(NativeEngine(model), requests), temperature=0.6) < 1e-5


def test_settings_of_one_request_leave_the_others_alone():
    model = tiny_model()
    prompts = prompts_of(5, 5, 9, 9)
    settings = [
        Sampling(9),
        Sampling(12, temperature=0.0),
        Sampling(5, top_k=3, stop_ids=(4,)),
        Sampling(7, repetition_penalty=1.3, options={"top_p": 0.7}),
    ]
    requests = [Request(i, p, s, seed=i) for i, (p, s) in enumerate(zip(prompts, settings, strict=True))]
    together = run(NativeEngine(model), requests)
    for request in requests:
        assert same(run(NativeEngine(model), [request]), {request.key: together[request.key]})
    assert [len(together[i].ids) for i in range(4)] == [9, 12, 5, 7]


def test_a_request_with_a_seed_is_the_same_in_every_batch():
    model = tiny_model("qwen3")
    requests = requests_of(prompts_of(3, 9, 40), 3)
    whole = run(NativeEngine(model), requests)
    assert same(run(NativeEngine(model, max_rows=2), requests[::-1]), whole)
    assert len({tuple(whole[2, j].ids) for j in range(3)}) == 3
    engine = NativeEngine(model)
    again = Request("again", requests[4].prompt_ids, SAMPLING, seed=requests[4].seed)
    assert run(engine, [again])["again"].ids == whole[1, 1].ids


def test_requests_without_a_seed_differ_and_follow_the_engines():
    model = tiny_model()
    requests = [Request(i, [11, 12], Sampling(12)) for i in range(3)]
    first, second, other = (run(NativeEngine(model, seed=s), requests) for s in (3, 3, 4))
    assert same(first, second) and not same(first, other)
    assert len({tuple(c.ids) for c in first.values()}) == 3


def test_later_requests_start_while_others_go_on(monkeypatch):
    monkeypatch.setattr(native, "MOST_COHORTS", 3)
    model = tiny_model("mistral")
    requests = requests_of(prompts_of(3, 9, 1, 20, 5, 33), 2, Sampling(16, stop_ids=(7,)))
    expected = run(NativeEngine(model), requests)
    engine, found, most = NativeEngine(model, tokens_per_step=2), {}, 0
    for request in requests:
        engine.submit([request])
        found |= {c.key: c for c in engine.step()}
        most = max(most, len(engine._cohorts))
    assert most == 4  # three, and the one that has just come
    while engine.pending:
        found |= {c.key: c for c in engine.step()}
    assert same(found, expected)
    assert worst_error(model, requests, found) < 1e-5


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_little_memory_makes_rows_wait_but_changes_nothing(family, monkeypatch):
    monkeypatch.setattr(native, "EXPECTED_TOKENS", 4)
    monkeypatch.setattr(native_cohort, "FIRST_ROOM", 4)
    model = tiny_model(family)
    requests = requests_of(prompts_of(3, 9, 20), 2, Sampling(18, stop_ids=(7,)))
    expected = run(NativeEngine(model), requests)
    engine = NativeEngine(model, cache_bytes=0)
    engine._cache_bytes = 100 * engine._bytes_per_token
    put_back = []
    monkeypatch.setattr(
        NativeEngine, "_put_back", lambda self, *a, old=NativeEngine._put_back: put_back.append(a) or old(self, *a)
    )
    assert same(run(engine, requests), expected)
    assert put_back if family == "llama" else True
    assert engine._used() == 0


def test_completions_follow_the_weights():
    model = tiny_model()
    engine = NativeEngine(model)
    requests = requests_of(prompts_of(4, 7))
    before = run(engine, requests)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    report = engine.sync(5)
    after = run(engine, requests)
    assert report.way == "same model" and report.num_bytes == 0
    assert not same(before, after)
    assert worst_error(model, requests, after) < 1e-5
    assert {(c.version, c.newest_version) for c in after.values()} == {(5, 5)}


def test_weights_that_change_in_between_sample_from_the_next_token_on():
    old, model = tiny_model(), tiny_model()
    engine = NativeEngine(model, tokens_per_step=4)
    requests = requests_of(prompts_of(4, 7), 2, Sampling(12))
    engine.submit(requests)
    assert engine.step() == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    engine.sync(1)
    found = {}
    while engine.pending:
        found |= {c.key: c for c in engine.step()}
    for request in requests:
        completion, prompt = found[request.key], request.prompt_ids
        first = torch.tensor(completion.logps[:5])  # one with the prompt, and `tokens_per_step`
        assert torch.allclose(first, trained_logps(old, prompt, completion.ids)[:5], atol=1e-5)
        rest = torch.tensor(completion.logps[5:])
        assert torch.allclose(rest, trained_logps(model, prompt, completion.ids)[5:], atol=1e-5)
        assert (completion.version, completion.newest_version) == (0, 1)


def test_the_training_state_is_as_it_was():
    model = tiny_model("qwen2", attention_dropout=0.5).train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.model.layers[0].mlp.eval()
    requests = requests_of(prompts_of(4, 7))
    engine = NativeEngine(model)
    flags = [module.training for module in model.modules()]
    state, name = torch.get_rng_state(), model.config._attn_implementation
    completions = run(engine, requests)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == name and model.config.use_cache is False
    assert all(p.grad is None for p in model.parameters())
    assert worst_error(model, requests, completions) < 1e-5  # without dropout


def test_adapters_take_part():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config)
    requests = requests_of(prompts_of(4, 7), 2, Sampling(10, repetition_penalty=1.0))
    requests.append(Request("greedy", requests[0].prompt_ids, Sampling(10, temperature=0.0)))
    completions = run(NativeEngine(model), requests)
    assert worst_error(model, requests, completions) < 1e-5
    with model.disable_adapter():
        assert not same(run(NativeEngine(model), requests), completions)


def test_soft_prompts_take_part():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    requests = requests_of(prompts_of(4, 7), 2, Sampling(6))
    completions = run(NativeEngine(model), requests)
    assert worst_error(model, requests, completions) < 1e-5


def test_images_of_a_prompt_reach_the_model():
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(**small, vocab_size=340, max_position_embeddings=256),
        image_token_id=339,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    prompt = [11, 339, 339, 339, 339, 12]
    images = [{"pixel_values": torch.randn(1, 3, 16, 16)} for _ in range(2)]
    requests = [Request((i, j), prompt, SAMPLING, i + 7 * j, images[i]) for i in range(2) for j in range(3)]
    requests += [Request(("greedy", i), prompt, Sampling(8, temperature=0.0), None, images[i]) for i in range(2)]
    requests.append(Request("text", [11, 12, 13], Sampling(8, temperature=0.0)))
    completions = run(NativeEngine(model, max_rows=4), requests)
    for request in requests:
        inputs = {"input_ids": torch.tensor([prompt if request.key != "text" else request.prompt_ids])}
        inputs |= request.model_inputs
        if request.sampling.temperature == 0:
            options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            expected = model.generate(**inputs, max_new_tokens=8, **options)
            assert completions[request.key].ids == expected[0, inputs["input_ids"].shape[1] :].tolist()
        else:
            ids = completions[request.key].ids
            whole = inputs | {"input_ids": torch.tensor([prompt + ids])}
            logp = model(**whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logp = logp.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert torch.allclose(logp, torch.tensor(completions[request.key].logps), atol=1e-5)


def test_autocast_of_the_trainer():
    model = tiny_model("qwen2")
    requests = requests_of(prompts_of(4, 30))
    engine = NativeEngine(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    completions = run(engine, requests)
    assert not engine.exact
    plain = worst_error(model, requests, completions)
    with torch.autocast("cpu", torch.bfloat16):
        error = worst_error(model, requests, completions)
    assert error < 0.15 and plain > 1e-4


def test_pause_and_abort():
    model = tiny_model()
    engine = NativeEngine(model, tokens_per_step=1)
    requests = requests_of(prompts_of(4, 7), 2, Sampling(10))
    expected = run(NativeEngine(model), requests)
    engine.submit(requests)
    engine.step()
    assert engine.pending == 4
    engine.sleep()  # its keys are given back
    assert engine._used() == 0 and engine.pending == 4
    found = {}
    while engine.pending:
        found |= {c.key: c for c in engine.step()}
    assert same(found, expected)
    engine.submit(requests)
    engine.step()
    engine.abort()
    assert engine.pending == 0 and engine.step() == []
    assert same(run(engine, requests), expected)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], SAMPLING, "has no tokens"),
        ([11] * 250, SAMPLING, "has 256 positions"),
        ([11], Sampling(4, regex="a+"), "`regex` is 'a\\+'"),
        ([11], Sampling(4, options={"num_beams": 3}), "has num_beams, which the engine 'native' does not know"),
        ([11], Sampling(4, temperature=-1.0), "`temperature` of the sampling is -1"),
        ([11], Sampling(4, top_p=0.0), "`top_p` of the sampling is 0"),
        ([11], Sampling(0), "`max_new_tokens` of the sampling is 0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(prompt, sampling, message):
    engine = NativeEngine(tiny_model("gpt2"))
    with pytest.raises(ValueError, match=message):
        engine.submit([Request("ok", [11, 12], SAMPLING), Request("bad", prompt, sampling)])
    assert engine.pending == 0


def test_a_key_is_pending_once():
    engine = NativeEngine(tiny_model())
    engine.submit([Request(1, [11], SAMPLING)])
    with pytest.raises(ValueError, match="key 1 is pending already"):
        engine.submit([Request(1, [12], SAMPLING)])


def test_random_numbers_are_those_of_splitmix():
    mask = (1 << 64) - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed in (0, 7, 2**64 - 5):
        state = mix((mix((seed * 0x94D049BB133111EB + golden) & mask) + golden) & mask)
        expected = [(mix((state + (4 + i) * golden) & mask) >> 11) * 2.0**-53 for i in range(5)]
        assert uniforms([seed], [3], 5)[0].tolist() == expected
    numbers = uniforms(list(range(1000)), [0] * 1000, 20)
    counts = torch.histc(numbers.float(), bins=20, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, 0.1 %
    assert (torch.corrcoef(numbers.T) - torch.eye(20)).abs().max() < 0.15
