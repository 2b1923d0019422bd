"""The output head in fp32 over a model in bf16: what it says, its gradients, how it trains and reaches engines."""

import copy
import types
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from fake_vllm import FakeVLLM
from grpo_runs import grpo_trainer
from peft import LoraConfig, get_peft_model
from test_grpo import SAMPLED, history
from tiny import tiny_model, tiny_tokenizer
from tolerances import GRADIENTS, STATISTICS

import fastalign
from fastalign import policy_check
from fastalign.data.collate import collate_flat
from fastalign.policy import prepare_policy, token_stats
from fastalign.policy_check import TOLERANCE
from fastalign.rollout.engine import Request, Sampling, generate
from fastalign.rollout.native import NativeEngine
from fastalign.rollout.own_weights import OwnWeightsEngine
from fastalign.rollout.vllm_engine import VLLMEngine, engine_dtype
from fastalign.rollout.vllm_server import VLLMServerEngine
from fastalign.rollout.weights import TrainingWeights, WeightPath
from fastalign.scoring_head import body_dtype, keep_head_in_fp32

FAMILIES = ("llama", "qwen2")  # of the second one the head is the input embedding
IDS = [5, 77, 12, 300, 41, 9, 8, 250, 33]


def half_model(family: str) -> Any:
    return tiny_model(family).to(torch.bfloat16)


def by_hand(model: Any, weight: torch.Tensor, ids: list[int] = IDS) -> torch.Tensor:
    """(T, V) logits with the head `weight` in fp32 behind layers in bf16."""
    is_tied = model.config.tie_word_embeddings
    table = weight if is_tied else model.get_input_embeddings().weight
    given = table[torch.tensor([ids])].to(torch.bfloat16)
    hidden = model.model(inputs_embeds=given, use_cache=False).last_hidden_state[0]
    assert hidden.dtype == torch.bfloat16
    return hidden.float() @ weight.T


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_are_those_of_an_fp32_head(family):
    model, rounded = half_model(family), half_model(family)
    keep_head_in_fp32(model)
    keep_head_in_fp32(model)  # idempotent
    with torch.no_grad():  # values that bf16 does not have
        noise = 1e-3 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight += noise
        rounded.lm_head.weight.copy_(model.lm_head.weight)
    assert model.lm_head.weight.dtype == torch.float32 and body_dtype(model) == torch.bfloat16
    others = [p.dtype for p in model.parameters() if p is not model.lm_head.weight]
    assert set(others) == {torch.bfloat16}
    assert prepare_policy(model).flat and policy_check._limit(model, 1.0, TOLERANCE) == TOLERANCE[torch.bfloat16]
    batch = collate_flat([IDS])
    found = token_stats(model, batch, outputs=("logp", "entropy"), grad=True).stats
    weight = model.lm_head.weight.detach().clone().requires_grad_()
    logp = by_hand(model, weight).log_softmax(-1)[:-1]
    expected = logp.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    within: dict[str, Any] = {"rtol": 0, "atol": STATISTICS[torch.float32]}
    torch.testing.assert_close(found.logp, expected, **within)
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1), **within)
    prepare_policy(rounded)
    plain = token_stats(rounded, batch).stats.logp.float()
    assert (plain - expected).abs().max() > 50 * STATISTICS[torch.float32]  # what the cast is for

    upstream = torch.linspace(-1, 1, len(expected))
    (found.logp * upstream).sum().backward()
    inner = {name: p.grad for name, p in model.named_parameters() if p is not model.lm_head.weight}
    mine = model.lm_head.weight.grad
    model.zero_grad()
    (expected * upstream).sum().backward()
    assert mine.dtype == torch.float32
    is_input = torch.zeros(len(mine), dtype=torch.bool)
    is_input[IDS] = family == "qwen2"  # gradients of these rows come through the layers, too
    for rows, dtype in ((~is_input, torch.float32), (is_input, torch.bfloat16)):
        assert (mine - weight.grad)[rows].norm() <= GRADIENTS[dtype] * weight.grad[rows].norm()
    for name, parameter in model.named_parameters():
        if parameter is model.lm_head.weight or parameter.grad is None:
            continue
        difference = (inner[name].float() - parameter.grad.float()).norm()
        assert difference <= GRADIENTS[torch.bfloat16] * parameter.grad.float().norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_logits_are_of_the_fp32_head_under_autocast_too(family):
    model = half_model(family)
    keep_head_in_fp32(model)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        expected = by_hand(model, model.lm_head.weight)
        within: dict[str, Any] = {"rtol": 0, "atol": STATISTICS[torch.float32]}
        for one in (model, copy.deepcopy(model)):
            torch.testing.assert_close(one(ids).logits[0], expected, **within)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(one(ids).logits[0], expected, **within)
        full = tiny_model(family)  # loaded in fp32 and run under autocast: the head is left out of that
        keep_head_in_fp32(full)
        prepare_policy(full)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = full.model(ids).last_hidden_state[0]
            logp = token_stats(full, collate_flat([IDS])).stats.logp
        expected = (hidden.float() @ full.lm_head.weight.T).log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(logp, expected, **within)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_moves_the_head_by_less_than_bf16_resolves(family, tmp_path):
    config = SAMPLED | {"max_steps": 2, "learning_rate": 1e-6, "beta": 0.1, "cast_lm_head_to_fp32": True}
    trainer = grpo_trainer(tmp_path, model=half_model(family), **config)
    assert not trainer.engine.exact and trainer.reference.model.lm_head.weight.dtype == torch.float32
    assert trainer.reference.model.lm_head.weight is not trainer.model.lm_head.weight
    before = copy.deepcopy(trainer.model.state_dict())
    lines = history(trainer)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-3) and all(line["grad_norm"] > 0 for line in lines[:2])
    moved = (trainer.model.lm_head.weight - before["lm_head.weight"]).abs()
    assert 0 < moved.max() < 3e-6
    inner = trainer.model.model.layers[0].self_attn.q_proj.weight == before["model.layers.0.self_attn.q_proj.weight"]
    assert (moved > 0).float().mean() > 0.9 and inner.float().mean() > 0.9  # bf16 moves those near 0 alone
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, trainer.model.lm_head.weight)


def test_a_resumed_run_has_the_same_head(tmp_path):
    config = SAMPLED | {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "cast_lm_head_to_fp32": True}
    whole = grpo_trainer(tmp_path, model=half_model("qwen2"), **config)
    whole.train()
    again = grpo_trainer(tmp_path, model=half_model("qwen2"), **config)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_adapters_on_the_head_are_refused_and_others_are_not(tmp_path):
    config = SAMPLED | {"cast_lm_head_to_fp32": True, "max_steps": 1}
    on_head = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"the output embedding carries an adapter.*`target_modules`"):
        grpo_trainer(tmp_path, model=half_model("llama"), peft_config=on_head, **config)
    peft_config = LoraConfig(r=4, target_modules=["q_proj"])
    trainer = grpo_trainer(tmp_path, model=half_model("llama"), peft_config=peft_config, **config)
    trainer.train()
    head = trainer.model.get_output_embeddings()
    assert head.weight.dtype == torch.float32 and not head.weight.requires_grad
    saved = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = get_peft_model(half_model("llama"), saved)
    keep_head_in_fp32(wrapped.get_base_model())
    assert {p.dtype for name, p in wrapped.named_parameters() if "lm_head" in name} == {torch.float32}


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_weights_are_refused(kind):
    trainer: Any = types.SimpleNamespace(
        args=types.SimpleNamespace(cast_lm_head_to_fp32=True), accelerator=types.SimpleNamespace(distributed_type=kind)
    )
    with pytest.raises(ValueError, match=f"not supported under {kind.name}"):
        fastalign.GRPOTrainer._make_parts(trainer, None, None, None)  # pyright: ignore[reportArgumentType]


# Engines


def ids_of(engine) -> dict[int, list[int]]:
    requests = [Request(i, IDS, Sampling(6), seed=i) for i in range(4)]
    return {one.key: one.ids for one in generate(engine, requests)}


@pytest.mark.parametrize("family", FAMILIES)
def test_engines_get_the_head_in_their_own_dtype(family):
    model = half_model(family)
    inside = copy.deepcopy(model)  # the model of an engine in this process
    keep_head_in_fp32(model)
    assert engine_dtype(model, None) == torch.bfloat16
    fake = FakeVLLM({"model_config": {"dtype": "torch.bfloat16"}})
    config = types.SimpleNamespace(vllm_server_host="127.0.0.1", vllm_server_port=fake.port, vllm_server_timeout=5)
    server = VLLMServerEngine(model, None, config, sampling=Sampling(4))
    path = WeightPath(TrainingWeights(model))
    path.settle(inside)
    assert path.way == "in place" and "several dtypes" in path.reason
    own = OwnWeightsEngine(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    assert path.push(None)[0] == "in place"
    server.sync(1)
    own.sync(1)
    for name, parameter in model.named_parameters():
        rounded = parameter.detach().to(torch.bfloat16)
        assert torch.equal(dict(inside.named_parameters())[name], rounded), name
        assert torch.equal(fake.weights[name], rounded), name
    assert own.base.lm_head.weight.dtype == torch.float32 and torch.equal(
        own.base.lm_head.weight, model.lm_head.weight
    )
    assert ids_of(own) == ids_of(NativeEngine(model))
    server.close()
    fake.stop()


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_log_probabilities_are_of_the_fp32_head(family):
    model = half_model(family)
    keep_head_in_fp32(model)
    done = next(generate(NativeEngine(model), [Request(0, IDS[:-1], Sampling(1), seed=3)]))
    with torch.no_grad():
        logp = by_hand(model, model.lm_head.weight, IDS[:-1]).log_softmax(-1)[-1, done.ids[0]]
    assert done.logps[0] == pytest.approx(float(logp), abs=1e-4)


@pytest.mark.vllm
def test_the_real_vllm_gets_the_head_after_each_step():
    from test_vllm_engine import BF16, CONFIG, SIZES, learn, worst

    model = tiny_model("qwen2", **(SIZES | {"head_dim": None})).to(torch.bfloat16)
    keep_head_in_fp32(model)
    engine = VLLMEngine(model, tiny_tokenizer(), CONFIG, sampling=Sampling(8))
    assert engine.way == "in place" and "several dtypes" in engine.reason
    assert worst(engine, model) < BF16
    learn(model)
    assert worst(engine, model) > 4 * BF16
    engine.sync(1)
    assert worst(engine, model) < BF16
    engine.close()
