"""DPOTrainer against TRL's on the same models, data and order: every logged number agrees, in every layout."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from test_parity_sft import PARITY_RTOL, TIMED, _lora, _text
from tiny import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")

import fastalign  # noqa: E402
from fastalign import given_data, prepare_policy, reference  # noqa: E402

# A reward is beta times the difference of two sums of log-probabilities of about 100 nats; their last bits, taken in
# another order, leave an absolute error. Losses and gradients follow the rewards.
SUM_ERROR = 3e-7  # of the size of the sums
MEAN_LOGIT_ERROR = 1e-6  # absolute: means of logits of either sign are near 0
EXPONENTIAL_RTOL = 5e-5  # the gradient of exp(-ratio) is multiplied by it, and so has its absolute error of about 1e-5


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pairs(form: str = "text", n: int = 16) -> Dataset:
    """Prompts of 5 to 13 words, answers of 1 to 9."""
    rows = []
    for i in range(n):
        prompt, chosen, rejected = (
            _text(i, 5 + (5 * i) % 9),
            _text(i + 1, 1 + (3 * i) % 7),
            _text(i + 3, 1 + 5 * i % 9),
        )
        if form == "chat":
            ask = [{"role": "user", "content": prompt}]
            say = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
            rows.append({"prompt": ask, "chosen": say[0], "rejected": say[1]})
        elif form == "implicit":
            rows.append({"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"})
        else:
            rows.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
    return Dataset.from_list(rows)


def history(library, folder, *, form="text", family="llama", share=None, model=None, evaluate=False, **config):
    """`log_history` of two steps; `lora` and `ref_model` among the settings go to the constructor."""
    extra = {"peft_config": _lora()} if config.pop("lora", False) else {}
    if not extra and model is None:
        extra["ref_model"] = tiny_model(family, seed=1)
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "disable_tqdm": True,
    } | config
    if library is fastalign:
        settings["share_prefix"] = share
    data = pairs(form)
    trainer = library.DPOTrainer(
        model=tiny_model(family) if model is None else model(),
        args=library.DPOConfig(**settings),
        train_dataset=data,
        eval_dataset=data.select(range(5)) if evaluate else None,
        processing_class=copy.deepcopy(tiny_tokenizer()),
        **extra,
    )
    trainer.train()
    if evaluate:
        trainer.evaluate()
    log = trainer.state.log_history  # findings of `fastalign.loop.health` are ours alone
    return [{k: v for k, v in entry.items() if not k.startswith("health/")} for entry in log]


def assert_same(ours: list[dict], theirs: list[dict], beta: float = 0.1, rtol: float = PARITY_RTOL) -> None:
    """The same keys, and numbers up to `rtol` and what the sums of log-probabilities lose."""
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert set(own) == set(other), set(own) ^ set(other)
        size = sum(abs(v) for k, v in other.items() if "logps/" in k)
        for key in set(own) - TIMED:
            error = MEAN_LOGIT_ERROR if "logits/" in key else 1e-7
            error = max(error, SUM_ERROR * beta * size) if "rewards/" in key else error
            assert math.isclose(own[key], other[key], rel_tol=rtol, abs_tol=error), (key, own[key], other[key])


CASES = {  # name -> settings; "evaluate", "form", "family" and "lora" are not the config's
    "sigmoid": {"evaluate": True},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "nca_pair": {"loss_type": "nca_pair"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "bco_pair": {"loss_type": "bco_pair"},
    "sppo_hard": {"loss_type": "sppo_hard"},
    "aot": {"loss_type": "aot", "label_smoothing": 0.1},
    "aot_unpaired": {"loss_type": "aot_unpaired"},
    "apo_zero": {"loss_type": "apo_zero"},
    "apo_down": {"loss_type": "apo_down"},
    "discopop": {"loss_type": "discopop", "discopop_tau": 0.2},
    "sigmoid_norm": {"loss_type": "sigmoid_norm", "beta": 2.0},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "evaluate": True},
    "forward_kl": {"f_divergence_type": "forward_kl", "beta": 0.01},
    "js_divergence": {"f_divergence_type": "js_divergence", "loss_type": "ipo"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "ld_alpha": {"ld_alpha": 0.3, "evaluate": True},
    "weighting": {"use_weighting": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
    "sync": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.4},
    "precompute": {"precompute_ref_log_probs": True, "ld_alpha": 0.5, "evaluate": True},
    "conversation": {"form": "chat", "family": "qwen3"},
    "implicit-prompt": {"form": "implicit", "family": "qwen2"},
    "truncated": {"max_length": 48},
    "lora": {"lora": True, "evaluate": True},
    "experts": {"family": "qwen3_moe", "router_aux_loss_coef": 0.05},
    "windows": {"family": "mistral"},
}
THOROUGH = {"sigmoid", "mpo", "ld_alpha", "weighting", "lora", "precompute", "aot"}  # in every layout


@pytest.mark.parametrize("case", CASES)
def test_every_logged_number_equals_trl(case, tmp_path, monkeypatch):
    settings = CASES[case]
    theirs = history(trl, tmp_path / "theirs", **settings)
    rtol = EXPONENTIAL_RTOL if case in ("forward_kl", "alpha_divergence") else PARITY_RTOL
    # unset: by what it saves, which is shared here, but not beside a balancing loss of experts
    for share in (False, True) if case in THOROUGH else (None,):
        ours = history(fastalign, tmp_path / f"ours{share}", share=share, **settings)
        assert_same(ours, theirs, settings.get("beta", 0.1), rtol)
    if case in THOROUGH:
        monkeypatch.setattr(given_data, "prepare_policy", lambda m, **_: prepare_policy(m, allow_flat=False))
        ours = history(fastalign, tmp_path / "padded", **settings)
        assert_same(ours, theirs, settings.get("beta", 0.1))


def test_an_adapter_that_is_trained_further_is_compared_with_its_copy(tmp_path):
    peft = pytest.importorskip("peft")

    def model():
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_model(), _lora(init_lora_weights=False))

    ours, theirs = (history(lib, tmp_path / lib.__name__, model=model, evaluate=True) for lib in (fastalign, trl))
    assert theirs[0]["rewards/chosen"] == 0  # the policy starts as the reference
    assert_same(ours, theirs)


def test_the_reference_is_loaded_from_where_the_policy_came_from(tmp_path):
    tiny_model(seed=3).save_pretrained(tmp_path / "model")
    names = {"model": lambda: str(tmp_path / "model")}
    assert_same(*(history(lib, tmp_path / lib.__name__, **names) for lib in (fastalign, trl)))


def test_bf16_agrees_with_trl_up_to_its_rounding(tmp_path):
    ours, theirs = (history(lib, tmp_path / lib.__name__, bf16=True) for lib in (fastalign, trl))
    for own, other in zip(ours[:2], theirs[:2], strict=True):
        for key in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "entropy"):
            assert math.isclose(own[key], other[key], rel_tol=3e-2), (key, own, other)


def test_a_collator_of_trl_gives_the_same_numbers(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    data, made = pairs(), {}
    for library in (fastalign, trl):
        config = {"max_steps": 2, "logging_steps": 1, "bf16": False, "use_cpu": True, "disable_tqdm": True}
        config |= {"report_to": "none", "save_strategy": "no", "precompute_ref_log_probs": True}
        trainer = library.DPOTrainer(
            model=tiny_model(),
            ref_model=tiny_model(seed=1),
            args=library.DPOConfig(str(tmp_path), train_sampling_strategy="sequential", **config),
            data_collator=DataCollatorForPreference(pad_token_id=0),
            train_dataset=data,
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        made[library] = trainer.state.log_history
    assert_same(made[fastalign], made[trl])
