"""Losses of the head on a device whose numbers the host cannot read: nothing waits for it, all launches are on it.

Tensors on `meta` have no numbers: .item(), .tolist(), .cpu(), nonzero() and masks as indices raise. Kernels are noted
instead of run.
"""

import contextlib
from unittest import mock

import fastalign_kernels as fk
import pytest
import torch
from fastalign_kernels import layers
from fastalign_kernels.losses.policy_gradient import POLICY_LOSSES
from fastalign_kernels.losses.preference import PREFERENCE_LOSSES
from triton_checks import triton_backend

interpreter = pytest.importorskip("triton.runtime.interpreter")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, and cannot be noted", allow_module_level=True)

N, D, V = 48, 16, 300
ROWS = torch.arange(N) * 6 // N  # on the CPU, as a collator gives them


@contextlib.contextmanager
def on_meta():
    """Inside, launches are noted and not run."""
    launches = []

    def launch(self, *args, **kwargs):
        found = [getattr(x, "base", x) for x in (*args, *kwargs.values())]
        devices = {x.device.type for x in found if isinstance(x, torch.Tensor)}
        assert devices == {"meta"}, f"{self.fn.__name__} on {devices}"
        launches.append(self.fn.__name__)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
        mock.patch.object(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext()),
        triton_backend(),
    ):
        yield launches


def vector(*shape, dtype=torch.float32, gradient=False):
    return torch.empty(*(shape or (N,)), dtype=dtype, device="meta", requires_grad=gradient)


def operands(dtype=torch.bfloat16):
    matrices = (vector(size, D, dtype=dtype, gradient=True) for size in (N, V))
    return *matrices, torch.empty(N, dtype=torch.int64, device="meta")


def cross_entropy():
    settings = {"label_smoothing": 0.1, "z_loss": 0.1, "class_weights": vector(V), "ignore_index": None}
    return fk.linear_cross_entropy(*operands(), chunk=16, **settings)


def logprobs():
    with torch.no_grad():
        fk.linear_logprobs(*operands(), ignore_index=None, temperature=vector())
    logp, entropy = fk.linear_logprobs(*operands(), ignore_index=None, entropy=True, chunk=16)
    return logp.sum() + entropy.sum()


def all_statistics():
    hidden, weight, targets = operands(torch.float16)
    low = vector(N, 4, gradient=True), vector(V, 4, gradient=True)
    form = fk.LogitForm(1.5, 30.0, vector())
    names = [name for name in fk.OUTPUTS if name != "top1"]
    total = lambda stats, span: sum(getattr(stats, name).sum() for name in names)  # noqa: E731
    bias = vector(V, gradient=True)
    plain, _ = fk.fused(hidden, weight, targets, total, bias=bias, form=form, outputs=fk.OUTPUTS, chunk=16)
    return plain + fk.fused(hidden, weight, targets, total, outputs=fk.OUTPUTS, chunk=16, low_rank=low)[0]


def preferences():
    hidden, weight, targets = operands()
    known = {"num_pairs": 3, "chunk": 16, "label_smoothing": 0.1}
    total = sum(
        fk.linear_preference_loss(
            hidden, weight, targets, ROWS, loss_type=name, ref_logps=torch.zeros(6), **known
        ).loss
        for name in PREFERENCE_LOSSES
    )  # fmt: skip
    for loss in ("cpo", "orpo"):
        total = total + fk.linear_preference_loss(hidden, weight, targets, ROWS, num_pairs=3, loss=loss).loss
    labels = torch.tensor([True, False] * 3)
    unpaired = fk.linear_unpaired_loss(
        hidden, weight, targets, ROWS, labels, ref_logps=torch.zeros(6), baseline=vector(1)[0]
    )
    return total + unpaired.loss


def policies():
    hidden, weight, targets = operands()
    total, rows = 0, {"rows": ROWS, "num_rows": 6, "weights": vector()}
    for name in POLICY_LOSSES:
        for options in ({}, {"beta": 0.1, "entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}):
            logps = {key: vector() for key in ("old_logp", "ref_logp", "sampling_logp")}
            options = {"loss_type": name, "chunk": 16, **rows, **logps, **options}
            total = total + fk.linear_policy_loss(hidden, weight, targets, vector(), **options)[0]
    return total


def divergences():
    hidden, weight, _ = operands()
    teacher = [vector(size, D, dtype=torch.bfloat16) for size in (N, V)]
    kinds = ("forward_kl", "reverse_kl", "jsd")
    return sum(fk.linear_divergence(hidden, weight, *teacher, divergence=kind, chunk=16)[0] for kind in kinds)


def bodies():
    x, weight = vector(N, 64, gradient=True), vector(64, gradient=True)
    normed, summed = layers.add_rms_norm(layers.rms_norm(x, weight), x, weight)
    q, k = layers.rope(x.view(1, N, 4, 16), x.view(1, N, 4, 16), vector(N, 16), vector(N, 16), heads_dim=2)
    ids = torch.empty(N, dtype=torch.int64, device="meta")
    table = layers.embedding(ids, vector(V, 64, gradient=True))
    parts = (layers.glu(normed, summed), layers.glu_packed(x), q, k, table)
    return sum(part.sum() for part in parts)


@pytest.mark.parametrize("form", ["rows", "offset"])
@pytest.mark.parametrize("op", [cross_entropy, logprobs, all_statistics, preferences, policies, divergences, bodies])
def test_nothing_is_read_back(op, form, monkeypatch):
    monkeypatch.setenv("FASTALIGN_HEAD", form)
    with on_meta() as launches:
        op().backward()
    own = {"score_product_kernel", "_row_divergence_kernel", "_glu_bwd_kernel"}
    assert own & set(launches) if form == "offset" else "score_product_kernel" not in launches
    assert len(launches) > 3


def test_what_reads_back_is_seen():
    """Finding ignored targets is the one documented exception."""
    with on_meta(), pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        fk.linear_cross_entropy(*operands())
