"""What every training command takes besides the trainer's own settings: the model and where the data is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import arg


@dataclass
class ScriptArguments:
    """Where the rows come from."""

    _argument_group_name = "data"

    dataset_name: str | None = arg(
        None, "Hub name, local folder, or jsonl, json, parquet or csv file. Not used where `datasets` is given."
    )
    dataset_config: str | None = arg(None, "Configuration of the dataset (`name` of `datasets.load_dataset`).")
    dataset_train_split: str = arg("train", "Split to train on.")
    dataset_test_split: str = arg("test", "Split to evaluate on, where `eval_strategy` asks for evaluation.")
    dataset_streaming: bool = arg(False, "Read the dataset as a stream, without downloading it first.")
    ignore_bias_buffers: bool = arg(
        False, "DDP: leave boolean buffers of the model out of broadcasts (some older models need it)."
    )
    dataset_columns: dict[str, str] | None = arg(
        None,
        "Columns to take and the names to give them, as NEW=OLD,NEW=OLD (YAML: a mapping), for example "
        "prompt=question,completion=answer. The other columns are dropped.",
    )

    def __post_init__(self):
        if isinstance(self.dataset_columns, str):
            self.dataset_columns = parse_columns(self.dataset_columns)


@dataclass
class RewardScriptArguments(ScriptArguments):
    """Where the rows come from, and what completions are worth."""

    reward_model_name_or_path: str | None = arg(None, "Reward model that scores completions: Hub name or folder.")
    reward_funcs: list[str] | None = arg(
        None, "Reward functions: names of fastalign.rewards, or dotted paths of your own (my_rewards.exact)."
    )

    def rewards(self) -> list[Any]:
        """The reward model and the functions; ValueError for names that are neither."""
        from ..rewards import find_rewards

        model = [self.reward_model_name_or_path] if self.reward_model_name_or_path else []
        return model + find_rewards(self.reward_funcs or [])


def parse_columns(text: str) -> dict[str, str]:
    """`"prompt=question,completion=answer"` -> `{"prompt": "question", ...}`; ValueError if malformed."""
    pairs = [part.split("=") for part in text.split(",")]
    if not all(len(pair) == 2 and all(map(str.strip, pair)) for pair in pairs):
        raise ValueError(
            f"`dataset_columns` is {text!r}; write NEW=OLD pairs, such as prompt=question,completion=answer."
        )
    return {new.strip(): old.strip() for new, old in pairs}


@dataclass
class ModelConfig:
    """Which model is trained, in which precision, and with which adapters."""

    _argument_group_name = "model"

    model_name_or_path: str | None = arg(None, "Hub name or local folder of the model.")
    model_revision: str = arg("main", "Branch, tag or commit of the model on the Hub.")
    dtype: str | None = arg(
        "float32", "Precision of the loaded weights.", choices=["auto", "bfloat16", "float16", "float32"]
    )
    attn_implementation: str | None = arg(
        None, "Attention implementation to load the model with; unset: chosen by what is installed."
    )
    use_peft: bool = arg(False, "Train LoRA adapters instead of the whole model (needs `peft`).")
    lora_r: int = arg(16, "Rank of the adapters.")
    lora_alpha: int = arg(32, "Scale of the adapters: their output is multiplied by alpha / r.")
    lora_dropout: float = arg(0.05, "Dropout in front of the adapters.")
    lora_target_modules: list[str] | None = arg(
        None, "Modules that get an adapter, by the end of their names, or 'all-linear'; unset: PEFT's choice."
    )
    lora_target_parameters: list[str] | None = arg(
        None, "Parameters that get an adapter where the module is no linear layer (experts)."
    )
    lora_modules_to_save: list[str] | None = arg(None, "Modules trained in full beside the adapters.")
    lora_task_type: str = arg("CAUSAL_LM", "Task type handed to PEFT ('SEQ_CLS' for reward models).")
    use_rslora: bool = arg(False, "Rank-stabilised LoRA: scale alpha / sqrt(r).")
    use_dora: bool = arg(False, "DoRA: adapters for the direction of the weights, a vector for their magnitude.")
    load_in_8bit: bool = arg(False, "Hold the base model in 8 bits (with adapters only; needs bitsandbytes).")
    load_in_4bit: bool = arg(False, "Hold the base model in 4 bits (with adapters only; needs bitsandbytes).")
    bnb_4bit_quant_type: str = arg("nf4", "Number format of 4-bit weights.", choices=["fp4", "nf4"])
    use_bnb_nested_quant: bool = arg(False, "Quantise the scales of 4-bit weights as well.")
    bnb_4bit_quant_storage: str | None = arg(None, "dtype in which 4-bit weights are stored.")
    from_scratch: bool = arg(
        False, "Start from random weights: the folder needs a config.json and a tokenizer, weights are not read."
    )

    def __post_init__(self):
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("`load_in_8bit` and `load_in_4bit` are both set; choose one.")
        if self.from_scratch and (self.load_in_8bit or self.load_in_4bit):
            raise ValueError("`from_scratch` cannot be combined with `load_in_8bit` or `load_in_4bit`.")
        modules: Any = self.lora_target_modules
        if isinstance(modules, list) and len(modules) == 1:
            self.lora_target_modules = modules[0]  # 'all-linear' and patterns are plain strings


def get_peft_config(model_args: ModelConfig):
    """The `peft.LoraConfig` that `model_args` describes, or None without `use_peft`. ValueError without `peft`."""
    if not model_args.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("`use_peft` needs the `peft` library: `pip install 'fastalign[peft]'`.") from error
    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        bias="none",
    )


def get_quantization_config(model_args: ModelConfig):
    """The `BitsAndBytesConfig` that `model_args` describes, or None where neither 4 nor 8 bits are asked for."""
    from transformers import BitsAndBytesConfig

    if model_args.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=model_args.dtype,
            bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
            bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model_args.load_in_8bit else None


def init_zero_verbose() -> None:
    """Log errors only, and send warnings through the log (prettily, where `rich` is installed)."""
    import logging
    import warnings

    try:
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler()
    except ImportError:
        handler = logging.StreamHandler()
    logging.basicConfig(format="%(message)s", datefmt="[%X]", handlers=[handler], level=logging.ERROR)

    def to_log(message, category, filename, lineno, file=None, line=None):
        logging.warning(f"{filename}:{lineno}: {category.__name__}: {message}")

    warnings.showwarning = to_log
