"""CPOTrainer (CPO, SimPO, AlphaPO) against TRL's on the same model, data and order, and its own rules."""

import copy
import functools
import math

import pytest
import torch
import transformers
from datasets import Dataset
from pair_runs import LAYOUTS, assert_same_history, assert_same_interface, history, pair_rows, run
from tiny import tiny_model, tiny_tokenizer

cpo = pytest.importorskip("trl.experimental.cpo")

from fastalign import CPOConfig, CPOTrainer  # noqa: E402

ours = functools.partial(run, CPOConfig, CPOTrainer)
MORE = frozenset({"num_tokens"})


class OfCompletions(cpo.CPOTrainer):
    """TRL's trainer with logits/* over the completions' tokens: as it stands they cover prompts and padding."""

    def concatenated_forward(self, model, batch):
        found = list(super().concatenated_forward(model, batch))
        for i, name in enumerate(("chosen", "rejected"), 2):
            scored = batch[f"{name}_labels"][:, 1:] != -100
            found[i] = found[i][:, : scored.shape[1]][scored]
        return tuple(found)


theirs = functools.partial(run, cpo.CPOConfig, OfCompletions)
LOSSES: dict[str, dict] = {
    "sigmoid": {"label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo", "cpo_alpha": 0.5},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.2},
    "alphapo": {"loss_type": "alphapo", "alpha": 0.25, "beta": 0.5},
    "alpha": {"loss_type": "ipo", "alpha": 0.25, "beta": 0.2},
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_logged_number_equals_trl(name, tmp_path):
    reference = theirs(tmp_path / "trl", **LOSSES[name])
    for layout in LAYOUTS:
        assert_same_history(ours(tmp_path / layout, layout=layout, **LOSSES[name]), reference, MORE)


def _moe():
    return tiny_model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.05)


CASES: dict[str, tuple[dict, dict]] = {
    "chat": ({"form": "chat"}, {}),
    "implicit": ({"form": "implicit"}, {}),
    "truncated": ({"max_length": 64}, {}),
    "checkpointed": ({"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, {}),
    "lora": ({}, {"peft_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "target_modules": ["q_proj"]}}),
    "experts": ({}, {"model": _moe}),
}


@pytest.mark.parametrize("case", CASES)
def test_data_adapters_and_experts_equal_trl(case, tmp_path):
    config, made = CASES[case]

    def options() -> dict:
        if case == "lora":
            peft = pytest.importorskip("peft")
            return config | {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", **made["peft_config"])}
        return config | {name: make() for name, make in made.items()}

    layout = "flat" if case == "experts" else None  # where prompts are shared, the experts see them once
    ours_run = run(CPOConfig, CPOTrainer, tmp_path / "ours", layout=layout, **options())
    assert_same_history(ours_run, theirs(tmp_path / "trl", **options()), MORE | {"aux_loss"})


@pytest.mark.parametrize("max_length", [512, 40])
@pytest.mark.parametrize("form", ["text", "chat"])
def test_tokens_of_rows_equal_trl(form, max_length, tmp_path):
    """BOS in front, EOS behind, answers cut, tokens that merge across the border or not, conversations."""
    prompts = ["the quick", "<s>the qui", "hello", "what is two plus", "a", "hello there,", "the lazy d"]
    chosen = [" brown fox", "ck brown</s>", " there, how are you today", " two", "ssistant", " how are", "og"]
    rejected = [" fox", "ck fox", "</s>", "", "nother", "", "og over"]
    texts = Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    settings = {"max_length": max_length if form == "chat" else max_length // 8, "bf16": False, "use_cpu": True}
    own, other = (
        cls(
            tiny_model(),
            config(str(tmp_path), report_to="none", **settings),
            train_dataset=texts if form == "text" else pair_rows("chat"),
            processing_class=copy.deepcopy(tiny_tokenizer()),
        ).train_dataset
        for cls, config in ((CPOTrainer, CPOConfig), (cpo.CPOTrainer, cpo.CPOConfig))
    )
    starts = [min(_prompt_length(row[f"{name}_labels"]) for name in ("chosen", "rejected")) for row in other]
    fits = [(row, start) for row, start in zip(other, starts, strict=True) if start < settings["max_length"]]
    assert len(own) == len(fits) > 3
    for mine, (row, start) in zip(own, fits, strict=True):
        for name in ("chosen", "rejected"):
            # where tokens merge with one answer only, TRL leaves the other's first token out of the loss
            whole = row[f"{name}_input_ids"][: settings["max_length"]]
            assert (mine["prompt_ids"], mine[f"{name}_ids"]) == (whole[:start], whole[start:])


def _prompt_length(labels: list[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != -100), len(labels))


def test_streams_and_token_budgets_give_the_same_run(tmp_path):
    settings: dict = {
        "loss_type": "simpo",
        "cpo_alpha": 0.0,
        "gradient_accumulation_steps": 2,
    }  # without the NLL, whose mean is over a micro-batch's tokens
    plain = ours(tmp_path / "plain", **settings)
    stream = ours(tmp_path / "stream", streamed=True, **settings)
    budget = ours(tmp_path / "budget", token_budget=400, **settings)
    for step, streamed, regrouped in zip(*map(history, (plain, stream, budget)), strict=True):
        assert streamed | {"epoch": step["epoch"]} == pytest.approx(step, rel=1e-5, abs=1e-7)
        for name in {"loss", "grad_norm", "eval_loss"} & set(step):
            assert regrouped[name] == pytest.approx(step[name], rel=1e-5)


def test_prompts_are_computed_once_where_that_pays(tmp_path):
    long = Dataset.from_list([{"prompt": f"{i} " * 60, "chosen": " a", "rejected": " b c"} for i in range(6)])
    trainer = ours(tmp_path, rows=long, max_steps=1)
    rows = [trainer.train_dataset[i] for i in range(3)]
    batch = trainer.data_collator(rows)
    once = sum(sum(len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")) for row in rows)
    assert batch.prefix is not None and batch.input_ids.numel() == once
    assert batch.num_tokens == once + sum(len(row["prompt_ids"]) for row in rows)


def test_metrics_of_predictions_see_logits_of_padded_rows(tmp_path):
    seen = {}

    def count(prediction) -> dict:
        labels, logits = torch.tensor(prediction.label_ids), torch.tensor(prediction.predictions)
        scored = labels[:, 1:] != -100
        logp = logits[:, :-1].log_softmax(-1)[scored].gather(1, labels[:, 1:][scored][:, None])
        seen["logps"] = logp.sum().item() / 12
        return {"rows": len(labels)}

    trainer = ours(tmp_path, compute_metrics=count, per_device_eval_batch_size=6)
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 12
    assert seen["logps"] == pytest.approx(
        (metrics["eval_logps/chosen"] + metrics["eval_logps/rejected"]) / 2, rel=1e-5
    )


def test_interface_is_that_of_trl():
    apart = frozenset({"bf16", "gradient_checkpointing"})
    assert_same_interface(CPOTrainer, cpo.CPOTrainer, CPOConfig, cpo.CPOConfig, apart)
    alphapo = CPOConfig("unused", loss_type="alphapo", use_cpu=True)
    assert (alphapo.loss_type, alphapo.cpo_alpha) == ("simpo", 0.0)


def test_model_init_makes_the_model(tmp_path):
    made = CPOTrainer(
        None,
        CPOConfig(str(tmp_path), use_cpu=True, bf16=False),
        train_dataset=pair_rows(),
        processing_class=copy.deepcopy(tiny_tokenizer()),
        model_init=tiny_model,
    )
    given = tiny_model().state_dict()
    assert all(torch.equal(value, given[name]) for name, value in made.model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "kto_pair"}, "`loss_type`"),
        ({"generate_during_eval": True}, "`generate_during_eval=True` is not supported"),
        ({"is_encoder_decoder": True}, "`is_encoder_decoder=True` is not supported"),
        ({"label_smoothing": 1.5}, "`label_smoothing` is 1.5"),
        ({"loss_type": "ipo", "beta": 0.0}, "`beta` is 0"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CPOConfig("unused", use_cpu=True, **fields)


def test_models_with_an_encoder_and_images_are_refused(tmp_path):
    config = transformers.T5Config(vocab_size=331, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    args = CPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    encoder = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"has an encoder .`is_encoder_decoder`"):
        CPOTrainer(encoder, args, train_dataset=pair_rows(), processing_class=copy.deepcopy(tiny_tokenizer()))
    images = pair_rows().map(lambda row: {"images": [1]})
    with pytest.raises(ValueError, match="which CPOTrainer does not take"):
        CPOTrainer(tiny_model(), args, train_dataset=images, processing_class=copy.deepcopy(tiny_tokenizer()))


def test_first_loss_by_hand(tmp_path):
    """One pair of one-token answers: the loss from the model's own distribution of the next token."""
    row = {"prompt_ids": [1, 7, 8, 9], "chosen_ids": [11], "rejected_ids": [12]}
    model = tiny_model()
    with torch.no_grad():
        logp = model(torch.tensor([row["prompt_ids"]])).logits[0, -1].log_softmax(-1)
    chosen, rejected = logp[11].item(), logp[12].item()
    expected = math.log1p(math.exp(-0.3 * (chosen - rejected))) - 0.5 * chosen
    rows = Dataset.from_list([row] * 6)
    trainer = run(CPOConfig, CPOTrainer, tmp_path, model=model, rows=rows, beta=0.3, cpo_alpha=0.5, max_steps=1)
    assert history(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-5)
