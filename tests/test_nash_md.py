"""NashMDTrainer against what TRL 1.10 logged (golden/sampled_pairs.json), its loss by hand, its opponent, learning."""

import copy

import pytest
import torch
from fastalign_kernels.losses.sampled_pairs import nash_md_loss
from sampled_pair_case import CASES, LEARNING, assert_same, evenness, golden, make, numbers, reward_model
from tiny import tiny_model

import fastalign
from fastalign.rollout.engine import Request, Sampling, generate
from fastalign.rollout.native import NativeEngine
from fastalign.rollout.opponents import MixtureEngine


@pytest.mark.parametrize("case", CASES["NashMD"])
def test_every_number_equals_trl(case, tmp_path):
    trainer = make("NashMD", tmp_path, reward_model(), **CASES["NashMD"][case])
    trainer.train()
    for own, other in zip(trainer.state.log_history, golden("NashMD", case), strict=True):
        assert_same(own, other, CASES["NashMD"][case].get("gradient_accumulation_steps", 1))


def test_losses_of_tokens_by_hand():
    """(beta log-ratio - (P - 1/2)) logp, whose first factor has no gradient."""
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([-1.5, -1.0, -0.5]).double()
    losses = nash_md_loss(logp, ref_logp, torch.tensor([0.9, 0.9, 0.2]).double(), beta=0.2)
    factors = [0.1 - 0.4, -0.2 - 0.4, 0.3]
    assert losses.tolist() == pytest.approx([-factors[0], -2 * factors[1], -0.5 * factors[2]])
    losses.sum().backward()
    assert logp.grad.tolist() == pytest.approx(factors)


def test_only_the_policys_completions_are_run(tmp_path, monkeypatch):
    trainer = make("NashMD", tmp_path, max_steps=2)
    seen, inner = [], trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda *a, **k: seen.append(a[1].num_rows) or inner(*a, **k))
    trainer.train()
    assert seen == [4, 4]


def test_a_judge_gives_the_probability(tmp_path):
    class Sure(fastalign.BasePairwiseJudge):
        def judge(self, prompts, completions, shuffle_order=True, return_scores=False):
            assert return_scores and all(len(pair) == 2 for pair in completions)
            return [0.25 for _ in prompts]

    log = numbers(_trained(make("NashMD", tmp_path, None, judge=Sure(), max_steps=1)))[0]
    assert log["rewards/probabilities"] == pytest.approx(0.25)
    assert log["loss/score"] == pytest.approx(-0.25 * log["logps/chosen"], rel=1e-6)
    first = fastalign.FunctionJudge(lambda given, pairs: [None for _ in pairs])
    log = numbers(_trained(make("NashMD", tmp_path, None, judge=first, max_steps=1)))[0]
    assert (log["loss"], log["frac_unranked"]) == (0.0, 1.0)


def _trained(trainer):
    trainer.train()
    return trainer


# The mixture


class Second:
    """A second model as the reference; what the engine needs of `fastalign.reference.Reference`."""

    def __init__(self, model):
        self.model = model

    def active(self, policy):
        import contextlib

        return contextlib.nullcontext(self.model)


def requests(sampling, count=12):
    """Prompts of different lengths, some of them more than once."""
    return [Request(i, [1, *range(20, 22 + i % 4 * 7)], sampling, seed=i) for i in range(count)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("temperature", [0.8, 0.0])
def test_tokens_are_drawn_from_the_mixture(family, temperature):
    """Log-probabilities are those of (1 - c) times the policy's logits plus c times the reference's."""
    policy, reference, share = tiny_model(family, seed=0), tiny_model(family, seed=1), 0.3
    sampling = Sampling(9, temperature=temperature, stop_ids=(2,))
    engine = MixtureEngine(policy, Second(reference), lambda: share, max_rows=7)
    given = {one.key: one.prompt_ids for one in requests(sampling)}
    found = list(generate(engine, requests(sampling)))
    assert len(found) == 12
    for one in found:
        ids = torch.tensor([[*given[one.key], *one.ids]])
        start = len(given[one.key]) - 1
        with torch.no_grad():
            z, other = (model(ids).logits[0, start:-1] for model in (policy, reference))
        logp = (((1 - share) * z + share * other) / (temperature or 1.0)).log_softmax(-1)
        expected = logp.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
        assert one.logps == pytest.approx(expected.tolist(), abs=2e-5)
        if not temperature:
            assert one.ids == logp.argmax(1).tolist()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_at_its_ends_the_mixture_is_one_of_the_models(share):
    models = tiny_model(seed=0), tiny_model(seed=1)
    sampling = Sampling(7, temperature=0.9, top_k=40, repetition_penalty=1.2)
    found = generate(MixtureEngine(models[0], Second(models[1]), lambda: share), requests(sampling))
    expected = generate(NativeEngine(models[int(share)]), requests(sampling))
    assert {one.key: one.ids for one in found} == {one.key: one.ids for one in expected}


def test_an_adapter_is_mixed_with_the_model_without_it(tmp_path):
    """Its share is that of the epoch, and the adapter also stands on the head."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4, lora_alpha=16, init_lora_weights=False)
    trainer = make("NashMD", tmp_path, fixed=False, ref_model=None, peft_config=config, mixture_coef=[0.2, 0.6])
    trainer.state.epoch = 1.4
    engine, (request,) = trainer.rollouts.other.engine, requests(Sampling(8, temperature=0.9), 1)
    (one,) = generate(engine, [request])
    ids = torch.tensor([[*request.prompt_ids, *one.ids]])
    with torch.no_grad():
        z = trainer.model(ids).logits
        with trainer.model.disable_adapter():
            other = trainer.model(ids).logits
    assert (z - other).abs().max() > 0.1
    logp = ((0.4 * z + 0.6 * other)[0, len(request.prompt_ids) - 1 : -1] / 0.9).log_softmax(-1)
    expected = logp.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
    assert one.logps == pytest.approx(expected.tolist(), abs=2e-5)


def test_models_that_cannot_be_mixed_are_refused(tmp_path):
    with pytest.raises(ValueError, match="recurrent"):
        MixtureEngine(tiny_model("mamba"), Second(tiny_model("mamba", seed=1)), lambda: 0.5)
    engine = MixtureEngine(tiny_model(), Second(tiny_model(vocab_size=340)), lambda: 0.5)
    with pytest.raises(ValueError, match="340 tokens"):
        list(generate(engine, requests(Sampling(2), 1)))
    with pytest.raises(ValueError, match="`use_vllm`"):
        fastalign.NashMDConfig(str(tmp_path), use_vllm=True)
    with pytest.raises(ValueError, match=r"`mixture_coef` is 1\.5"):
        fastalign.NashMDConfig(str(tmp_path), mixture_coef=[0.5, 1.5])


def test_it_learns_evaluates_and_resumes(tmp_path):
    options = LEARNING | {"save_strategy": "steps", "save_steps": 6, "adam_epsilon": 1e-3, "beta": 0.0}
    whole = make("NashMD", tmp_path / "whole", evenness, fixed=False, ref_model=None, **options)
    before = whole.evaluate()["eval_rewards/chosen"]
    whole.train()
    after = whole.evaluate()["eval_rewards/chosen"]
    assert after > before + 0.15, (before, after)
    reference = copy.deepcopy(tiny_model())
    again = make("NashMD", tmp_path / "again", evenness, fixed=False, ref_model=reference, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert numbers(again)[-3:-1] == numbers(whole)[-4:-2]
