"""KTOTrainer against TRL's on the same model, data and order, and what it does that TRL does not."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from pair_runs import assert_same_interface
from tiny import tiny_model, tiny_tokenizer

import fastalign
from fastalign.flat_attention import free_tokens
from fastalign.free_tokens import FreeTokens, teach_layers
from fastalign.policy import head_loss, prepare_policy
from fastalign.unpaired import JudgedCollator

trl = pytest.importorskip("trl")

PARITY_RTOL = 1e-5  # fp32: sums over tokens are taken in another order
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
APART = ("runtime", "per_second", "total_flos", "preparation_time", "health/")  # parts of keys that TRL lacks or times


def words(i: int, length: int) -> str:
    return " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(length))


def judged(n: int = 17) -> Dataset:
    """Rows with prompts of 1 to 12 words; the labels of some batches of 4 are all alike."""
    rows = [
        {"prompt": words(i, 1 + 5 * i % 12), "completion": " " + words(i + 1, 1 + 3 * i % 5), "label": i % 7 < 4}
        for i in range(n)
    ]
    return Dataset.from_list(rows)


def pairs(n: int = 8) -> Dataset:
    turn = lambda role, i, k: [{"role": role, "content": words(i, k)}]  # noqa: E731
    rows = [
        {"prompt": turn("user", i, 3), "chosen": turn("assistant", i + 1, 2), "rejected": turn("assistant", i + 2, 4)}
        for i in range(n)
    ]
    return Dataset.from_list(rows)


def make(library, folder, family="llama", data=None, evaluation=None, padded=False, **given):
    kind = library.KTOConfig
    arguments = {name: given.pop(name) for name in list(given) if name not in kind.__dataclass_fields__}
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    } | given
    trainer = library.KTOTrainer(
        tiny_model(family),
        args=kind(**settings),
        train_dataset=judged() if data is None else data,
        eval_dataset=evaluation,
        processing_class=copy.deepcopy(tiny_tokenizer()),
        **({"ref_model": tiny_model(family, seed=3)} if "peft_config" not in arguments else {}) | arguments,
    )
    if padded:
        trainer.data_collator.flat = False
    return trainer


def history(trainer, evaluate=None) -> list[dict]:
    trainer.train()
    if evaluate is not None:
        trainer.evaluate()
    log = trainer.state.log_history
    return [{k: v for k, v in entry.items() if not any(part in k for part in APART)} for entry in log]


def assert_same(ours: list[dict], theirs: list[dict], beta: float = 0.1) -> None:
    """Every number up to 1e-5, or to what fp32 leaves of the difference of two sums of log-probabilities."""
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert set(own) == set(other), set(own) ^ set(other)
        rounding = 4e-7 * max([abs(v) for k, v in other.items() if "logps/" in k], default=0)
        for key in own:
            apart = rounding * (beta if "rewards/" in key else 1) if "rewards/" in key or key.endswith("kl") else 1e-7
            assert math.isclose(own[key], other[key], rel_tol=PARITY_RTOL, abs_tol=apart), (key, own, other)


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


CASES = {  # name -> (model family, data, settings, settings of ours alone)
    "shared": ("llama", judged, {}, {"share_prefix": True}),
    "apart": ("llama", judged, {}, {"share_prefix": False}),
    "padded": ("llama", judged, {}, {"padded": True}),
    "conversations, paired": ("qwen3", pairs, {"beta": 0.3}, {}),
    "apo": ("qwen2", judged, {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"}, {}),
    "weights": ("llama", judged, {"desirable_weight": 0.7, "undesirable_weight": 1.3, "max_length": 14}, {}),
    "accumulation": ("llama", judged, {"gradient_accumulation_steps": 2, "logging_steps": 2}, {}),
    "experts": ("qwen3_moe", judged, {"router_aux_loss_coef": 0.05}, {"share_prefix": True}),
    "window": ("gemma2", judged, {"gradient_checkpointing": False}, {"share_prefix": True}),
    "recurrent": ("mamba", judged, {}, {}),
    "lora": ("llama", judged, {"peft_config": lora}, {}),
    "precomputed": ("llama", judged, {"precompute_ref_log_probs": True}, {}),
    "synchronised": ("llama", judged, {"sync_ref_model": True, "ref_model_sync_steps": 2}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_logged_number_equals_trl(case, tmp_path):
    family, data, settings, own = CASES[case]
    settings = {name: value() if callable(value) else value for name, value in settings.items()}
    evaluation = data().select(range(7)) if case in ("shared", "padded", "precomputed") else None
    runs = [
        history(make(library, tmp_path / library.__name__, family, data(), evaluation, **settings, **more), evaluation)
        for library, more in ((fastalign, own), (trl, {}))
    ]
    assert_same(*runs, settings.get("beta", 0.1))


def test_interface_is_that_of_trl():
    assert_same_interface(fastalign.KTOTrainer, trl.KTOTrainer, fastalign.KTOConfig, trl.KTOConfig)


def test_other_ways_to_the_same_run(tmp_path):
    """A stream, cached log-probabilities of the reference, and a collator of TRL's change no number."""
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    collator = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=1024)
    renamed = lambda rows: collator([{**r, "KL_completion_ids": r["kl_completion_ids"]} for r in rows])  # noqa: E731
    plain = history(make(fastalign, tmp_path / "plain"))
    for name, settings in {
        "stream": {"data": judged().to_iterable_dataset(num_shards=1)},
        "cached": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 7},
        "cached again": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 7},
        "collator": {"data_collator": renamed, "remove_unused_columns": False},
    }.items():
        run = history(make(fastalign, tmp_path / name, **settings))
        for entry in run:
            entry.pop("epoch")
        assert_same(run, [{k: v for k, v in entry.items() if k != "epoch"} for entry in plain])


def test_a_token_budget_changes_no_sum(tmp_path):
    settings = {"loss_type": "apo_zero_unpaired", "per_device_train_batch_size": 8, "max_steps": 2}
    runs = [make(fastalign, tmp_path / str(budget), token_budget=budget, **settings) for budget in (None, 120)]
    for entries in zip(*(history(run)[:-1] for run in runs), strict=True):
        own, other = ({name: entry[name] for name in ("loss", "grad_norm")} for entry in entries)
        assert own == pytest.approx(other, rel=1e-5)
    run = history(make(fastalign, tmp_path / "kto", token_budget=200, max_steps=2))
    assert all(0 < entry["loss"] < 1 and entry["kl"] >= 0 for entry in run[:-1])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe", "gpt_oss", "gpt_neox", "gpt2"])
def test_free_tokens_have_the_same_values_and_cost_no_backward(family, share):
    """Loss, hidden states and gradients equal those where all tokens have one and the free ones are detached."""
    torch.manual_seed(1)
    rows = [
        {"prompt_ids": torch.randint(5, 331, (m,)).tolist(), "completion_ids": torch.randint(5, 331, (n,)).tolist()}
        for m, n in ((9, 4), (1, 7), (14, 1))
    ]
    rows = [row | {"kl_completion_ids": rows[i - 1]["completion_ids"], "label": True} for i, row in enumerate(rows)]
    batch = JudgedCollator(kl=True, pad_token_id=0, share=share, pad_to_multiple_of=16)(rows)
    of_free = batch.row % 2 == 1
    factors = torch.randn(batch.num_scored, 32)
    results, seen = [], []
    for apart in (False, True):
        model = tiny_model(family).train()
        assert prepare_policy(model).flat
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if apart:
            assert teach_layers(model) and teach_layers(model)
            copy.deepcopy(model)
        inner = model.base_model
        layer = (inner.h if family == "gpt2" else inner.layers)[-1]
        norm = layer.ln_1 if family == "gpt2" else layer.input_layernorm
        norm.register_forward_hook(lambda m, i, o, a=apart: seen.append((a, torch.is_grad_enabled(), o.shape[1])))

        def op(hidden, weight, **head):
            kept = torch.where(of_free[:, None], hidden.detach(), hidden)
            return (kept * factors).sum() + (weight * weight).sum(), hidden.detach()

        with free_tokens(FreeTokens.of(batch)) if apart else nullcontext():
            found = head_loss(model, batch, op)
        found.loss.backward()
        results.append((found.loss, found.result, {n: p.grad for n, p in model.named_parameters()}))
    (loss, states, gradients), (free_loss, free_states, free_gradients) = results
    torch.testing.assert_close(free_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(free_states, states, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(free_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    free, total = batch.extras["free_at"].numel(), batch.input_ids.numel()
    recomputed = [(grad, n) for apart, grad, n in seen if apart]
    assert recomputed == [(True, total - free), (False, free), (True, total - free)]  # forward twice, once again


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size"),
        ({"train_sampling_strategy": "random"}, "sequential"),
        ({"loss_type": "dpo"}, "loss_type"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "sync_ref_model"),
        ({"share_prefix": True, "family": "mamba"}, "share_prefix"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(fastalign, tmp_path, **settings)


def test_unequal_labels_are_warned_of(tmp_path, caplog):
    make(fastalign, tmp_path / "a")
    assert "`desirable_weight` to 0.55..0.73 or `undesirable_weight` to 1.38..1.83" in caplog.text  # 11 good, 6 bad
    caplog.clear()
    make(fastalign, tmp_path / "b", undesirable_weight=1.5)
    assert "make up" not in caplog.text
    good = judged().map(lambda _: {"label": True})
    make(fastalign, tmp_path / "c", data=good)
    assert "All 17 answers are desirable, and no weight makes up for it" in caplog.text


def test_a_last_batch_of_one_row_is_warned_of(tmp_path, caplog):
    make(fastalign, tmp_path)
    assert caplog.text.count("The last batch of 17 rows with `per_device_train_batch_size=4` has one row") == 1
    caplog.clear()
    quiet = {"dataloader_drop_last": True}, {"per_device_train_batch_size": 5}, {"loss_type": "apo_zero_unpaired"}
    for settings in quiet:
        make(fastalign, tmp_path, **settings)
    assert "The last batch" not in caplog.text


def _kl_run(folder, data, **settings):
    """(the dataset it trains on, log-probabilities of mismatched answers, losses and z of the steps)."""
    trainer = make(fastalign, folder, data=data, precompute_ref_log_probs=True, **settings)
    log = history(trainer)
    steps = [entry[name] for name in ("loss", "kl") for entry in log if name in entry]
    return trainer.train_dataset, trainer.train_dataset["ref_kl_logps"][:], steps


def test_given_log_probabilities_of_other_mismatched_answers_are_computed_again(tmp_path, caplog):
    saved, expected, steps = _kl_run(tmp_path, judged(16))
    marked = saved.map(lambda row: {"ref_kl_logps": row["ref_kl_logps"] + 1})
    assert _kl_run(tmp_path, marked)[1] == pytest.approx([value + 1 for value in expected], rel=1e-6)  # taken as given
    assert "other mismatched answers" not in caplog.text
    alone = marked.remove_columns("kl_completion_ids")
    assert _kl_run(tmp_path, alone)[1:] == (pytest.approx(expected, rel=1e-5), pytest.approx(steps, rel=1e-4))
    for rows, size in ((saved.shuffle(seed=0), 4), (saved, 8)):
        caplog.clear()
        found = _kl_run(tmp_path, rows, per_device_train_batch_size=size)
        assert "`ref_kl_logps` are of other mismatched answers" in caplog.text
        fresh = rows.remove_columns(["ref_logps", "ref_kl_logps", "kl_completion_ids"])
        wanted = _kl_run(tmp_path, fresh, per_device_train_batch_size=size)
        assert found[1] == pytest.approx(wanted[1], rel=1e-5)
        assert found[2] == pytest.approx(wanted[2], rel=1e-4)
    with pytest.raises(ValueError, match="The stream's `ref_kl_logps` are of other mismatched answers"):
        _kl_run(tmp_path, saved.shuffle(seed=0).to_iterable_dataset())
    run = history(make(fastalign, tmp_path, data=saved.to_iterable_dataset(), precompute_ref_log_probs=True))
    assert [entry["loss"] for entry in run if "loss" in entry] == pytest.approx(steps[: len(steps) // 2], rel=1e-5)


def test_prepared_data_are_evaluated_after_the_reference_is_gone(tmp_path):
    data = judged(6)
    trainer = make(fastalign, tmp_path, evaluation=data, precompute_ref_log_probs=True, ref_model=None, max_steps=1)
    trainer.train()
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == trainer.evaluate()["eval_loss"]
