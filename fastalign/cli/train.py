"""One training command: parse, start more processes where asked, load model and data, train, save, say where it is."""

from __future__ import annotations

import inspect
import logging
import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, set_seed

from ..data.load import load_rows, select_columns
from ..data.mixture import DatasetMixtureConfig, get_dataset
from ..loop.health import HealthError
from ..models import model_class
from ..report.settings import write_settings
from .arguments import ModelConfig, RewardScriptArguments, ScriptArguments, get_peft_config, get_quantization_config
from .launch import add_launch_option, launch, split_launch_arguments, was_launched
from .parser import AlignParser

logger = logging.getLogger(__name__)


def make_parser(name: str, config_class: type, trainer_class: type | None = None) -> AlignParser:
    """The parser of `fastalign NAME`, which takes rewards where the trainer does."""
    scores = trainer_class is not None and "reward_funcs" in inspect.signature(trainer_class).parameters
    script_class = RewardScriptArguments if scores else ScriptArguments
    kinds: tuple[Any, ...] = (script_class, config_class, ModelConfig, DatasetMixtureConfig)
    parser = AlignParser(
        kinds,
        prog=f"fastalign {name}",
        usage=f"fastalign {name} --model_name_or_path MODEL --dataset_name DATA [--config FILE] [options]",
        epilog="Options may stand in the YAML file of --config under the same names. Arguments of `accelerate launch` "
        "(--num_processes, --mixed_precision, ...) start several processes.",
    )
    add_launch_option(parser)
    return parser


def run(name: str, config_class: type, trainer_class: type, arguments: list[str]) -> int:
    """Run `fastalign NAME` with `arguments`; returns the exit code (1: model or data, 2: an option, 3: health)."""
    parser = make_parser(name, config_class, trainer_class)
    try:
        own, file_rest = parser.read_config_option(arguments)
        namespace, rest = parser.parse_known_args(
            own
        )  # dataclasses come later: building them takes hold of the device
        launch_arguments, unknown_file, unknown = split_launch_arguments(file_rest, rest)
        if unknown_file or unknown:
            parser.error(parser.unknown_message(unknown_file, unknown))
        config = getattr(namespace, "accelerate_config", None)
        if (config or launch_arguments) and not was_launched():
            return launch(name, arguments, config, launch_arguments)
        settings = parser.parse_args_into_dataclasses(own, return_remaining_strings=True, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    script_args, training_args, model_args, mixture = settings[:4]
    _show_log(training_args)
    try:
        trainer = make_trainer(trainer_class, script_args, training_args, model_args, mixture)
        if trainer.is_world_process_zero():
            write_settings(training_args.output_dir, parser.given(namespace))
        try:
            trainer.train(resume_from_checkpoint=_resume_choice(training_args.resume_from_checkpoint))
        except HealthError as error:
            trainer.save_state()  # the report reads it
            folder = training_args.output_dir
            trainer.accelerator.print(f"{parser.prog}: {error}\nCurves: fastalign report {folder}", file=sys.stderr)
            trainer.accelerator.end_training()
            return 3
        _finish(trainer, training_args, script_args)
    except (ValueError, OSError) as error:  # what a user can get wrong; anything else keeps its traceback
        if training_args.log_level == "debug":
            raise
        print(f"{parser.prog}: error: {error}\n`--log_level debug` shows where it was raised.", file=sys.stderr)
        return 1
    return 0


def make_trainer(trainer_class, script_args, training_args, model_args, mixture):
    """The trainer that the settings describe, with its model and data loaded."""
    if not model_args.model_name_or_path:
        raise ValueError("`model_name_or_path` is required: a Hub name or the folder of a model.")
    dataset = load_data(script_args, mixture)
    train, evaluation = script_args.dataset_train_split, None
    if train not in dataset:
        raise ValueError(f"`dataset_train_split` is {train!r}, but the dataset has the splits {sorted(dataset)}.")
    if training_args.eval_strategy != "no":
        test = script_args.dataset_test_split
        if test not in dataset:
            raise ValueError(
                f"`eval_strategy` asks for evaluation, but the dataset has no split {test!r}, only {sorted(dataset)}. "
                "Set `dataset_test_split`, or `test_split_size` together with `datasets`."
            )
        evaluation = dataset[test]
    model, given = model_args.model_name_or_path, {}
    if model_args.from_scratch:
        model, given["processing_class"] = model_from_scratch(model_args, training_args, trainer_class)
    else:
        training_args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
        } | (training_args.model_init_kwargs or {})
    if isinstance(script_args, RewardScriptArguments):
        given["reward_funcs"] = script_args.rewards()
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=dataset[train],
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **given,
    )
    if script_args.ignore_bias_buffers:
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype.is_floating_point is False
        ]
    return trainer


def load_data(script_args: ScriptArguments, mixture: DatasetMixtureConfig):
    """The dataset by split: the mixture where `datasets` is given, else `dataset_name`; columns chosen and renamed."""
    columns = script_args.dataset_columns
    if mixture.datasets:
        if script_args.dataset_name:
            logger.warning("`dataset_name` is not used: `datasets` is given too.")
        dataset = get_dataset(mixture)
        return select_columns(dataset, columns) if columns else dataset
    if script_args.dataset_name:
        name, config, streaming = script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming
        return load_rows(name, config, columns=columns, streaming=streaming)
    raise ValueError("Give the data: `dataset_name` (Hub name, folder or file), or `datasets` in the config file.")


def model_from_scratch(model_args: ModelConfig, training_args, trainer_class):
    """A model of the trainer's kind with random weights from the folder's config.json, and the folder's tokenizer."""
    source, trust = str(model_args.model_name_or_path), training_args.trust_remote_code
    revision = model_args.model_revision
    set_seed(training_args.seed)
    labels = {"num_labels": trainer_class.num_labels} if trainer_class.model_kind else {}
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust, **labels)
    options = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    dtype = (config.dtype or torch.float32) if model_args.dtype == "auto" else getattr(torch, str(model_args.dtype))
    kind: Any = trainer_class.model_kind or model_class(config)
    make = getattr(kind, "_from_config", None) or kind.from_config  # the auto classes have the second only
    model = make(config, dtype=dtype, **options)
    logger.warning(
        f"from_scratch: {type(model).__name__} of {source} starts from random weights "
        f"({model.num_parameters():,} parameters, seed {training_args.seed})."
    )
    return model, AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust)


def _show_log(training_args) -> None:
    """Print what the library logs, from level `log_level` (info where it is left alone), on the first process."""
    level = training_args.get_process_log_level() if training_args.log_level != "passive" else logging.INFO
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("fastalign").setLevel(level if training_args.process_index == 0 else logging.ERROR)


def _resume_choice(value: str | bool | None) -> str | bool | None:
    words = {"true": True, "false": None, "none": None, "": None}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _finish(trainer, training_args, script_args) -> None:
    """Save the model and say where the results are."""
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    say = trainer.accelerator.print
    say(f"\nModel:    {training_args.output_dir}")
    say(f"Settings: {training_args.output_dir}/run.yaml")
    say(f"Curves:   fastalign report {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        say(f"Hub:      https://huggingface.co/{trainer.hub_model_id}")
    trainer.accelerator.end_training()
