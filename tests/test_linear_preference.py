"""Preference losses of a linear head against the specification on full logits, and against TRL's loss code."""

import functools

import pytest
import torch
from fastalign_kernels.head import answers as answers_module
from fastalign_kernels.head.preference import (
    ReferenceHead,
    linear_preference_loss,
    linear_preference_loss_reference,
    linear_unpaired_loss,
    linear_unpaired_loss_reference,
)
from fastalign_kernels.head.stats import stats
from fastalign_kernels.head.token_stats import LogitForm
from fastalign_kernels.losses.odds import cpo_loss, orpo_loss, tpo_loss
from fastalign_kernels.losses.preference import PREFERENCE_LOSSES, preference_loss
from fastalign_kernels.losses.sequences import row_sums
from fastalign_kernels.losses.unpaired import bco_loss, kto_loss, running_mean
from head_oracle import leaves, relative_error
from tolerances import GRADIENTS

D, V = 12, 61
LENGTHS = [5, 3, 1, 1, 0, 4, 11, 9, 2, 7]  # answers of 5 pairs: one of one token each, an empty chosen, a long one
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


def problem(lengths=LENGTHS, dtype=torch.float64, seed=0):
    """hidden, weight with gradient, targets, rows in the layout of pairs."""
    torch.manual_seed(seed)
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    hidden = torch.randn(len(rows), D, dtype=dtype).requires_grad_()
    weight = (torch.randn(V, D, dtype=dtype) * 0.7).requires_grad_()
    return hidden, weight, torch.randint(V, (len(rows),)), rows


def reference_head(hidden, targets, dtype):
    """A frozen head of another width and its log-probabilities."""
    head = ReferenceHead(torch.randn(len(targets), D + 3, dtype=dtype), torch.randn(V, D + 3, dtype=dtype) * 0.5)
    return head, stats(head.hidden, head.weight, targets).logp


def assert_same(found, expected, inputs, oracle_inputs, dtype):
    rtol = {torch.float64: 1e-9, torch.float32: 2e-6}[dtype]
    assert found.item() == pytest.approx(expected.item(), rel=rtol, abs=1e-7)
    grads = torch.autograd.grad(found, inputs)
    for grad, reference in zip(grads, torch.autograd.grad(expected, oracle_inputs, retain_graph=True), strict=True):
        if reference.norm() > 1e-12:
            assert relative_error(grad, reference) < 5 * GRADIENTS[dtype]
        else:
            assert grad.abs().max() < 1e-6
    return grads


@pytest.mark.parametrize("chunk", [1, 9, 20, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_dpo_type_equals_the_specification(dtype, chunk):
    hidden, weight, targets, rows = problem(dtype=dtype)
    head, ref_logp = reference_head(hidden, targets, dtype)
    counts = torch.tensor(LENGTHS)
    lengths = {"chosen_lengths": counts[::2], "rejected_lengths": counts[1::2]}
    oracle = leaves(hidden, weight)
    for name in PREFERENCE_LOSSES:
        settings = {"loss_type": name, "beta": 0.3, "label_smoothing": 0.1 if name in SMOOTHED else 0.0}
        found = linear_preference_loss(
            hidden, weight, targets, rows, num_pairs=5, reference=head, chunk=chunk, **settings
        )
        fn = functools.partial(preference_loss, **settings, **lengths)
        expected = linear_preference_loss_reference(
            *oracle, targets, rows, num_pairs=5, fn=fn, ref_logp=ref_logp.double()
        )
        assert_same(found.loss, expected, (hidden, weight), oracle, dtype)
        assert found.losses.mean().item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("layout", ["pairs", "blocks", "mixed"])
def test_layouts_give_the_same(layout, chunk):
    hidden, weight, targets, rows = problem()
    ref_logps = -torch.rand(10, dtype=torch.float64)
    settings = {"num_pairs": 5, "chunk": chunk, "outputs": ("entropy",), "beta": 0.3}
    plain = linear_preference_loss(hidden, weight, targets, rows, ref_logps=ref_logps, **settings)
    grads = torch.autograd.grad(plain.loss, (hidden, weight))
    numbers, references = rows, ref_logps
    order = torch.arange(len(rows))
    if layout == "blocks":
        numbers = rows % 2 * 5 + rows // 2
        order = numbers.argsort(stable=True)
        references = ref_logps.view(5, 2).t().reshape(-1)
    elif layout == "mixed":  # tokens of several answers alternate, those of an answer keep their order
        order = (torch.arange(len(rows)) % 3).argsort(stable=True)
    permuted = (hidden.detach()[order]).requires_grad_()
    settings |= {"layout": "blocks" if layout == "blocks" else "pairs", "ref_logps": references}
    found = linear_preference_loss(permuted, weight, targets[order], numbers[order], **settings)
    moved, of_weight = torch.autograd.grad(found.loss, (permuted, weight))
    assert torch.allclose(found.loss, plain.loss, rtol=1e-12)
    assert torch.allclose(found.chosen_logps, plain.chosen_logps) and torch.allclose(found.margins, plain.margins)
    assert torch.allclose(moved, grads[0][order]) and torch.allclose(of_weight, grads[1])
    assert torch.allclose(found.stats.entropy, plain.stats.entropy[order])
    logp = torch.log_softmax(hidden @ weight.t(), -1)[torch.arange(len(rows)), targets]
    assert torch.allclose(found.stats.logp, logp[order])
    assert torch.allclose(plain.rejected_logps, row_sums(logp, torch.tensor(LENGTHS))[1::2])


hinge = functools.partial(preference_loss, loss_type="hinge")
CASES = {  # loss and its settings; what the specification needs
    "cpo": ("cpo", {"loss_type": "hinge", "beta": 0.5}, cpo_loss, {"nll_alpha": 1.0}),
    "simpo": ("cpo", {"loss_type": "simpo", "nll_alpha": 0.0}, cpo_loss, {"average_log_prob": True}),
    "alphapo": ("cpo", {"loss_type": "alphapo", "alpha": 0.25}, cpo_loss, {"average_log_prob": True}),
    "orpo": ("orpo", {"beta": 0.4}, orpo_loss, {"average_log_prob": True, "nll_alpha": 1.0}),
    "tpo": ("tpo", {"loss_type": "tpo-l"}, tpo_loss, {"average_log_prob": True, "nll_alpha": 1.0, "nll_answer": 2}),
    "tpo, no nll": ("tpo", {"nll_alpha": 0.0}, tpo_loss, {}),
    "rpo": ("dpo", {"nll_alpha": 0.7}, preference_loss, {"nll_alpha": 0.7}),
    "own, referenced": (hinge, {}, hinge, {}),
    "own": (lambda c, r, *_: (c - r) ** 2, {}, lambda c, r, *_: (c - r) ** 2, {}),
    "own, coupled": (
        lambda c, r, *_: (c - r.sum()) ** 2,
        {"couples_pairs": True},
        lambda c, r, *_: (c - r.sum()) ** 2,
        {},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_other_losses_equal_the_specification(name, dtype):
    loss, settings, pure, own = CASES[name]
    per_pair = 3 if name == "tpo" else 2
    lengths = [3, 4, 2, 1, 1, 6, 5, 0, 2, 4, 3, 1]
    hidden, weight, targets, rows = problem(lengths, dtype)
    num_pairs = len(lengths) // per_pair
    head, ref_logp = reference_head(hidden, targets, dtype)
    bound = {k: v for k, v in settings.items() if k in ("loss_type", "beta", "alpha")}
    fn = functools.partial(pure, **bound) if bound else pure
    oracle = leaves(hidden, weight)
    referenced = name in ("rpo", "own, referenced")
    known = {"reference": head} if referenced else {}
    ref_logp = ref_logp.double() if referenced else None
    expected = linear_preference_loss_reference(
        *oracle, targets, rows, num_pairs=num_pairs, per_pair=per_pair, fn=fn, ref_logp=ref_logp, **own
    )
    for chunk in (8, None):
        found = linear_preference_loss(
            hidden, weight, targets, rows, num_pairs=num_pairs, loss=loss, chunk=chunk, **known, **settings
        )
        assert_same(found.loss, expected, (hidden, weight), oracle, dtype)
        alpha = own.get("nll_alpha", 0.0)
        nll = alpha * found.nll if alpha else 0.0
        assert float(found.losses.mean() + nll) == pytest.approx(expected.item(), rel=1e-5)


def test_prompts_that_only_the_nll_sees():
    """ORPO's NLL is over prompt and answer of the chosen sequence, its log-probabilities over the answer."""
    hidden, weight, targets, rows = problem([6, 2, 5, 3])
    scored = torch.ones(16, dtype=torch.bool)
    scored[:3] = scored[8:12] = False
    found = linear_preference_loss(hidden, weight, targets, rows, num_pairs=2, loss="orpo", scored=scored, chunk=9)
    h, w = leaves(hidden, weight)
    logp = torch.log_softmax(h @ w.t(), -1)[torch.arange(16), targets]
    chosen = torch.stack([logp[3:6].mean(), logp[12:13].mean()])
    rejected = torch.stack([logp[6:8].mean(), logp[13:16].mean()])
    nll = -torch.cat([logp[:6], logp[8:13]]).mean()
    assert_same(found.loss, orpo_loss(chosen, rejected).losses.mean() + nll, (hidden, weight), (h, w), torch.float64)
    assert found.nll.item() == pytest.approx(nll.item()) and torch.allclose(found.chosen_logps, chosen.detach())


def test_factors_of_the_head_and_temperatures_follow_the_tokens():
    """u b^T is added to the logits as if u stood beside hidden; both, and temperatures, are given in any order."""
    hidden, weight, targets, rows = problem([3, 2, 4, 1])
    u, b = torch.randn(10, 3, dtype=torch.float64), torch.randn(V, 3, dtype=torch.float64)
    temperature, order = torch.rand(10, dtype=torch.float64) + 0.5, (torch.arange(10) % 3).argsort(stable=True)
    form = LogitForm(temperature=temperature[order])
    settings = {"num_pairs": 2, "loss": "cpo", "form": form, "low_rank": (u[order], b), "chunk": 6}
    found = linear_preference_loss(hidden.detach()[order], weight, targets[order], rows[order], **settings)
    wide = torch.cat([hidden, u], 1) / temperature[:, None], torch.cat([weight, b], 1)
    expected = linear_preference_loss_reference(*wide, targets, rows, num_pairs=2, fn=cpo_loss, nll_alpha=1.0)
    assert_same(found.loss, expected, (weight,), (weight,), torch.float64)


@pytest.mark.parametrize("chunk", [10, None])
@pytest.mark.parametrize("settings", [{"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
                                      {"ld_alpha": 0.5, "loss_type": ["ipo", "sft"]}, {"use_weighting": True},
                                      {"loss_type": ["aot"], "ld_alpha": 0.25}], ids=str)  # fmt: skip
def test_flat_tokens_equal_trl_on_padded_rows(settings, chunk):
    pytest.importorskip("trl")
    from trl_preferences import trl_dpo

    lengths = torch.tensor([5, 3, 1, 1, 4, 6, 2, 7])  # chosen block, then rejected block
    hidden, weight, targets, rows = problem(lengths.tolist())
    ref_logps = -torch.rand(8, dtype=torch.float64)
    found = linear_preference_loss(
        hidden, weight, targets, rows, num_pairs=4, layout="blocks", ref_logps=ref_logps, chunk=chunk, **settings
    )
    h, w = leaves(hidden, weight)
    logp_all = torch.log_softmax(h @ w.t(), -1)
    mask = torch.zeros(8, 9, dtype=torch.int64)
    places = (rows, 1 + torch.cat([torch.arange(n) for n in lengths]))
    mask[places[0], places[1] + 1] = 1
    padded = torch.zeros(8, 8, dtype=torch.float64).index_put(places, logp_all[torch.arange(len(rows)), targets])
    log_sum_p2 = torch.zeros(8, 8, dtype=torch.float64).index_put(places, logp_all.mul(2).logsumexp(-1))
    own = {**settings, "loss_type": settings.get("loss_type", ["sigmoid"])}
    expected, metrics = trl_dpo(padded, mask, ref_logps, log_sum_p2, **own)
    assert_same(found.loss, expected, (hidden, weight), (h, w), torch.float64)
    for key in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert getattr(found, "_".join(reversed(key.split("/")))).mean().item() == pytest.approx(metrics[key])
    assert found.accuracies.mean().item() == pytest.approx(metrics["rewards/accuracies"])


@pytest.mark.parametrize("loss_type", ["sigmoid", "tpo-l"])
def test_tpo_equals_trl(loss_type):
    pytest.importorskip("trl")
    from trl_preferences import trl_tpo

    logits_hidden = torch.randn(6, 7, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    ids, mask = torch.randint(V, (6, 7)), torch.zeros(6, 7, dtype=torch.int64)
    for i in range(6):
        mask[i, 2 : 4 + i % 3] = 1
    expected = trl_tpo(logits_hidden @ weight.t(), ids, mask, loss_type=loss_type, beta=0.3)
    kept = mask[:, 1:].bool()
    rows = torch.arange(6)[:, None].expand(6, 6)[kept]
    hidden = logits_hidden[:, :-1][kept]
    found = linear_preference_loss(
        hidden, weight, ids[:, 1:][kept], rows, num_pairs=2, loss="tpo", layout="blocks", loss_type=loss_type, beta=0.3
    )
    assert_same(found.loss, expected, (logits_hidden, weight), (logits_hidden, weight), torch.float32)


@pytest.mark.parametrize("chunk", [6, 12, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unpaired_losses(dtype, chunk):
    lengths = [4, 1, 0, 7, 3, 2]
    hidden, weight, targets, rows = problem(lengths, dtype)
    labels = torch.tensor([True, False, True, False, False, True])
    head, ref_logp = reference_head(hidden, targets, dtype)
    h, w = leaves(hidden, weight)
    logps = row_sums(torch.log_softmax(h @ w.t(), -1)[torch.arange(17), targets], torch.tensor(lengths))
    refs = row_sums(ref_logp.double(), torch.tensor(lengths))
    kl = torch.tensor(0.3)
    calls = []

    def delta_of(rewards):
        calls.append(rewards)
        return running_mean(torch.tensor(0.5), torch.tensor(4.0), rewards)[0]

    weights = torch.rand(6, dtype=dtype) + 0.5
    shared = {"reference": head, "chunk": chunk}
    for own, expected in (
        ({"baseline": kl, "undesirable_weight": 1.5}, kto_loss(logps, refs, labels, kl, undesirable_weight=1.5)),
        ({"loss_type": "apo_zero_unpaired"}, kto_loss(logps, refs, labels, loss_type="apo_zero_unpaired")),
        (
            {"loss_type": "bco", "baseline": delta_of, "undesirable_weights": weights},
            bco_loss(logps, refs, labels, running_mean(torch.tensor(0.5), torch.tensor(4.0), 0.1 * (logps - refs))[0],
                     undesirable_weights=weights),
        ),
        ({"baseline": 0.3}, kto_loss(logps, refs, labels, kl.to(dtype).new_tensor(0.3))),
    ):  # fmt: skip
        found = linear_unpaired_loss(hidden, weight, targets, rows, labels, **shared, **own)
        assert_same(found.loss, expected.losses.mean(), (hidden, weight), (h, w), dtype)
        assert torch.allclose(found.losses.double(), expected.losses.detach(), rtol=1e-5)
        assert torch.allclose(found.rewards.double(), expected.rewards, rtol=1e-4, atol=1e-6)
    specified = linear_unpaired_loss_reference(
        h, w, targets, rows, labels, fn=functools.partial(kto_loss, kl=kl), ref_logp=ref_logp.double()
    )
    found = linear_unpaired_loss(hidden, weight, targets, rows, labels, baseline=kl, **shared)
    assert_same(found.loss, specified, (hidden, weight), (h, w), dtype)
    assert len(calls) == 1 and not calls[0].requires_grad
    with pytest.raises(TypeError, match="undesirable_weights"):  # BCO's own
        linear_unpaired_loss(hidden, weight, targets, rows, labels, **shared, baseline=kl, undesirable_weights=weights)


def test_products_are_three_where_pairs_are_separate_and_four_where_coupled(monkeypatch):
    hidden, weight, targets, rows = problem()
    used = []
    for name in ("fused", "deferred"):
        fn = getattr(answers_module, name)
        monkeypatch.setattr(answers_module, name, lambda *a, fn=fn, name=name, **k: used.append(name) or fn(*a, **k))
    settings = {"num_pairs": 5, "ref_logps": torch.zeros(10, dtype=torch.float64)}
    for own in (
        {"chunk": 10},  # the longest pair has 20 tokens: two chunks
        {"chunk": 9},  # more than two chunks
        {"chunk": 43, "loss_type": "aot"},  # all tokens in one chunk
        {"chunk": 42, "loss_type": ["sigmoid", "aot"]},
    ):
        linear_preference_loss(hidden, weight, targets, rows, **settings, **own)
    assert used == ["fused", "deferred", "fused", "deferred"]


def test_empty_batches_and_extremes():
    hidden, weight, targets, rows = problem([0, 0, 0, 0])
    for loss_type in ("sigmoid", "ipo", "sft", "aot"):
        found = linear_preference_loss(
            hidden, weight, targets, rows, num_pairs=2, ref_logps=torch.zeros(4).double(), loss_type=loss_type
        )
        found.loss.backward()
        assert found.losses.isfinite().all() and not weight.grad.any()
        assert found.loss.item() == pytest.approx(found.losses.mean().item())  # as of empty pairs among others
    found = linear_preference_loss(hidden, weight, targets, rows, num_pairs=0, ref_logps=torch.zeros(0).double())
    assert found.loss.item() == 0 and found.losses.shape == (0,)
    with torch.no_grad():  # evaluation
        values = problem()
        assert linear_preference_loss(*values, num_pairs=5, loss="orpo", chunk=20).loss.isfinite()
    hidden, weight, targets, rows = problem([3, 2, 0, 4], torch.float32)
    sharp = (hidden.detach() * 400).requires_grad_()  # log-probabilities of 0 and of -1000s
    sharp_targets = torch.where(torch.arange(9) < 4, (sharp @ weight.t()).argmax(-1), targets)
    for own in ({"loss": "orpo"}, {"loss": "cpo"}, {"loss_type": ["discopop", "sppo_hard", "sft"]}):
        found = linear_preference_loss(
            sharp, weight, sharp_targets, rows, num_pairs=2, ref_logps=torch.zeros(4), chunk=5, **own
        )
        grads = torch.autograd.grad(found.loss, (sharp, weight))
        assert found.loss.isfinite() and all(grad.isfinite().all() for grad in grads)


def test_divisors_let_micro_batches_add_up():
    hidden, weight, targets, rows = problem([3, 2, 4, 1])
    whole = linear_preference_loss(hidden, weight, targets, rows, num_pairs=2, loss="cpo")
    divisors = {"pair_divisor": 2, "nll_divisor": 7}  # 7 chosen tokens in all
    parts = [
        linear_preference_loss(hidden[t], weight, targets[t], rows[t] % 2, num_pairs=1, loss="cpo", **divisors)
        for t in (rows < 2, rows >= 2)
    ]
    assert sum(part.loss for part in parts).item() == pytest.approx(whole.loss.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "ppo"}, "choose among dpo, cpo, orpo, tpo"),
        ({"loss": "cpo", "use_weighting": True}, "WPO weights belong to dpo"),
        ({"ref_logps": None}, "without reference"),
        ({"ref_logps": torch.zeros(3)}, "one per answer"),
        ({"num_pairs": 4}, "allowed are 0 to 7"),
        ({"reference": ReferenceHead(torch.zeros(1, 1), torch.zeros(1, 1))}, "both given"),
        ({"loss_type": "sigmod"}, "choose among sigmoid"),
        ({"scored": torch.ones(3)}, "one per token"),
        ({"average_log_prob": True, "loss_type": ["sigmoid", "ipo"]}, r"with loss_type \['ipo'\], which divide sums"),
        ({"loss_type": "ipo", "beta": 0.0}, "beta=0 with ipo, which aims at a margin"),
        ({"ref_logps": [0.0] * 10}, r"ref_logps is a list: give a tensor \(10,\)"),
    ],
)
def test_errors(change, message):
    hidden, weight, targets, rows = problem()
    settings = {"num_pairs": 5, "ref_logps": torch.zeros(10, dtype=torch.float64)}
    with pytest.raises(ValueError, match=message):
        linear_preference_loss(hidden, weight, targets, rows, **(settings | change))
    with pytest.raises(ValueError, match="without reference or baseline"):
        linear_unpaired_loss(
            hidden, weight, targets, rows, torch.ones(10, dtype=torch.bool), ref_logps=torch.zeros(10)
        )
    with pytest.raises(TypeError, match="missing 4 required positional arguments: 'hidden'"):
        linear_preference_loss()
    with pytest.raises(ValueError, match="the answer of each token"):
        linear_preference_loss(hidden, weight, targets, rows[1:], **settings)
