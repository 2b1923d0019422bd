"""TPOTrainer against TRL's on the same model, data and order, and its own rules."""

import copy
import functools
import json
import math

import pytest
import torch
from datasets import Dataset
from pair_runs import LAYOUTS, SETTINGS, assert_same_history, assert_same_interface, history, pair_rows, run
from tiny import tiny_model, tiny_tokenizer

tpo = pytest.importorskip("trl.experimental.tpo")

from fastalign import TPOConfig, TPOTrainer  # noqa: E402
from fastalign.cli.main import main  # noqa: E402

ours = functools.partial(run, TPOConfig, TPOTrainer)
theirs = functools.partial(run, tpo.TPOConfig, tpo.TPOTrainer)
LOSSES: dict[str, dict] = {
    "sigmoid": {"label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge", "beta": 0.1, "tpo_alpha": 0.3},
    "ipo": {"loss_type": "ipo", "beta": 0.5},
    "tpo-l": {"loss_type": "tpo-l", "beta": 2.0, "label_smoothing": 0.2, "tpo_l_gamma": 1.0},
    "no-gold": {"tpo_alpha": 0.0},
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_logged_number_equals_trl(name, tmp_path):
    reference = theirs(tmp_path / "trl", **LOSSES[name])
    for layout in LAYOUTS:
        assert_same_history(ours(tmp_path / layout, layout=layout, **LOSSES[name]), reference)


CASES: dict[str, dict] = {
    "chat": {"form": "chat", "gradient_accumulation_steps": 2},
    "implicit": {"form": "implicit"},
    "keep_start": {"max_length": 64},
    "keep_end": {"max_length": 40, "truncation_mode": "keep_end"},
    "lora": {"peft_config": {"r": 4, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj"]}},
    "their-collator": {"data_collator": 0},
}


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_data_adapters_and_collators_equal_trl(case, tmp_path):
    def options() -> dict:
        found = dict(CASES[case])
        if "peft_config" in found:
            peft = pytest.importorskip("peft")
            found["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", **found["peft_config"])
        if "data_collator" in found:
            found["data_collator"] = tpo.tpo_trainer.DataCollatorForTriplePreference(pad_token_id=0)
        return found

    assert_same_history(ours(tmp_path / "ours", **options()), theirs(tmp_path / "trl", **options()))


def test_streams_and_token_budgets_give_the_same_run(tmp_path):
    settings: dict = {
        "tpo_alpha": 0.0,
        "gradient_accumulation_steps": 2,
    }  # without the NLL, whose mean is over a micro-batch's tokens
    plain = ours(tmp_path / "plain", **settings)
    stream = ours(tmp_path / "stream", streamed=True, **settings)
    budget = ours(tmp_path / "budget", token_budget=400, **settings)
    for step, streamed, regrouped in zip(*map(history, (plain, stream, budget)), strict=True):
        assert streamed | {"epoch": step["epoch"]} == pytest.approx(step, rel=1e-5, abs=1e-7)
        for name in {"loss", "grad_norm", "eval_loss"} & set(step):
            assert regrouped[name] == pytest.approx(step[name], rel=1e-5)


def test_experts_are_balanced_where_asked(tmp_path):
    """The balancing loss is the model's own, times its weight, on top of the plain loss; shared prompts count once."""
    settings: dict = {"max_steps": 1, "gradient_accumulation_steps": 2}
    plain = ours(tmp_path / "plain", model=tiny_model("qwen3_moe"), **settings)
    balanced = ours(tmp_path / "balanced", model=tiny_model("qwen3_moe"), router_aux_loss_coef=0.5, **settings)
    first, second = history(plain)[0], history(balanced)[0]
    assert "aux_loss" not in first
    model, rows = tiny_model("qwen3_moe"), [plain.train_dataset[i] for i in range(6)]
    found = []
    for part in (rows[:3], rows[3:]):
        whole = [
            row["prompt_ids"] + row[f"{name}_ids"] for row in part for name in ("chosen", "rejected", "reference")
        ]
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in whole], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(ids)) for ids in whole], batch_first=True).long()
        with torch.no_grad():
            found.append(model(padded, attention_mask=mask, output_router_logits=True).aux_loss.item())
    assert second["aux_loss"] == pytest.approx(sum(found) / 2, rel=1e-5)
    assert second["loss"] == pytest.approx(first["loss"] + 0.5 * sum(found) / 2, rel=1e-5)


def test_first_loss_by_hand(tmp_path):
    """One triple of one-token answers: the loss from the model's own distribution of the next token."""
    row = {"prompt_ids": [1, 7, 8, 9], "chosen_ids": [11], "rejected_ids": [12], "reference_ids": [13]}
    model = tiny_model()
    with torch.no_grad():
        logp = model(torch.tensor([row["prompt_ids"]])).logits[0, -1].log_softmax(-1)
    chosen, rejected, gold = (logp[i].item() for i in (11, 12, 13))
    expected = math.log1p(math.exp(-0.3 * (chosen - rejected))) - 0.5 * gold
    rows = Dataset.from_list([row] * 6)
    trainer = ours(tmp_path, model=model, rows=rows, beta=0.3, tpo_alpha=0.5, max_steps=1)
    assert history(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_interface_is_that_of_trl():
    apart = frozenset({"bf16", "gradient_checkpointing", "pad_to_multiple_of"})
    assert_same_interface(TPOTrainer, tpo.TPOTrainer, TPOConfig, tpo.TPOConfig, apart)


def test_missing_gold_answers_are_named(tmp_path):
    with pytest.raises(ValueError, match="reference"):
        ours(tmp_path, rows=pair_rows().remove_columns("reference"))
    with pytest.raises(ValueError, match="`loss_type`"):
        TPOConfig("unused", use_cpu=True, loss_type="simpo")


@pytest.mark.parametrize("command", ["cpo", "orpo", "tpo"])
def test_commands_train_what_the_trainers_do(command, tmp_path, capsys):
    import fastalign

    folder, data = tmp_path / "model", tmp_path / "data.jsonl"
    tiny_model().save_pretrained(folder)
    copy.deepcopy(tiny_tokenizer()).save_pretrained(folder)
    data.write_text("\n".join(json.dumps(row) for row in pair_rows()))
    names = [name for name in SETTINGS if name not in ("report_to", "disable_tqdm")]
    options = [text for name in names for text in (f"--{name}", str(SETTINGS[name]))]
    out = tmp_path / "out"
    line = ["--model_name_or_path", str(folder), "--dataset_name", str(data), "--output_dir", str(out)]
    assert main([command, *line, "--dtype", "float32", "--report_to", "none", *options]) == 0
    config, trainer = (getattr(fastalign, f"{command.upper()}{kind}") for kind in ("Config", "Trainer"))
    direct = run(config, trainer, tmp_path / "direct")
    losses = [
        [step["loss"] for step in log if "loss" in step]
        for log in (direct.state.log_history, json.loads((out / "trainer_state.json").read_text())["log_history"])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == SETTINGS["max_steps"]
