"""GRPO with vLLM in the training process, from the command line: what starting it and its weights cost.

    python benchmarks/online_vllm.py --data train.jsonl [--steps 20] [--warm-up 100] [--dry-run]

`--data` is a jsonl file with `question` and `answer` (grade-school problems). A model of 13M parameters learns the
form of the answers (`fastalign sft`, `--warm-up` steps), then GRPO runs `--steps` steps on sampled answers of up to
160 tokens (`fastalign grpo --use_vllm`). Written to benchmarks/results/: seconds until the engine runs, medians over
the steps of a step, of its sampling and of bringing the weights to the engine, and the share of that in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from sft_against_trl import make_model_folder  # noqa: E402

BATCH, GENERATIONS, LONGEST = 64, 8, 160
COMMON = "--report_to none --disable_tqdm true --logging_steps 1 --use_cpu --bf16 false --dataset_name"
REWARDS = '''
import re

def has_result(completions, **columns):
    """1 for an answer that ends with `#### number`, as those of the data do."""
    return [float(bool(re.search(r"####\\s*-?[0-9][0-9,.]*\\s*$", text))) for text in completions]

def right_result(completions, answer, **columns):
    """1 for the right number behind `####`."""
    return [float(text.split("####")[-1].strip() == gold.split("####")[-1].strip()) if "####" in text else 0.0
            for text, gold in zip(completions, answer)]
'''


def run(arguments: list[str], folder: pathlib.Path) -> str:
    """What `fastalign` says, run with `arguments` in `folder`."""
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    command = [sys.executable, "-m", "fastalign", *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"fastalign {arguments[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def train(folder: pathlib.Path, data: str, warm_up: int, steps: int) -> tuple[float, list[dict]]:
    """Seconds until the engine ran, and the log of each step of GRPO."""
    columns = "prompt=question,completion=answer"
    sft = f"sft --model_name_or_path model --from_scratch --output_dir sft --max_steps {warm_up} --dataset_columns"
    sizes = "--per_device_train_batch_size 8 --learning_rate 1e-3 --save_strategy steps --save_steps 1000000"
    run([*sft.split(), columns, *sizes.split(), *COMMON.split(), data], folder)
    grpo = f"grpo --model_name_or_path sft --output_dir grpo --use_vllm --max_steps {steps} --learning_rate 1e-5"
    grpo += f" --per_device_train_batch_size {BATCH} --num_generations {GENERATIONS}"
    grpo += " --dataset_columns prompt=question,answer=answer"
    grpo += (
        f" --max_completion_length {LONGEST} --reward_funcs problem_rewards.has_result problem_rewards.right_result"
    )
    said = run([*grpo.split(), "--log_level", "info", *COMMON.split(), data], folder)
    started = re.search(r"vLLM started in ([\d.]+) s; weights: (.*)", said)
    if started is None:
        raise SystemExit(f"vLLM did not say that it started:\n{said[-3000:]}")
    print(started.group(0))
    states = sorted((folder / "grpo").rglob("trainer_state.json"))
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    return float(started.group(1)), [row for row in history if "step_time" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="jsonl file with question and answer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=100, help="steps of SFT")
    parser.add_argument("--dry-run", action="store_true", help="do not write benchmarks/results/")
    options = parser.parse_args()
    with open(options.data, encoding="utf-8") as file:
        read = [json.loads(line) for line in file if line.strip()]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        texts = [{"prompt": row["question"], "completion": row["answer"]} for row in read]
        make_model_folder(folder / "model", texts, vocab_size=32_000)
        (folder / "problem_rewards.py").write_text(REWARDS, encoding="utf-8")
        start, history = train(folder, str(pathlib.Path(options.data).resolve()), options.warm_up, options.steps)
    if len(history) != options.steps:
        raise SystemExit(f"{len(history)} of {options.steps} steps are in the log.")
    for row in history:
        print({k: row[k] for k in ("loss", "grad_norm", "reward", "step_time", "time/sampling", "time/sync")})
    share = [100 * row["time/sync"] / row["step_time"] for row in history]
    values = {"start of the engine": ([start], "s"), "share of weights in a step": (share, "% of the step")}
    for what, key in {"step": "step_time", "sampling": "time/sampling", "weights to the engine": "time/sync"}.items():
        values[what] = [row[key] for row in history], "s"
    rows = []
    for mode, (numbers, unit) in values.items():
        low, *_, high = statistics.quantiles(numbers, n=5) if len(numbers) > 1 else numbers * 2
        rows.append({"op": "grpo with vLLM", "provider": "fastalign", "mode": mode, "unit": unit, "dtype": "fp32"})
        rows[-1] |= {"shape": f"13M V=32000 batch={BATCH} G={GENERATIONS} tokens<={LONGEST}"}
        rows[-1] |= {"median": round(statistics.median(numbers), 5), "p20": round(low, 5), "p80": round(high, 5)}
        print(f"{mode:28s} {rows[-1]['median']:10.4f} {unit}")
    if not options.dry_run:
        from results_file import append_rows, results_file

        append_rows(results_file(), rows)


if __name__ == "__main__":
    main()
