"""SFTTrainer against TRL's on the same model, data and order: every logged number agrees."""

import copy
import math

import pytest
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")

import fastalign  # noqa: E402

PARITY_RTOL = 1e-5  # fp32: sums over tokens are taken in another order
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TIMED = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"} | {
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
}


def _text(i: int, length: int) -> str:
    return " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(length))


def _rows(form: str, n: int = 48) -> Dataset:
    lengths = [(2 + (5 * i) % 9, 1 + (3 * i) % 7) for i in range(n)]
    if form == "text":
        return Dataset.from_list([{"text": _text(i, a + b)} for i, (a, b) in enumerate(lengths)])
    if form == "completion":
        return Dataset.from_list(
            [{"prompt": _text(i, a), "completion": " " + _text(i + 1, b)} for i, (a, b) in enumerate(lengths)]
        )
    turns = [
        [
            {"role": "user", "content": _text(i, a)},
            {"role": "assistant", "content": _text(i + 1, b)},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": _text(i + 2, a)},
        ]
        for i, (a, b) in enumerate(lengths)
    ]
    return Dataset.from_list([{"messages": turn} for turn in turns])


def _lora(**settings):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], **settings
    )


CASES = {  # name -> (form of the data, model family, config, trainer arguments)
    "text": ("text", "qwen2", {}, {}),
    "completion": ("completion", "llama", {}, {}),
    "whole-sequence": ("completion", "llama", {"completion_only_loss": False}, {}),
    "conversation": ("chat", "qwen3", {}, {}),
    "assistant": ("chat", "qwen3", {"assistant_only_loss": True}, {}),
    "dft": ("completion", "llama", {"loss_type": "dft"}, {}),
    "accumulation": ("completion", "llama", {"gradient_accumulation_steps": 4}, {}),
    "lora": ("completion", "llama", {}, {"peft_config": _lora}),
    "dora": ("completion", "llama", {}, {"peft_config": lambda: _lora(use_dora=True)}),
    "bfd": ("text", "qwen2", {"packing": True, "max_length": 48, "num_train_epochs": 4}, {}),
    "bfd_split": ("completion", "qwen2", {"packing": True, "packing_strategy": "bfd_split", "max_length": 24}, {}),
    "wrapped": ("text", "qwen2", {"packing": True, "packing_strategy": "wrapped", "max_length": 48}, {}),
    "truncated": ("completion", "llama", {"max_length": 20}, {}),
    "smoothing": ("completion", "llama", {"label_smoothing_factor": 0.1}, {}),
    "moe": ("text", "qwen3_moe", {"router_aux_loss_coef": 0.05, "gradient_accumulation_steps": 2}, {}),
    "softcap": ("text", "gemma2", {}, {}),
    "logit-scale": ("text", "cohere", {}, {}),
    "no-checkpointing": ("completion", "llama", {"gradient_checkpointing": False, "weight_decay": 0.1}, {}),
    "shuffled": ("completion", "llama", {"train_sampling_strategy": "random", "seed": 5}, {}),
    "bf16": ("completion", "llama", {"bf16": True}, {}),
}


def _history(library, form, family, config, extra, folder, evaluate: bool) -> list[dict]:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    if form == "chat":
        tokenizer.chat_template = MARKED
    data = _rows(form)
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 10,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "disable_tqdm": True,
    } | config
    trainer = library.SFTTrainer(
        model=tiny_model(family),
        args=library.SFTConfig(**settings),
        train_dataset=data,
        eval_dataset=data.select(range(10)) if evaluate else None,
        processing_class=tokenizer,
        **{name: make() for name, make in extra.items()},
    )
    trainer.train()
    if evaluate:
        trainer.evaluate()
    return trainer.state.log_history


def _assert_same(ours: list[dict], theirs: list[dict], rtol: float) -> None:
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert set(own) == set(other), set(own) ^ set(other)
        for key in set(own) - TIMED:
            assert math.isclose(own[key], other[key], rel_tol=rtol, abs_tol=1e-7), (key, own, other)


@pytest.mark.parametrize("case", CASES)
def test_every_logged_number_equals_trl(case, tmp_path):
    form, family, config, extra = CASES[case]
    evaluate = case in ("text", "completion", "bfd", "moe")
    ours = _history(fastalign, form, family, config, extra, tmp_path / "ours", evaluate)
    theirs = _history(trl, form, family, config, extra, tmp_path / "theirs", evaluate)
    # bf16 rounds differently in a differently shaped product, so only its size is compared
    _assert_same(ours, theirs, 2e-2 if case == "bf16" else PARITY_RTOL)
