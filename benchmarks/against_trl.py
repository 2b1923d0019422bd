"""What comparisons of whole training runs with TRL share: the model, a run in a fresh process, and rows of results."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
from typing import Any

PRECISIONS = {"fp32": {"bf16": False}, "bf16": {"bf16": True}}
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


def train(library: str, name: str, folder: str, rows: str, settings: dict[str, Any], limit: int | None = None) -> dict:
    """Train `name` ("SFT") in this process on the first `limit` of the rows in FOLDER/ROWS.jsonl, and measure."""
    import torch
    from datasets import load_dataset
    from transformers.utils import logging

    logging.disable_progress_bar()
    trainers = __import__(library, fromlist=[f"{name}Trainer"])
    dataset = load_dataset("json", data_files=f"{folder}/{rows}.jsonl", split="train", cache_dir=f"{folder}/cache")
    dataset = dataset if limit is None else dataset.select(range(limit))
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
        before = _peak_memory()
        result = trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "seconds": result.metrics["train_runtime"],
        "rows": len(dataset),
        "tokens": history[-1]["num_tokens"],
        "bytes_before": before,
        "peak_bytes": _peak_memory(),
        "losses": [row["loss"] for row in history],
        "grad_norms": [row["grad_norm"] for row in history],
    }


def _peak_memory() -> int:
    """Bytes: of tensors on the GPU, or of this whole process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alternate(script: str, arguments: list[str], folder: pathlib.Path, options) -> dict[str, list[dict]]:
    """`options.repeats` results of `script --child LIBRARY ARGUMENTS` for each library, which take turns.

    Each run has a cache of datasets of its own, so that nothing is found again.
    """
    runs: dict[str, list[dict]] = {name: [] for name in ("fastalign", options.against) if name != "none"}
    for _ in range(options.repeats):
        for library in runs:
            own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": tempfile.mkdtemp(dir=folder)}
            command = [sys.executable, script, "--child", library, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
            if done.returncode:
                raise SystemExit(f"{library} failed with {arguments}:\n{done.stderr[-3000:]}")
            runs[library].append(json.loads(done.stdout.strip().splitlines()[-1]))
    return runs


def summarize(runs: dict[str, list[dict]], count: str, row: dict[str, Any]) -> list[dict]:
    """Print how the libraries compare; `row` with the median of `count` per second and of the peak for each."""
    label = f"{row['mode']:10s} {row['dtype']}"
    for name in ("losses", "grad_norms") if "trl" in runs else ():
        print(f"{label}: {difference(runs['fastalign'][0][name], runs['trl'][0][name], name)}")
    rows = []
    for library, results in runs.items():
        speeds = sorted(result[count] / result["seconds"] for result in results)
        peak, before = (int(statistics.median(r[key] for r in results)) for key in ("peak_bytes", "bytes_before"))
        speed = {
            "median": round(statistics.median(speeds), 2),
            "p20": round(speeds[0], 2),
            "p80": round(speeds[-1], 2),
        }
        rows.append(row | {"provider": library} | speed | {"unit": f"{count}/s", "peak_bytes": peak})
        print(
            f"{label}: {library:9s} {speed['median']:8.2f} {count}/s ({rows[0]['median'] / speed['median']:.2f}x), "
            f"peak {peak / 2**20:.0f} MiB, of which {before / 2**20:.0f} before training",
            flush=True,
        )
    return rows


def difference(ours: list[float], theirs: list[float], name: str) -> str:
    """How far two runs' numbers are apart, in words; the values too where that says nothing of the libraries."""
    worst = max(abs(own - other) / max(abs(other), 1e-30) for own, other in zip(ours, theirs, strict=True))
    text = f"{name} differ by at most {worst:.1e} (relative)"
    return text if worst and worst == worst else f"{text}: {ours} and {theirs}"


def make_parser(description: str, modes: list[str], steps: int, batch: int) -> argparse.ArgumentParser:
    """The options of these comparisons."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", help="jsonl file; texts are made up without it")
    parser.add_argument("--against", choices=["trl", "none"], default="trl")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=modes, choices=modes)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--settings", default="{}", help="more settings of both configs, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="do not write benchmarks/results/")
    return parser


def write_rows(folder: pathlib.Path, rows: dict[str, list[dict]]) -> None:
    """FOLDER/NAME.jsonl of each."""
    for name, content in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def save(measured: list[dict], options) -> None:
    """Append to benchmarks/results/, unless this is a dry run."""
    if not options.dry_run:
        from results_file import append_rows, results_file

        append_rows(results_file(), measured)
