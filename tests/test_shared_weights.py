"""Finding a parameter's place in an engine's tensors, binding it, and noticing when it has moved; without vLLM."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import nn

from fastalign.rollout.shared_weights import agree, bind, find_twins, moved
from fastalign.rollout.vllm_adapter import why_merged
from fastalign.rollout.vllm_check import small_copy
from fastalign.rollout.weights import TrainingWeights, WeightPath

FUSED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
FUSED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


class FakeEngine(nn.Module):
    """Holds the weights of a model as vLLM does: fused rows, vocabulary padded to a multiple of 64."""

    def __init__(self, model, dtype=None, transposed=()):
        super().__init__()
        parts = {}
        for name, parameter in model.named_parameters():
            prefix, _, suffix = name.rpartition(".")
            parent, _, layer = prefix.rpartition(".")
            whole, place = FUSED.get(layer, (layer, 0))
            parts.setdefault(f"{parent}.{whole}.{suffix}".removeprefix("."), {})[place] = parameter.detach()
        for name, tensors in parts.items():
            value = torch.cat([tensors[i] for i in sorted(tensors)]).to(dtype)
            if "embed" in name or "lm_head" in name:
                value = torch.cat([value, torch.full((-len(value) % 64, *value.shape[1:]), 7.0, dtype=value.dtype)])
            value = value.T.contiguous() if name.endswith(transposed) and transposed else value
            self.register_parameter(name.replace(".", "/"), nn.Parameter(value, requires_grad=False))

    def named_parameters(self, *args, **kwargs):
        return [(name.replace("/", "."), p) for name, p in super().named_parameters(*args, **kwargs)]


def settle(model, **options):
    engine = FakeEngine(model, **options)
    path = WeightPath(TrainingWeights(model))
    path.settle(engine)
    return engine, path


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "gemma3", "phi3"])
def test_every_parameter_becomes_a_view_of_the_engine(family):
    model, ids = tiny_model(family), torch.arange(3, 40)[None]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits, identities = model(ids).logits, {name: id(p) for name, p in model.named_parameters()}
    engine, path = settle(model)
    assert path.way == "shared" and path.reason == ""
    storages = {p.untyped_storage().data_ptr() for _, p in engine.named_parameters()}
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == storages
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(ids).logits, logits)
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    fused = dict(engine.named_parameters())
    if family != "phi3":  # which is fused itself
        first = model.model.layers[0].self_attn
        rows = torch.cat([first.q_proj.weight, first.k_proj.weight, first.v_proj.weight])
        assert torch.equal(fused["model.layers.0.self_attn.qkv_proj.weight"], rows)
    assert path.push(None) == ("shared", 0)


def test_saving_a_shared_model_writes_each_weight_once(tmp_path):
    model = tiny_model("qwen2")
    settle(model)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert abs(size - 4 * sum(p.numel() for p in model.parameters())) < 8000  # names and shapes
    again = type(model).from_pretrained(tmp_path)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_moved_parameters_are_found_by_address(caplog):
    model = tiny_model("llama")
    engine, path = settle(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data + 1.0
    assert moved(path.twins, path.source.parameters()) == ["model.layers.1.mlp.up_proj.weight"]
    assert path.push(None) == ("in place", weight.numel() * 4)
    assert "model.layers.1.mlp.up_proj.weight" in caplog.text and "moved back" in caplog.text
    rows = dict(engine.named_parameters())["model.layers.1.mlp.gate_up_proj.weight"]
    assert torch.equal(rows[weight.shape[0] :], weight) and path.push(None) == ("shared", 0)
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})  # writes in place
    assert path.push(None) == ("shared", 0)
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)
    assert path.push(None)[0] == "in place" and path.push(None) == ("shared", 0)


def test_copies_where_dtypes_differ():
    model = tiny_model("qwen2")
    engine, path = settle(model, dtype=torch.bfloat16)
    assert path.way == "in place"
    assert path.reason == "model.embed_tokens.weight trains in float32 and samples in bfloat16"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    assert path.push(None) == ("in place", 2 * sum(p.numel() for p in model.parameters()))
    parameters = path.source.parameters()
    assert len(path.twins.found) == len(parameters) - 1  # the head is the embedding in the engine too
    for twin in path.twins.found:
        assert torch.equal(twin.place, parameters[twin.name].to(torch.bfloat16))
    assert dict(engine.named_parameters())["model.embed_tokens.weight"][331:].eq(7).all()  # padding stays


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"transposed": "o_proj.weight"},
            "the engine keeps model.layers.0.self_attn.o_proj.weight in a layout of its own",
        ),
        (
            {"transposed": "down_proj.weight"},
            "no tensor in which model.layers.0.mlp.down_proj.weight could be addressed",
        ),
    ],
)
def test_other_layouts_are_reloaded(change, reason):
    """A square matrix that is kept transposed has the right shape; its values give it away."""
    model = tiny_model("llama")
    _, path = settle(model, **change)
    assert path.way == "reloaded" and reason in path.reason
    given = {}
    assert path.push(lambda weights: given.update(weights))[0] == "reloaded"
    assert given.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(given[name], p) for name, p in model.named_parameters())


def test_tensors_of_the_engine_that_no_parameter_fills():
    model = tiny_model("llama")
    engine = FakeEngine(model)
    engine.register_parameter("extra/scale", nn.Parameter(torch.ones(3)))
    twins = find_twins(engine, dict(model.named_parameters()))
    assert not twins.found and "extra.scale of the engine belongs to no single parameter" in twins.reason


def test_tied_weights_that_the_engine_keeps_apart_are_copied_to_both():
    model = tiny_model("qwen2")
    engine = FakeEngine(model)
    engine.register_parameter("lm_head/weight", nn.Parameter(model.lm_head.weight.detach().clone()))
    path = WeightPath(TrainingWeights(model))
    path.settle(engine)
    assert path.way == "in place" and "is tied in training and kept apart in the engine" in path.reason
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    path.push(None)
    values = dict(engine.named_parameters())
    assert torch.equal(values["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(values["model.embed_tokens.weight"][:331], model.lm_head.weight)


def test_bind_and_agree_by_hand():
    engine = nn.Module()
    engine.qkv_proj = nn.Linear(2, 3, bias=False)
    model = nn.Module()
    model.q_proj, model.k_proj, model.v_proj = (nn.Linear(2, 1, bias=False) for _ in range(3))
    parameters = dict(model.named_parameters())
    twins = find_twins(engine, parameters)
    assert [twin.place.storage_offset() for twin in twins.found] == [0, 2, 4]
    assert agree(twins, parameters) == "q_proj.weight"
    engine.qkv_proj.weight.data.copy_(torch.cat(list(parameters.values())))
    assert agree(twins, parameters) == "" and bind(twins, parameters) == 24 and bind(twins, parameters) == 0
    model.k_proj.weight.data.fill_(5.0)
    assert engine.qkv_proj.weight[1].tolist() == [5.0, 5.0]


def test_adapters_are_left_out_or_merged():
    import peft

    model = tiny_model("llama")
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    q_proj = lora.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        q_proj.lora_B["default"].weight.fill_(0.5)
        lora.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    source = TrainingWeights(lora)
    assert source.parameters().keys() == plain.keys()
    assert torch.equal(source.parameters()["lm_head.weight"], plain["lm_head.weight"] + 1.0)
    merged = TrainingWeights(lora, merged=True)
    assert "merged" in merged.reason_not_to_share()
    with merged.readable() as tensors:
        found = {name: tensor.detach().clone() for name, tensor in merged.checkpoint(tensors)}
    expected = plain["model.layers.0.self_attn.q_proj.weight"] + 2.0 * 0.5 * q_proj.lora_A["default"].weight.sum(0)
    torch.testing.assert_close(found["model.layers.0.self_attn.q_proj.weight"], expected)
    torch.testing.assert_close(q_proj.base_layer.weight, plain["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, ""),
        ({"use_dora": True}, "the adapter has `use_dora`"),
        ({"modules_to_save": ["lm_head"]}, "the adapter has `modules_to_save`"),
        ({"bias": "all"}, "the adapter trains biases"),
        ({"target_modules": ["embed_tokens"]}, "on layers other than linear ones"),
        ({"r": 600}, "its rank is above 512"),
    ],
)
def test_what_vllm_cannot_run_beside_the_weights(options, reason):
    import peft

    config = peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | options))
    found = why_merged(peft.get_peft_model(tiny_model("llama"), config))
    assert reason in found and bool(found) == bool(reason)


def test_the_small_copy_keeps_what_decides():
    config = tiny_model("gemma3", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2).config
    config.vocab_size = 5000
    model = small_copy(config, torch.bfloat16)
    assert model.config.num_hidden_layers == 2 and model.config.layer_types == ["sliding_attention", "full_attention"]
    assert model.lm_head.weight.shape == (1024, 32) and model.dtype == torch.bfloat16
    assert config.vocab_size == 5000


def test_env_says_which_way(tmp_path, capsys):
    import importlib.util

    from fastalign.cli.env import main

    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed: see test_vllm_engine.py")
    tiny_model("qwen2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path)]) == 0
    assert "- weights for vLLM: vLLM is not installed (`pip install fastalign[vllm]`" in capsys.readouterr().out
