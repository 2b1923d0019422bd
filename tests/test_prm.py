"""PRMTrainer against transformers' own trainer on sequences that the test builds by TRL's rules, token by token."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from test_parity_sft import TIMED, _text
from test_reward_head import classifier
from tiny import tiny_model, tiny_tokenizer

import fastalign
from fastalign.data.stepwise import StepCollator, prepare_stepwise_dataset

SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "use_cpu": True,
    "disable_tqdm": True,
}


def _data(n: int = 20) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": _text(i, 1 + i % 4),
                "completions": [_text(i + j, 1 + (i + j) % 3) for j in range(1 + i % 4)],
                "labels": [(i + j) % 3 != 0 for j in range(1 + i % 4)],
            }
            for i in range(n)
        ]
    )


def _expected(row, separator="\n", max_length=None, max_completion_length=None, last_only=False):
    """ids and labels of a row, one token after another."""
    tokenizer = tiny_tokenizer()

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = [tokenizer.bos_token_id, *encode(row["prompt"])]
    completion, labels = [], []
    for number, (step, label) in enumerate(zip(row["completions"], row["labels"], strict=True)):
        tokens = encode(step) + encode(separator)
        known = not last_only or number == len(row["labels"]) - 1
        completion += tokens
        labels += [-100] * (len(tokens) - 1) + [int(label) if known else -100]
    completion, labels = completion[:max_completion_length], labels[:max_completion_length]
    return (ids + completion)[:max_length], ([-100] * len(ids) + labels)[:max_length]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"separator": " and", "last_only": True},
        {"max_length": 30},
        {"max_completion_length": 12},
    ],
)
def test_labels_stand_at_the_ends_of_steps(options):
    names = {"separator": "step_separator", "last_only": "last_step_only"}
    given = {"max_length": None} | {names.get(k, k): v for k, v in options.items()}
    made = prepare_stepwise_dataset(_data(), tiny_tokenizer(), **given)
    expected = [_expected(row, **options) for row in _data()]
    expected = [(ids, labels) for ids, labels in expected if any(label != -100 for label in labels)]
    assert [(row["input_ids"], row["labels"]) for row in made] == expected
    stream = prepare_stepwise_dataset(IterableDataset.from_generator(_data().to_list), tiny_tokenizer(), **given)
    assert [(row["input_ids"], row["labels"]) for row in stream] == expected


def _trainer(folder, model=None, data=None, config=None, **arguments):
    return fastalign.PRMTrainer(
        model=classifier("llama", "Token") if model is None else model,
        args=fastalign.PRMConfig(str(folder), **(SETTINGS | (config or {}))),
        train_dataset=_data() if data is None else data,
        processing_class=copy.deepcopy(tiny_tokenizer()),
        **arguments,
    )


def _reference(folder, model, config, evaluation, last_only=False):
    """transformers' trainer with the model's own loss."""
    rows = [dict(zip(("input_ids", "labels"), _expected(row, last_only=last_only), strict=True)) for row in _data()]
    held_out = [dict(zip(("input_ids", "labels"), _expected(row), strict=True)) for row in evaluation]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    own = {"gradient_checkpointing": True, "logging_steps": 1}
    model.accepts_loss_kwargs = False  # its loss is a mean of the micro-batch, though its forward takes any argument
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **(SETTINGS | own | config)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held_out),
        data_collator=transformers.DataCollatorForTokenClassification(tiny_tokenizer()),
        compute_metrics=_accuracy,
    )


def _accuracy(prediction):
    pairs = [
        (int(np.argmax(logits)), label)
        for row, labels in zip(prediction.predictions, prediction.label_ids, strict=True)
        for logits, label in zip(row, labels, strict=True)
        if label != -100
    ]
    return {"accuracy": sum(guess == label for guess, label in pairs) / len(pairs)}


def _family(case: str):
    if case != "padded":
        return classifier({"last-only": "qwen2"}.get(case, case), "Token")
    torch.manual_seed(0)
    sizes = {"vocab_size": 331, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.BloomForTokenClassification(transformers.BloomConfig(**sizes, num_labels=2, pad_token_id=0))


@pytest.mark.parametrize("case", ["qwen3", "gpt2", "padded", "last-only"])
def test_every_number_equals_transformers(case, tmp_path):
    model = _family(case)
    last_only = case == "last-only"
    evaluation = _data().select(range(8))
    ours = _trainer(
        tmp_path,
        copy.deepcopy(model),
        config={"train_on_last_step_only": last_only},
        eval_dataset=evaluation,
    )
    assert ours.policy.flat == (case != "padded")
    theirs = _reference(tmp_path, model, {}, evaluation, last_only)
    for trainer in (ours, theirs):
        trainer.train()
        trainer.evaluate()
    assert len(ours.state.log_history) == len(theirs.state.log_history)
    for own, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert set(own) - set(other) <= {"accuracy", "num_tokens", "eval_num_tokens"} and set(other) <= set(own)
        for key in set(other) - TIMED - {"eval_model_preparation_time"}:
            assert math.isclose(own[key], other[key], rel_tol=1e-5, abs_tol=1e-7), (key, own[key], other[key])


def test_how_a_step_is_cut_into_batches_does_not_change_it(tmp_path):
    """A micro-batch counts by its labelled steps."""
    runs = []
    for size in ({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 1}, {"token_budget": 90}):
        accumulation = 4 // size.get("per_device_train_batch_size", 4)
        trainer = _trainer(tmp_path, config=size | {"gradient_accumulation_steps": accumulation})
        trainer.train()
        runs.append((trainer.state.log_history[0]["loss"], trainer.model.score.weight.detach().clone()))
    for loss, weight in runs[1:]:
        assert loss == pytest.approx(runs[0][0], rel=1e-5)
        torch.testing.assert_close(weight, runs[0][1], rtol=1e-5, atol=1e-6)


def test_a_collator_of_transformers_is_taken(tmp_path):
    collator = transformers.DataCollatorForTokenClassification(tiny_tokenizer())
    losses = []
    for given in (None, collator):
        trainer = _trainer(tmp_path, data_collator=given)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history[:-1]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_model_by_name_judges_steps_after_training(tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    trainer = _trainer(tmp_path, str(tmp_path / "lm"), config={"activation_offloading": True})
    assert trainer.model.config.num_labels == 2
    trainer.train()
    trainer.save_model(str(tmp_path / "prm"))
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "prm").eval()
    data = _data().select(range(4))
    predicted = trainer.predict(data)
    expected = []
    for row in data:
        ids, labels = _expected(row)
        where = [i for i, label in enumerate(labels) if label != -100]
        expected.append(loaded(input_ids=torch.tensor([ids])).logits[0, where].detach())
    torch.testing.assert_close(torch.tensor(predicted.predictions[0]), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="TokenClassification"):
        _trainer(tmp_path, classifier("llama", num_labels=2))
    with pytest.raises(ValueError, match="num_labels=1"):
        _trainer(tmp_path, classifier("llama", "Token", num_labels=1))
    with pytest.raises(ValueError, match="completions"):
        _trainer(tmp_path, data=Dataset.from_list([{"prompt": "a", "completion": "b"}]))
    with pytest.raises(ValueError, match="No row of the train dataset can be used"):
        _trainer(tmp_path, data=Dataset.from_list([{"prompt": "a", "completions": ["b", "c"], "labels": [True]}]))
    with pytest.raises(ValueError, match="once"):
        fastalign.PRMTrainer(train_dataset=_data())
    with pytest.raises(ValueError, match="max_completion_length"):
        fastalign.PRMConfig("o", max_completion_length=0, use_cpu=True)
    collator = StepCollator(pad_token_id=0, num_labels=2, flat=True, vocab_size=9)
    with pytest.raises(ValueError, match="row 1, position 0: 2 is no class"):
        collator([{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [2, -100]}])


def test_bad_rows_are_named_by_their_number_in_the_dataset(tmp_path, caplog):
    rows = [{"prompt": "a", "completions": ["b", "c"], "labels": [True, False]} for _ in range(2003)]
    rows[1] = rows[1] | {"prompt": "a " * 60}
    rows[1203] = rows[1203] | {"labels": [True]}
    rows[1500] = rows[1500] | {"completions": ["b", ""]}
    rows[1600] = rows[1600] | {"completions": None}
    rows[1700] = rows[1700] | {"completions": [None, "c"]}
    rows[2002] = rows[2002] | {"labels": [None, True]}
    data, tokenizer = Dataset.from_list(rows), tiny_tokenizer()
    kept = prepare_stepwise_dataset(data, tokenizer, max_length=40)
    assert len(kept) == 1998
    reasons = [
        "3 dropped: a column holds no value, or one of another kind than the first row's (row 1600, 1700, 2002)",
        "1 dropped: `completions` and `labels` are not equally many (row 1203)",
        "1 dropped: no label of a step is left, as there is none or the limits on length cut it off (row 1)",
        "1 kept: a step says nothing (row 1500)",
    ]
    assert all(reason in caplog.text for reason in reasons)
    stream = prepare_stepwise_dataset(data.to_iterable_dataset(), tokenizer, max_length=40)
    assert [row["labels"] for row in stream] == kept["labels"]
    assert len(prepare_stepwise_dataset(data, tokenizer, max_length=40, bad_rows="drop")) == 1997
    with pytest.raises(ValueError, match=r"\(row 1600, 1700, 2002\).*\(row 1203\).*\(row 1\).*bad_rows='drop'"):
        _trainer(tmp_path, data=data, config={"bad_rows": "error", "max_length": 40})
