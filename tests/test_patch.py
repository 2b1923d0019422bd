"""Kernels put into tiny models: the same outputs and gradients, undone without a trace."""

import copy
import logging
import pickle
import subprocess
import sys

import pytest
import tiny
import torch
import transformers
from tiny import tiny_model
from tiny_training import make
from transformers import TrainingArguments

from fastalign import patch
from fastalign.config import AlignConfig
from fastalign.patch import OwnLayer, patch_model, unpatch_model
from fastalign.scoring_head import ScoringHead, attach_heads

EXPECTED = {  # family -> modules that change in two layers: norms, gated layers, decoder layers, RoPE
    "llama": (5, 2, 2, 1),
    "mistral": (5, 2, 2, 1),
    "qwen2": (5, 2, 2, 1),
    "qwen3": (9, 2, 2, 1),
    "qwen3_moe": (9, 2, 2, 1),
    "gemma": (5, 2, 2, 1),
    "gemma2": (9, 2, 0, 1),
    "gemma3": (13, 2, 0, 1),
    "phi3": (5, 2, 0, 1),
    "olmo": (0, 2, 0, 1),
    "olmo2": (9, 2, 0, 1),
    "olmo3": (9, 2, 0, 1),
    "granite": (5, 2, 0, 1),
    "cohere": (0, 2, 0, 0),  # interleaved RoPE and LayerNorm
    "gpt_oss": (5, 0, 0, 1),  # clamped, interleaved gates
    "gpt2": (0, 0, 0, 0),
    "gpt_neox": (0, 0, 0, 0),
}
SCALED = {"gemma", "gemma2", "gemma3"}  # their tables are no plain ones
MORE = {
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"head_dim": None}),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", {"head_dim": None}),
}


@pytest.fixture(autouse=True)
def _more_families(monkeypatch):
    for family, entry in MORE.items():
        monkeypatch.setitem(tiny.FAMILIES, family, entry)


def run(model, **kwargs):
    """Logits and all gradients for two rows, one of them padded."""
    ids = torch.arange(3, 27).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs).logits * mask.unsqueeze(-1)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads


def assert_close(found, true, bound=1e-6):
    assert found.keys() == true.keys()
    for name, value in true.items():
        assert (found[name] - value).abs().max() <= bound * value.abs().max().clamp_min(1), name


def classes(model):
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize("family", EXPECTED)
def test_families_compute_the_same_and_are_undone(family, tmp_path):
    options = {"experts_implementation": "batched_mm"} if family == "qwen3_moe" else {}
    model = tiny_model(family, **options).train()
    file = sys.modules[type(model).__module__]
    before, true, function = classes(model), run(model), getattr(file, "apply_rotary_pos_emb", None)
    changed = patch_model(model)
    kinds = ("RMSNorm",), ("GatedMLP", "PackedMLP", "Experts"), ("DecoderLayer",)
    names = *kinds, [name for name in changed if "RoPE" in name]
    assert changed.get("Embedding", 0) == (family not in SCALED)
    assert tuple(sum(changed.get(name, 0) for name in kind) for kind in names) == EXPECTED[family]
    assert patch_model(model) == {}
    assert [(name, cls.__name__) for name, cls, _ in classes(model)] == [(n, c.__name__) for n, c, _ in before]
    assert_close(run(model), true)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert classes(copied) == classes(model)
    assert_close(run(copied), true)
    model.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not any(isinstance(module, OwnLayer) for module in loaded.modules())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    unpatch_model(model)
    unpatch_model(copied)
    assert classes(model) == before and getattr(file, "apply_rotary_pos_emb", None) is function
    for parameter in model.parameters():
        parameter.grad = None
    assert b"fastalign" not in pickle.dumps(model)
    assert_close(run(model), true)


def test_through_triton(monkeypatch):
    triton_checks = pytest.importorskip("triton_checks")
    for family in ("qwen3", "phi3"):
        model = tiny_model(family, num_hidden_layers=1, vocab_size=30).train()
        monkeypatch.setattr("fastalign_kernels.launch.MULTIPROCESSORS_ELSEWHERE", 1)
        true = run(model)
        patch_model(model)
        with triton_checks.triton_backend():
            assert_close(run(model), true, 3e-6)
        unpatch_model(model)


def test_rope_follows_the_models_that_live():
    from transformers.models.llama import modeling_llama as file

    original = file.apply_rotary_pos_emb
    first, second = tiny_model(), tiny_model()
    assert patch_model(first).keys() == patch_model(second).keys()
    unpatch_model(first)
    assert file.apply_rotary_pos_emb is not original
    unpatch_model(second)
    assert file.apply_rotary_pos_emb is original
    patch_model(first)
    calls = []
    with pytest.MonkeyPatch.context() as context:
        context.setattr(patch, "rope", lambda *args, **kwargs: calls.append(1) or args[:2])
        q, k, angle = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8)
        assert file.apply_rotary_pos_emb(q, k, angle, angle)[0] is q and calls
        del first
        assert torch.equal(file.apply_rotary_pos_emb(q, k, angle, angle)[0], original(q, k, angle, angle)[0])
    unpatch_model(second)
    assert file.apply_rotary_pos_emb is original


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, monkeypatch):
    """Through Triton, whose backward pass overwrites what the recomputation made."""
    triton_checks = pytest.importorskip("triton_checks")
    monkeypatch.setattr("fastalign_kernels.launch.MULTIPROCESSORS_ELSEWHERE", 1)
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=30).train()
    true = run(model)
    patch_model(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with triton_checks.triton_backend():
        assert_close(run(model), true, 3e-6)
    unpatch_model(model)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_under_peft(dropout, monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("qwen3"), config).train()
    calls = []
    lora_linear = patch.lora_linear
    monkeypatch.setattr(patch, "lora_linear", lambda *args: calls.append(1) or lora_linear(*args))

    def runs():
        torch.manual_seed(1)
        results = [run(model)]
        with model.disable_adapter():
            results.append({"logits": model(input_ids=torch.arange(9).view(1, 9)).logits})
        model.merge_adapter()
        results.append({"logits": model(input_ids=torch.arange(9).view(1, 9)).logits})
        model.unmerge_adapter()
        return results

    state, true = model.state_dict().keys(), runs()
    assert patch_model(model)["LoraLinear"] == 14
    assert all("lora" in name for name in true[0].keys() - {"logits"})
    for found, expected in zip(runs(), true, strict=True):
        assert_close(found, expected, 1e-5)  # random adapters make activations of size 30
    assert len(calls) == (0 if dropout else 14) and model.state_dict().keys() == state
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        patched = model(input_ids=torch.arange(9).view(1, 9)).logits
        unpatch_model(model)
        assert (patched - model(input_ids=torch.arange(9).view(1, 9)).logits).abs().max() < 0.15
    assert not any(isinstance(module, OwnLayer) for module in model.modules())


def test_what_does_not_fit_stays():
    model = tiny_model("llama", hidden_act="relu")
    inner = model.model.layers[0]
    inner.input_layernorm.forward = inner.input_layernorm.forward  # an instance's own, as hooks of accelerate set it

    class Mine(type(inner.post_attention_layernorm)):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    inner.post_attention_layernorm.__class__ = Mine
    assert patch_model(model) == {"DecoderLayer": 1, "Embedding": 1, "RMSNorm": 3, "RoPE of modeling_llama": 1}
    assert type(inner.post_attention_layernorm) is Mine
    unpatch_model(model)


def test_beside_the_scoring_head_and_compiled():
    model = tiny_model("llama").train()
    true = run(model)
    attach_heads(model)
    patch_model(model)
    assert isinstance(model.lm_head, ScoringHead)
    torch._dynamo.reset()
    compiled = torch.compile(model.model.layers[0].mlp, backend="eager", fullgraph=True)
    x = torch.randn(1, 3, 32)
    assert torch.allclose(compiled(x), model.model.layers[0].mlp(x), atol=1e-6)
    whole = torch.compile(model, backend="eager")
    found = run(whole)
    assert_close({name.removeprefix("_orig_mod."): value for name, value in found.items()}, true)
    unpatch_model(model)
    assert isinstance(model.lm_head, ScoringHead)


def test_hooks_on_gate_and_up_keep_their_values():
    triton_checks = pytest.importorskip("triton_checks")
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=30).train()
    kept = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda module, args, output: kept.append(output))
    patch_model(model)
    with triton_checks.triton_backend():
        run(model)
    values = kept[0].detach().clone()
    unpatch_model(model)
    run(model)
    assert torch.allclose(values, kept[1], atol=1e-5)


def test_addition_and_norm_are_one_unless_the_norm_is_watched(monkeypatch):
    model = tiny_model("llama").train()
    true, fused, seen = run(model), [], []
    patch_model(model)
    add_rms_norm = patch.add_rms_norm
    monkeypatch.setattr(
        patch, "add_rms_norm", lambda *args, **kwargs: fused.append(1) or add_rms_norm(*args, **kwargs)
    )
    assert_close(run(model), true)
    norm = model.model.layers[0].post_attention_layernorm
    hook = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    assert len(fused) == 2
    assert_close(run(model), true)
    hook.remove()
    assert len(fused) == 3 and len(seen) == 1


def test_says_once_what_was_replaced(caplog):
    model = tiny_model("olmo")
    with caplog.at_level(logging.INFO, "fastalign.patch"):
        patch_model(model), patch_model(model)
    unpatch_model(model)
    assert [r.message for r in caplog.records] == [
        "Own kernels in OlmoForCausalLM: Embedding (1), GatedMLP (2), RoPE of modeling_olmo (1)."
    ]


def test_kernel_backend_of_the_config(tmp_path, monkeypatch):
    def number_of_own(**options):
        model = make("ours", tmp_path, **options).model
        count = sum(isinstance(module, OwnLayer) for module in model.modules())
        unpatch_model(model)
        return count

    assert number_of_own(kernel_backend="none") == 0
    assert number_of_own(kernel_backend="auto") == number_of_own(kernel_backend="own") == 10  # in C++
    assert AlignConfig(str(tmp_path), use_cpu=True).kernel_backend == "auto"
    monkeypatch.setattr(AlignConfig, "device", property(lambda self: torch.device("cuda")))
    asked = []
    monkeypatch.setattr(patch, "patch_model", lambda model, kernels, **options: asked.append((kernels, options)))
    for options in ({}, {"kernel_backend": "none"}, {"kernel_backend": "hub"}, {"kernel_backend": "liger"}):
        patch.use_kernel_backend(None, AlignConfig(str(tmp_path), use_cpu=True, **options))
    patch.use_kernel_backend(None, TrainingArguments(str(tmp_path), use_cpu=True))
    assert [kernels for kernels, _ in asked] == ["own", "none", "hub", "liger", "none"]
    with pytest.raises(ValueError, match="kernel_backend='fast': choose auto, own"):
        AlignConfig(str(tmp_path), kernel_backend="fast")
    with pytest.raises(ValueError, match="kernels='fast': choose one of"):
        monkeypatch.undo()
        patch_model(tiny_model(), "fast")


def test_use_liger_kernel_means_ligers_layers(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(patch, "patch_model", lambda model, kernels, **options: asked.append((kernels, options)))
    options = {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}}
    for args in (AlignConfig, TrainingArguments):
        patch.use_kernel_backend(None, args(str(tmp_path), use_cpu=True, **options))
    assert asked == [("liger", {"rope": False})] * 2
    with pytest.raises(ValueError, match="use_liger_kernel=True means kernel_backend='liger'"):
        AlignConfig(str(tmp_path), use_liger_kernel=True, kernel_backend="own")
    with pytest.raises(ValueError, match="liger_kernel_config is given"):
        AlignConfig(str(tmp_path), liger_kernel_config={"rope": False})


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        patch_model(tiny_model(), "liger")
    monkeypatch.setattr("transformers.utils.import_utils.is_kernels_available", lambda *args: False)
    with pytest.raises(ImportError, match="pip install kernels"):
        patch_model(tiny_model(), "hub")


def test_liger_gets_the_model_and_no_loss(monkeypatch):
    """With a stand-in for the package, which needs a GPU: its losses are off, and asking for them is refused."""
    from types import ModuleType

    asked = []
    outer, inner = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    outer.monkey_patch = inner
    inner._apply_liger_kernel_to_instance = lambda model, **options: asked.append((model, options))
    inner.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for module in (ModuleType("liger_kernel"), outer, inner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    model = tiny_model()
    patch_model(model, "liger", rope=False)
    assert asked == [(model, {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False})]
    with pytest.raises(ValueError, match=r"liger_kernel_config asks for cross_entropy.+own head"):
        patch_model(model, "liger", cross_entropy=True)


def test_hub_takes_the_base_model(monkeypatch):
    asked = []
    monkeypatch.setattr("transformers.utils.import_utils.is_kernels_available", lambda *args: True)
    monkeypatch.setattr(transformers.PreTrainedModel, "set_use_kernels", lambda self, use: asked.append((self, use)))
    model = tiny_model()
    assert patch_model(model, "hub") == {} and asked == [(model, True)]


FSDP = """
import sys; sys.path[:0] = [{root!r}, {root!r} + "/kernels", {root!r} + "/tests"]
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tiny import tiny_model
from fastalign.loop.distributed import await_gloo_threads
from fastalign.patch import patch_model
dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
ids = torch.arange(12).view(1, 12)
losses = []
for own in (False, True):
    model = tiny_model("llama").train()
    if own:
        assert patch_model(model)["RMSNorm"] == 5
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
assert abs(losses[0] - losses[1]) < 1e-5, losses
await_gloo_threads()  # joined with the interpreter's lock held
dist.destroy_process_group()
print("same")
"""


def test_under_fsdp2(tmp_path):
    from pathlib import Path

    script = FSDP.format(root=str(Path(__file__).parent.parent), file=tmp_path / "store")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "same" in done.stdout, done.stderr[-2000:]
