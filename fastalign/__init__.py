"""Fast post-training of language models through the interface of TRL."""

from importlib import import_module as _import_module
from typing import Any as _Any

_PUBLIC = {  # public name -> module that defines it; imported on first use, so that `import fastalign` is instant
    "BEMACallback": "fastalign.bema",
    "BCOConfig": "fastalign.trainers.bco",
    "BCOTrainer": "fastalign.trainers.bco",
    "BasePairwiseJudge": "fastalign.rollout.judges",
    "CPOConfig": "fastalign.trainers.cpo",
    "CPOTrainer": "fastalign.trainers.cpo",
    "DPOConfig": "fastalign.trainers.dpo",
    "DPOTrainer": "fastalign.trainers.dpo",
    "DatasetConfig": "fastalign.data.mixture",
    "DatasetMixtureConfig": "fastalign.data.mixture",
    "FunctionJudge": "fastalign.rollout.judges",
    "GRPOConfig": "fastalign.trainers.grpo",
    "GRPOTrainer": "fastalign.trainers.grpo",
    "HealthError": "fastalign.loop.health",
    "KTOConfig": "fastalign.trainers.kto",
    "KTOTrainer": "fastalign.trainers.kto",
    "ModelConfig": "fastalign.cli.arguments",
    "NashMDConfig": "fastalign.trainers.nash_md",
    "NashMDTrainer": "fastalign.trainers.nash_md",
    "ORPOConfig": "fastalign.trainers.orpo",
    "ORPOTrainer": "fastalign.trainers.orpo",
    "OnlineDPOConfig": "fastalign.trainers.online_dpo",
    "OnlineDPOTrainer": "fastalign.trainers.online_dpo",
    "PPOConfig": "fastalign.trainers.ppo",
    "PPOTrainer": "fastalign.trainers.ppo",
    "PRMConfig": "fastalign.trainers.prm",
    "PRMTrainer": "fastalign.trainers.prm",
    "RLOOConfig": "fastalign.trainers.rloo",
    "RLOOTrainer": "fastalign.trainers.rloo",
    "RewardConfig": "fastalign.trainers.reward",
    "RewardError": "fastalign.rollout.rewards",
    "RewardModelJudge": "fastalign.rollout.judges",
    "RewardTrainer": "fastalign.trainers.reward",
    "SFTConfig": "fastalign.trainers.sft",
    "SFTTrainer": "fastalign.trainers.sft",
    "ScriptArguments": "fastalign.cli.arguments",
    "SyncRefModelCallback": "fastalign.bema",
    "TPOConfig": "fastalign.trainers.tpo",
    "TPOTrainer": "fastalign.trainers.tpo",
    "TrlParser": "fastalign.cli.parser",
    "XPOConfig": "fastalign.trainers.xpo",
    "XPOTrainer": "fastalign.trainers.xpo",
    "apply_chat_template": "fastalign.data.chat",
    "clone_chat_template": "fastalign.data.chat",
    "extract_prompt": "fastalign.data.formats",
    "get_dataset": "fastalign.data.mixture",
    "get_peft_config": "fastalign.cli.arguments",
    "get_quantization_config": "fastalign.cli.arguments",
    "get_training_chat_template": "fastalign.data.chat",
    "init_zero_verbose": "fastalign.cli.arguments",
    "is_conversational": "fastalign.data.formats",
    "is_conversational_from_value": "fastalign.data.formats",
    "logits_forward": "fastalign.policy",
    "maybe_apply_chat_template": "fastalign.data.chat",
    "maybe_convert_to_chatml": "fastalign.data.formats",
    "maybe_extract_prompt": "fastalign.data.formats",
    "maybe_unpair_preference_dataset": "fastalign.data.formats",
    "pack_dataset": "fastalign.data.packing",
    "plan_packs": "fastalign.data.packing",
    "prepare_multimodal_messages": "fastalign.data.formats",
    "prepare_policy": "fastalign.policy",
    "supports_tool_calling": "fastalign.data.chat",
    "token_loss": "fastalign.policy",
    "token_stats": "fastalign.policy",
    "unpair_preference_dataset": "fastalign.data.formats",
    "write_report": "fastalign.report",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> _Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastalign")
    if name == "rewards":
        return _import_module("fastalign.rewards")
    if name in _PUBLIC:
        return getattr(_import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fastalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
