"""DPOTrainer beyond what parity shows: settings, data forms, budgets, streams, evaluation, saving, errors."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
import torch
from dpo_runs import losses, make, train
from test_parity_dpo import pairs
from test_parity_sft import _lora
from tiny import tiny_model, tiny_tokenizer

import fastalign
from fastalign import DPOConfig, DPOTrainer, given_data, prepare_policy
from fastalign.cli.main import main
from fastalign.pairs import PairAdapter, group_lengths

trl = pytest.importorskip("trl")
SAME = {"rtol": 1e-5, "atol": 2e-6}  # the margin is a difference of sums of about 100 nats, times beta


@pytest.fixture
def padded(monkeypatch):
    """Every model takes padded rows."""
    monkeypatch.setattr(given_data, "prepare_policy", lambda model, **_: prepare_policy(model, allow_flat=False))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    trainer = train(tmp_path_factory.mktemp("plain"), ref_model=tiny_model(seed=1), share_prefix=False)
    return losses(trainer)


# Settings


def test_fields_and_constructor_are_those_of_trl():
    ours, theirs = ({f.name: f for f in dataclasses.fields(lib.DPOConfig)} for lib in (fastalign, trl))
    assert theirs.keys() <= ours.keys()
    config, other = DPOConfig("x", use_cpu=True), trl.DPOConfig("x", use_cpu=True)
    own = set(theirs) - {f.name for f in dataclasses.fields(trl.SFTConfig)} | {"learning_rate", "max_length", "beta"}
    for name in own:
        assert getattr(config, name) == getattr(other, name), name
    signatures = [list(inspect.signature(lib.DPOTrainer.__init__).parameters) for lib in (fastalign, trl)]
    assert signatures[0] == signatures[1]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"loss_type": "sigmoide"}, r"loss_type \['sigmoide'\]: choose among sigmoid, hinge"),
        ({"loss_type": []}, "give at least one loss"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "a weight for each or none"),
        ({"ld_alpha": 1.5}, "`ld_alpha` is 1.5; it must be from 0 to 1"),
        ({"f_divergence_type": "kl"}, "Invalid `f_divergence_type` 'kl'"),
        ({"f_divergence_type": "forward_kl", "loss_type": "nca_pair"}, "cancels only in losses of the margin"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing=0.5: .* below 0.5 for robust"),
        ({"loss_type": "exo_pair"}, "label_smoothing=0 with exo_pair, which takes its logarithm"),
        ({"use_weighting": True, "loss_type": "aot_unpaired"}, "sorted losses belong to no single pair"),
        ({"loss_type": "aot", "token_budget": 100}, "sorts those of a micro-batch"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "numbers of an old one"),
        ({"ref_model_mixup_alpha": 2.0}, "`ref_model_mixup_alpha` is 2.0"),
        ({"precompute_ref_batch_size": 0}, "`precompute_ref_batch_size` is 0"),
        ({"beta": 0.0, "loss_type": ["sigmoid", "ipo"]}, r"`beta` is 0, but \['ipo'\] aim at margins"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "`discopop_tau` is 0.0, which .*: give one above 0"),
        ({"label_smoothing_factor": 0.1}, "no smoothing over the vocabulary"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        DPOConfig("unused", use_cpu=True, **settings)


def test_smoothing_that_no_loss_reads_is_said(caplog):
    DPOConfig("unused", use_cpu=True, label_smoothing=0.1, loss_type=["sigmoid", "robust"])
    assert "label_smoothing" not in caplog.text
    DPOConfig("unused", use_cpu=True, label_smoothing=0.1)
    assert "`label_smoothing` is ignored with `loss_type='sigmoid'`; set it to 0.0." in caplog.text


def test_models_that_need_padded_rows_refuse_flat_settings(tmp_path, padded):
    for name, error in {"share_prefix": "cannot share a prompt", "padding_free": "needs padded rows"}.items():
        with pytest.raises(ValueError, match=f"`{name}=True`.*{error}: flat batches were not asked for"):
            make(tmp_path, **{name: True})


def test_images_are_refused(tmp_path):
    data = pairs().add_column("image", [None] * 16)
    with pytest.raises(ValueError, match="has images"):
        make(tmp_path, data)


# Options and forms of data that leave the numbers alone


@pytest.mark.parametrize(
    "option",
    [
        {"share_prefix": True},
        {"share_prefix": None},
        {"token_budget": 250},
        {"token_budget": 150, "share_prefix": True},
        {"gradient_checkpointing": False},
        {"activation_offloading": True},
        {"dataloader_num_workers": 1},
        {"pad_to_multiple_of": 16, "share_prefix": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"padding_free": True},
    ],
    ids=str,
)
def test_option_leaves_losses_alone(option, plain, tmp_path):
    found = losses(train(tmp_path, ref_model=tiny_model(seed=1), **option))
    compared = 2 if "token_budget" in option else 3  # metrics are means of micro-batches, which it makes unequal
    torch.testing.assert_close(found[:, :compared], plain[:, :compared], **SAME)


@pytest.mark.parametrize("form", ["ids", "stream", "columns"])
def test_form_of_the_data_leaves_losses_alone(form, plain, tmp_path):
    data = pairs()
    if form == "stream":
        data = data.to_iterable_dataset()
    elif form == "columns":
        data = data.add_column("other", list(range(16)))
    else:
        prepared = make(tmp_path).train_dataset
        data = prepared.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    found = losses(train(tmp_path, data, ref_model=tiny_model(seed=1)))
    torch.testing.assert_close(found, plain, **SAME)


@pytest.mark.parametrize("share", [False, True, None])
@pytest.mark.parametrize("rows", ["flat", "padded"])
def test_micro_batches_keep_to_the_token_budget(rows, share, tmp_path, request):
    if rows == "padded":
        request.getfixturevalue("padded")
        share = None
    trainer = make(tmp_path, share_prefix=share, token_budget=240, per_device_train_batch_size=8)
    batches = list(trainer.get_train_dataloader())
    assert sum(batch.num_rows for batch in batches) == 32
    assert max(batch.input_ids.numel() for batch in batches) <= 240 and len(batches) > 2
    flat, shared = rows == "flat", trainer.data_collator.share
    lengths = group_lengths(trainer.train_dataset, ("chosen", "rejected"), flat=flat, share=shared)
    single = [trainer.data_collator([row]).input_ids.numel() for row in trainer.train_dataset]
    assert lengths.tolist() == single == trainer.example_lengths(trainer.train_dataset).tolist()
    assert shared is (flat and share is not False)  # prompts are long here, so sharing them pays


def test_length_column_is_read_where_there_is_one(tmp_path):
    trainer = make(tmp_path)
    data = trainer.train_dataset.add_column("length", list(range(16)))
    assert trainer.example_lengths(data).tolist() == list(range(16))


def test_collator_that_returns_something_else_is_refused(tmp_path):
    trainer = train(tmp_path, data_collator=make(tmp_path).data_collator)  # one of ours is taken as it is
    assert len(losses(trainer)) == 2
    with pytest.raises(TypeError, match="got \\['input_ids'\\]"):
        PairAdapter(lambda rows: {"input_ids": rows}, flat=True)([[1, 2]])


# Evaluation, saving, commands


def test_metrics_of_predictions_see_logits_and_labels(tmp_path):
    seen = {}

    def compute(prediction):
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"rows": len(prediction.label_ids)}

    options = {"per_device_eval_batch_size": 4, "share_prefix": True, "compute_metrics": compute}
    trainer = make(tmp_path, eval_dataset=pairs().select(range(5)), **options)
    metrics = trainer.evaluate()
    logits, labels = torch.from_numpy(seen["logits"]), torch.from_numpy(seen["labels"])
    assert metrics["eval_rows"] == 10 and labels.shape == logits.shape[:2]
    logp = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    sums = (logp * (labels[:, 1:] != -100)).sum(1)
    # logged is the mean of two batches, of 4 pairs and of 1, each with its chosen rows first
    assert metrics["eval_logps/chosen"] == pytest.approx(((sums[:4].mean() + sums[8]) / 2).item(), rel=1e-5)
    assert metrics["eval_logps/rejected"] == pytest.approx(((sums[4:8].mean() + sums[9]) / 2).item(), rel=1e-5)


def test_several_sets_and_another_one_are_evaluated(tmp_path):
    sets = {"a": pairs().select(range(4)), "b": pairs("implicit").select(range(4, 8))}
    trainer = make(tmp_path, eval_dataset=sets, ref_model=tiny_model(seed=1))
    together = trainer.evaluate()
    alone = trainer.evaluate(sets["b"])
    assert alone["eval_loss"] == pytest.approx(together["eval_b_loss"]) != together["eval_a_loss"]
    assert alone["eval_rewards/margins"] == pytest.approx(together["eval_b_rewards/margins"], abs=1e-6)
    streamed = trainer.evaluate(sets["b"].to_iterable_dataset())
    assert streamed["eval_loss"] == pytest.approx(alone["eval_loss"])
    assert streamed["eval_samples_per_second"] * streamed["eval_runtime"] == pytest.approx(4, rel=0.05)  # pairs


def test_a_resumed_run_continues_with_the_same_reference(tmp_path):
    peft = pytest.importorskip("peft")

    def model():
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_model(), _lora(init_lora_weights=False))

    settings = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path, model=model(), **settings)
    resumed = make(tmp_path, model=model(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    np.testing.assert_allclose(losses(resumed)[-2:], losses(whole)[-2:], rtol=1e-6)


def test_router_loss_is_part_of_the_loss(tmp_path):
    model = tiny_model("qwen3_moe")
    one, other = (
        train(tmp_path, model=model, max_steps=1, learning_rate=0.0, router_aux_loss_coef=c) for c in (0.5, 0.0)
    )
    row, without = one.state.log_history[0], other.state.log_history[0]
    assert row["loss"] == pytest.approx(without["loss"] + 0.5 * row["aux_loss"], rel=1e-6)
    assert "aux_loss" not in without and one.data_collator.share is False and other.data_collator.share == "auto"


def test_command_trains_from_a_file(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    file, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    line = f"dpo --model_name_or_path {tmp_path / 'model'} --dataset_name {file} --output_dir {out} --max_steps 1 "
    line += "--loss_type sigmoid sft --loss_weights 1 0.5 --logging_steps 1 --report_to none --use_cpu --bf16 false"
    assert main(line.split()) == 0
    logged = json.loads((out / "trainer_state.json").read_text())["log_history"][0]
    expected = train(tmp_path / "own", loss_type=["sigmoid", "sft"], loss_weights=[1, 0.5], max_steps=1)
    assert "rewards/margins" in logged and logged["loss"] != pytest.approx(np.log(2))
    assert isinstance(expected, DPOTrainer)
