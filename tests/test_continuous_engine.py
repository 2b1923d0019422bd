"""Transformers' continuous batching behind the contract of engines."""

import pytest
import torch
from tiny import tiny_model
from transformers.generation.continuous_batching import ContinuousBatchingManager

from fastalign.data.collate import collate_flat
from fastalign.policy import token_stats
from fastalign.rollout.continuous import ContinuousEngine
from fastalign.rollout.engine import Request, Sampling, generate
from fastalign.rollout.native import NativeEngine

CAN_PAUSE = hasattr(ContinuousBatchingManager, "pause")
SAMPLING = Sampling(12, stop_ids=(2, 7, 9))


def engine_of(model, seed=0, **options):
    return ContinuousEngine(model, options=options, autocast=lambda: torch.autocast("cpu", enabled=False), seed=seed)


def requests_of(*lengths, num=3, sampling=SAMPLING):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 331, (n,), generator=generator).tolist() for n in lengths]
    return [Request((i, j), p, sampling) for i, p in enumerate(prompts) for j in range(num)]


def run(engine, requests):
    return {completion.key: completion for completion in generate(engine, requests)}


def worst_error(model, requests, completions, temperature=1.0):
    model.eval()
    errors = []
    for request in requests:
        ids = completions[request.key].ids
        batch = collate_flat([request.prompt_ids + ids], [[-100] * len(request.prompt_ids) + ids])
        expected = token_stats(model, batch, temperature=temperature).stats.logp
        errors.append((expected - torch.tensor(completions[request.key].logps)).abs().max().item())
    return max(errors)


def test_log_probabilities_stops_and_the_training_state():
    model = tiny_model("qwen2", attention_dropout=0.5).train()
    engine = engine_of(model)
    requests = requests_of(3, 9, 70)
    state, name = torch.get_rng_state(), model.config._attn_implementation
    completions = run(engine, requests)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.model.layers[0].training and model.config._attn_implementation == name
    for completion in completions.values():
        stopped = completion.ids[-1] in SAMPLING.stop_ids
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(completion.ids) == 12
        assert not set(completion.ids[:-1]) & set(SAMPLING.stop_ids)
    assert len({tuple(c.ids) for c in completions.values()}) == len(requests)
    assert worst_error(model, requests, completions) < 1e-5 and engine.exact
    again = run(engine, requests)
    assert {k: c.ids for k, c in again.items()} != {k: c.ids for k, c in completions.items()}


def test_requests_with_other_settings_run_one_after_the_other():
    model = tiny_model("llama")
    warm = requests_of(5, sampling=Sampling(6, temperature=0.5))
    greedy = [Request("greedy", warm[0].prompt_ids, Sampling(9, temperature=0.0))]
    completions = run(engine_of(model, num_blocks=32), [*greedy, *warm])
    assert worst_error(model, warm, completions, temperature=0.5) < 1e-5
    assert completions["greedy"].ids == run(NativeEngine(model), greedy)["greedy"].ids


@pytest.mark.skipif(not CAN_PAUSE, reason="this Transformers cannot pause the manager")
def test_weights_that_change_while_requests_are_pending():
    model = tiny_model("llama")
    engine = engine_of(model, max_batch_tokens=4)  # so that few run at a time
    requests = requests_of(3, 9, num=4)
    engine.submit(requests)
    found = {c.key: c for c in engine.step()}
    assert 0 < len(found) < len(requests) and engine.pending == len(requests) - len(found)
    assert worst_error(model, [r for r in requests if r.key in found], found) < 1e-5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    engine.sync(3)
    rest = {}
    while engine.pending:
        rest |= {c.key: c for c in engine.step()}
    assert set(rest) | set(found) == {r.key for r in requests}
    assert worst_error(model, [r for r in requests if r.key in rest], rest) < 1e-5
    assert {c.version for c in rest.values()} == {3}
    engine.submit(requests)
    engine.step()
    engine.abort()
    assert engine.pending == 0 and engine.step() == []


def test_what_it_cannot_do_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="has pages; ContinuousBatchingConfig knows"):
        engine_of(model, pages=3)
    engine = engine_of(model)
    for request, message in [
        (Request(1, [], SAMPLING), "has no tokens"),
        (Request(1, [11], SAMPLING, model_inputs={"pixel_values": torch.zeros(1)}), "has images"),
        (Request(1, [11], Sampling(3, repetition_penalty=1.2)), "`repetition_penalty` is 1.2"),
        (Request(1, [11], Sampling(3, regex="a")), "the engine 'continuous' cannot hold"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit([request])
    assert engine.pending == 0


def test_a_manager_that_fails_says_so(monkeypatch):
    model = tiny_model("llama")
    engine = engine_of(model)
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: 1 / 0)
    engine.submit(requests_of(3))
    with pytest.raises(RuntimeError, match="Continuous batching"):
        engine.step()
    assert engine.pending == 0
    monkeypatch.undo()
    assert len(run(engine, requests_of(3))) == 3
