"""OnlineDPOTrainer against TRL's on the same models, prompts and completions, and what must not change its numbers."""

import copy
import zlib

import pytest
import torch
import torch.nn.functional as F
from sampled_pair_case import (
    LEARNING,
    PAD,
    SETTINGS,
    assert_same,
    completion_of,
    evenness,
    first_reward,
    fixed_rollouts,
    length_reward,
    models,
    numbers,
    prompt_ids,
    prompts,
)
from test_parity_sft import _lora
from tiny import tiny_model, tiny_tokenizer
from torch.utils.data import SequentialSampler

import fastalign

COUNT_PADDING = ("objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward")  # in TRL


def padded(rows, left=False):
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(row)) for row in rows]
    ids = [f + row if left else row + f for row, f in zip(rows, fill, strict=True)]
    mask = [
        [0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f)
        for row, f in zip(rows, fill, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def theirs(folder, even, rewards, extra, **config):
    """The log of TRL's trainer, with losses as they were before it rounds them."""
    trl = pytest.importorskip("trl.experimental.online_dpo")

    class Fixed(trl.OnlineDPOTrainer):
        losses = []

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

        def _generate(self, model, given, images=None):
            ids = padded([prompt_ids(prompt) for prompt in given] * 2, left=True)
            completions = [completion_of(prompt, number, even) for number in (0, 1) for prompt in given]
            return (*ids, *padded(completions), None)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.losses.append(float(loss))
            return loss

    settings = SETTINGS | config
    trainer = Fixed(
        **models_of(extra),
        reward_funcs=list(rewards),
        args=trl.OnlineDPOConfig(str(folder), **settings),
        train_dataset=prompts(),
        processing_class=copy.deepcopy(tiny_tokenizer()),
        **extra,
    )
    trainer.train()
    per_step = settings.get("gradient_accumulation_steps", 1)
    for number, log in enumerate(trainer.state.log_history[:-1]):
        log["loss"] = sum(trainer.losses[number * per_step : (number + 1) * per_step])
    return trainer.state.log_history


def models_of(extra):
    return {"model": tiny_model()} if "peft_config" in extra else models()


def ours(folder, even=False, rewards=(length_reward, first_reward), extra=None, train=True, **config):
    extra = {"rollout_func": fixed_rollouts(even)} | (extra or {})
    trainer = fastalign.OnlineDPOTrainer(
        **models_of(extra),
        reward_funcs=list(rewards),
        args=fastalign.OnlineDPOConfig(str(folder), **(SETTINGS | {"shuffle_dataset": False} | config)),
        train_dataset=prompts(),
        eval_dataset=prompts().select(range(12)),
        processing_class=copy.deepcopy(tiny_tokenizer()),
        **extra,
    )
    if train:
        trainer.train()
    return trainer


PARITY = {
    "sigmoid": {},
    "even": {"even": True},
    "ipo": {"loss_type": "ipo", "reward_weights": [0.5, -1.0]},
    "penalty": {"missing_eos_penalty": 1.5, "gradient_accumulation_steps": 2},
    "cut": {"per_device_train_batch_size": 1, "max_length": 10},
    "lora": {"lora": True, "even": True},
}


@pytest.mark.parametrize("case", PARITY)
def test_every_logged_number_equals_trl(case, tmp_path):
    config = dict(PARITY[case])
    even, lora = config.pop("even", False), config.pop("lora", False)

    def extra():
        return {"peft_config": _lora(init_lora_weights=False)} if lora else {}

    rewards = (length_reward, first_reward)
    expected = theirs(tmp_path / "theirs", even, rewards, extra(), **config)
    found = ours(tmp_path / "ours", even, rewards, extra(), **config).state.log_history
    assert len(found) == len(expected) == 6
    for own, other in zip(found, expected, strict=True):
        assert_same(own, other, config.get("gradient_accumulation_steps", 1), () if even else COUNT_PADDING)


# Without TRL


def test_how_a_step_is_cut_changes_nothing(tmp_path):
    plain = ours(tmp_path, max_steps=2, share_prefix=True)
    ways = [{"share_prefix": False}, {"token_budget": 30}, {"per_device_train_batch_size": 1}]
    for way in ways:
        steps = 4 // way.get("per_device_train_batch_size", 4)
        other = ours(tmp_path, max_steps=2, gradient_accumulation_steps=steps, **way)
        for own, expected in zip(numbers(other), numbers(plain), strict=True):
            assert own == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_pair_by_hand_with_the_beta_of_its_epoch(tmp_path):
    """fp64; the loss and its gradient of the second step, which is the first of the second epoch."""
    data = prompts().select(range(2))
    policy, reference = (model.double() for model in models().values())
    settings = SETTINGS | {"max_steps": 2, "learning_rate": 0.0, "beta": [0.3, 0.7], "per_device_train_batch_size": 2}
    trainer = fastalign.OnlineDPOTrainer(
        policy,
        reference,
        length_reward,
        fastalign.OnlineDPOConfig(str(tmp_path), max_grad_norm=1e9, **settings),
        train_dataset=data,
        processing_class=copy.deepcopy(tiny_tokenizer()),
        rollout_func=fixed_rollouts(),
    )
    trainer.train()

    def logp(model, row, number):
        ids, own = prompt_ids(row["prompt"]), completion_of(row["prompt"], number)
        logits = model(torch.tensor([[*ids, *own]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        return logits.gather(1, torch.tensor(own)[:, None]).sum()

    losses = []
    for row in data:
        pair = [completion_of(row["prompt"], number) for number in (0, 1)]
        first, second = length_reward(pair, [row["target"]] * 2)
        better, worse = (0, 1) if first >= second else (1, 0)
        ratios = [logp(policy, row, i) - logp(reference, row, i).detach() for i in (better, worse)]
        losses.append(-F.logsigmoid(0.7 * (ratios[0] - ratios[1])))
    loss = torch.stack(losses).mean()
    policy.zero_grad()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters()])
    log = trainer.state.log_history[1]
    assert log["beta"] == pytest.approx(0.7)
    assert log["loss"] == pytest.approx(float(loss.detach()), rel=1e-7)  # the reference's are kept in fp32
    assert log["grad_norm"] == pytest.approx(float(norm), rel=1e-7)


def test_pairs_that_nobody_can_rank_have_no_part(tmp_path):
    """The mean is over the others; a step without any has a gradient of zero."""

    def partly(completion_ids, target, **kwargs):
        return [
            None if t == 2 else length_reward([ids], [t])[0] for ids, t in zip(completion_ids, target, strict=True)
        ]

    log = numbers(ours(tmp_path, rewards=[partly], max_steps=1))[0]
    assert log["frac_unranked"] == pytest.approx(1 / 4)
    whole = prompts().filter(lambda row: row["target"] != 2).select(range(3))
    trainer = ours(tmp_path, rewards=[length_reward], max_steps=1, per_device_train_batch_size=3, train=False)
    trainer.train_dataset = whole
    trainer.train()
    other = numbers(trainer)[0]
    for key in ("loss", "grad_norm", "logps/chosen", "objective/kl", "objective/scores", "rewards/margins"):
        assert log[key] == pytest.approx(other[key], rel=1e-5), key

    class Undecided(fastalign.BasePairwiseJudge):
        def judge(self, prompts, completions, shuffle_order=True):
            return [-1] * len(prompts)

    judged = ours(tmp_path, rewards=[], extra={"judge": Undecided()}, max_steps=1)
    log = numbers(judged)[0]
    assert (log["loss"], log["grad_norm"], log["frac_unranked"]) == (0.0, 0.0, 1.0)
    assert "logps/chosen" not in log


def test_a_judge_ranks_as_the_reward_that_it_thinks_of(tmp_path):
    ends = tiny_tokenizer()

    def size(text):  # of two texts with as many tokens one is the smaller, whichever is shown first
        return len(ends(text)["input_ids"]) + zlib.crc32(text.encode()) % 64 / 64

    def shorter(given, pairs):
        return [int(size(b) < size(a)) for a, b in pairs]

    def short(completions, **kwargs):
        return [-size(text) for text in completions]

    by_judge = ours(tmp_path, rewards=[], extra={"judge": fastalign.FunctionJudge(shorter)}, max_steps=2)
    by_reward = ours(tmp_path, rewards=[short], max_steps=2)
    keys = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/margins")
    for own, other in zip(numbers(by_judge)[:2], numbers(by_reward)[:2], strict=True):
        assert "objective/scores" not in own and "objective/scores" in other
        assert [own[key] for key in keys] == pytest.approx([other[key] for key in keys], rel=1e-6)


def test_it_learns_what_is_rewarded_and_evaluates(tmp_path):
    model = tiny_model()
    trainer = fastalign.OnlineDPOTrainer(
        model,
        reward_funcs=evenness,
        args=fastalign.OnlineDPOConfig(str(tmp_path), **(SETTINGS | LEARNING)),
        train_dataset=prompts(),
        eval_dataset=prompts().select(range(16)),
        processing_class=copy.deepcopy(tiny_tokenizer()),
    )
    before = trainer.evaluate()["eval_objective/scores"]
    trainer.train()
    after = trainer.evaluate()["eval_objective/scores"]
    assert before < 0.55 and after > 0.7, (before, after)


def test_a_run_that_is_resumed_is_the_same(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "adam_epsilon": 1e-3}
    whole = ours(tmp_path / "whole", extra={"rollout_func": None}, **options)
    again = ours(tmp_path / "again", extra={"rollout_func": None}, train=False, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert numbers(again)[2:4] == numbers(whole)[2:4]


def test_wrong_arguments_are_named(tmp_path):
    def config(**options):
        return fastalign.OnlineDPOConfig(str(tmp_path), **(SETTINGS | options))

    cases = [
        ("loss_type", {"loss_type": "hinge"}),
        ("`beta` is empty", {"beta": []}),
        ("1 / \\(2 beta\\)", {"beta": [0.1, 0.0], "loss_type": "ipo"}),
        ("missing_eos_penalty", {"missing_eos_penalty": -1.0}),
        ("auto_find_batch_size", {"auto_find_batch_size": True}),
    ]
    for match, options in cases:
        with pytest.raises(ValueError, match=match):
            config(**options)
    given = {"processing_class": tiny_tokenizer(), "train_dataset": prompts()}
    judge = fastalign.FunctionJudge(lambda given, pairs: [0] * len(pairs))
    model = tiny_model()
    for match, options, settings in [
        ("reward_funcs", {}, {}),
        ("`judge` and rewards", {"judge": judge, "reward_funcs": length_reward}, {}),
        ("missing_eos_penalty", {"judge": judge}, {"missing_eos_penalty": 1.0}),
        ("compute_metrics", {"reward_funcs": length_reward, "compute_metrics": len}, {}),
        ("same object", {"reward_funcs": length_reward, "ref_model": model}, {}),
    ]:
        with pytest.raises(ValueError, match=match):
            fastalign.OnlineDPOTrainer(model, args=config(**settings), **given, **options)
    assert config(max_completion_length=5).max_new_tokens == 5
