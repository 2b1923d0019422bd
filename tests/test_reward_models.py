"""Reward models in the pool and in judges, against the model's ordinary forward on padded rows, as TRL runs it."""

import copy

import pytest
import torch
from test_reward_head import classifier
from tiny import tiny_tokenizer
from torch import nn
from trl.data_utils import apply_chat_template

from fastalign.rollout import reward_models
from fastalign.rollout.judges import FunctionJudge, RewardModelJudge
from fastalign.rollout.rewards import RewardPool, join_scores
from fastalign.rollout.samples import Sample

TEXTS = [("How far?", " 3 km"), ("How far?", " It is very far from here to there"), ("Who", "</s>"), ("a b", " c")]


def sample(prompt, completion) -> Sample:
    return Sample({"prompt": prompt}, [1], [2], None, "stop", completion)


def as_messages(prompt: str, completion: str) -> tuple[list, list]:
    return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]


def as_trl(model, tokenizer, samples, **template_kwargs) -> torch.Tensor:
    """Padded forward of all texts at once."""
    texts = []
    for one in samples:
        prompt, completion = one.row["prompt"], one.completion
        if isinstance(prompt, str):
            texts.append(prompt + completion)
        else:
            texts.append(apply_chat_template({"messages": prompt + completion}, tokenizer, **template_kwargs)["text"])
    inputs = tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("form", ["text", "messages"])
@pytest.mark.parametrize("budget", [16_384, 30])
def test_the_pool_gives_the_models_own_scores(family, form, budget, monkeypatch):
    monkeypatch.setattr(reward_models, "TOKENS_OF_A_BATCH", budget)
    tokenizer, model = tiny_tokenizer(), classifier(family)
    model.config.pad_token_id = tokenizer.pad_token_id
    samples = [sample(*(pair if form == "text" else as_messages(*pair))) for pair in TEXTS * 2]
    expected = as_trl(model, tokenizer, samples)
    pool = RewardPool(model, reward_processing_classes=tokenizer)
    pending = [pool.submit(samples[:2]), pool.submit(samples[2:])]
    found = join_scores([one.result() for one in pending])
    torch.testing.assert_close(found.rewards[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert expected.unique().numel() == len(TEXTS) and pool.names == [type(model).__name__]


def test_models_run_once_on_all_that_is_submitted_and_tokenise_once(monkeypatch):
    tokenizer, models = tiny_tokenizer(), [classifier(seed=1), classifier("qwen2", seed=2)]
    tokenized, batches = [], []
    own = reward_models.tokenize
    monkeypatch.setattr("fastalign.rollout.rewards.tokenize", lambda *a: tokenized.append(len(a[0])) or own(*a))
    for model in models:
        model.register_forward_pre_hook(lambda module, args: batches.append(module))
    samples = [sample(*pair) for pair in TEXTS]
    pool = RewardPool([models[0], lambda completions: [0.5, None], models[1]], [1, 2, 3], [tokenizer, None, tokenizer])
    batches.clear()
    pending = [pool.submit(samples[:2]), pool.submit(samples[2:])]
    found = join_scores([one.result() for one in reversed(pending)][::-1])
    assert tokenized == [4] and batches == models
    for column, model in ((0, models[0]), (2, models[1])):
        torch.testing.assert_close(found.rewards[:, column], as_trl(model, tokenizer, samples), rtol=1e-4, atol=1e-5)
    assert found.rewards[0, 1] == 0.5 and found.rewards[1, 1].isnan()


def test_a_tokenizer_without_padding_gets_its_end_token():
    tokenizer, model = copy.deepcopy(tiny_tokenizer()), classifier()
    samples = [sample("a", " b</s>"), sample("a", " c")]
    tokenizer.pad_token = None
    pool = RewardPool(model, reward_processing_classes=tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id
    found = pool.submit(samples).result().rewards[:, 0]
    torch.testing.assert_close(found, as_trl(model, tokenizer, samples), rtol=1e-4, atol=1e-5)


def test_models_by_name_and_of_unknown_kinds(tmp_path):
    tokenizer, model = tiny_tokenizer(), classifier()
    model.save_pretrained(tmp_path / "judge-7b")
    tokenizer.save_pretrained(tmp_path / "judge-7b")

    class Length(nn.Module):
        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"logits": attention_mask.sum(1, keepdim=True).float()})

    samples = [sample(*as_messages(*pair)) for pair in TEXTS]
    template = {"enable_thinking": False}
    pool = RewardPool([str(tmp_path / "judge-7b"), Length()], None, [None, tokenizer], chat_template_kwargs=template)
    found = pool.submit(samples).result().rewards
    assert pool.names == ["judge-7b", "Length"]
    torch.testing.assert_close(found[:, 0], as_trl(model, tokenizer, samples, **template), rtol=1e-4, atol=1e-5)
    lengths = [len(ids) for ids in reward_models.tokenize(samples, tokenizer, template)]
    assert found[:, 1].tolist() == lengths and len(set(lengths)) > 1
    with pytest.raises(ValueError, match="has no name to load a tokenizer from"):
        RewardPool(classifier())


def test_a_judge_of_a_reward_model_prefers_the_higher_score():
    tokenizer, model = tiny_tokenizer(), classifier()
    model.config.pad_token_id = tokenizer.pad_token_id
    prompts = [prompt for prompt, _ in TEXTS]
    pairs = [[a, b] for (_, a), (_, b) in zip(TEXTS, TEXTS[::-1], strict=True)] + [[" same", " same"]]
    prompts.append("p")
    scores = [
        as_trl(model, tokenizer, [sample(p, a), sample(p, b)]).tolist()
        for p, (a, b) in zip(prompts, pairs, strict=True)
    ]
    expected = [int(b > a) for a, b in scores[:-1]] + [-1]
    assert {0, 1} <= {*expected}
    judge = RewardModelJudge(model, tokenizer)
    assert judge.judge(prompts, pairs) == judge.judge(prompts, pairs, shuffle_order=False) == expected


def test_a_judge_of_a_function_sees_both_orders():
    orders = []

    def longer(prompts, pairs):
        orders.extend(tuple(pair) for pair in pairs)
        return [None if len(a) == len(b) else int(len(b) > len(a)) for a, b in pairs]

    judge = FunctionJudge(longer)
    prompts, pairs = ["p"] * 40, [["aa", "b"], ["a", "bb"]] * 19 + [["a", "b"]] * 2
    assert judge.judge(prompts, pairs) == [0, 1] * 19 + [-1, -1]
    assert {("aa", "b"), ("b", "aa"), ("a", "bb"), ("bb", "a")} <= {*orders}
    orders.clear()
    assert judge.judge(prompts, pairs, shuffle_order=False) == [0, 1] * 19 + [-1, -1]
    assert orders == [tuple(pair) for pair in pairs]
    first = FunctionJudge(lambda prompts, pairs: [0] * len(pairs)).judge(prompts, pairs)
    assert 5 < sum(first) < 35  # one that prefers a place prefers none
    texts = [[f"{i}a", f"{i}b"] for i in range(40)]
    draws = [FunctionJudge(lambda prompts, pairs: [0] * len(pairs), seed) for seed in (0, 0, 1)]
    found = [[one.judge(prompts, texts), one.judge(prompts, texts[::-1])] for one in draws]
    assert found[0] == found[1] and found[0][0] == draws[0].judge(prompts, texts)  # as a resumed run sees them
    assert found[0][0] != found[0][1] and found[0] != found[2]
    for answers, message in (([0], "1 answers for 40"), ([2] * 40, "returned 2")):
        with pytest.raises(ValueError, match=message):
            FunctionJudge(lambda prompts, pairs, answers=answers: answers).judge(prompts, pairs)
