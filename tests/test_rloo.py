"""RLOOTrainer against TRL's on the same models, prompts and completions: every logged number agrees."""

import copy

import numpy as np
import pytest
from test_grpo_parity import length_reward, parity_reward, prompts
from test_parity_sft import PARITY_RTOL, TIMED, _lora
from tiny import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")

import trl.trainer.rloo_trainer as trl_rloo  # noqa: E402

import fastalign  # noqa: E402

END, LONGEST = 2, 9
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": LONGEST,
    "max_steps": 5,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


@pytest.fixture(autouse=True)
def groups_stay_together(monkeypatch):
    monkeypatch.setattr(trl_rloo, "shuffle_sequence_dict", lambda batch: batch)


def completions_of(prompt_ids: list[list[int]]) -> list[list[int]]:
    """The same completions for the same prompts; a prompt's differ from each other."""
    seen, found = {}, []
    for ids in prompt_ids:
        number = seen[tuple(ids)] = seen.get(tuple(ids), 0) + 1
        rng = np.random.default_rng([*ids, number])
        length = int(rng.integers(1, LONGEST + 1))
        completion = rng.integers(5, 330, length).tolist()
        found.append([*completion[:-1], END] if length < LONGEST else completion)
    return found


def rollout(given, trainer):
    ids = tiny_tokenizer()(text=list(given))["input_ids"]
    return {"prompt_ids": ids, "completion_ids": completions_of(ids), "logprobs": [None] * len(ids)}


class FixedCompletions(trl.RLOOTrainer):
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        return completions_of(prompt_ids)


def history(library, folder, *, evaluate=False, rewards=(length_reward, parity_reward), **config):
    """`log_history` of the run; "lora" is not the config's."""
    extra = {"peft_config": _lora(init_lora_weights=False)} if config.pop("lora", False) else {}
    model = tiny_model()
    if config.get("beta", 0.05):
        tiny_model(seed=1).save_pretrained(folder.parent / "reference")
        model.config._name_or_path = str(folder.parent / "reference")
    if library is fastalign:
        extra["rollout_func"] = rollout
    data = prompts()
    trainer = (FixedCompletions if library is trl else fastalign.RLOOTrainer)(
        model,
        list(rewards),
        library.RLOOConfig(str(folder), **(SETTINGS | config)),
        train_dataset=data,
        eval_dataset=data.select(range(8)) if evaluate else None,
        processing_class=copy.deepcopy(tiny_tokenizer()),
        **extra,
    )
    trainer.train()
    if evaluate:
        trainer.evaluate()
    history = trainer.state.log_history
    return [
        {k: v for k, v in entry.items() if not k.removeprefix("eval_").startswith(("health/", "time/"))}
        for entry in history
    ]


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    """The same keys and numbers; losses and kl are sums whose parts cancel, and keep the last bits of each."""
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert set(own) == set(other), set(own) ^ set(other)
        size = max((v for k, v in other.items() if k.endswith("reward_std")), default=1.0)
        for key in set(own) - TIMED - {"step_time"}:
            error = 1e-6 * (1 + size) if "loss" in key or key.endswith("kl") else 2e-7
            assert own[key] == pytest.approx(other[key], rel=PARITY_RTOL, abs=error), key


CASES = {
    "default": {"evaluate": True},
    "off-policy": {
        "steps_per_generation": 4,
        "num_iterations": 2,
        "epsilon": 0.02,
        "num_generations": 4,
    },
    "no-reference": {"beta": 0.0, "normalize_advantages": True, "steps_per_generation": 4},
    "clipped": {"reward_clip_range": (-1.0, 2.0), "beta": 0.5, "reward_weights": [0.5, 2.0], "temperature": 0.7},
    "truncated": {"mask_truncated_completions": True, "epsilon_high": 0.3},
    "lora": {"lora": True},
}


@pytest.mark.parametrize("case", CASES)
def test_every_logged_number_equals_trl(case, tmp_path):
    theirs = history(trl, tmp_path / "theirs", **CASES[case])
    assert_same(history(fastalign, tmp_path / "ours", **CASES[case]), theirs)
