"""References: what they say, that they stay frozen, that cached numbers equal computed ones, how they follow."""

import pytest
import torch
from dpo_runs import first_batch, losses, make, train
from test_parity_dpo import pairs
from test_parity_sft import _lora
from tiny import tiny_model
from torch import nn
from transformers import LlamaForCausalLM

from fastalign import BEMACallback, SyncRefModelCallback, logits_forward, reference_models
from fastalign import reference as module
from fastalign.loop.batching import batches_by_length
from fastalign.loop.weights import content_hash
from fastalign.pairs import disable_dropout
from fastalign.policy import prepare_policy, token_stats
from fastalign.reference import answer_logps

SUMS = {"rtol": 1e-5, "atol": 1e-4}  # sums of about 30 log-probabilities of 5 nats


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(module, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(model: nn.Module, part: str = "") -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if part in name}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def answer_sums(model, batch) -> torch.Tensor:
    """(R,) from the full logits of a batch that is not shared."""
    prepare_policy(model)
    with torch.no_grad():
        logp = logits_forward(model, batch).logits.flatten(0, -2)[batch.source].log_softmax(-1)
    logp = logp.gather(1, batch.targets[:, None])[:, 0]
    return torch.zeros(batch.num_rows, dtype=torch.float64).index_add(0, batch.row, logp.double())


# What a reference says


@pytest.mark.parametrize("share", [False, True])
def test_a_new_adapter_is_switched_off_for_the_reference(tmp_path, share):
    trainer = train(tmp_path, peft_config=_lora(), share_prefix=share, learning_rate=0.1)
    unshared = first_batch(make(tmp_path, share_prefix=False))
    batch = first_batch(trainer)
    assert trainer.ref_model is None and trainer.reference.mode == "adapter_off"
    found = trainer.reference.logps(trainer.model_wrapped, batch)
    torch.testing.assert_close(found, answer_sums(tiny_model(), unshared), **SUMS)
    with torch.no_grad():
        policy = answer_logps(batch, token_stats(trainer.model, batch).stats.logp)
    assert (found - policy).abs().max() > 1  # training has moved the policy


def test_an_adapter_that_is_trained_further_leaves_its_copy_alone(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), _lora(init_lora_weights=False))
    trainer = make(tmp_path, model=model, share_prefix=False, learning_rate=0.1)
    before, batch = weights(model, ".ref."), first_batch(trainer)
    assert before.keys() == {name.replace(".default.", ".ref.") for name in weights(model, ".default.")}
    start = trainer.reference.logps(trainer.model, batch)
    trainer.train()
    assert same(before, weights(model, ".ref.")) and trainer.reference.mode == "ref_adapter"
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".default." not in name)
    assert model.active_adapter == "default" and model.training
    assert torch.equal(trainer.reference.logps(trainer.model_wrapped, batch), start)


def test_a_second_model_stays_frozen_and_keeps_its_dtype(tmp_path):
    given = tiny_model(seed=1).to(torch.float64)
    before = weights(given)
    trainer = train(tmp_path, ref_model=given, learning_rate=0.1, share_prefix=False)
    assert trainer.ref_model is given and same(before, weights(given)) and not given.training
    batch = first_batch(trainer)
    expected = answer_sums(tiny_model(seed=1), batch)
    found = trainer.reference.logps(trainer.model, batch)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, **SUMS)


def test_a_model_without_a_file_is_copied_and_a_name_is_loaded(tmp_path):
    model = tiny_model(seed=2)
    trainer = make(tmp_path, model=model)
    assert trainer.ref_model is not model and same(weights(model), weights(trainer.ref_model))
    tiny_model(seed=3).save_pretrained(tmp_path / "other")
    trainer = make(tmp_path, model=model, ref_model=str(tmp_path / "other"))
    assert same(weights(tiny_model(seed=3)), weights(trainer.ref_model))


def test_a_policy_that_was_changed_after_loading_is_noticed(tmp_path, caplog):
    tiny_model(seed=2).save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    make(tmp_path, model=model)
    assert "changed in memory" not in caplog.text
    with torch.no_grad():
        model.model.norm.weight += 0.1
    trainer = make(tmp_path, model=model)
    assert "the weights of `model` are others: it was changed in memory" in caplog.text
    assert same(weights(tiny_model(seed=2)), weights(trainer.ref_model))


def test_the_policy_itself_is_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="`model` and `ref_model` are the same object"):
        make(tmp_path, model=model, ref_model=model)
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="it would be compared with itself"):
        make(tmp_path, model=peft.get_peft_model(model, _lora(), adapter_name="ref"))


def test_dropout_never_reaches_the_reference(tmp_path):
    config = _lora()
    config.lora_dropout = 0.5
    trainer = make(tmp_path, peft_config=config, disable_dropout=False, share_prefix=False)
    batch = first_batch(trainer)
    trainer.model.train()
    assert torch.equal(*(trainer.reference.logps(trainer.model, batch) for _ in range(2)))
    assert all(part.training for part in trainer.model.modules())
    disable_dropout(trainer.model)
    assert {part.p for part in trainer.model.modules() if isinstance(part, nn.Dropout)} == {0.0}
    attention = trainer.model.get_base_model().model.layers[0].self_attn
    attention.attention_dropout = 0.3
    disable_dropout(trainer.model)
    assert attention.attention_dropout == 0.0


# Cached


@pytest.mark.parametrize("kind", ["policy", "model", "adapter"])
@pytest.mark.parametrize("share", [False, True])
def test_cached_log_probabilities_train_as_computed_ones(tmp_path, kind, share):
    def options():
        own = {"ref_model": tiny_model(seed=1)} if kind == "model" else {}
        return own | ({"peft_config": _lora()} if kind == "adapter" else {}) | {"share_prefix": share}

    cached = train(tmp_path, precompute_ref_log_probs=True, precompute_ref_batch_size=3, **options())
    computed = train(tmp_path, **options())
    torch.testing.assert_close(losses(cached), losses(computed), rtol=2e-5, atol=2e-6)
    assert (cached.ref_model is None) == (kind != "model")


def test_the_cache_is_found_again_and_follows_weights_data_and_settings(tmp_path, cache, monkeypatch):
    computed = []
    compute = module.Reference._compute
    monkeypatch.setattr(module.Reference, "_compute", lambda *a: computed.append(a[2]) or compute(*a))

    def columns(**options):
        trainer = make(tmp_path, **({"precompute_ref_log_probs": True} | options))
        return trainer.train_dataset["ref_chosen_logps"][:]

    first = columns(eval_dataset=pairs().select(range(5)))
    assert computed == ["train", "eval"] and len(list(cache.rglob("*.npy"))) == 2
    assert columns(beta=0.5, learning_rate=1e-2, seed=7) == first and len(computed) == 2
    assert columns(model=tiny_model(seed=1)) != first
    assert columns(ref_model=tiny_model(seed=1)) != first
    columns(ld_alpha=0.5)
    columns(data=pairs(n=12))
    assert len(computed) == 6


def test_the_cache_follows_what_weights_do_not_say(tmp_path, cache):
    peft = pytest.importorskip("peft")

    def columns(model, **options) -> list[float]:
        trainer = make(tmp_path, model=model, precompute_ref_log_probs=True, **options)
        return trainer.train_dataset["ref_chosen_logps"][:]

    def adapted(lora_alpha: int):
        config = _lora(init_lora_weights=False)
        config.lora_alpha = lora_alpha
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_model(), config)

    other = tiny_model(rms_norm_eps=0.1)
    other.load_state_dict(tiny_model().state_dict())
    assert columns(tiny_model()) != columns(other)
    assert columns(adapted(8)) != columns(adapted(64))
    assert len(list(cache.rglob("*.npy"))) == 4
    assert columns(adapted(8)) == columns(adapted(8)) and len(list(cache.rglob("*.npy"))) == 4
    files = set()
    for fp8 in (False, True):
        trainer = make(tmp_path)
        trainer.args.fp8 = fp8
        files.add(trainer.reference._file(trainer.train_dataset))
    assert len(files) == 2


def test_log_probabilities_of_a_given_collators_batches_are_not_kept(tmp_path, cache):
    """What it makes of a row may be something else the next time, of which the cache knows nothing."""
    for length in (100, 3):
        own = make(tmp_path).data_collator

        def cut(rows, own=own, length=length):
            return own([row | {"chosen_ids": row["chosen_ids"][:length]} for row in rows])

        options = {"precompute_ref_log_probs": True, "data_collator": cut, "max_steps": 1}
        first = train(tmp_path, model=tiny_model(), **options).state.log_history[0]
        assert abs(first["rewards/chosen"]) < 1e-5, length  # the policy still is its reference


def test_given_columns_are_taken_as_they_are(tmp_path):
    data = pairs().add_column("ref_chosen_logps", [-2.0] * 16).add_column("ref_rejected_logps", [-3.0] * 16)
    trainer = make(tmp_path, data, precompute_ref_log_probs=True)
    batch = first_batch(trainer)
    assert trainer.reference.logps(trainer.model, batch).tolist() == [-2.0, -3.0] * 4


def test_what_cannot_be_cached_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a dataset with a length, not a stream"):
        make(tmp_path, pairs().to_iterable_dataset(), precompute_ref_log_probs=True)
    trainer = train(tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="the reference was the policy before training"):
        trainer.evaluate(pairs("implicit").select(range(4)))
    trainer = train(tmp_path, precompute_ref_log_probs=True, ref_model=tiny_model(seed=1))
    online = train(tmp_path, ref_model=tiny_model(seed=1))
    found = [run.evaluate(pairs("implicit").select(range(4)))["eval_loss"] for run in (trainer, online)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    batch = first_batch(trainer)
    batch.extras.pop("ref_rejected_logps")
    with pytest.raises(ValueError, match="the batch has no ref_rejected_logps"):
        trainer.reference.logps(trainer.model, batch)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [None, 40])
def test_batches_by_length_hold_every_row_once_within_the_budget(padded, budget):
    lengths = torch.randint(1, 30, (57,), generator=torch.Generator().manual_seed(0)).numpy()
    batches = batches_by_length(lengths, budget, 3, padded=padded)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(57))
    cost = [lengths[b].max() * len(b) if padded else lengths[b].sum() for b in batches]
    longest = sorted(lengths)[-3:]
    assert max(cost) <= (budget or (max(longest) * 3 if padded else sum(longest)))
    assert len(batches) < 57 / 3 or budget


def test_the_digest_of_weights_sees_each_value_name_and_type():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    start = content_hash(model)
    assert content_hash(model) == start
    with torch.no_grad():
        model[1].bias[1] += 1e-6
    changed = content_hash(model)
    assert changed != start and content_hash(model, skip=("1.bias",)) != changed
    assert content_hash(nn.Sequential(model[0], nn.Identity(), model[1])) != changed
    assert content_hash(model.to(torch.bfloat16)) not in (start, changed)


# References that move


def test_sync_moves_the_reference_towards_the_policy(tmp_path):
    model, reference = tiny_model(seed=0), tiny_model(seed=1)
    policy, before = weights(model), weights(reference)
    trainer = make(tmp_path, model=model, ref_model=reference, sync_ref_model=True, ref_model_sync_steps=2)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SyncRefModelCallback))
    trainer.state.global_step = 1
    callback.on_step_end(trainer.args, trainer.state, None, model=model)
    assert same(before, weights(reference))
    trainer.state.global_step = 2
    callback.on_step_end(trainer.args, trainer.state, None, model=model)
    for name, value in weights(reference).items():
        torch.testing.assert_close(value, 0.6 * policy[name] + 0.4 * before[name])
    with pytest.raises(ValueError, match="not supported with adapters"):
        make(tmp_path, peft_config=_lora(), sync_ref_model=True)


def test_bema_equals_trl_and_becomes_the_reference(tmp_path):
    from trl import BEMACallback as Theirs

    settings = {"update_freq": 2, "update_after": 1, "lag": 3, "multiplier": 0.5, "min_ema_multiplier": 0.1}
    ours = BEMACallback(**settings, update_ref_model=True, ref_model_update_freq=5)
    theirs = Theirs(**settings)
    trainer = train(tmp_path, ref_model=tiny_model(seed=1), max_steps=5, learning_rate=1e-2, callbacks=[ours, theirs])
    expected = dict(theirs.running_model.named_parameters())
    assert ours.weights.keys() == expected.keys()
    for name, value in ours.weights.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-5, atol=1e-7)
        assert torch.equal(trainer.ref_model.get_parameter(name).detach(), value)
    saved = type(trainer.model).from_pretrained(tmp_path / "bema")
    for name, value in weights(saved).items():
        torch.testing.assert_close(value, ours.weights[name])


@pytest.mark.parametrize("kind", ["sync", "bema"])
def test_a_resumed_run_continues_with_the_reference_that_has_moved(tmp_path, kind):
    def begun(folder):
        bema = BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=2)
        moved = {"sync_ref_model": True, "ref_model_sync_steps": 2} if kind == "sync" else {"callbacks": [bema]}
        options = {"max_steps": 5, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3} | moved
        return make(tmp_path / folder, **options), bema

    whole, averaged = begun("whole")
    whole.train()
    resumed, averaged_later = begun("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(losses(resumed)[-2:], losses(whole)[-2:])
    assert same(weights(resumed.model), weights(whole.model)) and same(averaged.weights, averaged_later.weights)
    assert same(weights(resumed.ref_model), weights(whole.ref_model))
    assert not same(weights(whole.ref_model), weights(tiny_model()))


def test_bema_without_a_second_model_cannot_move_the_reference(tmp_path):
    callback = BEMACallback(update_ref_model=True)
    with pytest.raises(ValueError, match="needs a trainer with a reference model of its own"):
        train(tmp_path, peft_config=_lora(), callbacks=[callback])
    with pytest.raises(ValueError, match="update_freq=0"):
        BEMACallback(update_freq=0)


def test_bema_saves_an_adapter_and_tied_weights(tmp_path):
    callback = BEMACallback(update_freq=1)
    train(tmp_path / "lora", peft_config=_lora(), callbacks=[callback], learning_rate=1e-2)
    from safetensors.torch import load_file

    adapter = load_file(tmp_path / "lora" / "bema" / "adapter_model.safetensors")
    for name, value in adapter.items():
        head, _, tail = name.rpartition(".weight")
        torch.testing.assert_close(value, callback.weights[f"{head}.default.weight{tail}"])
    callback = BEMACallback(update_freq=1)
    trainer = train(tmp_path / "tied", model=tiny_model("qwen2"), callbacks=[callback], learning_rate=1e-2)
    saved = type(trainer.model).from_pretrained(tmp_path / "tied" / "bema")
    torch.testing.assert_close(saved.lm_head.weight.detach(), callback.weights["model.embed_tokens.weight"])


def test_a_policy_changed_in_memory_needs_its_own_copy_as_reference(tmp_path, caplog):
    tiny_model().save_pretrained(tmp_path / "model")

    def loaded():
        return LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)

    make(tmp_path, model=loaded())
    assert "changed in memory" not in caplog.text
    model = loaded()
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1  # far from the beginning
    make(tmp_path, model=model)
    assert "the weights of `model` are others: it was changed in memory" in caplog.text
    with torch.device("meta"):  # as on ranks that load no weights
        empty = LlamaForCausalLM(model.config)
    assert not reference_models._differ(empty, model, "") and not reference_models._differ(model, empty, "")
    model = loaded()
    rows, size = model.get_input_embeddings().weight.shape
    model.resize_token_embeddings(rows + 3)
    shapes = rf"embed_tokens.weight is \({rows + 3}, {size}\), there \({rows}, {size}\)"
    with pytest.raises(ValueError, match=rf"{shapes}.*pass `ref_model=copy.deepcopy\(model\)`"):
        make(tmp_path, model=model)
