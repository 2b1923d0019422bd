"""Steps of GRPO against TRL's: same model, prompts, completions, rewards and settings, one fresh process a run.

    python benchmarks/online_against_trl.py --data train.jsonl --steps 4 --repeats 2

`--data` is a jsonl file with `question` and `answer` (grade-school problems); without it, texts of such lengths are
made up. `update` gives both libraries the answers as completions, so that only the update is timed; `update_shared`
likewise, with prompts of about 500 and completions of 64 tokens; `update_kl` adds a reference; `step` samples the
completions with each library's own default and is a whole step. Runs of the two libraries alternate; medians go to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from preferences_against_trl import make_rows  # noqa: E402
from sft_against_trl import PRECISIONS, make_model_folder  # noqa: E402

GENERATIONS = 8
MODES: dict[str, tuple[str, bool, dict]] = {  # name -> (rows, whether completions are given, settings of both)
    "update": ("problems", True, {"max_completion_length": 512}),
    "update_kl": ("problems", True, {"max_completion_length": 512, "beta": 0.04}),
    "update_shared": ("long", True, {"max_completion_length": 64}),
    "step": ("problems", False, {"max_completion_length": 64}),
}
LONG = 500, 64  # words of a prompt, tokens of a completion


class Given:
    """A `rollout_func`: each prompt's completions are answers of the rows, other ones for each number."""

    def __init__(self, tokenizer, rows: list[dict], longest: int):
        answers = [tokenizer(row["answer"])["input_ids"][: longest - 1] for row in rows]
        self.answers = [[*ids, tokenizer.eos_token_id] for ids in answers]
        self.places = {row["prompt"]: place for place, row in enumerate(rows)}

    def __call__(self, prompts, trainer) -> dict:
        found: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for number, prompt in enumerate(prompts):
            completion = self.answers[(self.places[prompt] + number % GENERATIONS) % len(self.answers)]
            found["prompt_ids"].append(trainer.processing_class(text=prompt)["input_ids"])
            found["completion_ids"].append(completion)
            found["logprobs"].append([-1.0] * len(completion))
        return found


def distinct_tokens(completion_ids, **columns) -> list[float]:
    """A reward that differs within a group."""
    return [len(set(ids)) + 0.01 * (sum(ids) % 97) for ids in completion_ids]


def run_one(library: str, folder: str, mode: str, settings: dict) -> dict:
    """Train in this process and measure: seconds of each step but the first, peak memory, losses, norms."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.utils import logging

    logging.disable_progress_bar()
    trainers = __import__(library, fromlist=["GRPOTrainer"])
    kind, is_given, _ = MODES[mode]
    rows = json.loads(pathlib.Path(folder, f"{kind}.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    given = Given(tokenizer, rows, settings["max_completion_length"])
    times: list[float] = []

    class Clock(TrainerCallback):
        """When each step was done."""

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as output:
        args = trainers.GRPOConfig(
            output_dir=output,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            num_generations=GENERATIONS,
            shuffle_dataset=False,
            **settings,
        )
        trainer = trainers.GRPOTrainer(
            f"{folder}/model",
            distinct_tokens,
            args,
            Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
            callbacks=[Clock()],
            rollout_func=given if is_given else None,
        )
        trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {
        "seconds": [after - before for before, after in itertools.pairwise(times)],
        "peak_bytes": peak,
        "losses": [row["loss"] for row in history],
        "grad_norms": [row["grad_norm"] for row in history],
    }


def measure(folder: pathlib.Path, mode: str, precision: str, options) -> list[dict]:
    """Alternate runs of both libraries; one row of medians over all their steps per library."""
    settings = MODES[mode][2] | PRECISIONS[precision] | {"max_steps": options.steps + 1}
    settings |= {"per_device_train_batch_size": options.batch} | json.loads(options.settings)
    runs: dict[str, list[dict]] = {name: [] for name in ("fastalign", options.against) if name != "none"}
    for _ in range(options.repeats):
        for library in runs:
            command = [sys.executable, __file__, "--child", library, str(folder), mode, json.dumps(settings)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            if done.returncode:
                raise SystemExit(f"{library} failed in {mode} {precision}:\n{done.stderr[-3000:]}")
            runs[library].append(json.loads(done.stdout.strip().splitlines()[-1]))
    for name in ("losses", "grad_norms") if "trl" in runs and MODES[mode][1] else ():
        pairs = list(zip(runs["fastalign"][0][name], runs["trl"][0][name], strict=True))
        worst = max(abs(own - other) / max(abs(other), 1e-3) for own, other in pairs)
        print(f"{mode:14s} {precision}: {name} differ by at most {worst:.1e} (relative; of 1e-3 where they are less)")
    rows = []
    for library, results in runs.items():
        seconds = sorted(second for result in results for second in result["seconds"])
        pick = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
        rows.append(
            {"op": "grpo", "provider": library, "mode": mode}
            | {"shape": f"13M V=32000 batch={options.batch} G={GENERATIONS}", "dtype": precision}
            | {"median": round(statistics.median(seconds), 4), "p20": round(pick[0], 4), "p80": round(pick[-1], 4)}
            | {"unit": "s", "peak_bytes": int(statistics.median(r["peak_bytes"] for r in results))}
        )
        print(
            f"{mode:14s} {precision}: {library:9s} {rows[-1]['median']:8.3f} s a step, peak "
            f"{rows[-1]['peak_bytes'] / 2**20:.0f} MiB ({rows[-1]['median'] / rows[0]['median']:.2f}x)",
            flush=True,
        )
    return rows


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        library, folder, mode, settings = sys.argv[2:6]
        print(json.dumps(run_one(library, folder, mode, json.loads(settings))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="jsonl file with question and answer; texts are made up without it")
    parser.add_argument("--against", choices=["trl", "none"], default="trl")
    parser.add_argument("--steps", type=int, default=4, help="that are timed, behind one that is not")
    parser.add_argument("--batch", type=int, default=32, help="completions of a step")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=list(PRECISIONS))
    parser.add_argument("--settings", default="{}", help="more settings of both configs, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="do not write benchmarks/results/")
    options = parser.parse_args()
    if options.data:
        with open(options.data, encoding="utf-8") as file:
            read = [json.loads(line) for line in file if line.strip()]
        problems = [{"prompt": row["question"] + "\n", "answer": row["answer"]} for row in read]
    else:
        problems = [{"prompt": r["prompt"], "answer": r["chosen"]} for r in make_rows(2000, 45, 60, 0.45)]
    long = [{"prompt": r["prompt"], "answer": r["chosen"]} for r in make_rows(64, LONG[0], 2 * LONG[1], 0.05)]
    measured = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for kind, rows in {"problems": problems[:256], "long": long}.items():
            (folder / f"{kind}.json").write_text(json.dumps(rows), encoding="utf-8")
        texts = [{"prompt": row["prompt"], "completion": row["answer"]} for row in problems + long]
        make_model_folder(folder / "model", texts, vocab_size=32_000)
        for mode in options.modes:
            for precision in options.precisions:
                measured += measure(folder, mode, precision, options)
    if not options.dry_run:
        from results_file import append_rows, results_file

        append_rows(results_file(), measured)


if __name__ == "__main__":
    main()
