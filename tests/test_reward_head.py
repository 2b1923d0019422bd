"""Classification heads on flat batches against one sequence at a time through the model's ordinary forward."""

import copy
import io
from dataclasses import replace

import pytest
import torch
import transformers
from fastalign_kernels.attention import Segments
from tiny import FAMILIES, SIZES
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastalign.data.batch import name_read
from fastalign.data.collate import collate_flat, collate_padded
from fastalign.data.pair_batches import AnswerCollator
from fastalign.loop.distributed import await_gloo_threads
from fastalign.policy import unwrap
from fastalign.reward_head import prepare_reward_model, score_loss, scores

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "phi3", "olmo", "qwen3_moe", "gpt_oss")
TOKEN_HEADS = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox")


def classifier(family: str = "llama", task: str = "Sequence", *, seed: int = 0, **overrides):
    """A random classification model of `family`, one label for sequences and two for tokens, without dropout."""
    config_name, _, own = FAMILIES[family]
    settings = {k: v for k, v in (SIZES | own | overrides).items() if v is not None}
    settings.setdefault("num_labels", 1 if task == "Sequence" else 2)
    config = getattr(transformers, config_name)(**settings)
    stem = config_name.removesuffix("TextConfig").removesuffix("Config")
    if config_name == "Gemma3TextConfig":
        stem = "Gemma3Text"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{stem}For{task}Classification")(config)
        head = model.score if hasattr(model, "score") else model.classifier
        with torch.no_grad():
            head.weight.mul_(20.0)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def rows(lengths=(9, 1, 14, 5), seed: int = 0) -> list[list[int]]:
    ids = torch.randint(5, 331, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return [part.tolist() for part in ids.split(list(lengths))]


def read_at(batch, positions: list[list[int]], ids: list[list[int]]):
    """`batch` with `source` at these positions of each row."""
    width = batch.input_ids.shape[-1] if batch.is_padded else None
    starts = [i * width for i in range(len(ids))] if width else batch.cu_seqlens[:-1].tolist()
    batch.source = torch.tensor([s + p for s, part in zip(starts, positions, strict=True) for p in part])
    return batch


def weighted(found):
    """A loss in which every score has a weight of its own."""
    weight = torch.arange(1, found.numel() + 1).view_as(found).float()
    return (found * weight).sum() / weight.sum(), found.detach()


def run(model, batch) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    out = score_loss(model, batch, weighted)
    out.loss.backward()
    return out.result, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_at_a_time(model, ids, positions) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    parts = []
    for row, where in zip(ids, positions, strict=True):
        logits = model(input_ids=torch.tensor([row])).logits
        parts.append(logits if logits.ndim == 2 else logits[0, where])
    found = torch.cat(parts)
    weighted(found)[0].backward()
    return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], **TOLERANCE)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, rtol=1e-5, atol=1e-5 * max(1.0, grad.abs().max().item()))


CASES = [("Sequence", f) for f in DECODERS] + [("Token", f) for f in TOKEN_HEADS]


@pytest.mark.parametrize("task, family", CASES, ids=[f"{f}-{t}" for t, f in CASES])
def test_flat_and_padded_scores_equal_each_sequence_alone(task, family):
    model, ids = classifier(family, task), rows()
    inner = [[len(row) - 1] if task == "Sequence" else sorted({0, len(row) // 2, len(row) - 1}) for row in ids]
    expected = one_at_a_time(copy.deepcopy(model), ids, inner)
    info = prepare_reward_model(model)
    assert info.flat, info.reason
    assert_same(run(model, read_at(collate_flat(ids), inner, ids)), expected)
    padded = copy.deepcopy(model)
    assert_same(run(padded, read_at(collate_padded(ids, pad_token_id=0), inner, ids)), expected)


def last_layer(model):
    inner = model.base_model
    return (inner.h if hasattr(inner, "h") else inner.layers)[-1]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_the_last_layer_computes_what_is_read(family, share):
    """Behind its attention, the tokens of which a score is asked; scores and gradients are those of all."""
    prompts, answers = rows((6, 9, 7)), rows((5, 1, 8, 3, 4, 2), seed=1)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    data = [dict(zip(names, row, strict=True)) for row in zip(prompts, answers[::2], answers[1::2], strict=True)]
    options = {"pad_token_id": 0, "share": share, "read": "last", "pad_to_multiple_of": 16}
    batch = AnswerCollator(("chosen", "rejected"), **options)(data)
    model, counts = classifier(family), []
    assert prepare_reward_model(model).shares_prefix
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    layer = last_layer(model)
    behind = layer.ln_2 if family == "gpt2" else layer.post_attention_layernorm
    behind.register_forward_hook(lambda module, given, out: counts.append(out.numel() // out.shape[-1]))
    everything = replace(batch, extras={k: v for k, v in batch.extras.items() if k != "read"})
    assert_same(run(model, batch), run(model, everything))
    assert counts == [6] * 2 + [len(batch.input_ids)] * 2  # with what checkpointing runs again


def test_a_layer_that_needs_every_token_behind_its_attention_computes_all(caplog):
    """The check finds it, says so, and the scores are right."""
    model, ids, kept = classifier("llama"), rows(), []

    def add_first(module, given, out):
        first = kept[0]
        kept.clear()
        return out + first

    last_layer(model).input_layernorm.register_forward_hook(lambda module, given, out: kept.append(out))
    last_layer(model).mlp.register_forward_hook(add_first)
    last = [[len(row) - 1] for row in ids]
    expected = one_at_a_time(copy.deepcopy(model), ids, last)
    with caplog.at_level("INFO"):
        assert prepare_reward_model(model).flat
    assert "computes every token" in caplog.text
    kept.clear()
    assert_same(run(model, name_read(read_at(collate_flat(ids), last, ids))), expected)


@pytest.mark.parametrize("family, reason", [("bert", "pool"), ("bloom", "outside")])
def test_a_model_that_cannot_be_packed_is_padded(family, reason):
    own = {"vocab_size": 331, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_labels": 1}
    if family == "bert":
        config = transformers.BertConfig(**own, intermediate_size=32, pad_token_id=0)
        model = transformers.BertForSequenceClassification(config).eval()
    else:
        model = transformers.BloomForSequenceClassification(transformers.BloomConfig(**own, pad_token_id=0)).eval()
    assert not prepare_reward_model(model).flat
    ids = rows()
    last = [[len(row) - 1] for row in ids]
    expected = one_at_a_time(model, ids, last)
    assert_same(run(model, read_at(collate_padded(ids, pad_token_id=0), last, ids)), expected)


def test_the_prepared_model_is_otherwise_what_it_was(tmp_path):
    model, ids = classifier("qwen2"), torch.tensor(rows((6, 6)))
    before, names = model(input_ids=ids).logits, list(model.state_dict())
    prepare_reward_model(model)
    scores(model, read_at(collate_flat(ids.tolist()), [[5], [5]], ids.tolist()))
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, before)
    assert loaded.config.architectures == ["Qwen2ForSequenceClassification"]
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.load(stream, weights_only=False)(input_ids=ids).logits, before)


@pytest.mark.parametrize("variant", ["saved", "lora", "dora"])
def test_adapters_and_a_saved_head(variant):
    peft = pytest.importorskip("peft")
    extra = {"modules_to_save": ["score"]} if variant == "saved" else {"modules_to_save": []}
    modules = ["q_proj", "v_proj"] if variant == "saved" else ["q_proj", "score"]
    config = peft.LoraConfig(r=4, target_modules=modules, use_dora=variant == "dora", **extra)
    model = peft.get_peft_model(classifier("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.eval()
    ids = rows()
    last = [[len(row) - 1] for row in ids]
    expected = one_at_a_time(copy.deepcopy(model), ids, last)
    assert any("score" in name for name in expected[1])
    assert prepare_reward_model(model).flat
    assert_same(run(model, name_read(read_at(collate_flat(ids), last, ids))), expected)
    with model.disable_adapter():
        off = scores(model, read_at(collate_flat(ids), last, ids))
    plain = torch.cat([classifier("llama")(input_ids=torch.tensor([row])).logits for row in ids])
    torch.testing.assert_close(off, plain, **TOLERANCE)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("task", ["Sequence", "Token"])
def test_the_wrapped_model_is_called(task, wrapper, tmp_path):
    """DDP and FSDP2 gather weights and reduce gradients in hooks of its forward; checkpointing runs layers again."""
    model, ids = classifier("llama", task), rows()
    last = [[len(row) - 1] for row in ids]
    prepare_reward_model(model)
    expected = run(model, read_at(collate_flat(ids), last, ids))
    model.zero_grad()
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model.gradient_checkpointing_enable()
        wrapped: torch.nn.Module = model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if wrapper == "ddp":
            wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        else:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        assert unwrap(wrapped) is model
        result, grads = run(wrapped, name_read(read_at(collate_flat(ids), last, ids)))
        whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    finally:
        await_gloo_threads()  # joined with the interpreter's lock held
        torch.distributed.destroy_process_group()
    assert_same((result, {name.removeprefix("module."): grad for name, grad in whole.items()}), expected)


def test_rewards_are_scored_in_the_precision_of_the_head():
    """Under bf16 autocast the ordinary head rounds rewards to 8 bits; asked for single positions it does not."""
    model, ids = classifier("llama"), rows()
    last = [[len(row) - 1] for row in ids]
    prepare_reward_model(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scores(model, read_at(collate_flat(ids), last, ids))
    assert found.dtype == torch.float32
    assert (found != found.bfloat16().float()).all()


def test_a_head_of_zeros_does_not_hide_that_sequences_mix(monkeypatch):
    """The check of packing looks at hidden states."""
    model = classifier("llama")
    torch.nn.init.zeros_(model.score.weight)

    def one_segment(base, batch):
        return Segments(batch.cu_seqlens[[0, -1]], int(batch.cu_seqlens[-1]))

    monkeypatch.setattr("fastalign.policy._segments", one_segment)
    assert not prepare_reward_model(model).flat
