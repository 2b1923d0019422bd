"""ORPOTrainer against TRL's on the same model, data and order, and its own rules."""

import functools
import math

import pytest
import torch
from datasets import Dataset
from pair_runs import LAYOUTS, assert_same_history, assert_same_interface, history, run
from tiny import tiny_model

orpo = pytest.importorskip("trl.experimental.orpo")

from fastalign import ORPOConfig, ORPOTrainer  # noqa: E402

ours = functools.partial(run, ORPOConfig, ORPOTrainer)
MORE = frozenset({"num_tokens"})


class OfCompletions(orpo.ORPOTrainer):
    """TRL's trainer with logits/* over the completions' tokens: as it stands they cover prompts and padding."""

    def concatenated_forward(self, model, batch):
        found = list(super().concatenated_forward(model, batch))
        for i, name in enumerate(("chosen", "rejected"), 2):
            scored = batch[f"{name}_labels"][:, 1:] != -100
            found[i] = found[i][:, : scored.shape[1]][scored]
        return tuple(found)


theirs = functools.partial(run, orpo.ORPOConfig, OfCompletions)


def test_every_logged_number_equals_trl(tmp_path):
    reference = theirs(tmp_path / "trl", beta=0.3)
    for layout in LAYOUTS:
        assert_same_history(ours(tmp_path / layout, layout=layout, beta=0.3), reference, MORE)


def _moe():
    return tiny_model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.05)


@pytest.mark.parametrize("case", ["chat", "truncated", "experts", "lora"])
def test_data_adapters_and_experts_equal_trl(case, tmp_path):
    def options() -> dict:
        if case == "experts":
            return {"layout": "flat", "model": _moe()}
        if case == "lora":
            peft = pytest.importorskip("peft")
            return {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])}
        return {"form": "chat", "gradient_accumulation_steps": 2} if case == "chat" else {"max_length": 64}

    own = ours(tmp_path / "ours", **options())
    other = theirs(tmp_path / "trl", **{k: v for k, v in options().items() if k != "layout"})
    assert_same_history(own, other, MORE | {"aux_loss"})


def test_streams_give_the_same_run(tmp_path):
    plain, stream = ours(tmp_path / "plain"), ours(tmp_path / "stream", streamed=True)
    for step, streamed in zip(history(plain), history(stream), strict=True):
        assert streamed | {"epoch": step["epoch"]} == pytest.approx(step, rel=1e-5, abs=1e-7)


def test_first_loss_by_hand(tmp_path):
    """One pair of one-token answers to a prompt of three tokens, from the model's own probabilities."""
    row = {"prompt_ids": [1, 7, 8], "chosen_ids": [11], "rejected_ids": [12]}
    model = tiny_model()
    with torch.no_grad():
        logp = model(torch.tensor([row["prompt_ids"]])).logits[0].log_softmax(-1)
    nll = -(logp[0, 7] + logp[1, 8] + logp[2, 11]).item() / 3
    chosen, rejected = (math.exp(logp[2, i].item()) for i in (11, 12))
    log_odds = math.log(chosen / (1 - chosen)) - math.log(rejected / (1 - rejected))
    expected = {
        "loss": nll + 0.4 * math.log1p(math.exp(-log_odds)),
        "nll_loss": nll,
        "log_odds_chosen": log_odds,
        "log_odds_ratio": -math.log1p(math.exp(-log_odds)),
    }
    trainer = ours(tmp_path, model=model, rows=Dataset.from_list([row] * 6), beta=0.4, max_steps=1)
    first = history(trainer)[0]
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_interface_is_that_of_trl():
    apart = frozenset({"bf16", "gradient_checkpointing"})
    assert_same_interface(ORPOTrainer, orpo.ORPOTrainer, ORPOConfig, orpo.ORPOConfig, apart)


def test_padding_value_fills_padded_rows(tmp_path):
    trainer = ours(tmp_path, layout="padded", padding_value=17, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    fill = batch.input_ids[batch.attention_mask == 0]
    assert fill.numel() and (fill == 17).all()


@pytest.mark.parametrize("field", ["generate_during_eval", "is_encoder_decoder"])
def test_unsupported_fields_are_named(field):
    with pytest.raises(ValueError, match=f"`{field}=True` is not supported"):
        ORPOConfig("unused", use_cpu=True, **{field: True})
