"""Preferences with the base model in 4 bits and a trained LoRA adapter on it (QLoRA); bitsandbytes computes on CPU."""

import pytest
import torch
from datasets import Dataset
from pair_runs import SETTINGS, pair_rows
from tiny import tiny_model, tiny_tokenizer

import fastalign

WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": None}  # bitsandbytes has blocks of 64
bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

from transformers import BitsAndBytesConfig  # noqa: E402


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(**WIDE).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def judged_rows() -> Dataset:
    rows = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in pair_rows()
        for name in ("chosen", "rejected")
    ]
    return Dataset.from_list(rows)


def make(name: str, source, folder, **settings):
    config, trainer = (getattr(fastalign, f"{name}{kind}") for kind in ("Config", "Trainer"))
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    settings = SETTINGS | {"per_device_train_batch_size": 6, "max_steps": 12, "learning_rate": 1e-2} | settings
    return trainer(
        str(source),
        args=config(str(folder), **settings),
        train_dataset=judged_rows() if name == "KTO" else pair_rows(),
        quantization_config=BitsAndBytesConfig(**options),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def whole_weights(trainer) -> torch.nn.Module:
    """The base as a model of ordinary weights: what its 4 bits stand for."""
    plain = tiny_model(**WIDE)
    quantized = trainer.model.get_base_model()
    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            values = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data = values.float()
    for name in ("model.embed_tokens", "lm_head"):
        plain.get_submodule(name).weight.data = quantized.get_submodule(name).weight.data.float()
    return plain


@torch.no_grad()
def logp_of_answer(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Nats, by the model's ordinary forward of the whole sequence."""
    ids = torch.tensor([prompt + answer])
    logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logp.gather(1, ids[0, 1:, None])[-len(answer) :].sum()


@pytest.mark.parametrize(("name", "checkpointing"), [("DPO", True), ("KTO", False)])
def test_an_adapter_learns_on_four_bits_that_are_the_reference(name, checkpointing, source, tmp_path):
    trainer = make(name, source, tmp_path, gradient_checkpointing=checkpointing)
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora" not in n}
    assert sum(p.dtype == torch.uint8 for p in base.values()) == 14  # the products of two layers
    assert trainer.reference.mode == "adapter_off" and trainer.ref_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    plain, expected = whole_weights(trainer), []
    for row in trainer.train_dataset.select(range(6)):
        for answer in trainer.answers:
            expected.append(logp_of_answer(plain, row["prompt_ids"], row[f"{answer}_ids"]))
    found = trainer.reference.logps(trainer.model, batch)
    torch.testing.assert_close(found, torch.stack(expected).double(), rtol=1e-4, atol=1e-4)
    before = trainer.reference.logps(trainer.model, batch)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    for n, p in trainer.model.named_parameters():
        assert "lora" in n or torch.equal(p, base[n]), n
    trainer.model.eval()
    assert torch.equal(trainer.reference.logps(trainer.model, batch), before)
