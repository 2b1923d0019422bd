"""GRPO and RLOO on prompts with images: against TRL, whole runs, and what is refused."""

import copy
import functools
import math

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from test_vision import _model, _processor
from test_vision_pairs import _picture, _say
from tiny import tiny_tokenizer

trl = pytest.importorskip("trl")

import trl.trainer.grpo_trainer as trl_grpo  # noqa: E402
import trl.trainer.rloo_trainer as trl_rloo  # noqa: E402

import fastalign  # noqa: E402

PARITY_RTOL = 1e-5  # fp32: sums over tokens are taken in another order
TIMED = ("runtime", "per_second", "total_flos", "preparation_time", "health/", "time/", "step_time", "epoch")
END, LONGEST, IMAGE = 2, 7, 330
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": LONGEST,
    "max_steps": 3,
    "adam_epsilon": 1e-4,  # what rounding leaves of gradients that are zero makes no whole steps
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def rows(n: int = 12, kind: str = "images") -> list[dict]:
    """Prompts of different lengths with one image each; of "images" every third row has two, of "mixed" every fourth
    none (TRL fails on micro-batches of those)."""
    made = []
    for i in range(n):
        ask = _say("user", "what is this " * (1 + i % 3))
        if kind == "image":
            made.append({"prompt": ask, "image": _picture(i), "target": i % 5})
        else:
            count = 0 if i % 4 == 3 and kind == "mixed" else 1 + (i % 3 == 2)
            images = [_picture(i + 20 * k, 18 + i) for k in range(count)]
            made.append({"prompt": ask, "images": images, "target": i % 5})
    return made


def data(n: int = 12, kind: str = "images") -> Dataset:
    found = rows(n, kind)
    return Dataset.from_dict({key: [row[key] for row in found] for key in found[0]})


@functools.cache
def _loaded():
    processor = _processor()
    return processor, _model(processor)


def loaded():
    return tuple(copy.deepcopy(x) for x in _loaded())


def reward(completion_ids, target, prompts, images=None, image=None, **_) -> list[float]:
    given = [[one] for one in image] if images is None else images
    for prompt, own in zip(prompts, given, strict=True):
        placed = [part["image"] for part in prompt[0]["content"] if part["type"] == "image"]
        assert [one.size for one in placed] == [one.size for one in own]
    return [len(set(ids)) + 0.1 * (sum(ids) % 7) - t for ids, t in zip(completion_ids, target, strict=True)]


def completions_of(prompt_ids: list[list[int]]) -> list[list[int]]:
    """The same completions for the same prompts."""
    seen, found = {}, []
    for ids in prompt_ids:
        number = seen[len(ids)] = seen.get(len(ids), 0) + 1
        rng = np.random.default_rng([len(ids), number])
        found.append(rng.integers(5, IMAGE, int(rng.integers(1, LONGEST + 1))).tolist())
        if len(found[-1]) < LONGEST:
            found[-1][-1] = END
    return found


def rollout(prompts, trainer):
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    ids = [_loaded()[0].apply_chat_template([prompt], **options)["input_ids"][0] for prompt in prompts]
    return {"prompt_ids": ids, "completion_ids": completions_of(ids), "logprobs": None}


class FixedCompletions(trl.RLOOTrainer):
    """TRL's RLOO, which takes no `rollout_func`."""

    def __init__(self, *args, rollout_func=None, **kwargs):
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        return completions_of(prompt_ids)


def make(library, folder, algorithm="GRPO", train=None, evaluation=None, **given):
    """A trainer, made of config fields and constructor arguments."""
    config = getattr(library, f"{algorithm}Config")
    arguments = {name: given.pop(name) for name in list(given) if name not in config.__dataclass_fields__}
    processor, model = loaded()
    if given.get("beta"):
        other = _model(processor)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.05)
        other.save_pretrained(folder.parent / "reference")
        model.config._name_or_path = str(folder.parent / "reference")
    trainer = FixedCompletions if (library, algorithm) == (trl, "RLOO") else getattr(library, f"{algorithm}Trainer")
    return trainer(
        model,
        arguments.pop("reward_funcs", reward),
        config(str(folder), **(SETTINGS | given)),
        train_dataset=data() if train is None else train,
        eval_dataset=evaluation,
        processing_class=arguments.pop("processing_class", processor),
        **arguments,
    )


def history(trainer) -> list[dict]:
    log = trainer.state.log_history
    return [{k: v for k, v in entry.items() if not any(part in k for part in TIMED)} for entry in log]


OFF = {"steps_per_generation": 4, "per_device_train_batch_size": 2, "num_iterations": 2, "max_steps": 5}
CASES = {
    "grpo": ("GRPO", {"evaluation": True}),
    "grpo, reference": ("GRPO", {"beta": 0.1, "loss_type": "grpo", "train": functools.partial(data, kind="image")}),
    "grpo, off policy": ("GRPO", {"loss_type": "bnpo", **OFF}),
    "rloo": ("RLOO", {"evaluation": True, "beta": 0.0, "learning_rate": 1e-3, **OFF}),
    "rloo, reference": ("RLOO", {"beta": 0.1}),
}


@pytest.fixture
def groups_stay_together(monkeypatch):
    """TRL spreads the completions of a group over the micro-batches of a generation."""
    for module in (trl_grpo, trl_rloo):
        monkeypatch.setattr(module, "shuffle_sequence_dict", lambda batch: batch)


@pytest.mark.usefixtures("groups_stay_together")
@pytest.mark.parametrize("case", CASES)
def test_every_logged_number_equals_trl(case, tmp_path):
    algorithm, settings = CASES[case]
    logs = []
    for library in (fastalign, trl):
        given = {name: value() if callable(value) else value for name, value in settings.items()}
        evaluation = data(8) if given.pop("evaluation", False) else None
        given |= {"rollout_func": rollout, "evaluation": evaluation}
        trainer = make(library, tmp_path / library.__name__, algorithm, **given)
        trainer.train()
        if evaluation is not None:
            trainer.evaluate()
        logs.append(history(trainer))
    for own, other in zip(*logs, strict=True):
        assert set(own) == set(other), set(own) ^ set(other)
        for key in own:
            assert math.isclose(own[key], other[key], rel_tol=PARITY_RTOL, abs_tol=2e-7), (key, own, other)


# Whole runs


def test_a_run_learns_what_its_images_show(tmp_path):
    """The image says which half of the vocabulary is right: who does not see it gets 0.5 at most."""
    from PIL import Image

    shades = [Image.fromarray(np.full((16, 16, 3), 255 * (i % 2), np.uint8)) for i in range(16)]
    train = Dataset.from_dict({"prompt": [_say("user", "which")] * 16, "image": shades, "white": [0, 1] * 8})

    def right(completion_ids, white, **_):
        return [
            sum((token >= 160) == bool(one) for token in ids) / len(ids)
            for ids, one in zip(completion_ids, white, strict=True)
        ]

    given = {"max_steps": 40, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 1}
    given |= {"num_generations": 16, "max_completion_length": 1, "adam_epsilon": 1e-8, "learning_rate": 3e-3}
    given |= {"lr_scheduler_type": "constant"}
    trainer = make(fastalign, tmp_path, train=train, reward_funcs=right, **given)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert np.mean(rewards[:5]) < 0.6 and np.mean(rewards[-5:]) > 0.8, rewards


def test_a_run_goes_on_in_the_middle_of_a_generation(tmp_path):
    """Rows without images among them; the images of the rest of the batch lie in the checkpoint."""
    given = {"steps_per_generation": 4, "gradient_accumulation_steps": 1, "beta": 0.1, "train": data(12, "mixed")}
    given |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "log_completions": True, "num_iterations": 2}
    whole = make(fastalign, tmp_path / "whole", **given)
    whole.train()
    rest = make(fastalign, tmp_path / "rest", **given)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert history(rest)[:-1] == history(whole)[:-1]
    table = pandas.read_parquet(tmp_path / "whole" / "completions" / "completions_00001.parquet")
    first = table["prompt"][0][0]["content"][0]
    assert first["type"] == "image" and not first.get("image")


def test_sampling_ahead_reads_images(tmp_path):
    given = {"max_staleness": 1, "gradient_accumulation_steps": 1, "max_steps": 4, "train": data(12, "mixed")}
    given |= {"save_strategy": "steps", "save_steps": 2}
    whole = make(fastalign, tmp_path / "whole", **given)
    whole.train()
    rest = make(fastalign, tmp_path / "rest", **given)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert history(rest)[:-1] == history(whole)[:-1]


# What is refused


def a_tool(x: int) -> int:
    """Doubles.

    Args:
        x: what is doubled.
    """
    return 2 * x


def soft_prompt():
    peft = pytest.importorskip("peft")
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=32)


REFUSED = [
    ({"use_vllm": True}, "`use_vllm=True` samples from text alone"),
    ({"use_transformers_continuous_batching": True}, "`use_transformers_continuous_batching=True` samples from text"),
    ({"processing_class": tiny_tokenizer}, "is a plain tokenizer"),
    ({"train": lambda: Dataset.from_dict({"prompt": ["a"] * 8, "image": [_picture(0)] * 8})}, "prompts of text"),
    ({"tools": lambda: [a_tool]}, "do not go with `tools`"),
    ({"peft_config": soft_prompt, "max_steps": 1}, "keeps no cache"),
    ({"environment_factory": lambda: object}, "do not go with `environment_factory`"),
    ({"evaluation": lambda: {"a": data(4).rename_column("prompt", "question")}}, "no `prompt`"),
]


@pytest.mark.parametrize("settings, message", REFUSED)
def test_what_images_do_not_go_with_is_refused(settings, message, tmp_path):
    settings = {name: value() if callable(value) else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        make(fastalign, tmp_path, **settings).train()


def test_images_without_a_place_are_named(tmp_path):
    said = [{"role": "user", "content": [{"type": "text", "text": "what"}]}]
    train = Dataset.from_dict({"prompt": [said] * 8, "image": [_picture(0)] * 8})
    with pytest.raises(ValueError, match="1 images but its messages have 0 places"):
        make(fastalign, tmp_path, train=train).train()
