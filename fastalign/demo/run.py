"""`fastalign demo`: make a model and a task, fine-tune, prefer right answers, reinforce them, compare, report."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

STEPS = 120  # of fine-tuning; the stages behind it have a sixth and two thirds of them
NUM_HELD_OUT, NUM_SHOWN = 512, 24
STAGES = ("sft", "dpo", "grpo")  # folders, in order


@dataclass
class Stage:
    """What is known about the model at one point of the demo."""

    name: str
    greedy: float  # share of held-out tasks answered right
    sampled: float  # the same for samples at temperature 1
    loss: float  # on the right answers of the held-out tasks, nats per token
    tokens_per_second: float | None
    peak_bytes: int
    seconds: float
    completions: list[str]


def measure(name: str, trainer, tokenizer, tasks, seed: int, *, tokens_per_second=None, seconds=0.0) -> Stage:
    """Score the trainer's model as it is."""
    from .evaluate import peak_memory, score

    result = score(trainer.accelerator.unwrap_model(trainer.model), tokenizer, tasks, seed=seed)
    loss = trainer.evaluate()["eval_loss"]
    return Stage(
        name, result.greedy, result.sampled, loss, tokens_per_second, peak_memory(), seconds, result.completions
    )


def train(trainer, folder: str, settings: dict) -> dict[str, float]:
    """Train, leave model, log and settings in `folder`; returns what `Stage` has of it."""
    from fastalign.report.settings import write_settings

    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    tokens = next(entry["num_tokens"] for entry in reversed(trainer.state.log_history) if "num_tokens" in entry)
    trainer.save_model(folder)
    trainer.save_state()
    write_settings(folder, settings)
    return {"tokens_per_second": tokens / seconds, "seconds": seconds}


def run_demo(output_dir: str, *, seed: int = 0, steps: int = STEPS) -> list[Stage]:
    """Run all stages, in order; models are left in `output_dir`/sft, /dpo and /grpo, results in the last."""
    from .model import make_model, make_tokenizer
    from .stages import (
        BATCH,
        NOISE,
        NUM_DIGITS,
        NUM_GENERATIONS,
        PAIR_BATCH,
        PROMPTS,
        dpo_settings,
        dpo_trainer,
        grpo_settings,
        grpo_trainer,
        sft_settings,
        sft_trainer,
    )
    from .task import sort_tasks

    sft, dpo, grpo = (str(Path(output_dir, name)) for name in STAGES)
    few, most = max(steps // 6, 1), max(steps * 2 // 3, 1)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=seed)
    tasks = sort_tasks(NUM_HELD_OUT, NUM_DIGITS, seed)
    print(
        f"Task: sort {NUM_DIGITS} digits. Model: Qwen2 from random weights, {model.num_parameters():,} parameters, "
        f"{len(tokenizer)} characters.\n"
        f"SFT: {steps} steps of {BATCH} examples, of which {NOISE:.0%} are wrong on purpose.\n"
        f"DPO: {few} steps of {PAIR_BATCH} pairs, in which the right answer is preferred to a wrong one.\n"
        f"GRPO: {most} steps of {PROMPTS} tasks without answers, each tried {NUM_GENERATIONS} times and checked.\n"
    )
    judge = sft_trainer(model, tokenizer, tasks, sft, steps=steps, seed=seed)
    stages = [measure("before", judge, tokenizer, tasks, seed)]
    speed = train(judge, sft, sft_settings(steps=steps, seed=seed))
    stages.append(measure("after SFT", judge, tokenizer, tasks, seed, **speed))
    trainer = dpo_trainer(judge.model, tokenizer, tasks, dpo, steps=few, seed=seed)
    speed = train(trainer, dpo, dpo_settings(steps=few, seed=seed))
    stages.append(measure("after DPO", judge, tokenizer, tasks, seed, **speed))
    trainer = grpo_trainer(judge.model, tokenizer, tasks, grpo, steps=most, seed=seed)
    speed = train(trainer, grpo, grpo_settings(steps=most, seed=seed))
    stages.append(measure("after GRPO", judge, tokenizer, tasks, seed, **speed))
    write_stages(grpo, stages, tasks)
    return stages


def write_stages(folder: str, stages: list[Stage], tasks) -> None:
    """Write `results.json` and `samples.jsonl`, which the report shows."""
    from .task import is_right

    Path(folder, "results.json").write_text(json.dumps(result_table(stages), indent=1), encoding="utf-8")
    with Path(folder, "samples.jsonl").open("w", encoding="utf-8") as file:
        for stage in stages:
            for task, completion in list(zip(tasks, stage.completions, strict=True))[:NUM_SHOWN]:
                line = {
                    "stage": f"sampled {stage.name}",
                    "prompt": task.prompt,
                    "completion": completion,
                    "expected": task.answer,
                }
                file.write(json.dumps(line | {"correct": is_right(task, completion)}) + "\n")


def result_table(stages: list[Stage]) -> dict[str, list]:
    """Columns and rows of the comparison: one row per measure, one column per stage."""
    measures = {
        "accuracy, greedy": lambda s: f"{s.greedy:.1%}",
        "accuracy, sampled": lambda s: f"{s.sampled:.1%}",
        "held-out loss (nats/token)": lambda s: f"{s.loss:.3f}",
        "training tokens/s": lambda s: f"{s.tokens_per_second:,.0f}" if s.tokens_per_second else "",
        "training time (s)": lambda s: f"{s.seconds:.1f}" if s.seconds else "",
        "peak memory (MiB)": lambda s: f"{s.peak_bytes / 2**20:,.0f}",
    }
    return {
        "columns": [f"{NUM_HELD_OUT} held-out tasks", *(stage.name for stage in stages)],
        "rows": [[name, *(value(stage) for stage in stages)] for name, value in measures.items()],
    }


def format_table(columns: list[str], rows: list[list[str]]) -> str:
    """The table as aligned text."""
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def main(arguments: list[str]) -> int:
    """Run the demo and say where model and report are."""
    parser = argparse.ArgumentParser(
        prog="fastalign demo",
        description="Make a small model and a task with checkable answers, fine-tune it here, teach it to "
        "prefer right answers, then let it try and learn from what was right (two minutes on two CPU cores), compare "
        "the stages, and write a report.",
    )
    parser.add_argument(
        "--output_dir", default="demo_output", help="folder for model and report [default: demo_output]"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of model, data and order [default: 0]")
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help="optimizer steps of fine-tuning; DPO gets a sixth, GRPO two thirds of them; fewer learn less "
        f"[default: {STEPS}]",
    )
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be at least 1")
    print("Loading torch and transformers ...", flush=True)
    from fastalign import write_report

    stages = run_demo(options.output_dir, seed=options.seed, steps=options.steps)
    table = result_table(stages)
    report = write_report(
        [Path(options.output_dir, name) for name in STAGES],
        Path(options.output_dir, "report.html"),
        title="fastalign demo: sorting digits",
    )
    print(f"\n{format_table(table['columns'], table['rows'])}\n")
    print(f"Model:  {Path(options.output_dir, STAGES[-1])} (load it with AutoModelForCausalLM.from_pretrained)")
    print(f"Report: {report}")
    return 0
