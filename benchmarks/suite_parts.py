"""Parts of the GPU suite that call the library themselves: numerics, forms of the head, tiles of its product.

    python benchmarks/suite_parts.py numerics|forms|tiles [--dry-run]

`gpu_suite.py` runs each in a process of its own. The last line of output is what was found, as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]
import torch  # noqa: E402
from fastalign_kernels import OUTPUTS, LogitForm, fused, linear_cross_entropy  # noqa: E402
from measure import device, milliseconds  # noqa: E402

TINY = (24, 32, 100)  # tokens, hidden size, vocabulary
FORM_SHAPES = [
    (16384, h, v) for h, v in [(896, 151936), (2048, 128256), (4096, 128256), (2048, 32000), (2304, 256000)]
]
TILE_SHAPES = [(8192, 896, 151936), (8192, 4096, 128256)]
GAIN = 0.98  # of the time: what is closer than that is noise
GOALS = {  # op -> hidden size -> share of the roof that was aimed at, on an H200
    "linear_cross_entropy": {896: 0.72, 2048: 0.85, 4096: 0.88},
    "linear_logprobs": {896: 0.78, 2048: 0.86, 4096: 0.86},
    "linear_preference_loss": {896: 0.72, 2048: 0.85, 4096: 0.88},
    "linear_policy_loss": {896: 0.72, 2048: 0.85, 4096: 0.88},
    "linear_divergence": {896: 0.7, 2048: 0.8, 4096: 0.8},
    **{op: {0: 0.85} for op in ("add_rms_norm", "swiglu", "rope", "embedding")},
}


def operands(n: int, d: int, v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 hidden (N, D) and weight (V, D) with logits of standard deviation 1, and targets (N,)."""
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=device()).bfloat16().requires_grad_()
    weight = (torch.randn(v, d, device=device()) / d**0.5).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(0, v, (n,), device=device())


def numerics(dry: bool) -> dict:
    """Relative errors of loss and gradients of the head in bf16 against fp64, for both forms, at rising scales."""
    n, d, v = TINY if dry else (1024, 2048, 128256)
    found = {}
    for form in ("rows", "offset"):
        os.environ["FASTALIGN_HEAD"] = form
        for scale in (1.0, 8.0, 40.0):
            hidden, weight, targets = operands(n, d, v)
            hidden = (hidden.detach() * scale).requires_grad_()
            loss, stats = fused(hidden, weight, targets, lambda s, span: -s.logp.sum() / n)
            loss.backward()
            exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
            logp = (exact_hidden @ exact_weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
            (-logp.mean()).backward()
            errors = {"logp_max": (stats.logp.double() - logp).abs().max().item()}
            for name, own, other in [("hidden", hidden, exact_hidden), ("weight", weight, exact_weight)]:
                assert own.grad is not None and other.grad is not None
                errors[f"grad_{name}"] = ((own.grad.double() - other.grad).norm() / other.grad.norm()).item()
            found[f"{form}, logits of scale {scale:g}"] = errors
    return found


def forms(dry: bool) -> dict:
    """Milliseconds of the cross-entropy with each form of the head: what `head/form_table.py` is filled from."""
    found, faster = {}, []
    for n, d, v in [TINY] if dry else FORM_SHAPES:
        hidden, weight, targets = operands(n, d, v)

        def step(form: str, h=hidden, w=weight, t=targets) -> None:
            os.environ["FASTALIGN_HEAD"], h.grad, w.grad = form, None, None
            linear_cross_entropy(h, w, t, ignore_index=None).backward()

        times: dict[str, list[float]] = {"rows": [], "offset": []}
        for repeat in range(2 if dry else 6):
            for form, values in times.items():
                took = milliseconds(lambda form=form, step=step: step(form))
                values += [took] * (repeat > 0)  # the first one compiles
        medians = {form: sorted(values)[len(values) // 2] for form, values in times.items()}
        found[f"N={n} H={d} V={v}"] = medians
        faster += [(d, v, n)] * (medians["offset"] < GAIN * medians["rows"])
        print(n, d, v, medians, flush=True)
    return found | {"offset is faster from (H, V, N)": faster}


def tiles(dry: bool) -> dict:
    """Milliseconds of the product with each set of tiles: what `SCORE_CONFIGS` of head/offset_rows.py is chosen by."""
    from fastalign_kernels.head import offset_rows
    from fastalign_kernels.launch import table_architecture

    own = offset_rows.SCORE_CONFIGS[table_architecture(device())]
    wide, narrow = own[0], dataclasses.replace(own[1], group=16)
    others = [dataclasses.replace(wide, split=2), dataclasses.replace(wide, group=16), narrow]
    others += [
        dataclasses.replace(own[1], num_warps=4),
        dataclasses.replace(own[1], block_n=256, num_stages=3, split=4),
    ]
    configs, found = list(dict.fromkeys([*own, *others])), {}
    for n, d, v in [TINY] if dry else TILE_SHAPES:
        hidden, weight, targets = (t.detach() for t in operands(n, d, v))
        energies = offset_rows.energy_buffer(n, v, hidden)
        offsets = offset_rows.target_logits(hidden, weight, None, targets, LogitForm())
        for name, outputs in {"logp": ("logp",), "all": tuple(o for o in OUTPUTS if o != "lse")}.items():
            times = found[f"{name} N={n} H={d} V={v}"] = {}
            for config in configs[:2] if dry else configs:

                def product(c=config, o=outputs, h=hidden, w=weight, t=targets, at=offsets, e=energies) -> object:
                    return offset_rows.score_product(h, w, None, t, at, LogitForm(), o, e, o == ("logp",), config=c)

                label = " ".join(f"{key}={value}" for key, value in vars(config).items())
                try:
                    product()
                    times[label] = min(milliseconds(product) for _ in range(1 if dry else 5))
                except Exception as error:  # too much shared memory, or a compiler's bug: a result as well
                    times[label] = f"{type(error).__name__}: {str(error)[:120]}"
                print(name, n, d, v, label, times[label], flush=True)
    return found


def goals(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Share of the roof aimed at and reached, of the newest row of each case that has a goal."""
    found = {}
    for row in rows:
        size = re.search(r"H=(\d+)", row.get("shape", ""))
        goal = GOALS.get(row["op"], {}).get(int(size.group(1)) if size else 0)
        if row["provider"] == "fastalign" and goal and row.get("share_of_roof"):
            name = " ".join(filter(None, (row["op"], row.get("mode"), row["shape"], row.get("dtype"))))
            found[name] = {"goal": goal, "reached": row["share_of_roof"], "ms": row["median"]}
    return found


PARTS = {"numerics": numerics, "forms": forms, "tiles": tiles}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    print(json.dumps(PARTS[options.part](options.dry_run)))


if __name__ == "__main__":
    main()
