"""The real vLLM in this process: what it samples is what the training model would, before and after it has learned."""

import os
import random
import types

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from fastalign.rollout.engine import Request, Sampling, generate
from fastalign.rollout.vllm_engine import VLLMEngine
from fastalign.rollout.vllm_loading import cache_bytes, rows_at_once

pytestmark = pytest.mark.vllm

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # vLLM has no smaller
CONFIG = types.SimpleNamespace(vllm_max_model_length=128, vllm_gpu_memory_utilization=0.1)
SAMPLING = Sampling(12, stop_ids=(2,))
# |log-probability as sampled - the model's own|, in nats. fp32: logits of size 10 have a last bit of 1e-6.
# bf16: hidden states are rounded to 2^-9 in another order, a few hundredths of a logit.
FP32, BF16 = 2e-5, 0.15


def prompts(num=3, generations=4, length=40):
    """Requests in groups of one prompt, longer than a block of the cache."""
    rows = [[5 + p] * length + [7, 9, 11 + p] for p in range(num)]
    return [Request((p, g), rows[p], SAMPLING, seed=100 * p + g) for p in range(num) for g in range(generations)]


def model_logps(model, rows, temperature=1.0):
    """Log-probabilities of the ids behind each prompt, [(prompt, ids)], by the training model's own forward pass."""
    length = max(len(prompt) + len(ids) for prompt, ids in rows)
    batch = torch.tensor([prompt + ids + [0] * (length - len(prompt) - len(ids)) for prompt, ids in rows])
    with torch.no_grad():
        logps = (model(batch).logits[:, :-1].float() / temperature).log_softmax(-1)
    logps = logps.gather(-1, batch[:, 1:, None])[..., 0]
    return [row[len(prompt) - 1 :][: len(ids)] for row, (prompt, ids) in zip(logps, rows, strict=True)]


def worst(engine, model, requests=None):
    """Largest difference between log-probabilities as sampled and the model's, over all tokens."""
    requests = requests or prompts()
    done = {c.key: c for c in generate(engine, requests)}
    assert done.keys() == {r.key for r in requests}
    rows = [(r.prompt_ids, done[r.key].ids) for r in requests]
    known = model_logps(model, rows, requests[0].sampling.temperature)
    return max(
        (logps - torch.tensor(done[r.key].logps)).abs().max().item() for logps, r in zip(known, requests, strict=True)
    )


def learn(model, lr=1e-2):
    """One optimizer step in place."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    ids = torch.randint(3, 300, (2, 24))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.zero_grad()


def put(model, values):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


@pytest.fixture(scope="module")
def outside():
    """What a process looks like before the first engine is built in it."""
    return look()


def look():
    return {
        "environment": {k: v for k, v in os.environ.items() if not k.startswith("_TORCH")},  # what compiling sets
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "torch": (torch.set_num_threads, torch.accelerator.synchronize, torch.cuda.current_stream, torch.cuda.stream),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "distributed": torch.distributed.is_initialized(),
        "precision": torch.get_float32_matmul_precision(),
    }


@pytest.fixture(scope="module")
def engine(outside):
    model = tiny_model("qwen2", **(SIZES | {"head_dim": None}))
    engine = VLLMEngine(model, tiny_tokenizer(), CONFIG, sampling=Sampling(8, regex="x"))
    engine.model, engine.left = model, look()
    yield engine
    engine.close()


def test_surroundings_are_as_before(engine, outside):
    """Building an engine and sampling leave environment, random generators, torch's functions and groups alone."""
    assert engine.left == outside
    torch.manual_seed(3)
    before = look()
    unseeded = [Request(i, [5, 6, 7], SAMPLING) for i in range(3)]
    assert len(list(generate(engine, unseeded))) == 3
    assert look() == before
    torch.set_num_threads(before["threads"])  # works, vLLM's own only warns
    assert engine.start_seconds < 120


def test_generations_follow_every_step(engine):
    """After each optimizer step samples are those of the new weights, with nothing copied."""
    model = engine.model
    assert engine.way == "shared" and not engine.reason and engine.exact
    assert worst(engine, model) < FP32
    first = {c.key: c.ids for c in generate(engine, prompts())}
    for version in range(1, 4):
        learn(model)
        assert worst(engine, model) > 100 * FP32  # cached prompts still are those of older weights
        report = engine.sync(version)
        assert (report.way, report.num_bytes, engine.version) == ("shared", 0, version)
        assert worst(engine, model) < FP32
    assert {c.key: c.ids for c in generate(engine, prompts())} != first


def test_seeds_and_order(engine):
    """The same seed gives the same tokens, alone or in company; another seed gives others."""
    requests = prompts(2, 3)
    together = {c.key: c.ids for c in generate(engine, requests)}
    alone = {c.key: c.ids for r in reversed(requests) for c in generate(engine, [r])}
    assert together == alone
    assert len({tuple(ids) for ids in together.values()}) == len(requests)


def test_stop_ids_length_and_temperature(engine):
    stop = next(generate(engine, prompts(1, 1))).ids[3]
    sampling = Sampling(12, temperature=0.7, stop_ids=(2, stop))
    requests = [Request(i, r.prompt_ids, sampling, seed=i) for i, r in enumerate(prompts(2, 16))]
    assert worst(engine, engine.model, requests) < FP32
    for completion in generate(engine, requests):
        ends = [token in (2, stop) for token in completion.ids]
        if completion.finish_reason == "stop":
            assert ends[-1] and not any(ends[:-1])
        else:
            assert len(completion.ids) == 12 and not any(ends)
    greedy = next(generate(engine, [Request(0, [5, 6, 7], Sampling(4, temperature=0.0))]))
    with torch.no_grad():
        ids = [5, 6, 7]
        for _ in range(4):
            ids.append(engine.model(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert greedy.ids == ids[3:]


def test_completions_match_the_regular_expression(engine):
    sampling = Sampling(12, regex="(ab|c)+d", stop_ids=(2,))
    texts = [
        tiny_tokenizer().decode(c.ids) for c in generate(engine, [Request(i, [5, 6], sampling, i) for i in range(4)])
    ]
    assert all(text.removesuffix("</s>").strip("abcd") == "" for text in texts) and any("d" in text for text in texts)


def test_weights_change_while_requests_are_under_way(engine):
    """Tokens before the update are those of the old weights, tokens after it those of the new, prompt included."""
    model, sampling = engine.model, Sampling(30)
    requests = [Request(g, [5] * 40, sampling, seed=g) for g in range(3)]
    engine.submit(requests)
    for _ in range(8):
        assert engine.step() == []
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(model)
    engine.sync(7)
    engine.submit([Request("late", [5] * 40, sampling, seed=1)])
    done = {}
    while engine.pending:
        done |= {c.key: c for c in engine.step()}
    rows = [([5] * 40, c.ids) for c in done.values()]
    new_logps = dict(zip(done, model_logps(model, rows), strict=True))
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    put(model, old)
    old_logps = dict(zip(done, model_logps(model, rows), strict=True))
    for key, completion in done.items():
        sampled = torch.tensor(completion.logps)
        from_new = (sampled - new_logps[key]).abs() < FP32
        from_old = (sampled - old_logps[key]).abs() < FP32
        before = 0 if key == "late" else int(from_old.int().cumprod(0).sum())
        assert from_new[before:].all() and (before >= 6 or key == "late")
        assert (completion.version, completion.newest_version) == ((7, 7) if key == "late" else (3, 7))
    put(model, now)
    engine.sync(3)


def test_a_pause_keeps_requests_and_abort_drops_them(engine):
    engine.submit(prompts(1, 3))
    engine.step()
    assert engine.pending == 3
    engine.sleep()  # on CPU there is nothing to give back
    while engine.pending:
        engine.step()
    engine.submit(prompts(1, 3))
    engine.step()
    engine.abort()
    assert engine.pending == 0 and engine.step() == []
    assert worst(engine, engine.model) < FP32


def test_refused_requests_name_themselves(engine):
    with pytest.raises(ValueError, match="request 'a' is empty"):
        engine.submit([Request("a", [], SAMPLING)])
    with pytest.raises(ValueError, match=r"request 'b' has 128 tokens.*`vllm_max_model_length`.* is 128"):
        engine.submit([Request("b", [5] * 128, SAMPLING)])
    with pytest.raises(ValueError, match=r"\['pixel_values'\]"):
        engine.submit([Request("c", [5], SAMPLING, model_inputs={"pixel_values": 1})])
    with pytest.raises(ValueError, match=r"`generation_kwargs` has \['n'\]"):
        engine.submit([Request("d", [5], Sampling(4, options={"n": 2}))])
    assert engine.pending == 0
    short = next(generate(engine, [Request("e", [5] * 120, Sampling(40))]))
    assert len(short.ids) == 8 and short.finish_reason == "length"  # the model's room ends


def test_parameters_that_were_moved_are_moved_back(engine, caplog):
    model = engine.model
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    report = engine.sync(8)
    assert report.way == "in place" and report.num_bytes > 0 and "moved back" in caplog.text
    assert worst(engine, model) < FP32
    learn(model)
    assert engine.sync(9).way == "shared" and worst(engine, model) < FP32


def other_engine(model, **settings):
    config = types.SimpleNamespace(**(vars(CONFIG) | settings))
    return VLLMEngine(model, None, config, sampling=SAMPLING)


@pytest.mark.parametrize(
    ("family", "way"),
    [
        ("llama", "shared"),
        ("gpt2", "reloaded"),
        *(
            pytest.param(family, "shared", marks=pytest.mark.slow)
            for family in ("qwen3", "mistral", "gemma2", "gemma3", "olmo", "phi3", "granite", "cohere", "gpt_neox")
        ),
    ],
)
def test_families(engine, family, way):
    plain = {} if family in ("llama", "qwen3", "mistral", "gemma2", "gemma3") else {"head_dim": None}
    sizes = SIZES | plain | ({"num_key_value_heads": None} if family in ("gpt2", "gpt_neox") else {})
    model = tiny_model(family, **sizes)
    model.set_attn_implementation("eager")  # SDPA leaves Gemma 2's cap of the logits out
    other = other_engine(model)
    try:
        assert other.way == way and bool(other.reason) == (way != "shared")
        learn(model)
        report = other.sync(1)
        assert report.way == way and worst(other, model) < FP32
    finally:
        other.close()
    learn(model)  # trains on without an engine
    assert worst(engine, engine.model) < FP32  # and the first one goes on as well


def test_adapter_beside_shared_weights(engine):
    """LoRA is brought as files and run beside the base weights, which stay shared and unmerged."""
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"v_proj": 2}
    )
    model = peft.get_peft_model(tiny_model("llama", **SIZES), config)
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    other = other_engine(model)
    try:
        assert other.way == "shared"
        for version in range(1, 3):
            learn(model, lr=0.1)
            assert worst(other, model) > 100 * FP32
            report = other.sync(version)
            assert report.way == "adapter" and 0 < report.num_bytes < 20_000
            assert worst(other, model) < FP32
    finally:
        other.close()
    assert torch.equal(base, model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight)


def test_bf16_and_copies_from_fp32(engine):
    """bf16 is shared too; when training goes on in fp32 the engine gets rounded copies, and says why."""
    model = tiny_model("llama", dtype=torch.bfloat16, **SIZES)
    other = other_engine(model)
    try:
        assert other.way == "shared" and not other.exact and worst(other, model) < BF16
        model.float()
        learn(model)
        report = other.sync(1)
        assert report.way == "in place" and report.num_bytes == 2 * sum(p.numel() for p in model.parameters())
        assert "trains in float32 and samples in bfloat16" in other.reason
        assert worst(other, model) < BF16
    finally:
        other.close()


@pytest.mark.slow
def test_adapters_that_vllm_cannot_run_are_merged(engine):
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], use_dora=True)
    model = peft.get_peft_model(tiny_model("llama", **SIZES), config)
    other = other_engine(model)
    try:
        assert other.way == "in place" and "use_dora" in other.reason
        learn(model, lr=0.1)
        assert other.sync(1).way == "in place" and worst(other, model) < FP32
    finally:
        other.close()


@pytest.mark.slow
def test_weights_that_cannot_be_reloaded_are_refused(engine):
    model = tiny_model("qwen3_moe", moe_intermediate_size=32, **SIZES)
    with pytest.raises(ValueError, match="vLLM cannot take new weights of Qwen3MoeForCausalLM here"):
        other_engine(model)
    assert worst(engine, engine.model) < FP32


def test_env_says_which_way(engine, tmp_path, capsys):
    from fastalign.cli.env import main

    tiny_model("gpt2", **(SIZES | {"head_dim": None, "num_key_value_heads": None})).save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path)]) == 0
    expected = (
        "- weights for vLLM: reloaded: loaded anew by the engine after each step, because the engine keeps no tensor"
    )
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(expected) and line.endswith("(tried with 2 of 2 layers in float32)")


def test_memory_of_the_cache():
    config = tiny_model("llama", **SIZES).config
    per_token = 2 * config.num_hidden_layers * 1 * 32 * 4
    assert cache_bytes(config, torch.float32, 8, 100, 0.9) == per_token * 128 * 8  # whole blocks of 32 tokens
    assert cache_bytes(config, torch.float32, 10**9, 100, 1e-9) == per_token * (128 + 32)  # one request at least
    assert rows_at_once(types.SimpleNamespace(per_device_train_batch_size=4, steps_per_generation=8)) == 32
