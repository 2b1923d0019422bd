"""The stages of the demo: the settings of each, and the trainer that they make."""

from __future__ import annotations

from .task import noisy_rows, preference_rows, sort_tasks

NUM_DIGITS, NOISE = 6, 0.5
BATCH = 256  # examples of a step of fine-tuning
PAIR_BATCH = 128  # pairs of a step of the preference stage
PROMPTS, NUM_GENERATIONS = 64, 8  # of a step of reinforcement learning


def sft_settings(*, steps: int, seed: int) -> dict:
    """The fields of the demo's SFTConfig."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(steps // 6, 1),
        "adam_beta2": 0.95,
        "max_length": 64,
        "gradient_checkpointing": False,
        "logging_steps": max(steps // 40, 1),
        "eval_strategy": "steps",
        "eval_steps": max(steps // 8, 1),
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }


def sft_trainer(model, tokenizer, tasks, output_dir: str, *, steps: int, seed: int):
    """The trainer that fine-tunes `model` on noisy answers and evaluates it on the right answers of `tasks`."""
    from datasets import Dataset

    from fastalign import SFTConfig, SFTTrainer
    from fastalign.loop.progress import TrainingProgress

    from .progress import OneLine

    held_out = frozenset(task.prompt for task in tasks)
    train = Dataset.from_dict(noisy_rows(sort_tasks(steps * BATCH, NUM_DIGITS, seed + 1, held_out), NOISE, seed + 2))
    test = Dataset.from_dict(noisy_rows(tasks, 0.0, seed))
    settings = SFTConfig(output_dir, **sft_settings(steps=steps, seed=seed))
    trainer = SFTTrainer(model, settings, train_dataset=train, eval_dataset=test, processing_class=tokenizer)
    trainer.remove_callback(TrainingProgress)
    trainer.add_callback(OneLine("SFT"))
    return trainer


def dpo_settings(*, steps: int, seed: int) -> dict:
    """The fields of the demo's DPOConfig."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": PAIR_BATCH,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(steps // 6, 1),
        "loss_type": "apo_zero",  # which also raises the chosen answers, where there is room for little else
        "beta": 1.0,
        "kl_drift_bound": 3.0,  # rejected answers of seven characters are to become impossible
        "max_length": 64,
        "gradient_checkpointing": False,
        "logging_steps": max(steps // 20, 1),
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }


def dpo_trainer(model, tokenizer, tasks, output_dir: str, *, steps: int, seed: int):
    """The trainer that teaches `model` to prefer right answers to wrong ones; its reference is the model as it is."""
    from datasets import Dataset

    from fastalign import DPOConfig, DPOTrainer
    from fastalign.loop.progress import TrainingProgress

    from .progress import OneLine

    held_out = frozenset(task.prompt for task in tasks)
    new = sort_tasks(steps * PAIR_BATCH, NUM_DIGITS, seed + 3, held_out)
    settings = DPOConfig(output_dir, **dpo_settings(steps=steps, seed=seed))
    pairs = Dataset.from_dict(preference_rows(new, seed + 4))
    trainer = DPOTrainer(model, args=settings, train_dataset=pairs, processing_class=tokenizer)
    trainer.remove_callback(TrainingProgress)
    trainer.add_callback(OneLine("DPO"))
    return trainer


def grpo_settings(*, steps: int, seed: int) -> dict:
    """The fields of the demo's GRPOConfig."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": PROMPTS * NUM_GENERATIONS,
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": NUM_DIGITS + 2,
        "learning_rate": 8e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(steps // 16, 1),
        "adam_beta2": 0.95,
        "gradient_checkpointing": False,
        "logging_steps": max(steps // 20, 1),
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }


def right_answer(completions: list[str], answer: list[str], **others) -> list[float]:
    """The reward: 1 for the digits of the prompt in order, nothing else."""
    return [float(completion.strip() == right) for completion, right in zip(completions, answer, strict=True)]


def grpo_trainer(model, tokenizer, tasks, output_dir: str, *, steps: int, seed: int):
    """The trainer that lets `model` try each task several times and learn from which tries were right."""
    from datasets import Dataset

    from fastalign import GRPOConfig, GRPOTrainer
    from fastalign.loop.progress import TrainingProgress

    from .progress import OneLine

    held_out = frozenset(task.prompt for task in tasks)
    new = sort_tasks(steps * PROMPTS, NUM_DIGITS, seed + 5, held_out)
    settings = GRPOConfig(output_dir, **grpo_settings(steps=steps, seed=seed))
    prompts = Dataset.from_dict({"prompt": [task.prompt for task in new], "answer": [task.answer for task in new]})
    trainer = GRPOTrainer(model, right_answer, settings, prompts, processing_class=tokenizer)
    trainer.remove_callback(TrainingProgress)
    trainer.add_callback(OneLine("GRPO"))
    return trainer
