"""What GRPO refuses, by name and with what to do."""

from typing import Any

import pytest
from datasets import Dataset
from grpo_runs import grpo_trainer, prompts, rollout

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"data": Dataset.from_list([{"question": "a"}] * 8)}, "no `prompt`"),
    "few prompts": ({"data": prompts(1)}, "fewer than the 2"),
    "no rewards": ({"rewards": []}, "`reward_funcs` is empty"),
    "one completion": ({"num_generations": 1}, "needs at least 2"),
    "part of a group": ({"num_generations": 3}, "multiple of `num_generations`=3"),
    "part of a batch": ({"generation_batch_size": 6}, "`generation_batch_size` is 6"),
    "both sizes": ({"generation_batch_size": 8, "steps_per_generation": 2}, "set one of them"),
    "moving nothing": ({"sync_ref_model": True}, "there is none"),
    "loss": ({"loss_type": "gro"}, "loss_type"),
    "finding sizes": ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    "regrouped entropy": ({"token_budget": 9, "top_entropy_quantile": 0.5}, "unset one"),
    "bounds": ({"vllm_importance_sampling_clip_min": 4.0}, "smaller"),
    "repository": ({"log_completions_hub_repo": "a/b"}, "log_completions"),
    "cold": ({"temperature": 0.0}, "above 0"),
    "part of the vocabulary": ({"use_vllm": True, "top_k": 5}, "bias the importance sampling"),
    "evaluation": ({"eval_strategy": "steps", "per_device_eval_batch_size": 3}, "whole groups|multiple"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(case, tmp_path):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        grpo_trainer(tmp_path, **options)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda found: found.pop("logprobs"), "logprobs missing"),
        (lambda found: found["prompt_ids"].pop(), "7 entries of `prompt_ids` for 8"),
        (lambda found: found.update(prompt_ids=[[]] * 8), "no tokens"),
    ],
)
def test_rollout_functions_are_told_what_is_wrong(change, message, tmp_path):
    def wrong(given, trainer):
        found = rollout(given, trainer)
        change(found)
        return found

    with pytest.raises(ValueError, match=message):
        grpo_trainer(tmp_path, rollout_func=wrong).train()
