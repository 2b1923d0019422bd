"""The client of a vLLM server against a fake one: what is sent, what comes back, what happens when it fails."""

import os
import subprocess
import sys
import time
import types

import pytest
import torch
from fake_vllm import FakeVLLM
from tiny import tiny_model, tiny_tokenizer

from fastalign.rollout import vllm_http
from fastalign.rollout.engine import Request, Sampling, generate
from fastalign.rollout.vllm_push import is_local
from fastalign.rollout.vllm_server import VLLMServerEngine

SAMPLING = Sampling(8, temperature=0.7, top_k=5, stop_ids=(2, 9))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(vllm_http, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(vllm_http, "LONGEST_PAUSE", 0.1)


@pytest.fixture
def fake():
    server = FakeVLLM()
    yield server
    server.stop()


def connect(fake, model=None, timeout=5.0, **settings):
    config = types.SimpleNamespace(
        vllm_server_host="127.0.0.1", vllm_server_port=fake.port, vllm_server_timeout=timeout
    )
    model = tiny_model("qwen2") if model is None else model
    return VLLMServerEngine(model, None, types.SimpleNamespace(**(vars(config) | settings)), sampling=SAMPLING)


def requests(num=6):
    return [Request(f"r{i}", [3, 4, 10 * i + 5], SAMPLING, seed=i) for i in range(num)]


def test_requests_and_completions(fake):
    engine = connect(fake, vllm_server_base_url=f"http://localhost:{fake.port}/")
    done = {c.key: c for c in generate(engine, requests())}
    for i in range(6):
        ids = [10 * i + 5 + i + k for k in range(1 + i % 3)]
        assert done[f"r{i}"].ids == ids and done[f"r{i}"].logps == [-0.5 * k for k in range(len(ids))]
        assert done[f"r{i}"].finish_reason == "length" and done[f"r{i}"].version == 0
    body = next(body for path, _, body in fake.calls if path == "/v1/completions" and body["seed"] == 4)
    expected = {"model": "model", "prompt": [3, 4, 45], "max_tokens": 8, "temperature": 0.7, "top_k": 5, "seed": 4}
    expected |= {"stop_token_ids": [2, 9], "ignore_eos": True, "logprobs": 0, "return_token_ids": True}
    assert expected.items() <= body.items()
    engine.close()


def test_weights_travel_as_files_and_only_then_requests_go_on(fake):
    model = tiny_model("qwen2")  # tied: the head is not sent twice
    engine = connect(fake, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    fake.calls.clear()
    fake.hold.clear()
    engine.submit(requests(2))
    report = engine.sync(3)
    steps = [path for path in fake.paths() if path != "/v1/completions"]
    assert steps == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]
    assert {p: q for p, q, _ in fake.calls}["/pause"] == {"mode": ["keep"]}
    assert {p: q for p, q, _ in fake.calls}["/reset_prefix_cache"] == {"reset_running_requests": ["true"]}
    own = dict(model.named_parameters())
    assert fake.weights.keys() == own.keys() and all(torch.equal(fake.weights[name], own[name]) for name in own)
    assert report.way == engine.way == "reloaded"
    assert report.num_bytes == sum(p.numel() * 4 for p in own.values())
    fake.hold.set()
    done = []
    while engine.pending:
        done += engine.step()
    assert [(c.version, c.newest_version) for c in done] == [(0, 3)] * 2
    engine.close()


def test_adapter_is_sent_alone_where_the_server_takes_it():
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_model("llama"), config)
    for lora, way in ((None, "reloaded"), ({"max_lora_rank": 8}, "adapter")):
        fake = FakeVLLM({"lora_config": lora})
        engine = connect(fake, model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1)
        engine.sync(1)
        assert engine.way == way
        q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
        a, b = q_proj.lora_A["default"].weight, q_proj.lora_B["default"].weight
        if way == "adapter":
            sent = fake.weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
            assert torch.equal(sent, b) and fake.adapter["r"] == 4 and fake.adapter["target_modules"] == ["q_proj"]
            next(generate(engine, requests(1)))
            assert fake.calls[-1][2]["model"] == "policy"
        else:
            merged = q_proj.base_layer.weight + 2.0 * b @ a
            torch.testing.assert_close(fake.weights["model.layers.0.self_attn.q_proj.weight"], merged)
            assert not any("lora" in name for name in fake.weights)
        engine.close()
        fake.stop()


def test_failures_are_tried_again_and_counted(fake):
    engine = connect(fake)
    fake.faults = {"/v1/completions": [503, 0, 500, 0]}
    done = {c.key for c in generate(engine, requests())}
    assert done == {f"r{i}" for i in range(6)}
    assert engine.counts["retries"] >= 2 and "restarts" not in engine.counts and "failed" not in engine.counts
    engine.close()


def test_a_refusal_is_not_tried_again(fake):
    engine = connect(fake)
    fake.faults = {"/v1/completions": [400]}
    engine.submit(requests(1))
    with pytest.raises(
        RuntimeError, match=rf"refused POST 127.0.0.1:{fake.port}/v1/completions: HTTP 400.*as the test wants"
    ):
        engine.step()
    assert engine.counts.get("retries", 0) == 0
    engine.close()


def test_a_restarted_server_gets_weights_and_requests_again(fake):
    """It comes back with the weights of its checkpoint: what it sampled from those is thrown away."""
    engine = connect(fake)
    engine.sync(4)
    fake.hold.clear()
    engine.submit(requests(3))
    time.sleep(0.1)
    port = fake.port
    fake.stop()
    again = FakeVLLM(port=port)
    again.weights = {"of": "the checkpoint"}
    done = []
    while engine.pending:
        done += engine.step()
    assert {c.key for c in done} == {"r0", "r1", "r2"} and engine.counts["restarts"] == 1
    assert len(again.weights) > 1 and again.version.endswith(":4")
    last = max(i for i, path in enumerate(again.paths()) if path == "/collective_rpc")
    assert again.paths()[last:].count("/v1/completions") >= 3
    engine.close()
    again.stop()


def test_a_dead_server_is_an_error_that_says_what_to_do(fake):
    engine = connect(fake, timeout=0.3)
    engine.submit(requests(1))
    port = fake.port
    fake.faults = {"/v1/completions": [0] * 99}
    fake.stop()
    engine.client.hang_up()
    engine._sent.clear()
    engine.submit(requests(1))
    expected = rf"127.0.0.1:{port}/v1/completions could not be used for 0 s.*vllm_server_timeout.*vllm serve"
    with pytest.raises(ConnectionError, match=expected):
        while engine.pending:
            engine.step()
    assert engine.counts["failed"] == 1 and engine.counts["retries"] >= 2
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}/health could not be used"):
        connect(fake, timeout=0.1)


def test_abort_gives_up_what_is_under_way(fake):
    engine = connect(fake)
    fake.hold.clear()
    engine.submit(requests(3))
    time.sleep(0.1)
    engine.abort()
    assert engine.pending == 0 and engine.step() == []
    fake.hold.set()
    assert len(list(generate(engine, requests(2)))) == 2
    assert sum(path == "/v1/completions" for path in fake.paths()) == 5  # none was sent twice
    engine.close()


def test_servers_started_the_wrong_way_are_refused(fake):
    fake.faults = {"/server_info": [404]}
    with pytest.raises(ValueError, match="without VLLM_SERVER_DEV_MODE=1"):
        connect(fake)
    fake.settings["model_config"]["logprobs_mode"] = "raw_logprobs"
    with pytest.raises(ValueError, match=r"reports raw_logprobs.*--logprobs-mode processed_logprobs"):
        connect(fake)
    with pytest.raises(ValueError, match="`vllm_server_base_url` is 'ftp://x'"):
        connect(fake, vllm_server_base_url="ftp://x")
    del fake.settings["model_config"]["logprobs_mode"]
    engine = connect(fake)
    for request, message in [
        (Request("a", [], SAMPLING), "'a' is empty"),
        (Request("b", [1] * 64, SAMPLING), "has 64 tokens, but the server takes 64"),
        (Request("c", [1], Sampling(4, options={"n": 3})), r"`generation_kwargs` has \['n'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit([request])
    engine.close()
    assert is_local("127.0.0.1") and is_local("localhost") and not is_local("gpu-7.cluster")


@pytest.mark.vllm
@pytest.mark.slow
def test_the_real_server(tmp_path):
    """`vllm serve` on this machine: samples follow the weights, log-probabilities are the model's."""
    from test_vllm_engine import FP32, SIZES, learn, worst

    model = tiny_model("llama", **SIZES)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(tmp_path / "model"), "--port", "8471"]
    command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "128", "--block-size", "32"]
    command += ["--kv-cache-memory-bytes", "67108864"]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            config = types.SimpleNamespace(vllm_server_port=8471, vllm_server_timeout=600)
            engine = VLLMServerEngine(model, None, config, sampling=SAMPLING)
            assert worst(engine, model) < FP32
            learn(model)
            assert worst(engine, model) > 100 * FP32
            assert engine.sync(1).way == "reloaded"
            assert worst(engine, model) < FP32
            engine.close()
        finally:
            server.terminate()
