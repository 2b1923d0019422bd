"""What is learned from real preferences: accuracy on held-out pairs of a reward model, and of DPO's implicit reward.

    python benchmarks/preference_learning.py --data pairs.jsonl

`--data` is a jsonl file with the texts `prompt`, `chosen` and `rejected`. Every second pair is trained on, the others
are held out; the tokenizer, too, is trained on the first half alone. Models start from random weights.

1. A reward model: how many of the held-out pairs get a higher reward for the chosen answer? Chance is 50 %.
2. A policy, fine-tuned for an epoch on both answers of the training pairs, then DPO on these pairs: for how many of
   the held-out pairs has the chosen answer's likelihood risen more than the rejected one's
   (`eval_rewards/accuracies`)? Before DPO nothing has risen; so the reference is chance, 50 %.

Rows go to benchmarks/results/ as `reward_accuracy` and `dpo_accuracy`, in % of the held-out pairs. In these rows p20
and p80 are the bounds of the 95 % confidence interval (Wilson's) instead of quantiles, as their `shape` says. The exit
status is 1 where an interval reaches down to chance.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from against_trl import make_tokenizer  # noqa: E402

VOCABULARY = 1000
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "num_train_epochs": 1,
    "max_length": 1024,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 20,
    "disable_tqdm": True,
    "log_level": "error",
    "seed": 0,
}


def wilson(hits: int, num: int, z: float = 1.96) -> tuple[float, float]:
    """Bounds of the 95 % confidence interval of a share: Wilson 1927, JASA 22(158)."""
    share, more = hits / num, z * z / num
    centre = (share + more / 2) / (1 + more)
    half = z * math.sqrt(share * (1 - share) / num + more / (4 * num)) / (1 + more)
    return centre - half, centre + half


def read_halves(path: str) -> tuple[list[dict], list[dict]]:
    """Every second pair, from the first on, and the others; answers begin on a new line."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    answers = ("chosen", "rejected")
    rows = [{"prompt": row["prompt"]} | {name: "\n" + row[name] for name in answers} for row in rows]
    trained = {row["prompt"] for row in rows[::2]}
    return rows[::2], [row for row in rows[1::2] if row["prompt"] not in trained]


def make_model(head: str):
    """A random Qwen3 with a language modelling ("CausalLM") or a reward head ("SequenceClassification")."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        **SHAPE,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    config.num_labels = 1
    return getattr(transformers, f"Qwen3For{head}")(config)


def trained(kind: str, model, tokenizer, folder: str, train: list[dict], held_out: list[dict] | None, **settings):
    """A trainer of `kind` after training."""
    import datasets

    import fastalign

    extra = {"ref_model": copy.deepcopy(model)} if kind == "DPO" else {}
    trainer = getattr(fastalign, f"{kind}Trainer")(
        model,
        args=getattr(fastalign, f"{kind}Config")(output_dir=folder, **(SETTINGS | settings)),
        train_dataset=datasets.Dataset.from_list(train),
        eval_dataset=datasets.Dataset.from_list(held_out) if held_out else None,
        processing_class=tokenizer,
        **extra,
    )
    trainer.train()
    return trainer


def reward_accuracy(tokenizer, folder: str, train: list[dict], held_out: list[dict], epochs: float):
    """(held-out pairs ranked right, model)."""
    model = make_model("SequenceClassification")
    trainer = trained("Reward", model, tokenizer, folder, train, held_out, num_train_epochs=epochs)
    rewards = trainer.predict(trainer.eval_dataset).predictions  # (pairs, 2), the chosen first
    assert len(rewards) == len(held_out)
    return int((rewards[:, 0] > rewards[:, 1]).sum()), model


def dpo_accuracy(tokenizer, folder: str, train: list[dict], held_out: list[dict], epochs: float):
    """(held-out pairs ranked right by what DPO changed, model)."""
    model = make_model("CausalLM")
    texts = [{"prompt": row["prompt"], "completion": row[name]} for row in train for name in ("chosen", "rejected")]
    tuning = trained("SFT", model, tokenizer, folder, texts, None, learning_rate=2e-3, per_device_train_batch_size=16)
    print(f"policy: loss {[row['loss'] for row in tuning.state.log_history if 'loss' in row][-1]:.3f} per token")
    settings = {"num_train_epochs": epochs, "learning_rate": 3e-4}
    trainer = trained("DPO", model, tokenizer, folder, train, held_out, **settings)
    return round(trainer.evaluate()["eval_rewards/accuracies"] * len(held_out)), model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="jsonl file with prompt, chosen and rejected")
    parser.add_argument("--only", nargs="+", choices=["reward", "dpo"], default=["reward", "dpo"])
    parser.add_argument("--epochs", type=float, default=2, help="of the reward model and of DPO")
    parser.add_argument("--dry-run", action="store_true", help="do not write benchmarks/results/")
    options = parser.parse_args()
    import datasets

    datasets.disable_progress_bars()
    train, held_out = read_halves(options.data)
    tokenizer = make_tokenizer([text for row in train for text in row.values()], VOCABULARY)
    rows = []
    print(f"{len(train)} pairs to learn from, {len(held_out)} held out")
    for name, measure in {"reward": reward_accuracy, "dpo": dpo_accuracy}.items():
        if name not in options.only:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            hits, model = measure(tokenizer, folder, train, held_out, options.epochs)
        low, high = wilson(hits, len(held_out))
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f"{name:7s} {hits}/{len(held_out)} = {hits / len(held_out):.1%} of the held-out pairs ranked right, 95 % "
            f"interval {low:.1%} to {high:.1%} (chance 50 %); {size:.1f}M parameters, "
            f"{time.perf_counter() - start:.0f} s"
        )
        rows.append(
            {"op": f"{name}_accuracy", "provider": "fastalign", "mode": f"{options.epochs:g} epochs", "dtype": "fp32"}
            | {"shape": f"{size:.1f}M, {len(train)} pairs, held out {len(held_out)}; p20, p80: 95 % interval"}
            | {"median": 100 * hits / len(held_out), "p20": 100 * low, "p80": 100 * high, "unit": "% held out"}
        )
    if not options.dry_run:
        from results_file import append_rows, results_file

        append_rows(results_file(), rows)
    sys.exit(any(row["p20"] <= 50 for row in rows))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
