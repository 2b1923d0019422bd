"""fp8 in the body of a model, and updates of bf16 weights: which layers, how close, and the same after a resume."""

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fastalign_kernels.head import products
from fastalign_kernels.head.rows import row_stats
from tiny import tiny_model, tiny_tokenizer
from tiny_training import SETTINGS, make, tiny_rows, weights
from torch import nn
from torch.distributed.fsdp import fully_shard

from fastalign import SFTConfig, SFTTrainer, precision
from fastalign.loop.bf16_update import MasterWeights, StochasticAdamW, round_stochastically
from fastalign.loop.distributed import await_gloo_threads
from fastalign.precision import Fp8Linear, convert_to_fp8, use_fp8

BF16 = torch.bfloat16


def in_fp8(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]


def lora_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False)
    return peft.get_peft_model(tiny_model(), config)


def one_loss(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 45).view(2, 20)
    return model(input_ids=ids, labels=ids).loss


# fp8


def test_body_is_converted_and_nothing_else():
    model = tiny_model("qwen3_moe", mlp_only_layers=[1])
    convert_to_fp8(model, worthwhile=0)
    parts = {name.split(".", 3)[-1] for name in in_fp8(model)}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert parts == attention | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}  # no router, no head
    routed = nn.ModuleDict({"gate": nn.Linear(32, 32), "up": nn.Linear(32, 32)})
    routed["doubled"] = nn.Linear(32, 32).double()
    routed["hooked"] = nn.Linear(32, 32)
    routed["hooked"].forward = lambda x: x
    assert convert_to_fp8(routed, worthwhile=0) == 1 and in_fp8(routed) == ["up"]
    assert convert_to_fp8(routed, worthwhile=0) == 0  # idempotent


def test_adapters_stay_and_frozen_weights_get_no_gradient():
    plain = lora_model()
    model = copy.deepcopy(plain)
    convert_to_fp8(model, worthwhile=0)
    names = in_fp8(model)
    assert len(names) == 14 and not any("lora" in name or "lm_head" in name for name in names)
    assert sum(name.endswith("q_proj.base_layer") for name in names) == 2
    exact = one_loss(plain).item()
    loss = one_loss(model)
    assert loss.item() == pytest.approx(exact, rel=0.02) and loss.item() != exact
    loss.backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())


def test_only_large_layers_gain():
    sizes = {"mlp": (896, 4864), "q": (1024, 1024), "k": (4096, 1024), "v": (896, 128), "value": (4096, 1)}
    layers = nn.ModuleDict({name: nn.Linear(*size, device="meta") for name, size in sizes.items()})
    convert_to_fp8(layers)
    assert in_fp8(layers) == ["mlp", "q", "k"]


def test_files_copies_and_pickles_are_those_of_the_plain_model(tmp_path):
    plain, model = tiny_model(), tiny_model()
    convert_to_fp8(model, worthwhile=0)
    expected = one_loss(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert in_fp8(other) == in_fp8(model) and torch.equal(one_loss(other), expected)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear"
    model.save_pretrained(tmp_path / "fp8"), plain.save_pretrained(tmp_path / "plain")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "fp8" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("bf16", [False, True])
def test_training_follows_the_loss_of_full_precision(tmp_path, monkeypatch, bf16):
    """Twenty steps: the loss falls by as much, and stays within 1 % of that without fp8 all the way."""
    monkeypatch.setattr(precision, "WORTHWHILE", 0)
    options = {"max_steps": 20, "learning_rate": 1e-2, "bf16": bf16, "train": tiny_rows(6)}
    runs = {fp8: make("ours", tmp_path, fp8=fp8, **options) for fp8 in (False, True)}
    losses = {}
    for fp8, run in runs.items():
        run.train()
        losses[fp8] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(in_fp8(runs[True].model)) == 14 and not in_fp8(runs[False].model)
    assert losses[True] != losses[False] and losses[False][-1] < 0.9 * losses[False][0]
    worst = max(abs(a / b - 1) for a, b in zip(losses[True], losses[False], strict=True))
    print(f"fp8 against {'bf16' if bf16 else 'fp32'}: at most {worst:.2%} off")
    assert worst < 0.01


def test_gradient_checkpointing_gives_the_same_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        convert_to_fp8(model, worthwhile=0)
        if checkpointing:
            model.gradient_checkpointing_enable()
        one_loss(model).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_fp8_is_refused_where_it_cannot_help(tmp_path, caplog):
    args = SimpleNamespace(fp8=True, device=torch.device("mps"), torch_compile=False)
    with pytest.raises(ValueError, match=r"fp8=True needs a CUDA card .* found mps"):
        use_fp8(tiny_model(), args)
    with pytest.raises(ValueError, match="no linear layer of LlamaForCausalLM is large enough"):
        make("ours", tmp_path, fp8=True)
    layer = nn.Linear(1024, 1024, device="meta")
    use_fp8(nn.Sequential(layer), SimpleNamespace(fp8=True, device=torch.device("cpu"), torch_compile=False))
    assert "emulated on the CPU" in caplog.text


def test_torchao_takes_trainable_layers(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(precision, "has_fp8", lambda device: True)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024).requires_grad_(False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert convert_to_fp8(model, compiled=True) == 2
    assert type(model[0]).__module__.startswith("torchao.") and in_fp8(model) == ["1"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# bf16 weights


def test_rounding_is_exact_in_expectation():
    values = torch.cat([torch.randn(40), torch.tensor([1.0, -1.0, 0.0, 1.9999, -3e-39, 65535.5, 3.3895e38])])
    noise = torch.arange(65536, dtype=torch.int32)
    for value in values:
        rounded = round_stochastically(value.expand(65536), noise)
        finite = rounded.double()
        assert finite.isinf().sum() == 0 or value > 3.38e38
        if value < 3.38e38:
            assert finite.mean().item() == value.item()  # sums of so few distinct numbers are exact in fp64
            assert rounded.unique().numel() <= 2
    odd = torch.tensor([math.inf, -math.inf, math.nan]).view(torch.int32)
    odd = torch.cat([odd, torch.tensor([0x7FFFFFFF], dtype=torch.int32)]).view(torch.float32)
    rounded = round_stochastically(odd, torch.full((4,), 65535, dtype=torch.int32))
    assert rounded[:2].tolist() == [math.inf, -math.inf] and rounded[2:].isnan().all()


def test_fp32_weights_get_torchs_adamw():
    theirs = [torch.randn(9, 7).requires_grad_(), torch.randn(5).requires_grad_()]
    ours = [p.detach().clone().requires_grad_() for p in theirs]
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizers = [
        cls([{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:], "weight_decay": 0.0}], **options)
        for cls, p in ((torch.optim.AdamW, theirs), (StochasticAdamW, ours))
    ]
    for _ in range(10):
        for mine, reference in zip(ours, theirs, strict=True):
            reference.grad = torch.randn_like(reference)
            mine.grad = reference.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("state_dtype", [torch.float32, BF16])
def test_small_updates_arrive_on_average(state_dtype):
    """A constant gradient moves every weight by lr a step: 1/20 of the last bit of 1.0, which plain rounding loses."""
    steps, rate = 100, 2.0**-8 / 20
    runs = {}
    for name, make_optimizer in {
        "plain": lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0),
        "stochastic": lambda p: StochasticAdamW(p, lr=rate, state_dtype=state_dtype),
        "master": lambda p: MasterWeights(torch.optim.AdamW(p, lr=rate, weight_decay=0)),
    }.items():
        weight = torch.ones(4096, dtype=BF16, requires_grad=True)
        optimizer = make_optimizer([weight])
        for _ in range(steps):
            weight.grad = torch.full_like(weight, -0.5)
            optimizer.step()
        runs[name] = weight.detach().double().mean().item() - 1
    assert runs["plain"] == 0
    assert runs["master"] == pytest.approx(steps * rate, abs=2.0**-8)  # rounded once, at the end
    assert runs["stochastic"] == pytest.approx(steps * rate, rel=0.02)


def test_noise_depends_on_seed_step_and_parameter_alone():
    def run(seed, draws=0):
        torch.rand(draws)
        pair = [torch.ones(64, dtype=BF16, requires_grad=True) for _ in range(2)]
        optimizer = StochasticAdamW(pair, lr=1e-3, seed=seed)
        for _ in range(2):
            for weight in pair:
                weight.grad = torch.ones_like(weight)
            optimizer.step()
        return [weight.detach() for weight in pair]

    first, again, other = run(1), run(1, draws=3), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])


def test_master_weights_are_an_fp32_run_on_rounded_weights():
    model = tiny_model(dtype=BF16)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    by_hand = torch.optim.AdamW(masters, lr=1e-2, weight_decay=0.1)
    optimizer = MasterWeights(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    for _ in range(4):
        one_loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad.float()
        by_hand.step(), optimizer.step(), optimizer.zero_grad()
        for master, p in zip(masters, model.parameters(), strict=True):
            assert p.grad is None and torch.equal(p, master.bfloat16())


UPDATES = {
    "stochastic": {"bf16_update": "stochastic_rounding"},
    "stochastic, bf16 moments": {"bf16_update": "stochastic_rounding", "optim_args": "state_dtype=bfloat16"},
    "master": {"bf16_update": "fp32_master"},
    "master of adafactor": {"bf16_update": "fp32_master", "optim": "adafactor"},
}


@pytest.mark.parametrize("options", UPDATES.values(), ids=UPDATES)
def test_a_resumed_run_is_the_same_to_the_last_bit(options, tmp_path):
    common = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "learning_rate": 1e-3, **options}
    runs = [make("ours", tmp_path, model=tiny_model(dtype=BF16), **common) for _ in range(2)]
    start = weights(runs[0])
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert runs[1].window.first_step == 3
    moved = 0
    for name, value in weights(runs[0]).items():
        assert value.dtype == BF16 and torch.equal(weights(runs[1])[name], value)
        moved += (value != start[name]).sum().item()
    assert moved > 1000
    states = [run.optimizer.state_dict()["state"] for run in runs]
    moments = BF16 if "optim_args" in options else torch.float32
    for index, values in states[0].items():
        assert values.keys() == states[1][index].keys()
        assert ("master" in values) == (options["bf16_update"] == "fp32_master")
        for name, value in values.items():
            assert not isinstance(value, torch.Tensor) or value.ndim == 0 or value.dtype == moments
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][index][name])), name


def test_a_checkpoint_without_copies_is_refused(tmp_path):
    common = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make("ours", tmp_path, model=tiny_model(dtype=BF16), **common).train()
    run = make("ours", tmp_path, model=tiny_model(dtype=BF16), bf16_update="fp32_master", **common)
    with pytest.raises(ValueError, match="weights have no fp32 copy"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bf16_update": "exact"}, "choose plain, stochastic_rounding or fp32_master"),
        ({"bf16_update": "stochastic_rounding", "optim": "adafactor"}, "optim='adamw_torch' or .* found 'adafactor'"),
        ({"bf16_update": "fp32_master", "optim": "lomo"}, "does not work with optim='lomo'"),
        ({"bf16_update": "fp32_master"}, "no trainable weight is bfloat16"),
        ({"bf16_update": "stochastic_rounding", "optim_args": "rank=3"}, "optim_args='rank=3'"),
        ({"bf16_update": "fp32_master", "optimizers": (torch.optim.SGD([torch.ones(1)]), None)}, "but one was passed"),
    ],
)
def test_what_does_not_fit_is_named(options, named, tmp_path):
    dtype = BF16 if "optim_args" in options else torch.float32
    with pytest.raises(ValueError, match=named):
        make("ours", tmp_path, model=tiny_model(dtype=dtype), **options).train()


def test_sharded_parameters(tmp_path):
    """FSDP2 (here over one rank): fp8 layers see whole weights, and both updates give what they give unsharded."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for make_optimizer in (
            lambda p: StochasticAdamW(p, lr=1e-3, weight_decay=0.1),
            lambda p: MasterWeights(torch.optim.AdamW(p, lr=1e-3)),
        ):
            results = []
            for sharded in (False, True):
                model = tiny_model(dtype=BF16)
                assert convert_to_fp8(model, worthwhile=0) == 14
                if sharded:
                    for layer in model.model.layers:
                        fully_shard(layer)
                    fully_shard(model)
                optimizer = make_optimizer(list(model.parameters()))
                for _ in range(2):
                    one_loss(model).backward()
                    optimizer.step(), optimizer.zero_grad()
                results.append([p.full_tensor() if sharded else p for p in model.parameters()])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        await_gloo_threads()  # joined with the interpreter's lock held
        dist.destroy_process_group()


def test_statistics_are_fp32_while_training_in_bf16(tmp_path, monkeypatch):
    """Log-probabilities and losses of a model in bf16, by autocast or by its weights, are fp32."""
    seen = []

    def watch(logits, targets, form, outputs, out):
        seen.append((logits.dtype, out.lse.dtype, out.stats.logp.dtype))
        row_stats(logits, targets, form, outputs, out)

    monkeypatch.setattr(products, "row_stats", watch)
    for dtype in (torch.float32, BF16):
        args = SFTConfig(str(tmp_path), **(SETTINGS | {"bf16": True, "max_steps": 1}))
        run = SFTTrainer(tiny_model(dtype=dtype), args, train_dataset=tiny_rows(), processing_class=tiny_tokenizer())
        seen.clear()  # of the check that the head is understood, outside of autocast
        run.train()
        assert run.window.loss.dtype == torch.float32
        logits = torch.float32 if torch.cuda.is_available() else BF16  # a GPU writes bf16 products in fp32
        assert set(seen) == {(logits, torch.float32, torch.float32)}
