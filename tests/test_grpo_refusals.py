"""What GRPO refuses, by name and with what to do."""

from typing import Any

import pytest
from datasets import Dataset
from grpo_runs import grpo_trainer, prompts, rollout

import fastalign

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
    "fewer than none": ({"num_completions_to_print": -1}, "at least 0"),
    "cold": ({"temperature": 0.0}, "above 0"),
    "part of the vocabulary": ({"use_vllm": True, "top_k": 5}, "bias the importance sampling"),
    "another temperature": ({"use_vllm": True, "generation_kwargs": {"temperature": 0.7}}, "'temperature': 0.7.*bias"),
    "replayed temperature": ({"replay_buffer_size": 2, "generation_kwargs": {"temperature": 0.7}}, "temperature 1.0"),
    "biased tokens": ({"use_vllm": True, "generation_kwargs": {"logit_bias": {5: 1.0}}}, "'logit_bias': {5: 1.0}"),
    "regex": ({"use_vllm": True, "vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex"),
    "cold engine": ({"generation_kwargs": {"temperature": 0}}, "`generation_kwargs`.* 0; it must be above 0"),
    "two lengths": ({"generation_kwargs": {"max_new_tokens": 3}}, "max_new_tokens=3.*`max_completion_length` instead"),
    "two lengths of vLLM": ({"generation_kwargs": {"max_tokens": 3}}, "max_tokens=3"),
    "low delta": ({"delta": 1.1}, "`delta` is 1.1; it must be at least 1.2"),
    "low delta of a high clip": ({"delta": 1.2, "epsilon_high": 0.28}, "at least 1.28"),
    "negative clip": ({"epsilon": -1}, "`epsilon` is -1; it must be at least 0"),
    "negative upper clip": ({"epsilon_high": -0.1}, "`epsilon_high` is -0.1"),
    "negative buffer": ({"replay_buffer_size": -3}, "`replay_buffer_size` is -3"),
    "entropy's bounds": (
        {"use_adaptive_entropy": True, "entropy_coef_min": 2.0},
        "`entropy_coef_max` is 1.0; it must be at least 2.0",
    ),
    "evaluation": ({"eval_strategy": "steps", "per_device_eval_batch_size": 3}, "whole groups|multiple"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(case, tmp_path):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        grpo_trainer(tmp_path, **options)


def test_what_fits_is_taken(tmp_path):
    """A delta at the clip itself, bounds that nothing reads, arguments of the engine that agree with the fields."""
    same = {"max_new_tokens": 9, "top_p": 0.9}
    args = grpo_trainer(tmp_path, delta=1.28, epsilon_high=0.28, entropy_coef_min=2.0, generation_kwargs=same).args
    assert (args.delta, args.max_completion_length) == (1.28, 9)
    assert grpo_trainer(tmp_path, loss_type="cispo", epsilon_high=5.0, delta=4.0).args.epsilon_high == 5.0
    with pytest.raises(ValueError, match="`epsilon` is -1"):
        fastalign.RLOOConfig(str(tmp_path), epsilon=-1.0, bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="`response_length` instead"):
        fastalign.PPOConfig(str(tmp_path), generation_kwargs={"max_new_tokens": 3}, bf16=False, use_cpu=True)


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


def test_a_field_without_effect_says_so(caplog, tmp_path):
    fastalign.GRPOConfig(str(tmp_path), ds3_gather_for_generation=False, bf16=False, use_cpu=True)
    assert "`ds3_gather_for_generation=False` has no effect" in caplog.text
