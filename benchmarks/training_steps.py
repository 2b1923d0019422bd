"""Steps of SFT, DPO and GRPO in one library on a random model: tokens per second, peak memory, first losses.

    python benchmarks/training_steps.py fastalign FOLDER [--steps 12] [--small] [--modes sft dpo]

`make_folder` writes the FOLDER; `gpu_suite.py` calls this for fastalign and for trl. Data, order and settings are the
same in both; GRPO's completions are made up in advance, so that what is timed is its update. One line of JSON for each
mode, written as soon as it is measured. Steps before the last two thirds warm up: kernels are compiled there.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import pathlib
import random
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]
from preferences_against_trl import make_rows  # noqa: E402
from sft_against_trl import make_model_folder, make_texts  # noqa: E402

HALF_BILLION = {  # the shape of Qwen2-0.5B
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GENERATIONS = 8
MODES = {  # name -> (trainer, rows, settings of both libraries)
    "sft": ("SFT", "texts", {"max_length": 1024}),
    "sft packed": ("SFT", "texts", {"max_length": 1024, "packing": True}),
    "dpo": ("DPO", "pairs", {"max_length": 1024}),
    "grpo": ("GRPO", "prompts", {"num_generations": GENERATIONS, "shuffle_dataset": False}),
}
LENGTHS = {False: (120, 160, 256), True: (6, 8, 12)}  # words of a prompt and an answer, tokens of a completion


def make_folder(folder: pathlib.Path, small: bool, steps: int, batch: int) -> None:
    """A random model with its tokenizer, and rows of every kind."""
    prompt, answer, _ = LENGTHS[small]
    count = steps * batch
    pairs = make_rows(count, prompt, answer, 0.4)
    texts = make_texts(count * 8) if not small else [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs]
    kinds = {"texts": texts, "pairs": pairs, "prompts": [{"prompt": row["prompt"]} for row in pairs]}
    for kind, rows in kinds.items():
        (folder / f"{kind}.json").write_text(json.dumps(rows), encoding="utf-8")
    vocabulary, shape = (400, TINY) if small else (151_936, HALF_BILLION)
    spoken = texts + [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    make_model_folder(folder / "model", spoken, vocabulary, shape)


class Rollouts:
    """Completions by prompt and number, the same in every library; what they say is made up."""

    def __init__(self, longest: int, vocabulary: int):
        self.longest, self.vocabulary = longest, vocabulary

    def __call__(self, prompts, trainer) -> dict:
        found: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for number, prompt in enumerate(prompts):
            rng = random.Random(f"{prompt} {number % GENERATIONS}")
            length = rng.randint(self.longest // 2, self.longest)
            ids = trainer.processing_class(text=prompt)["input_ids"]
            completion = [rng.randrange(2, self.vocabulary) for _ in range(length - 1)] + [1]
            found["prompt_ids"].append(ids)
            found["completion_ids"].append(completion)
            found["logprobs"].append([-1.0] * length)
        return found


def distinct_tokens(completion_ids, **columns) -> list[float]:
    """A reward that differs within a group."""
    return [len(set(ids)) + 0.1 * (sum(ids) % 7) for ids in completion_ids]


def trainer_of(library: str, folder: pathlib.Path, mode: str, output: str, options: argparse.Namespace, callback):
    """The trainer of a mode, made as a user of either library would."""
    import torch
    from datasets import Dataset

    name, kind, settings = MODES[mode]
    module = __import__(library, fromlist=[f"{name}Trainer"])
    data = Dataset.from_list(json.loads((folder / f"{kind}.json").read_text(encoding="utf-8")))
    extra: dict = {}
    if name == "GRPO":
        longest = LENGTHS[options.small][2]
        settings = settings | {"max_completion_length": longest}
        extra = {"reward_funcs": distinct_tokens, "rollout_func": Rollouts(longest, 300)}
    args = getattr(module, f"{name}Config")(
        output_dir=output,
        bf16=True,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **({} if name == "GRPO" else {"train_sampling_strategy": "sequential"}),
        **settings,
    )
    cls = getattr(module, f"{name}Trainer")
    return cls(str(folder / "model"), args=args, train_dataset=data, callbacks=[callback], **extra)


def measure(library: str, folder: pathlib.Path, mode: str, options: argparse.Namespace) -> dict:
    """Tokens per second of each step after the warm-up, peak bytes (GPU), losses and gradient norms of the first."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """When each step was done."""

        times: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    clock, on_gpu = Clock(), torch.cuda.is_available()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_of(library, folder, mode, output, options, clock)
        trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    warm = options.steps // 3
    pairs = list(zip([row["num_tokens"] for row in history], clock.times, strict=True))[warm:]
    speeds = [(n - n0) / (t - t0) for (n0, t0), (n, t) in itertools.pairwise(pairs)]
    return {
        "mode": mode,
        "tokens_per_second_of_steps": [round(speed, 1) for speed in speeds],
        "seconds_in_all": round(time.perf_counter() - start, 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "losses": [row["loss"] for row in history[:3]],
        "grad_norms": [row["grad_norm"] for row in history[:3]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", choices=["fastalign", "trl"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="the folder holds tiny rows and a tiny model")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.disable_progress_bar()
    for mode in options.modes:
        print(json.dumps(measure(options.library, options.folder, mode, options)), flush=True)


if __name__ == "__main__":
    main()
