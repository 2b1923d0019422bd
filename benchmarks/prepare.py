"""Preparation for fine-tuning: conversational rows to token ids and labels, against TRL's `_prepare_dataset`.

    python benchmarks/prepare.py [--rows 100000] [--repeats 3] [--modes prompt_completion messages assistant_only]

Rows are cut from the English text that Python's own help ships (log-normal lengths, about 160 tokens a row); the
tokenizer, byte-level BPE with 16k tokens and ChatML, is trained on the same text. One process per library call
(`num_proc=None`), calls alternate, nothing is cached, and the two results are compared row by row.
"""

from __future__ import annotations

import argparse
import time
from pydoc_data.topics import topics
from types import SimpleNamespace

import datasets
import numpy as np
from results_file import append_rows, percentiles, results_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MODES = ("prompt_completion", "messages", "assistant_only")
MAX_LENGTH = 1024


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHATML
    return fast


def make_rows(num_rows: int, mode: str) -> datasets.Dataset:
    """Questions and answers of random length from random places of the text."""
    words = " ".join(topics.values()).split(" ")
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(np.log((25, 45)), 0.6, (num_rows, 2))).astype(int)
    starts = rng.integers(0, len(words) - lengths.max(), (num_rows, 2))
    ends = starts + lengths
    texts = [[" ".join(words[s:e]) for s, e in zip(*row, strict=True)] for row in zip(starts, ends, strict=True)]
    asked = [[{"role": "user", "content": question}] for question, _ in texts]
    answers = [[{"role": "assistant", "content": answer}] for _, answer in texts]
    if mode == "prompt_completion":
        return datasets.Dataset.from_dict({"prompt": asked, "completion": answers})
    return datasets.Dataset.from_dict({"messages": [a + b for a, b in zip(asked, answers, strict=True)]})


def provider(name: str, tokenizer: PreTrainedTokenizerFast, mode: str):
    """The preparation of one library, from a dataset to a dataset."""
    assistant_only = mode == "assistant_only"
    if name == "fastalign":
        from fastalign.data.tokenize import prepare_sft_dataset

        return lambda rows: prepare_sft_dataset(
            rows, tokenizer, max_length=MAX_LENGTH, assistant_only_loss=assistant_only
        )
    from accelerate import PartialState
    from trl import SFTTrainer

    PartialState(cpu=True)
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss=mode == "prompt_completion"
    )
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=assistant_only,
        max_length=MAX_LENGTH,
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    return lambda rows: SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, False, None, "train")


def bench(mode: str, num_rows: int, repeats: int, tokenizer: PreTrainedTokenizerFast) -> list[dict]:
    rows = make_rows(num_rows, mode)
    few = rows.select(range(min(num_rows, 1000)))
    calls = {name: provider(name, tokenizer, mode) for name in ("fastalign", "trl")}
    ours, theirs = (call(few) for call in calls.values())  # warm-up, and the proof that both do the same
    for column in ("input_ids", "labels"):
        if ours[column][:] != theirs[column][:]:
            raise SystemExit(f"The libraries differ in `{column}` ({mode}); nothing is timed.")
    times: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}  # seconds of all threads
    num_tokens = 0
    for repeat in range(repeats):
        for name, call in calls.items():
            start, used = time.perf_counter(), time.process_time()
            result = call(rows)
            times[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - used)
            num_tokens = int(np.sum([len(batch["input_ids"].values) for batch in _chunks(result)]))
        print(f"{mode} {repeat + 1}/{repeats}:", {name: round(values[-1], 3) for name, values in times.items()})
    shape = f"{num_rows} rows, {num_tokens} tokens"
    faster, less = (np.median(seconds["trl"]) / np.median(seconds["fastalign"]) for seconds in (times, processor))
    print(f"{mode}: {faster:.2f} times TRL's speed, with {1 / less:.3f} of its processor time")
    return [
        {"op": "prepare_sft", "provider": name, "mode": mode, "shape": shape, "unit": "s"} | percentiles(values)
        for name, values in times.items()
    ]


def _chunks(dataset: datasets.Dataset):
    return ({"input_ids": chunk} for chunk in dataset.data.column("input_ids").chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--output", default=None, help="JSON file; default: benchmarks/results/<device>.json")
    options = parser.parse_args()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = make_tokenizer(list(topics.values()))
    rows = [row for mode in options.modes for row in bench(mode, options.rows, options.repeats, tokenizer)]
    append_rows(options.output or results_file(), rows)


if __name__ == "__main__":
    main()
