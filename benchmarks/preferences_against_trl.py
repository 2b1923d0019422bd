"""Steps of DPO, KTO and reward models against TRL's: same model, data, order and settings, one fresh process a run.

    python benchmarks/preferences_against_trl.py --data pairs.jsonl --steps 20 --repeats 3

`--data` is a jsonl file with the columns `prompt`, `chosen` and `rejected`; without it, texts of the lengths of
grade-school problems are made up. The mode `dpo_shared` always has prompts of about 500 tokens and answers of about
100. Runs of the two libraries alternate, so that a drift of the machine meets both; medians go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from sft_against_trl import PRECISIONS, make_model_folder  # noqa: E402

MODES = {  # name -> (trainer, rows, settings of both libraries)
    "dpo": ("DPO", "pairs", {}),
    "dpo_shared": ("DPO", "long", {}),
    "dpo_cached": ("DPO", "pairs", {"precompute_ref_log_probs": True}),
    "kto": ("KTO", "judged", {}),
    "reward": ("Reward", "pairs", {}),
}
LONG = 500, 100  # words of a prompt and of an answer in `dpo_shared`


def make_rows(n: int, words_of_prompt: float, words_of_answer: float, spread: float, seed: int = 0) -> list[dict]:
    """Pairs of answers of made-up words, with log-normal lengths around the given medians."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 5))) for _ in range(8_000)]
    weights = [1 / (i + 10) for i in range(len(words))]

    def text(median: float) -> str:
        return " ".join(rng.choices(words, weights, k=max(4, int(median * rng.lognormvariate(0, spread)))))

    texts = [(text(words_of_prompt), text(words_of_answer), text(words_of_answer)) for _ in range(n)]
    return [{"prompt": p, "chosen": " " + chosen, "rejected": " " + rejected} for p, chosen, rejected in texts]


def read_rows(path: str) -> list[dict]:
    """`prompt`, `chosen` and `rejected` of a jsonl file."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


def judged(rows: list[dict]) -> list[dict]:
    """The answers of pairs one by one, with labels."""
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]


def run_one(library: str, folder: str, mode: str, settings: dict) -> dict:
    """Train in this process and measure: rows per second of the training loop, peak memory, losses."""
    import torch
    from datasets import load_dataset
    from transformers.utils import logging

    logging.disable_progress_bar()
    trainers = __import__(library, fromlist=["DPOTrainer"])
    name, kind, _ = MODES[mode]
    dataset = load_dataset("json", data_files=f"{folder}/{kind}.jsonl", split="train", cache_dir=f"{folder}/cache")
    dataset = dataset.select(range(settings["max_steps"] * settings["per_device_train_batch_size"]))
    with tempfile.TemporaryDirectory() as output:
        args = getattr(trainers, f"{name}Config")(
            output_dir=output,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential",
            **settings,
        )
        trainer = getattr(trainers, f"{name}Trainer")(f"{folder}/model", args=args, train_dataset=dataset)
        result = trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {
        "rows_per_second": len(dataset) / result.metrics["train_runtime"],
        "peak_bytes": peak,
        "losses": [row["loss"] for row in history],
        "grad_norms": [row["grad_norm"] for row in history],
    }


def measure(folder: pathlib.Path, mode: str, precision: str, options) -> list[dict]:
    """Alternate runs of both libraries; one row of medians per library."""
    settings = MODES[mode][2] | PRECISIONS[precision] | {"max_steps": options.steps}
    settings |= {"per_device_train_batch_size": options.batch, "max_length": 1024} | json.loads(options.settings)
    runs: dict[str, list[dict]] = {name: [] for name in ("fastalign", options.against) if name != "none"}
    for _ in range(options.repeats):
        for library in runs:
            command = [sys.executable, __file__, "--child", library, str(folder), mode, json.dumps(settings)]
            cache = {
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_CACHE": tempfile.mkdtemp(dir=folder),
            }  # nothing is found again
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | cache)
            if done.returncode:
                raise SystemExit(f"{library} failed in {mode} {precision}:\n{done.stderr[-3000:]}")
            runs[library].append(json.loads(done.stdout.strip().splitlines()[-1]))
    for name in ("losses", "grad_norms") if "trl" in runs else ():
        pairs = zip(runs["fastalign"][0][name], runs["trl"][0][name], strict=True)
        worst = max(abs(own - other) / abs(other) for own, other in pairs)
        print(f"{mode:10s} {precision}: {name} differ by at most {worst:.1e} (relative)")
    rows = []
    for library, results in runs.items():
        speeds = sorted(r["rows_per_second"] for r in results)
        rows.append(
            {"op": "preferences", "provider": library, "mode": mode, "shape": f"13M V=32000 batch={options.batch}"}
            | {"dtype": precision, "median": round(statistics.median(speeds), 2)}
            | {"p20": round(speeds[0], 2), "p80": round(speeds[-1], 2), "unit": "rows/s"}
            | {"peak_bytes": int(statistics.median(r["peak_bytes"] for r in results))}
        )
        print(
            f"{mode:10s} {precision}: {library:9s} {rows[-1]['median']:8.2f} rows/s, peak "
            f"{rows[-1]['peak_bytes'] / 2**20:.0f} MiB ({rows[0]['median'] / rows[-1]['median']:.2f}x)"
        )
    return rows


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        library, folder, mode, settings = sys.argv[2:6]
        print(json.dumps(run_one(library, folder, mode, json.loads(settings))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="jsonl file with prompt, chosen and rejected; texts are made up without it")
    parser.add_argument("--against", choices=["trl", "none"], default="trl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--settings", default="{}", help="more settings of both configs, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="do not write benchmarks/results/")
    options = parser.parse_args()
    num_rows = options.steps * options.batch
    rows = {"pairs": read_rows(options.data) if options.data else make_rows(max(num_rows, 2000), 60, 90, 0.45)}
    if len(rows["pairs"]) < num_rows:
        raise SystemExit(f"{options.data} has {len(rows['pairs'])} rows, --steps times --batch is {num_rows}.")
    rows |= {"judged": judged(rows["pairs"]), "long": make_rows(num_rows, *LONG, 0.05)}
    measured = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for kind, content in rows.items():
            lines = "".join(json.dumps(row) + "\n" for row in content)
            (folder / f"{kind}.jsonl").write_text(lines, encoding="utf-8")
        texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows["pairs"] + rows["long"]]
        make_model_folder(folder / "model", texts, vocab_size=32_000)
        for mode in options.modes:
            for precision in options.precisions:
                measured += measure(folder, mode, precision, options)
    if not options.dry_run:
        from results_file import append_rows, results_file

        append_rows(results_file(), measured)


if __name__ == "__main__":
    main()
