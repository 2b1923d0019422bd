"""What two ranks do in `test_vocabulary_parallel.py`, started as `head_ranks.py RANK FOLDER`: errors against one."""

import json
import os
import sys
from pathlib import Path

import fastalign_kernels as fk
import torch
import torch.distributed as dist
from fastalign_kernels import LogitForm, VocabularyShard
from head_oracle import DIFFERENTIABLE, relative_error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

N, D, V, R, CUT = 45, 24, 173, 3, 100  # rows 0..99 of the head lie on rank 0, the other 73 on rank 1


def problem(dtype, seed=0, sign=1):
    """hidden, weight, bias, u, b and targets of the whole head; some targets are the most probable token."""
    torch.manual_seed(seed)
    shapes = [(N, D), (V, D), (V,), (N, R), (V, R)]
    tensors = [(torch.randn(shape) * 0.4).to(dtype) for shape in shapes]
    targets = torch.randint(V, (N,))
    logits = tensors[0] @ tensors[1].t() + tensors[2] + tensors[3] @ tensors[4].t()
    targets[::3] = (sign * logits).argmax(-1)[::3]
    return tensors, targets


def on_rank(tensors, rank):
    """This rank's operands and its shard."""
    rows = slice(0, CUT) if rank == 0 else slice(CUT, V)
    hidden, weight, bias, u, b = tensors
    return [hidden, weight[rows], bias[rows], u, b[rows]], rows, VocabularyShard(None, rows.start)


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def run(op, operands, targets, coef, form, shard=None):
    """Loss, statistics and gradients of one call."""
    hidden, weight, bias, u, b = operands
    options = {"bias": bias, "form": form, "outputs": fk.OUTPUTS, "chunk": 16, "low_rank": (u, b), "shard": shard}

    def loss_fn(stats, span=slice(None)):
        loss = sum((coef[name][span] * getattr(stats, name)).sum() for name in DIFFERENTIABLE)
        return loss + stats.logp.exp().sum()

    if op == "fused":
        loss, stats = fk.fused(hidden, weight, targets, loss_fn, **options)
    else:
        stats = fk.deferred(hidden, weight, targets, **options)
        loss = loss_fn(stats)
    return loss.detach(), stats, torch.autograd.grad(loss * 0.7, operands)


def shard_errors(op, dtype, form, rank):
    """Largest relative errors of sharded results against those of the whole head."""
    tensors, targets = problem(dtype, sign=-1 if form.scale < 0 else 1)
    coef = {name: torch.randn(N, dtype=dtype) for name in DIFFERENTIABLE}
    expected_loss, expected, expected_grads = run(op, leaves(tensors), targets, coef, form)
    local, rows, shard = on_rank(tensors, rank)
    loss, stats, grads = run(op, leaves(local), targets, coef, form, shard)
    with torch.no_grad():
        scored = fk.stats(local[0], local[1], targets, bias=local[2], form=form, outputs=fk.OUTPUTS, chunk=16,
                          low_rank=(local[3], local[4]), shard=shard)  # fmt: skip
    errors = {"loss": relative_error(loss, expected_loss)}
    for name in DIFFERENTIABLE:
        for found in (stats, scored):
            error = relative_error(getattr(found, name), getattr(expected, name).double())
            errors[name] = max(error, errors.get(name, 0.0))
    errors["top1"] = float((stats.top1 != expected.top1).sum() + (scored.top1 != expected.top1).sum())
    errors["top1 varies"] = float(expected.top1.all() or not expected.top1.any())
    for name, found, whole, cut in zip("hWBub", grads, expected_grads, (0, 1, 1, 0, 1), strict=True):
        errors[f"gradient {name}"] = relative_error(found, (whole[rows] if cut else whole).double())
    return errors


def loss_errors(dtype, rank):
    """The public losses on a shard; ties between shards; impossible tokens."""
    (hidden, weight, bias, u, b), targets = problem(dtype)
    targets[5:9] = -100
    results = []
    for operands, shard in (([hidden, weight, bias, u, b], None), on_rank([hidden, weight, bias, u, b], rank)[::2]):
        h, w, c, *low = leaves(operands)
        options = {"bias": c, "low_rank": tuple(low), "shard": shard}
        loss = fk.linear_cross_entropy(h, w, targets, label_smoothing=0.2, z_loss=0.01, softcap=3.0, **options)
        logp, entropy = fk.linear_logprobs(h, w, targets, temperature=0.7, entropy=True, **options)
        (grad,) = torch.autograd.grad(loss + (logp * entropy).sum(), h)
        results.append([loss.detach(), logp.detach(), entropy.detach(), grad])
    errors = {
        str(i): relative_error(found, exact.double()) for i, (exact, found) in enumerate(zip(*results, strict=True))
    }
    tied = weight.clone()
    tied[5] = tied[120] = 3 * torch.sign(hidden[0])
    tokens = torch.tensor([5, 120, 5])
    rows = hidden[:1].expand(3, -1)
    (_, part, *_), _, shard = on_rank([hidden, tied, bias, u, b], rank)
    top1 = fk.stats(rows, part, tokens, outputs=("top1",), shard=shard).top1
    assert fk.stats(rows, tied, tokens, outputs=("top1",)).top1.tolist() == [True, False, True]
    errors["ties"] = float((top1 != torch.tensor([True, False, True])).sum())
    absent, tokens = bias.clone(), targets.clamp_min(0) % (CUT + 9)
    absent[CUT + 9 :] = -torch.inf
    names = ("logp", "entropy", "log_sum_p2", "lse")
    exact = fk.stats(hidden, weight, tokens, bias=absent, outputs=names)
    (_, part, absent, *_), _, shard = on_rank([hidden, weight, absent, u, b], rank)
    found = fk.stats(hidden, part, tokens, bias=absent, outputs=names, shard=shard)
    for name in names:
        errors[f"absent {name}"] = relative_error(getattr(found, name), getattr(exact, name).double())
    try:
        fk.stats(hidden, part, tokens + V, bias=absent, shard=shard)
    except ValueError as error:
        errors["message"] = float(f"allowed are 0 to {V - 1}" not in str(error))
    return errors


def dtensor_errors(op, placement, rank):
    """Each rank has tokens of its own: the gradient is the mean over the ranks, placed as the weight."""
    mesh = init_device_mesh("cpu", (2,))
    form = LogitForm(temperature=0.8)
    everyone, grads = [problem(torch.float64, seed) for seed in (0, 1)], []
    _, weight, bias, _, b = everyone[0][0]  # the same on both ranks
    coef = {name: torch.linspace(-1, 1, N, dtype=torch.float64) for name in DIFFERENTIABLE}
    for (hidden, _, _, u, _), targets in everyone:
        grads.append(run(op, leaves([hidden, weight, bias, u, b]), targets, coef, form)[2])
    (hidden, _, _, u, _), targets = everyone[rank]
    if placement == "fsdp":
        head = nn.Linear(D, V).double()
        head.load_state_dict({"weight": weight, "bias": bias})
        fully_shard(head, mesh=mesh)
        placed = [*head.parameters(), distribute_tensor(b, mesh, [Shard(0)]).requires_grad_()]
    else:
        place = [Shard(0)] if placement == "shard" else [Replicate()]
        placed = [distribute_tensor(t, mesh, place).requires_grad_() for t in (weight, bias, b)]
    operands = [hidden.requires_grad_(), placed[0], placed[1], u.requires_grad_(), placed[2]]
    found = run(op, operands, targets, coef, form)[2]
    errors = {}
    for i in (0, 3):
        errors[f"own {i}"] = relative_error(found[i], grads[rank][i])
    for i, tensor in ((1, placed[0]), (2, placed[1]), (4, placed[2])):
        assert isinstance(found[i], DTensor) and found[i].placements == tensor.placements
        errors[f"mean {i}"] = relative_error(found[i].full_tensor(), (grads[0][i] + grads[1][i]) / 2)
    return errors


def weighted_smoothing_errors():
    """The part of the loss that is a product with the weight of its own takes a DTensor too."""
    (hidden, weight, bias, *_), targets = problem(torch.float64)
    options = {"class_weights": torch.linspace(0, 1, V), "label_smoothing": 0.1}
    exact = leaves([weight, bias])
    placed = [distribute_tensor(t, init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_() for t in (weight, bias)]
    expected, found = (fk.linear_cross_entropy(hidden, w, targets, bias=b, **options) for w, b in (exact, placed))
    grads = zip(torch.autograd.grad(found, placed), torch.autograd.grad(expected, exact), strict=True)
    errors = [relative_error(found, expected), *(relative_error(g.full_tensor(), reference) for g, reference in grads)]
    return {str(i): error for i, error in enumerate(errors)}


def refusals():
    mesh = init_device_mesh("cpu", (2,))
    (hidden, weight, *_), targets = problem(torch.float64)
    messages = []
    for h, w in (
        (hidden, distribute_tensor(weight, mesh, [Shard(1)])),
        (distribute_tensor(hidden, mesh, [Replicate()]), weight),
    ):
        try:
            fk.stats(h, w, targets)
        except ValueError as error:
            messages.append(str(error))
    return messages


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    forms = {
        "plain": LogitForm(),
        "all": LogitForm(1.3, 6.0, torch.linspace(0.5, 2.0, N)),
        "negative": LogitForm(-0.8),
    }
    result = {}
    for kernels, dtype in (("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        os.environ["FASTALIGN_KERNELS"] = kernels
        kind = f"{kernels} {str(dtype)[6:]}"
        for op in ("fused", "deferred"):
            for name, form in forms.items():
                result[f"{kind} {op} {name}"] = shard_errors(op, dtype, form, rank)
        result[f"{kind} losses"] = loss_errors(dtype, rank)
    for op in ("fused", "deferred"):
        for placement in ("shard", "replicate", "fsdp"):
            result[f"dtensor {op} {placement}"] = dtensor_errors(op, placement, rank)
    result["dtensor loss shard"] = weighted_smoothing_errors()
    (folder / f"{rank}.json").write_text(json.dumps({"errors": result, "refusals": refusals()}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads need not be joined
