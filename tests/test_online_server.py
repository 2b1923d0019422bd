"""Runs that sample from a vLLM server which fails, hangs, dies or comes back: what they say, count and do."""

import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from fake_vllm import FakeVLLM
from grpo_runs import LONGEST, grpo_trainer
from test_grpo import history
from test_online_faults import Weights, long_prompts
from transformers import TrainerCallback

from fastalign.rollout import vllm_http, vllm_server


class Server(FakeVLLM):
    """Samples ids of the tiny model's vocabulary."""

    def answer(self, path, query, body):
        if path != "/v1/completions":
            return super().answer(path, query, body)
        self.hold.wait(30)
        length = 1 + body["seed"] % min(body["max_tokens"], LONGEST)
        ids = [5 + (body["seed"] // 7 + 11 * i) % 320 for i in range(length)]
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-5.8] * length}, "finish_reason": "length"}
        return 200, {"choices": [choice]}


class AtStep(TrainerCallback):
    """Does something when a step has ended."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(vllm_http, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(vllm_http, "LONGEST_PAUSE", 0.1)
    made = Server()
    yield made
    made.stop()


def served(folder, server, *callbacks, timeout=0.3, **config):
    config = {"max_steps": 3, "vllm_importance_sampling_correction": False} | config
    config |= {"fixed": False, "use_vllm": True, "vllm_mode": "server", "vllm_server_timeout": timeout}
    config |= {"vllm_server_host": "127.0.0.1", "vllm_server_port": server.port, "max_completion_length": 6}
    return grpo_trainer(folder, callbacks=[*callbacks], **config)


def test_a_server_that_answers_500_ends_the_run_and_the_checkpoint_goes_on(server, tmp_path):
    fails = AtStep(1, lambda: server.faults.update({"/v1/completions": [500] * 9999}))
    trainer = served(tmp_path, server, fails, save_strategy="steps", save_steps=1)
    expected = rf"127.0.0.1:{server.port}/v1/completions could not be used for 0 s.*`vllm_server_timeout`.*HTTP 500.*"
    with pytest.raises(ConnectionError, match=expected + "as the test wants.*is started with: .*vllm serve"):
        trainer.train()
    assert trainer.state.global_step == 1 and all(p.isfinite().all() for p in trainer.model.parameters())
    assert not trainer.engine.pending and trainer.engine.counts["failed"] >= 1
    server.faults.clear()
    again = served(tmp_path, server)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    for made in (trainer, again):
        made.engine.close()


def test_a_server_that_takes_requests_and_answers_none_is_found_out(server, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "SILENCE", 0.2)
    monkeypatch.setattr(vllm_http, "HEALTH_TIMEOUT", 0.1)
    answer = server.answer

    def stuck(path, query, body):
        server.hold.wait(30)
        return answer(path, query, body)

    def hang():
        server.answer = stuck
        server.hold.clear()

    trainer = served(tmp_path, server, AtStep(1, hang))
    sync = trainer.engine.sync
    monkeypatch.setattr(trainer.engine, "sync", lambda step: sync(step) if step == 0 else SimpleNamespace(seconds=0.0))
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{server.port}/health could not be used.*timed out"):
        trainer.train()
    assert trainer.state.global_step == 1
    server.hold.set()
    trainer.engine.close()


def test_a_slow_server_that_is_well_is_waited_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "SILENCE", 0.05)
    trainer = served(tmp_path, server, max_steps=1)
    server.hold.clear()
    threading.Timer(0.6, server.hold.set).start()
    lines = history(trainer)
    assert trainer.state.global_step == 1 and server.paths().count("/health") >= 3
    assert not any(key.startswith("sampling/server") for line in lines for key in line)
    trainer.engine.close()


def test_a_server_that_dies_while_it_samples_and_comes_back_goes_on(server, tmp_path):
    """It gets the weights of the step it died in and all requests again; what went wrong is in that step's log."""
    weights, restarted = Weights(), []

    def die():
        before = server.paths().count("/v1/completions")
        server.hold.clear()

        def restart():
            while server.paths().count("/v1/completions") < before + 8:
                time.sleep(0.01)
            server.stop()
            time.sleep(0.1)
            restarted.append(Server(port=server.port))

        threading.Thread(target=restart, daemon=True).start()

    trainer = served(tmp_path, server, weights, AtStep(1, die), timeout=20)
    lines = history(trainer)[:-1]
    assert trainer.state.global_step == 3 and all(math.isfinite(line["loss"]) for line in lines)
    assert [line.get("sampling/server_restarts", 0) for line in lines] == [0, 1, 0]
    assert [line.get("sampling/server_retries", 0) > 0 for line in lines] == [False, True, False]
    assert weights.at[-1].isfinite().all() and not torch.equal(weights.at[-1], weights.at[-2])
    (again,) = restarted
    sent = torch.cat([again.weights[name].flatten() for name, _ in trainer.model.named_parameters()])
    assert torch.equal(sent, weights.at[2]) and again.version.endswith(":2")  # those that sampled for step 3
    trainer.engine.close()
    again.stop()


def test_prompts_that_the_server_has_no_room_for_are_refused(server, tmp_path):
    trainer = served(tmp_path, server, data=long_prompts(70))
    with pytest.raises(ValueError, match=r"tokens, but the server takes 64 .*--max-model-len.*begins with 'the the"):
        trainer.train()
    trainer.engine.close()
