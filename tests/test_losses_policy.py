"""Policy-gradient losses against worked numbers and TRL's own loss, token by token."""

import collections
import math
from types import SimpleNamespace

import pytest
import torch
from fastalign_kernels.losses.corrections import entropy_threshold, high_entropy_mask
from fastalign_kernels.losses.policy_gradient import (
    POLICY_LOSSES,
    WEIGHTINGS,
    PolicyObjective,
    PolicyTokens,
    kl_estimate,
    policy_terms,
    token_weights,
)
from fastalign_kernels.losses.row_sums import Rows

F64 = torch.float64
LENGTHS = (5, 1, 0, 7, 4)
ACCUMULATION, STEPS_PER_GENERATION, NUM_TOKENS, MAX_LENGTH = 2, 4, 61.0, 9
FLAT_OF_TRL = {"dapo", "cispo", "vespo"}  # TRL divides these by tokens and accumulation, the others by accumulation


def batch(seed=0):
    """Padded fp64 tensors of one micro-batch, as TRL sees them."""
    g = torch.Generator().manual_seed(seed)
    rows, width = len(LENGTHS), max(LENGTHS)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)  # noqa: E731
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    logp = -normal(rows, width).abs() - 0.1
    near = lambda scale: logp + scale * normal(rows, width)  # noqa: E731
    advantages = torch.tensor([1.0, -0.5, 0.0, -1.5, 0.7], dtype=F64)
    return SimpleNamespace(
        mask=mask, logp=logp, old=near(0.4), ref=near(0.3), sampled=near(0.3), advantages=advantages,
        entropy=normal(rows, width).abs(), importance=1 + 0.5 * normal(rows, width).abs() * mask,
    )  # fmt: skip


def trl_harness(b, options):
    """GRPOTrainer (or GMPO's) with what `_compute_loss` touches, and log-probabilities handed in."""
    module = pytest.importorskip("trl.trainer.grpo_trainer")
    trainer_class = module.GRPOTrainer
    if options["loss_type"] == "gmpo":
        trainer_class = pytest.importorskip("trl.experimental.gmpo").GMPOTrainer
    o = PolicyObjective(**options)
    trainer = trainer_class.__new__(trainer_class)
    logp, entropy = (v.clone().requires_grad_() for v in (b.logp, b.entropy))
    trainer.accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda v: v, reduce=lambda v, reduction: v,
        pad_across_processes=lambda v, dim, pad_index: v,
    )  # fmt: skip
    trainer.args = SimpleNamespace(steps_per_generation=STEPS_PER_GENERATION, **vars(o))
    trainer.model = SimpleNamespace(training=True)
    trainer.current_gradient_accumulation_steps = ACCUMULATION
    trainer.max_completion_length, trainer.epsilon_low, trainer.epsilon_high = MAX_LENGTH, o.epsilon, o.high
    for name in ("loss_type", "beta", "importance_sampling_level", "top_entropy_quantile", "entropy_coef"):
        setattr(trainer, name, getattr(o, name))
    trainer.off_policy_mask_threshold = o.off_policy_mask_threshold
    trainer._entropy_bonus_enabled, trainer.use_adaptive_entropy = o.entropy_coef != 0.0, False
    trainer.aux_loss_enabled = False
    trainer._metrics = {"train": collections.defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logp, entropy, None)
    return trainer, logp, entropy


def trl_loss(b, options, given):
    trainer, logp, entropy = trl_harness(b, options)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = "importance_weights" in given
    names = {"old_logp": "old_per_token_logps", "ref_logp": "ref_per_token_logps"} | {
        "sampling_logp": "sampling_per_token_logps",
        "importance_weights": "importance_sampling_ratio",
    }
    inputs = {names[name]: value for name, value in given.items()} | {
        "prompt_ids": b.mask[:, :0], "prompt_mask": b.mask[:, :0],
        "completion_ids": b.mask, "completion_mask": b.mask, "advantages": b.advantages,
        "num_items_in_batch": torch.tensor(NUM_TOKENS),
    }  # fmt: skip
    loss = trainer._compute_loss(trainer.model, inputs)
    grads = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    return loss, grads, {name: values[0] for name, values in trainer._metrics["train"].items()}


def flat_loss(b, options, given):
    """The same from flat tokens; (loss, gradients of logp and entropy, terms, rows)."""
    o, at = PolicyObjective(**options), b.mask.bool()
    ids = at.nonzero()[:, 0]
    num_tokens = NUM_TOKENS * ACCUMULATION / STEPS_PER_GENERATION
    weights = token_weights(ids, len(LENGTHS), o.loss_type, num_tokens=num_tokens, max_completion_length=MAX_LENGTH)
    if o.loss_type not in FLAT_OF_TRL:
        weights = weights / ACCUMULATION
    logp, entropy = (v[at].clone().requires_grad_() for v in (b.logp, b.entropy))
    known = {name: value[at] for name, value in given.items()}
    tokens = PolicyTokens(b.advantages[ids], weights, ids, **known)
    bonus_mask = torch.ones_like(entropy)
    if o.top_entropy_quantile < 1.0:
        bound = entropy_threshold(entropy.detach(), o.top_entropy_quantile)
        tokens.entropy_mask = bonus_mask = high_entropy_mask(entropy, bound)
    terms = policy_terms(logp, tokens, o, len(LENGTHS))
    bonus = (entropy * bonus_mask).sum() / bonus_mask.sum() / ACCUMULATION
    loss = (terms.loss * weights).sum() - o.entropy_coef * bonus
    grads = torch.autograd.grad(loss, (logp, entropy))
    return loss, grads, terms, Rows(ids, len(LENGTHS))


def assert_metrics(o, metrics, terms, rows, entropy):
    """TRL's logged numbers are means of ours, over rows where the ratio is one of the row."""
    per_row = o.importance_sampling_level == "sequence" and o.loss_type != "gmpo"
    lengths = rows.lengths.to(F64)

    def mean(flag, of_rows=per_row):
        row_means = rows.sums(flag.to(F64)) / (lengths.clamp(min=1) if of_rows else lengths)
        return row_means.mean() if of_rows else flag.to(F64).mean(), row_means

    expected = {"entropy": entropy.mean()}
    if o.beta:
        expected["kl"] = terms.kl.mean()
    if o.loss_type == "cispo":
        expected["cispo_clip_ratio"] = mean(terms.clip_high)[0]
    elif o.loss_type == "vespo":
        phi = mean(terms.phi, of_rows=True)[1]
        phi[2] = math.exp(3.0 + 0 - 3.0)  # the row without tokens: W = 1
        expected["vespo/phi_seq_mean"] = phi.mean()
    elif terms.clip_low is not None:
        (low, low_rows), (high, high_rows) = mean(terms.clip_low), mean(terms.clip_high)
        expected |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
        kept = ~low_rows.isnan()
        expected |= {"clip_ratio/low_min": low_rows[kept].min(), "clip_ratio/high_max": high_rows[kept].max()}
    found = {name: v for name, v in metrics.items() if name not in ("policy_loss", "entropy_coef")}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-6, abs=1e-12), name


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gmpo"]
OPTIONS = [
    {},
    {"importance_sampling_level": "sequence"},
    {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5},
    {"beta": 0.1},
    {"beta": 0.1, "use_bias_correction_kl": False, "importance_sampling_level": "sequence"},
    {"beta": 0.1, "importance_sampling_level": "sequence"},
    {"off_policy_mask_threshold": 0.05},
    {"top_entropy_quantile": 0.4, "entropy_coef": 0.02},
    {"entropy_coef": 0.02, "importance": True},
    {"importance": True, "beta": 0.1, "off_policy_mask_threshold": 0.02, "importance_sampling_level": "sequence"},
    {"on_policy": True, "beta": 0.1},
    {"on_policy": True, "importance_sampling_level": "sequence"},
    {"sapo_temperature_neg": 2.0, "vespo_k_pos": 1.0, "vespo_lambda_neg": 1.0},
]


NOT_IN_GMPO = {"importance", "off_policy_mask_threshold", "entropy_coef", "delta"}  # TRL's leaves them out
CASES = [(name, o) for name in LOSSES for o in OPTIONS if name != "gmpo" or not NOT_IN_GMPO & o.keys()]
CASES.append(("gmpo", {"epsilon": 0.1, "epsilon_high": 0.3, "top_entropy_quantile": 0.4}))


@pytest.mark.parametrize(("loss_type", "options"), CASES, ids=str)
def test_losses_equal_trl(loss_type, options):
    options = {"loss_type": loss_type, **options}
    importance, on_policy = options.pop("importance", False), options.pop("on_policy", False)
    b = batch()
    given = {} if on_policy else {"old_logp": b.old}
    if "beta" in options:
        given["ref_logp"] = b.ref
    if importance:
        given |= {"importance_weights": b.importance, "sampling_logp": b.sampled}
    loss, grads, metrics = trl_loss(b, options, given)
    found, found_grads, terms, rows = flat_loss(b, options, given)
    at = b.mask.bool()
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(found_grads, grads, strict=True):
        expected = torch.zeros_like(b.logp) if theirs is None else theirs
        assert torch.allclose(ours, expected[at], rtol=1e-6, atol=1e-9)
        assert not expected[~at].any()
    assert_metrics(PolicyObjective(**options), metrics, terms, rows, b.entropy[at])


def test_rloo_equals_trl():
    module = pytest.importorskip("trl.trainer.rloo_trainer")
    b = batch()
    b.old[0], b.old[3] = b.logp[0] - 0.1, b.logp[3] + 0.1  # one row above the bounds at A > 0, one below at A < 0
    trainer = module.RLOOTrainer.__new__(module.RLOOTrainer)
    trainer.accelerator = SimpleNamespace(gather=lambda v: v, reduce=lambda v, reduction: v)
    trainer.model, trainer.aux_loss_enabled = SimpleNamespace(training=True), False
    trainer.epsilon_low, trainer.epsilon_high = 0.01, 0.02
    trainer._metrics = {"train": collections.defaultdict(list)}
    logp = b.logp.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logp, b.entropy, None)
    inputs = {"prompt_ids": b.mask[:, :0], "prompt_mask": b.mask[:, :0], "completion_ids": b.mask}
    inputs |= {"completion_mask": b.mask, "advantages": b.advantages, "old_logps": (b.old * b.mask).sum(1)}
    loss = trainer._compute_loss(None, inputs)
    (grad,) = torch.autograd.grad(loss, logp)
    options = {"loss_type": "rloo", "epsilon": 0.01, "epsilon_high": 0.02}
    found, (found_grad, _), terms, rows = flat_loss(b, options, {"old_logp": b.old})
    assert found.item() * ACCUMULATION == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(found_grad * ACCUMULATION, grad[b.mask.bool()], rtol=1e-6, atol=1e-10)
    low, high = (rows.sums(f.to(F64)) / rows.lengths.clamp(min=1) for f in (terms.clip_low, terms.clip_high))
    metrics = trainer._metrics["train"]
    assert metrics["clip_ratio/region_mean"][0] == pytest.approx(float((low + high).mean()))
    assert float(low.sum() + high.sum()) > 0


def tokens_of(advantages, **known):
    advantages = torch.tensor(advantages, dtype=F64)
    return PolicyTokens(advantages, torch.ones_like(advantages), **known)


def test_clip_by_hand():
    logp = torch.log(torch.tensor([0.5, 0.5, 0.1, 0.3], dtype=F64)).requires_grad_()
    old = torch.log(torch.tensor([0.25, 0.25, 0.2, 0.3], dtype=F64))  # ratios 2, 2, 0.5, 1
    terms = policy_terms(logp, tokens_of([1.0, -1.0, -1.0, 2.0], old_logp=old), PolicyObjective(loss_type="ppo"))
    assert terms.loss.tolist() == pytest.approx([-1.2, 2.0, 0.8, -2.0])
    assert terms.clip_high.tolist() == [True, False, False, False]
    assert terms.clip_low.tolist() == [False, False, True, False]
    terms.loss.sum().backward()  # no gradient where the clipped term is the smaller
    assert logp.grad.tolist() == pytest.approx([0.0, 2.0, 0.0, -2.0])


def test_reinforce_and_dppo_by_hand():
    logp = torch.log(torch.tensor([0.5, 0.9, 0.1, 0.4], dtype=F64)).requires_grad_()
    old = torch.log(torch.tensor([0.25, 0.3, 0.4, 0.5], dtype=F64))
    terms = policy_terms(logp, tokens_of([1.0, -1.0, -1.0, -2.0], old_logp=old), PolicyObjective(loss_type="dppo"))
    # rose by 0.25 at A > 0: dropped; rose by 0.6 at A < 0: kept; fell by 0.3 at A < 0: dropped; fell by 0.1: kept
    assert terms.loss.tolist() == pytest.approx([0.0, 3 * math.log(0.9), 0.0, 1.6 * math.log(0.4)])
    assert terms.clip_high.tolist() == [True, False, False, False]
    assert terms.clip_low.tolist() == [False, False, True, False]
    (grad,) = torch.autograd.grad(terms.loss.sum(), logp)
    assert grad.tolist() == pytest.approx([0.0, 3.0, 0.0, 1.6])
    capped = policy_terms(logp, tokens_of([-1.0] * 4, old_logp=old), PolicyObjective(loss_type="dppo", clip_ratio_c=2))
    assert float(capped.loss[1].detach()) == pytest.approx(2 * math.log(0.9))
    terms = policy_terms(logp, tokens_of([1.0, -1.0, 0.0, 2.0]), PolicyObjective(loss_type="reinforce"))
    assert torch.autograd.grad(terms.loss.sum(), logp)[0].tolist() == pytest.approx([-1.0, 1.0, 0.0, -2.0])


def test_sequence_ratio_by_hand():
    logp = torch.tensor([math.log(2.0), math.log(8.0), 0.0], dtype=F64, requires_grad=True)
    tokens = tokens_of([1.0, 1.0, 3.0], old_logp=torch.zeros(3, dtype=F64), rows=torch.tensor([0, 0, 2]))
    objective = PolicyObjective(loss_type="grpo", importance_sampling_level="sequence", epsilon_high=9.0)
    terms = policy_terms(logp, tokens, objective, 3)
    assert terms.ratio.tolist() == pytest.approx([4.0, 4.0, 1.0])  # sqrt(2 * 8)
    terms.loss.sum().backward()  # each token of the row carries 2 terms * 4 / 2
    assert logp.grad.tolist() == pytest.approx([-4.0, -4.0, -3.0])


@pytest.mark.parametrize(("name", "value", "slope"), [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", None, None)])
def test_kl_estimates(name, value, slope):
    logp = torch.tensor([0.5], dtype=F64, requires_grad=True)
    found = kl_estimate(logp, torch.zeros(1, dtype=F64), name)
    (grad,) = torch.autograd.grad(found, logp)
    assert float(found.detach()) == pytest.approx(math.exp(-0.5) + 0.5 - 1 if value is None else value)
    assert float(grad) == pytest.approx(1 - math.exp(-0.5) if slope is None else slope)


def test_token_weights_by_hand():
    ids = torch.tensor([0, 0, 2])
    weights = lambda name, **k: token_weights(ids, 4, name, **k).tolist()  # noqa: E731
    assert weights("grpo") == pytest.approx([1 / 8, 1 / 8, 1 / 4])
    assert weights("luspo") == pytest.approx([1 / 4] * 3)
    assert weights("bnpo") == pytest.approx([1 / 3] * 3)
    assert weights("dapo") == pytest.approx([1 / 3] * 3)
    assert weights("dapo", num_tokens=torch.tensor(12.0)) == pytest.approx([1 / 12] * 3)
    assert weights("dr_grpo", max_completion_length=5) == pytest.approx([1 / 20] * 3)
    with pytest.raises(ValueError, match="max_completion_length is not given"):
        weights("dr_grpo")
    with pytest.raises(ValueError, match="loss_type='x'"):
        weights("x")
    assert WEIGHTINGS.keys() == POLICY_LOSSES.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "gspo"}, "loss_type='gspo': choose one of grpo"),
        ({"importance_sampling_level": "row"}, "importance_sampling_level='row'"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4'"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile=0.0"),
    ],
)
def test_objective_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyObjective(**options)
