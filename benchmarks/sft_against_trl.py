"""SFT steps per second and peak memory against TRL: same model, data, order and settings, one fresh process a run.

    python benchmarks/sft_against_trl.py --data train.jsonl --steps 30 --repeats 3

`--data` is a jsonl file with two text columns (`--columns question answer`); without it, texts of similar lengths are
made up. Runs of the two libraries alternate, so that a drift of the machine meets both; medians go to
benchmarks/results/.
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
MODES = {  # name -> settings of both libraries
    "unpacked": {"packing": False},
    "packed": {"packing": True},
}
PRECISIONS = {"fp32": {"bf16": False}, "bf16": {"bf16": True}}


def make_texts(n: int, seed: int = 0) -> list[dict]:
    """Questions and answers of made-up words, with the lengths of grade-school problems (log-normal)."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(30_000)]
    weights = [1 / (i + 10) for i in range(len(words))]

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, weights, k=max(4, int(rng.lognormvariate(mean, 0.45)))))

    return [{"prompt": text(3.7), "completion": " " + text(3.9)} for _ in range(n)]


def read_texts(path: str, columns: list[str]) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [{"prompt": row[columns[0]], "completion": "\n" + row[columns[1]]} for row in rows]


SMALL = {  # about 13M parameters with a vocabulary of 32,000
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def make_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer trained on `texts`, with `<pad>` = 0 and the end token `</s>` = 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")


def make_model_folder(folder: pathlib.Path, rows: list[dict], vocab_size: int, shape: dict[str, int] = SMALL) -> None:
    """A random Qwen2 and a byte-level BPE tokenizer trained on `rows`, saved as `from_pretrained` wants them."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    texts = [row["prompt"] + row["completion"] for row in rows]
    make_tokenizer(texts, min(vocab_size, 32_000)).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        **shape,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def run_one(library: str, folder: str, settings: dict) -> dict:
    """Train in this process and measure: tokens per second of the training loop, peak resident memory, losses."""
    import torch
    from datasets import load_dataset
    from transformers.utils import logging

    logging.disable_progress_bar()
    trainer_of = __import__(library, fromlist=["SFTTrainer"])
    dataset = load_dataset("json", data_files=f"{folder}/rows.jsonl", split="train", cache_dir=f"{folder}/cache")
    with tempfile.TemporaryDirectory() as output:
        args = trainer_of.SFTConfig(
            output_dir=output,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential",
            **settings,
        )
        trainer = trainer_of.SFTTrainer(f"{folder}/model", args=args, train_dataset=dataset)
        result = trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    seconds = result.metrics["train_runtime"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {
        "tokens_per_second": history[-1]["num_tokens"] / seconds,
        "seconds": seconds,
        "tokens": history[-1]["num_tokens"],
        "peak_bytes": peak,
        "losses": [row["loss"] for row in history],
        "grad_norms": [row["grad_norm"] for row in history],
    }


def measure(folder: pathlib.Path, mode: str, precision: str, options) -> list[dict]:
    """Alternate runs of both libraries; one row of medians per library."""
    settings = MODES[mode] | PRECISIONS[precision]
    settings |= {"max_steps": options.steps, "per_device_train_batch_size": options.batch, "max_length": 1024}
    settings |= json.loads(options.settings)
    runs: dict[str, list[dict]] = {name: [] for name in ("fastalign", options.against) if name != "none"}
    for _ in range(options.repeats):
        for library in runs:
            command = [sys.executable, __file__, "--child", library, str(folder), json.dumps(settings)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            if done.returncode:
                raise SystemExit(f"{library} failed in {mode} {precision}:\n{done.stderr[-3000:]}")
            runs[library].append(json.loads(done.stdout.strip().splitlines()[-1]))
    for name in ("losses", "grad_norms") if "trl" in runs else ():
        pairs = zip(runs["fastalign"][0][name], runs["trl"][0][name], strict=True)
        worst = max(abs(own - other) / abs(other) for own, other in pairs)
        print(f"{mode:9s} {precision}: {name} differ by at most {worst:.1e} (relative)")
    rows = []
    for library, results in runs.items():
        speeds = sorted(r["tokens_per_second"] for r in results)
        peak = statistics.median(r["peak_bytes"] for r in results)
        median = statistics.median(speeds)
        rows.append(
            {"op": "sft", "provider": library, "mode": mode, "shape": f"13M V=32000 batch={options.batch}"}
            | {"dtype": precision, "median": round(median, 1), "p20": round(speeds[0], 1), "p80": round(speeds[-1], 1)}
            | {"unit": "tokens/s", "peak_bytes": int(peak)}
        )
    if len(rows) == 1:
        print(f"{mode:9s} {precision}: {rows[0]['median']:.0f} tokens/s, peak {rows[0]['peak_bytes'] / 2**20:.0f} MiB")
        return rows
    ours, theirs = rows
    speed, memory = ours["median"] / theirs["median"], theirs["peak_bytes"] / ours["peak_bytes"]
    print(
        f"{mode:9s} {precision}: {ours['median']:.0f} against {theirs['median']:.0f} tokens/s = {speed:.2f}x;", end=" "
    )
    print(f"peak {ours['peak_bytes'] / 2**20:.0f} against {theirs['peak_bytes'] / 2**20:.0f} MiB = 1/{memory:.2f}")
    return rows


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        library, folder, settings = sys.argv[2:5]
        print(json.dumps(run_one(library, folder, json.loads(settings))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="jsonl file; texts are made up without it")
    parser.add_argument("--columns", nargs=2, default=["question", "answer"], help="its prompt and completion columns")
    parser.add_argument("--against", choices=["trl", "none"], default="trl")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--settings", default="{}", help="more settings of both configs, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="do not write benchmarks/results/")
    options = parser.parse_args()
    rows = read_texts(options.data, options.columns) if options.data else make_texts(4000)
    measured = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        make_model_folder(folder / "model", rows, vocab_size=32_000)
        for mode in options.modes:
            for precision in options.precisions:
                measured += measure(folder, mode, precision, options)
    if not options.dry_run:
        sys.path.insert(0, str(HERE))
        from results_file import append_rows, results_file

        append_rows(results_file(), measured)


if __name__ == "__main__":
    main()
