"""RewardTrainer against TRL's on the same model, data and order; what it adds: flat, shared and budgeted batches."""

import copy
import json
import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from test_parity_sft import TIMED, _text
from test_reward_head import classifier, rows
from tiny import tiny_model, tiny_tokenizer

import fastalign
from fastalign.cli.main import main
from fastalign.data.pair_batches import AnswerCollator
from fastalign.reward_head import prepare_reward_model, read_before_padding, scores
from fastalign.trainers.reward import ANSWERS, RewardCollator

PARITY_RTOL = 1e-5  # fp32: sums over tokens are taken in another order


def _texts(n: int = 24) -> list[dict]:
    sizes = [(2 + (5 * i) % 9, 1 + (3 * i) % 7, 1 + (5 * i) % 6) for i in range(n)]
    return [
        {"prompt": _text(i, a), "chosen": " " + _text(i + 1, b), "rejected": " " + _text(i + 5, c)}
        for i, (a, b, c) in enumerate(sizes)
    ]


def _data(form: str) -> Dataset:
    found = _texts()
    if form == "margin":
        found = [row | {"margin": 0.1 * (i % 5)} for i, row in enumerate(found)]
    if form in ("implicit", "tokens"):
        found = [{a: row["prompt"] + row[a] for a in ANSWERS} for row in found]
    if form == "tokens":
        tokenizer = tiny_tokenizer()
        found = [{f"{a}_ids": tokenizer(row[a])["input_ids"] for a in ANSWERS} for row in found]
    if form.startswith("chat"):
        user = [[{"role": "user", "content": row["prompt"]}] for row in found]
        said = [{a: [{"role": "assistant", "content": row[a]}] for a in ANSWERS} for row in found]
        if form == "chat":
            found = [{"prompt": u} | s for u, s in zip(user, said, strict=True)]
        else:
            found = [{a: u + s[a] for a in ANSWERS} for u, s in zip(user, said, strict=True)]
    return Dataset.from_list(found)


def _lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], modules_to_save=["score"]
    )


CASES = {  # name -> (form of the data, model family, config of both, config of ours, trainer arguments)
    "explicit": ("explicit", "llama", {"optim": "adamw_torch", "learning_rate": 1e-4}, {"share_prefix": False}, {}),
    "shared": ("explicit", "qwen3", {}, {"share_prefix": True}, {}),
    "implicit": ("implicit", "qwen2", {}, {}, {}),
    "margin": ("margin", "llama", {"center_rewards_coefficient": 0.01}, {}, {}),
    "chat": ("chat", "qwen3", {}, {}, {}),
    "chat-implicit": ("chat-implicit", "qwen2", {}, {}, {}),
    "tokens": ("tokens", "llama", {}, {}, {}),
    "filtered": ("explicit", "llama", {"max_length": 60}, {}, {}),
    "accumulation": ("explicit", "gpt2", {"gradient_accumulation_steps": 3}, {}, {}),
    "sliding-window": ("explicit", "mistral", {}, {"share_prefix": True}, {}),
    "padded": ("explicit", "bert", {}, {}, {}),
    "eos-pads": ("explicit", "llama", {}, {"share_prefix": True}, {}),
    "lora": ("explicit", "llama", {"gradient_checkpointing": False}, {}, {"peft_config": _lora}),
}


def _model(family: str):
    if family == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"vocab_size": 331, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=32, num_labels=1, pad_token_id=0))
    return classifier(family, sliding_window=24) if family == "mistral" else classifier(family)


def _settings(folder, **changed) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",  # AdamW makes updates of the rounding errors where a gradient is 0 (biases of keys)
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "disable_tqdm": True,
    } | changed


def _trainer(library, folder, data=None, model=None, tokenizer=None, config=None, **arguments):
    return library.RewardTrainer(
        model=classifier() if model is None else model,
        args=library.RewardConfig(**_settings(folder, **(config or {}))),
        train_dataset=_data("explicit") if data is None else data,
        processing_class=copy.deepcopy(tiny_tokenizer()) if tokenizer is None else tokenizer,
        **arguments,
    )


def _history(library, case, folder) -> list[dict]:
    form, family, config, own, extra = CASES[case]
    tokenizer = copy.deepcopy(tiny_tokenizer())
    if case == "eos-pads":
        tokenizer.pad_token = tokenizer.eos_token
    data = _data(form)
    trainer = _trainer(
        library,
        folder,
        data,
        _model(family),
        tokenizer,
        config | (own if library is fastalign else {}),
        eval_dataset=data.select(range(10)),
        **{name: make() for name, make in extra.items()},
    )
    if library is fastalign:
        assert trainer.policy.flat == (case != "padded")
        assert trainer.policy.shares_prefix or not own.get("share_prefix")
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


@pytest.mark.parametrize("case", CASES)
def test_every_logged_number_equals_trl(case, tmp_path):
    trl = pytest.importorskip("trl")
    ours, theirs = _history(fastalign, case, tmp_path / "ours"), _history(trl, case, tmp_path / "theirs")
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert set(own) == set(other), set(own) ^ set(other)
        for key in set(own) - TIMED:
            of_rewards = key.endswith(("_reward", "margin"))  # differences of rewards to 4
            close = math.isclose(own[key], other[key], rel_tol=PARITY_RTOL, abs_tol=1e-5 if of_rewards else 1e-7)
            assert close, (case, key, own[key], other[key])


def test_fields_and_defaults_are_trls():
    trl = pytest.importorskip("trl")
    theirs = {f.name: f for f in trl.RewardConfig.__dataclass_fields__.values()}
    ours = fastalign.RewardConfig("o", use_cpu=True), trl.RewardConfig("o", use_cpu=True)
    for name in (
        "max_length",
        "learning_rate",
        "disable_dropout",
        "center_rewards_coefficient",
        "activation_offloading",
    ):
        assert getattr(ours[0], name) == getattr(ours[1], name)
    assert set(theirs) - set(fastalign.RewardConfig.__dataclass_fields__) <= {"use_liger_kernel"}


def _weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize("changed", [{"token_budget": 230}, {"gradient_accumulation_steps": 2}])
def test_how_a_step_is_cut_into_batches_does_not_change_it(changed, tmp_path):
    size = {"per_device_train_batch_size": 4 // changed.get("gradient_accumulation_steps", 1)}
    whole = _trainer(fastalign, tmp_path, config={"max_steps": 4})
    whole.train()
    cut = _trainer(fastalign, tmp_path, config={"max_steps": 4} | changed | size)
    cut.train()
    for (name, value), other in zip(_weights(whole).items(), _weights(cut).values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-6, msg=name)


def test_pairs_that_are_too_long_are_left_out_and_counted(tmp_path, caplog):
    data = _data("explicit")
    tokenizer = tiny_tokenizer()
    longest = [max(len(tokenizer(r["prompt"] + r[a] + "</s>")["input_ids"]) for a in ANSWERS) for r in data]
    limit = sorted(longest)[len(longest) // 2]
    with caplog.at_level(logging.WARNING, "fastalign"):
        trainer = _trainer(fastalign, tmp_path, data, config={"max_length": limit})
    left_out = sum(n > limit for n in longest)
    assert len(trainer.train_dataset) == len(data) - left_out > 0
    assert f"{left_out} dropped" in caplog.text and "max_length" in caplog.text


def test_streams_and_evaluation_of_another_set(tmp_path):
    data = _data("explicit")
    expected = _trainer(fastalign, tmp_path, data, config={"max_steps": 3})
    expected.train()
    stream = _trainer(
        fastalign, tmp_path, IterableDataset.from_generator(data.to_list), config={"max_steps": 3, "bf16": False}
    )
    stream.train()
    for (name, value), other in zip(_weights(expected).items(), _weights(stream).values(), strict=True):
        torch.testing.assert_close(other, value, msg=name)
    assert stream.evaluate(data.select(range(8)))["eval_loss"] == pytest.approx(
        expected.evaluate(data.select(range(8)))["eval_loss"]
    )


def test_compute_metrics_gets_the_rewards_of_pairs(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["rewards"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"won": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    data = _data("explicit").select(range(10))
    config = {"per_device_eval_batch_size": 4}
    trainer = _trainer(fastalign, tmp_path, eval_dataset=data, compute_metrics=compute_metrics, config=config)
    found = trainer.evaluate()
    tokenizer, model = tiny_tokenizer(), classifier()
    texts = [[row["prompt"] + row[a] + "</s>" for a in ANSWERS] for row in data]
    expected = [[model(**tokenizer(t, return_tensors="pt")).logits.item() for t in pair] for pair in texts]
    np.testing.assert_allclose(seen["rewards"], expected, rtol=1e-5, atol=1e-6)
    assert not seen["labels"].any()
    assert found["eval_won"] == np.mean([c > r for c, r in expected])
    np.testing.assert_allclose(trainer.predict(data).predictions, expected, rtol=1e-5, atol=1e-6)


def test_legacy_columns_and_a_cloned_template_with_new_tokens(tmp_path):
    peft = pytest.importorskip("peft")
    legacy = _data("tokens").rename_columns({f"{a}_ids": f"{a}_input_ids" for a in ANSWERS})
    with pytest.warns(FutureWarning, match="chosen_input_ids"):
        renamed = _trainer(fastalign, tmp_path, legacy).train_dataset
    assert renamed.to_list() == _trainer(fastalign, tmp_path, _data("tokens")).train_dataset.to_list()
    source = copy.deepcopy(tiny_tokenizer())
    source.add_tokens(["<new>"], special_tokens=True)
    source.chat_template = "{% for m in messages %}<new>{{ m['content'] }}{% endfor %}"
    source.save_pretrained(tmp_path / "source")
    trainer = _trainer(
        fastalign,
        tmp_path,
        _data("chat"),
        config={"chat_template_path": str(tmp_path / "source"), "max_steps": 1},
        peft_config=peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]),
    )
    new = trainer.processing_class.convert_tokens_to_ids("<new>")
    row = trainer.train_dataset[0]
    assert [*row["prompt_ids"], *row["chosen_ids"]].count(new) == 2
    before = _weights(trainer)
    trainer.train()
    moved = [name for name, value in _weights(trainer).items() if not torch.equal(value, before[name])]
    assert any("trainable_tokens" in name for name in moved)


def test_a_collator_of_trl_is_taken(tmp_path):
    trl_reward = pytest.importorskip("trl.trainer.reward_trainer")
    own = _trainer(fastalign, tmp_path, _data("margin"))
    given = _trainer(
        fastalign, tmp_path, _data("margin"), data_collator=trl_reward.DataCollatorForPreference(pad_token_id=0)
    )
    own.train()
    given.train()
    losses = [[entry["loss"] for entry in t.state.log_history[:-1]] for t in (own, given)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_saved_model_gives_the_rewards_that_were_trained(tmp_path):
    """Loaded by its name without fastalign, padded, it reads where the trainer read, also if the end token pads."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    trainer = _trainer(fastalign, tmp_path, tokenizer=tokenizer, config={"share_prefix": True})
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    data = _data("explicit").select(range(6))
    texts = [row["prompt"] + row[a] + "</s>" for row in data for a in ANSWERS]
    found = loaded(**tokenizer(texts, padding=True, return_tensors="pt")).logits.view(-1, 2)
    torch.testing.assert_close(torch.tensor(trainer.predict(data).predictions), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["flat", "shared", "padded"])
def test_sequences_are_read_before_their_padding(form):
    pad, ids = 2, rows((4, 3, 2))
    pairs = [  # prompt, chosen, rejected -> positions read in the whole sequences
        (ids[0], [9, 9, pad], [pad], 5, 3),
        ([7, pad], [8, pad, pad], [pad, pad], 2, 0),
        ([pad], [pad], [pad, 5], 0, 2),
        ([], ids[1], [6, pad], 2, 0),
    ]
    made = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r, *_ in pairs]
    options = {"pad_token_id": pad, "flat": form != "padded", "share": form == "shared", "read": "last"}
    batch = RewardCollator(ANSWERS, **options)(made)
    flat_positions = batch.position_ids.flatten()
    assert flat_positions[batch.source].tolist() == [n for pair in pairs for n in pair[3:]]
    model = classifier()
    model.config.pad_token_id = pad
    assert prepare_reward_model(model).shares_prefix
    wholes = [p + answer for p, c, r, *_ in pairs for answer in (c, r)]
    alone = torch.cat([model(input_ids=torch.tensor([whole])).logits for whole in wholes])
    torch.testing.assert_close(scores(model, batch), alone, rtol=1e-5, atol=1e-5)
    plain = AnswerCollator(ANSWERS, **options)([{"prompt_ids": [4], "chosen_ids": [5], "rejected_ids": [6, 7]}])
    assert read_before_padding(plain, pad) is plain


def test_a_model_by_name_gets_one_label_and_adapters_train_its_head(tmp_path, caplog):
    peft = pytest.importorskip("peft")
    tiny_model("llama").save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    trainer = _trainer(
        fastalign,
        tmp_path,
        model=str(tmp_path / "lm"),
        config={"activation_offloading": True, "gradient_checkpointing": False, "eos_token": "<|im_end|>"},
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    )
    assert "SEQ_CLS" in caplog.text
    assert trainer.model.config.num_labels == 1
    assert trainer.model.config.eos_token_id == trainer.processing_class.convert_tokens_to_ids("<|im_end|>")
    before = _weights(trainer)
    trainer.train()
    moved = {name for name, value in _weights(trainer).items() if not torch.equal(value, before[name])}
    assert any("score.modules_to_save" in name for name in moved) and any("lora_B" in name for name in moved)
    caplog.clear()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    _trainer(fastalign, tmp_path, peft_config=config)
    assert "modules_to_save" in caplog.text


@pytest.mark.parametrize("command, adapters", [("reward", True), ("prm", False)])
def test_commands(command, adapters, tmp_path):
    """From pairs or judged steps to a model that loads as a classifier."""
    import transformers

    if adapters:
        pytest.importorskip("peft")
    if command == "reward":
        rows_ = _texts()
    else:
        rows_ = [{"prompt": "a", "completions": ["b", "c d"], "labels": [True, i % 2 == 0]} for i in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows_)))
    tiny_model("qwen2").config.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    line = ["--model_name_or_path", str(tmp_path / "model"), "--from_scratch", "--dataset_name", str(data)]
    line += ["--max_steps", "2", "--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    line += ["--output_dir", str(tmp_path / "out"), *(["--use_peft"] if adapters else [])]
    assert main([command, *line]) == 0
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert math.isfinite(log[-1]["train_loss"])
    if adapters:
        found = (tmp_path / "out" / "adapter_config.json").read_text()
        assert json.loads(found)["task_type"] == "SEQ_CLS" and "score" in json.loads(found)["modules_to_save"]
    else:
        loaded = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
        assert loaded.config.num_labels == 2


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_labels=3"):
        _trainer(fastalign, tmp_path, model=classifier(num_labels=3))
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification"):
        _trainer(fastalign, tmp_path, model=tiny_model("llama"))
    with pytest.raises(ValueError, match="eos_token"):
        _trainer(fastalign, tmp_path, config={"eos_token": "<nothing>"})
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        fastalign.RewardConfig("o", label_smoothing_factor=0.1, use_cpu=True)
    with pytest.raises(ValueError, match="share_prefix"):
        _trainer(fastalign, tmp_path, model=_model("bert"), config={"share_prefix": True})
