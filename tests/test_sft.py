"""SFTTrainer beyond what parity shows: data forms, adapters, saving, options that must not change numbers, errors."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_parity_sft import MARKED, _lora, _rows
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from fastalign import SFTConfig, SFTTrainer

LOSS_RTOL = 2e-6
TRAINER_ARGUMENTS = [
    "peft_config",
    "formatting_func",
    "data_collator",
    "compute_loss_func",
    "compute_metrics",
    "eval_dataset",
    "preprocess_logits_for_metrics",
]


def _train(tmp_path, data=None, *, model=None, family="llama", steps=4, **more):
    passed = {name: more.pop(name) for name in TRAINER_ARGUMENTS if name in more}
    tokenizer = copy.deepcopy(more.pop("tokenizer", tiny_tokenizer()))
    settings = {"per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3, "bf16": False}
    settings |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_steps": steps}
    trainer = SFTTrainer(
        model=tiny_model(family) if model is None else model,
        args=SFTConfig(output_dir=str(tmp_path / "out"), **(settings | more)),
        train_dataset=_rows("completion") if data is None else data,
        processing_class=tokenizer,
        **passed,
    )
    trainer.train()
    return trainer


def _losses(trainer) -> np.ndarray:
    return np.array([(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return _losses(_train(tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize(
    "option",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"selective": True}},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"activation_offloading": True},
        {"token_budget": 100},
        {"dataloader_num_workers": 1},
        {"pad_to_multiple_of": 16},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"padding_free": True},
        {"torch_empty_cache_steps": 1},
    ],
    ids=lambda option: next(iter(option)),
)
def test_option_leaves_losses_and_gradient_norms_alone(option, plain, tmp_path):
    np.testing.assert_allclose(_losses(_train(tmp_path, **option)), plain, rtol=LOSS_RTOL)


def test_custom_collator_of_padded_dictionaries_gives_the_same_numbers(plain, tmp_path):
    def pad(rows):
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name, fill):
            return torch.tensor([list(row[name]) + [fill] * (width - len(row[name])) for row in rows])

        ids = padded("input_ids", -1)
        return {"input_ids": ids.clamp(min=0), "labels": padded("labels", -100), "attention_mask": (ids >= 0).long()}

    np.testing.assert_allclose(_losses(_train(tmp_path, data_collator=pad)), plain, rtol=LOSS_RTOL)


def test_transformers_collator_works(tmp_path):
    trainer = _train(tmp_path, _rows("text"), data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()))
    np.testing.assert_allclose(_losses(trainer), _losses(_train(tmp_path, _rows("text"))), rtol=LOSS_RTOL)


def test_model_that_cannot_be_packed_trains_padded_with_the_loss_of_single_rows(tmp_path):
    trainer = _train(tmp_path, family="mamba", steps=1)
    assert not trainer.policy.flat
    model = tiny_model("mamba")
    total, count = 0.0, 0
    for row in trainer.train_dataset:
        labels = torch.tensor(row["labels"])[1:]
        logp = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        scored = labels != -100
        total -= logp[scored].gather(1, labels[scored, None]).sum().item()
        count += int(scored.sum())
    evaluated = _evaluate_untrained(tmp_path, "mamba", trainer.train_dataset)
    assert evaluated == pytest.approx(total / count, rel=1e-5)


def _evaluate_untrained(tmp_path, family, tokenised) -> float:
    trainer = SFTTrainer(
        model=tiny_model(family),
        args=SFTConfig(
            output_dir=str(tmp_path / "eval"),
            bf16=False,
            use_cpu=True,
            report_to="none",
            per_device_eval_batch_size=64,
        ),
        train_dataset=tokenised,
        eval_dataset=tokenised,
        processing_class=tiny_tokenizer(),
    )
    return trainer.evaluate()["eval_loss"]


def test_packing_a_model_that_cannot_be_packed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Packing with 'bfd'"):
        _train(tmp_path, family="mamba", packing=True)


def test_saved_model_loads_in_transformers_with_the_trained_weights(tmp_path):
    trainer = _train(tmp_path, family="qwen2")
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for (name, own), (_, other) in zip(trainer.model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(own, other), name
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(ids).logits, loaded(ids).logits)
    own = trainer.model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(own, loaded.generate(ids, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_adapters_train_and_merge(settings, tmp_path):
    base = tiny_model("llama")
    frozen = {name: p.clone() for name, p in base.named_parameters()}
    trainer = _train(tmp_path, model=base, peft_config=_lora(**settings))
    own = dict(trainer.model.get_base_model().named_parameters())
    for name, before in frozen.items():
        name = name if name in own else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(own[name], before), name
    trainer.save_model(str(tmp_path / "adapter"))
    from peft import PeftModel

    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = trainer.model.eval()(ids).logits
        torch.testing.assert_close(again(ids).logits, wanted)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_adapter_on_the_head_is_trained(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head", "q_proj"], lora_dropout=0.0)
    trainer = _train(tmp_path, peft_config=config)
    moved = {name for name, p in trainer.model.named_parameters() if "lora_B" in name and p.abs().sum() > 0}
    assert any("lm_head" in name for name in moved) and any("q_proj" in name for name in moved)


def test_continues_a_peft_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), _lora())
    trainer = _train(tmp_path, model=model)
    assert any(p.abs().sum() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)
    with pytest.raises(ValueError, match="PeftModel"):
        _train(tmp_path, model=peft.get_peft_model(tiny_model("llama"), _lora()), peft_config=_lora())


def test_loss_function_of_the_user_gets_logits_and_labels(plain, tmp_path):
    def loss_func(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        return loss / num_items_in_batch

    with pytest.warns(FutureWarning, match="compute_loss_func"):
        trainer = _train(tmp_path, compute_loss_func=loss_func)
    np.testing.assert_allclose(_losses(trainer), plain, rtol=1e-5)


def test_compute_metrics_sees_logits_and_labels(tmp_path):
    data = _rows("completion", 12)

    def accuracy(prediction):
        guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        scored = labels != -100
        return {"hits": float((guesses[scored] == labels[scored]).mean())}

    trainer = _train(
        tmp_path,
        data,
        eval_dataset=data,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        per_device_eval_batch_size=64,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_hits"] == pytest.approx(metrics["eval_mean_token_accuracy"], abs=1e-6)


def test_evaluate_prepares_a_dataset_it_is_given(tmp_path):
    trainer = _train(tmp_path, eval_dataset={"a": _rows("completion", 8), "b": _rows("completion", 12)})
    both = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= set(both)
    assert trainer.evaluate(_rows("completion", 8))["eval_loss"] == pytest.approx(both["eval_a_loss"])


def test_selective_checkpointing_may_be_switched_off(plain, tmp_path):
    trainer = _train(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"selective": False})
    np.testing.assert_allclose(_losses(trainer), plain, rtol=LOSS_RTOL)


def test_model_names_that_cannot_be_loaded_are_explained(tmp_path):
    config = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="given as `processing_class`"):
        SFTTrainer(tiny_model(), config, train_dataset=_rows("text"))
    _train(tmp_path, peft_config=_lora(), steps=1).save_model(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="holds an adapter and no model"):
        SFTTrainer(str(tmp_path / "adapter"), config, train_dataset=_rows("text"))


def test_predict_prepares_a_dataset_it_is_given(tmp_path):
    trainer = _train(tmp_path, steps=1)
    rows = _rows("completion", 6)
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"])


def test_transform_may_give_the_tokens(tmp_path):
    settings = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    ready = _train(tmp_path / "a", steps=1).train_dataset  # prepared rows
    plain = _losses(_train(tmp_path / "b", ready))
    rows = Dataset.from_dict({"number": range(len(ready))}).with_transform(lambda batch: ready[batch["number"]])
    assert np.array_equal(_losses(_train(tmp_path / "c", rows, **settings)), plain)


def test_loss_of_the_user_trains_the_router_too(tmp_path):
    def loss_of_user(outputs, labels, num_items_in_batch):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    runs = [
        _train(tmp_path / str(i), family="qwen3_moe", router_aux_loss_coef=2.0, **more)
        for i, more in enumerate([{}, {"compute_loss_func": loss_of_user}])
    ]
    np.testing.assert_allclose(_losses(runs[1]), _losses(runs[0]), rtol=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])  # head apart, tied, other names
def test_adapters_train_the_tokens_of_a_cloned_template(family, tmp_path):
    other = copy.deepcopy(tiny_tokenizer())
    other.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    other.chat_template = other.chat_template.replace("<|im_start|>", "<|new|>")
    other.save_pretrained(tmp_path / "other")
    config = _lora(trainable_token_indices=[5])
    config.target_modules = "all-linear"
    model = tiny_model(family)
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    trainer = _train(
        tmp_path, _rows("chat"), model=model, peft_config=config, chat_template_path=str(tmp_path / "other")
    )
    after = trainer.model.merge_and_unload().get_input_embeddings().weight.detach()
    new = trainer.processing_class.convert_tokens_to_ids("<|new|>")
    changed = (after[: len(before)] != before).any(1).nonzero().flatten().tolist()
    assert set(changed) <= {5} and new >= len(before)
    assert trainer.processing_class.chat_template == other.chat_template
    saved = config.modules_to_save or []
    assert saved == (["lm_head"] if family == "llama" else [])


def test_streaming_equals_map_style(plain, tmp_path):
    trainer = _train(tmp_path, _rows("completion").to_iterable_dataset(), train_sampling_strategy="sequential")
    stored = _train(tmp_path, _rows("completion"), train_sampling_strategy="sequential")
    np.testing.assert_allclose(_losses(trainer), _losses(stored), rtol=LOSS_RTOL)


def test_neftune_changes_training_and_leaves_the_model_clean(plain, tmp_path):
    trainer = _train(tmp_path, neftune_noise_alpha=5.0)
    assert not np.allclose(_losses(trainer), plain, rtol=1e-4)
    hooks = trainer.model.get_input_embeddings()._forward_hooks.values()
    assert not any("neftune" in hook.__qualname__ for hook in hooks)


def test_plain_training_arguments_are_taken(tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to="none", save_strategy="no")
    trainer = SFTTrainer(tiny_model(), args, train_dataset=_rows("text"), processing_class=tiny_tokenizer())
    assert isinstance(trainer.args, SFTConfig) and trainer.args.max_steps == 1 and trainer.args.learning_rate == 5e-5


ERRORS = {  # name -> (exception, words of the message, what is passed)
    "no dataset": (ValueError, "train_dataset", {"data": "none"}),
    "list": (TypeError, "Dataset", {"data": [{"text": "a"}]}),
    "empty": (ValueError, "empty", {"data": Dataset.from_dict({"text": []})}),
    "missing column": (ValueError, "question", {"data": Dataset.from_dict({"question": ["a"], "answer": ["b"]})}),
    "assistant only on text": (ValueError, "conversational", {"assistant_only_loss": True}),
    "unknown template": (
        ValueError,
        "template",
        {"data": _rows("chat"), "assistant_only_loss": True, "chat_template": "{{ messages[0]['content'] }}"},
    ),
    "formatting and completion": (
        ValueError,
        "formatting_func",
        {"formatting_func": lambda row: "x", "completion_only_loss": True},
    ),
    "dft and own loss": (ValueError, "dft", {"loss_type": "dft", "compute_loss_func": lambda *a, **k: 0}),
    "eos": (ValueError, "eos_token", {"eos_token": "<nothing>"}),
    "router": (ValueError, "router_aux_loss_coef", {"router_aux_loss_coef": 0.1}),
    "peft type": (TypeError, "peft_config", {"peft_config": {"r": 4}}),
    "images": (ValueError, "images", {"data": Dataset.from_dict({"text": ["a"], "images": [[]]})}),
    "fully masked": (
        ValueError,
        "scored",
        {"data": Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [[-100] * 3] * 4})},
    ),
    "model": (TypeError, "`model` must be", {"model": torch.nn.Linear(2, 2)}),
    "model without a head": (ValueError, "no language-modelling head", {"model": tiny_model().model}),
    "sequence longer than the model": (
        ValueError,
        "400 tokens, but GPT2LMHeadModel has positions for 256",
        {"family": "gpt2", "data": Dataset.from_dict({"input_ids": [[5] * 400] * 4})},
    ),
    "evaluation list": (TypeError, "`eval_dataset` must be .* got `list`", {"eval_dataset": [{"text": "a"}]}),
    "collator and packing": (ValueError, "data_collator", {"data_collator": dict, "packing": True}),
    "collator and padding-free": (ValueError, "data_collator", {"data_collator": dict, "padding_free": True}),
    "no template file": (ValueError, "no such file", {"chat_template_path": "missing.jinja"}),
    "stream of dropped rows": (
        ValueError,
        "no batch",
        {"data": _rows("completion").to_iterable_dataset(), "max_length": 2},
    ),
    "raw rows not prepared": (ValueError, "none of which", {"dataset_kwargs": {"skip_prepare_dataset": True}}),
    "masks that a collator never sees": (
        ValueError,
        "no 'labels'",
        {
            "data": Dataset.from_dict({"input_ids": [[5, 6]] * 4, "completion_mask": [[0, 1]] * 4}),
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "data_collator": dict,
        },
    ),
    "ids outside the vocabulary": (ValueError, "331", {"data": Dataset.from_dict({"input_ids": [[5, 6, 700]] * 8})}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_input_is_named(case, tmp_path):
    kind, words, passed = ERRORS[case]
    passed = dict(passed)
    data = passed.pop("data", _rows("completion"))
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = passed.pop("chat_template", tokenizer.chat_template)
    with pytest.raises(kind, match=words):
        if isinstance(data, str):
            SFTTrainer(tiny_model(), SFTConfig(str(tmp_path), use_cpu=True), processing_class=tiny_tokenizer())
        _train(tmp_path, data, tokenizer=tokenizer, **passed)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "mse"}, "loss_type"),
        ({"packing": True, "max_length": None}, "max_length"),
        ({"packing_strategy": "ffd"}, "packing_strategy"),
        ({"dataset_kwargs": {"add_special_tokens": False}}, "dataset_kwargs"),
        ({"gradient_checkpointing_kwargs": {"selective": True, "use_reentrant": True}}, "reentrant"),
        ({"gradient_checkpointing_kwargs": {"selective": True}, "gradient_checkpointing": False}, "selective"),
        ({"token_budget": 0}, "token_budget"),
        ({"pad_to_multiple_of": "abc"}, "'abc'; use a number"),
        ({"pad_to_multiple_of": 0}, "is 0; use a number"),
        ({"truncation_mode": "middle"}, "truncation_mode"),
        ({"loss_type": "dft", "label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
    ids=str,
)
def test_config_refuses(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        SFTConfig(str(tmp_path), use_cpu=True, **settings)


def test_assistant_only_scores_the_assistants_tokens_alone(tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = MARKED
    trainer = _train(tmp_path, _rows("chat", 4), tokenizer=tokenizer, assistant_only_loss=True, steps=1)
    row = trainer.train_dataset[0]
    scored = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    turns = [m["content"] for m in _rows("chat", 4)[0]["messages"] if m["role"] == "assistant"]
    assert tokenizer.decode(scored) == "".join(turn + "<|im_end|>" for turn in turns)
