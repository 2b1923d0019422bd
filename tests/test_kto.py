"""KTOTrainer against TRL's on the same model, data and order, and what it does that TRL does not."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

import fastalign

trl = pytest.importorskip("trl")

PARITY_RTOL = 1e-5  # fp32: sums over tokens are taken in another order
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
CLOCK = ("runtime", "per_second", "total_flos", "preparation_time")


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


def make(library, folder, family="llama", data=None, evaluation=None, **given):
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
    torch.manual_seed(0)
    return library.KTOTrainer(
        tiny_model(family) if isinstance(family, str) else family,
        args=kind(**settings),
        train_dataset=judged() if data is None else data,
        eval_dataset=evaluation,
        processing_class=copy.deepcopy(tiny_tokenizer()),
        **({"ref_model": tiny_model(family, seed=3)} if "peft_config" not in arguments else {}) | arguments,
    )


def history(trainer, evaluate=False) -> list[dict]:
    trainer.train()
    if evaluate:
        trainer.evaluate()
    log = trainer.state.log_history
    return [{k: v for k, v in entry.items() if not any(part in k for part in CLOCK)} for entry in log]


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
    "conversations, paired": ("qwen3", pairs, {"beta": 0.3}, {}),
    "apo": ("qwen2", judged, {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"}, {}),
    "weights": ("llama", judged, {"desirable_weight": 0.7, "undesirable_weight": 1.3, "max_length": 14}, {}),
    "accumulation": ("llama", judged, {"gradient_accumulation_steps": 2, "logging_steps": 2}, {}),
    "moe": ("qwen3_moe", judged, {"router_aux_loss_coef": 0.05}, {"share_prefix": True}),
    "window": ("gemma2", judged, {"gradient_checkpointing": False}, {"share_prefix": True}),
    "lora": ("llama", judged, {"peft_config": lora}, {}),
    "precomputed": ("llama", judged, {"precompute_ref_log_probs": True}, {}),
    "synchronised": ("llama", judged, {"sync_ref_model": True, "ref_model_sync_steps": 2}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_logged_number_equals_trl(case, tmp_path):
    family, data, settings, own = CASES[case]
    settings = {name: value() if callable(value) else value for name, value in settings.items()}
    evaluation = data().select(range(7)) if case in ("shared", "precomputed") else None
    runs = [
        history(make(library, tmp_path / library.__name__, family, data(), evaluation, **settings, **extra), bool(evaluation))
        for library, extra in ((fastalign, own), (trl, {}))
    ]
    assert_same(*runs, settings.get("beta", 0.1))
