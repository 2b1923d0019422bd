"""GRPOTrainer against TRL's on the same models, prompts and completions: every logged number agrees."""

import copy
import functools
import math

import pytest
from grpo_runs import SETTINGS, length_reward, parity_reward, prompts, rollout
from test_parity_sft import PARITY_RTOL, TIMED, _lora
from tiny import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")

import trl.trainer.grpo_trainer as trl_grpo  # noqa: E402

import fastalign  # noqa: E402


@pytest.fixture(autouse=True)
def groups_stay_together(monkeypatch):
    """TRL spreads the completions of a group over the micro-batches of a generation; here they stay together, so that
    they share their prompt."""
    monkeypatch.setattr(trl_grpo, "shuffle_sequence_dict", lambda batch: batch)


class NoEngine:
    """In place of TRL's vLLM, which it wants to keep in step although the completions come from elsewhere."""

    def sync_weights(self):
        pass


def history(library, folder, *, evaluate=False, rewards=(length_reward, parity_reward), mask=False, **config):
    """`log_history` of the run; "engine", "lora" and "reference" are not the config's."""
    extra = {"peft_config": _lora(init_lora_weights=False)} if config.pop("lora", False) else {}
    corrected = config.pop("engine", False)
    model = tiny_model(config.pop("family", "llama"))
    if config.get("beta"):
        tiny_model(seed=1).save_pretrained(folder.parent / "reference")
        model.config._name_or_path = str(folder.parent / "reference")
    if library is trl:
        config = {k: v for k, v in config.items() if k not in ("token_budget", "share_prefix")}
    args = library.GRPOConfig(str(folder), **(SETTINGS | config))
    data = prompts()
    trainer = library.GRPOTrainer(
        model,
        list(rewards),
        args,
        train_dataset=data,
        eval_dataset=data.select(range(8)) if evaluate else None,
        processing_class=copy.deepcopy(tiny_tokenizer()),
        rollout_func=functools.partial(rollout, with_mask=mask),
        **extra,
    )
    if corrected:
        trainer.use_vllm = args.use_vllm = True
        trainer.vllm_generation, trainer._last_loaded_step = NoEngine(), -1
    trainer.train()
    if evaluate:
        trainer.evaluate()
    history = trainer.state.log_history
    return [
        {k: v for k, v in entry.items() if not k.removeprefix("eval_").startswith(("health/", "time/"))}
        for entry in history
    ]


def assert_same(ours: list[dict], theirs: list[dict], rtol: float = PARITY_RTOL) -> None:
    """The same keys, and numbers up to `rtol`."""
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert set(own) == set(other), set(own) ^ set(other)
        for key in set(own) - TIMED - {"step_time"}:
            assert math.isclose(own[key], other[key], rel_tol=rtol, abs_tol=2e-7), (key, own[key], other[key])


OFF = {"steps_per_generation": 4, "per_device_train_batch_size": 2, "num_iterations": 2, "max_steps": 5}
CASES = {
    "dapo": {"evaluate": True},
    "dapo-off-policy": OFF,
    "grpo": {"loss_type": "grpo", "beta": 0.1, "evaluate": True},
    "grpo-misaligned": {"loss_type": "grpo", "gradient_accumulation_steps": 3, "steps_per_generation": 2},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": "batch"} | OFF,
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": False, "delta": 1.5} | OFF,
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.01} | OFF,
    "sapo": {"loss_type": "sapo"} | OFF,
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"} | OFF,
    "vespo": {"loss_type": "vespo"} | OFF,
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 1e-3, "beta": 0.05} | OFF,
    "biased-kl": {"beta": 0.2, "use_bias_correction_kl": False, "reward_weights": [0.3, 1.2]} | OFF,
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
    "truncated": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "masked-tokens": {"mask": True, "evaluate": True},
    "opsm": {"off_policy_mask_threshold": 0.01} | OFF,
    "entropy-mask": {"top_entropy_quantile": 0.4, "entropy_coef": 0.02},
    "entropy-bonus": {"entropy_coef": 0.05, "loss_type": "bnpo"},
    "adaptive-entropy": {"use_adaptive_entropy": True, "entropy_target": 5.5, "entropy_coef_delta": 0.01},
    "temperature": {"temperature": 0.7, "beta": 0.1, "epsilon": 0.01, "epsilon_high": 0.02} | OFF,
    "sync": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.4},
    "engine-mask": {"engine": True, "vllm_importance_sampling_clip_max": 1.1},
    "engine-off-policy": {"engine": True, "vllm_importance_sampling_mode": "token_truncate"} | OFF,
    "engine-vespo": {"engine": True, "vllm_importance_sampling_mode": "token_mask", "loss_type": "vespo"},
    "lora": {"lora": True, "beta": 0.1},
    "experts": {"family": "qwen3_moe", "router_aux_loss_coef": 0.05},
}


@pytest.mark.parametrize("case", CASES)
def test_every_logged_number_equals_trl(case, tmp_path):
    theirs = history(trl, tmp_path / "theirs", **CASES[case])
    assert_same(history(fastalign, tmp_path / "ours", **CASES[case]), theirs)
