"""Datasets of prompts: what they must have, and the tokens that end an answer to them."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset

from ..data.formats import first_row, has_images
from ..models import LoadedModel
from .image_inputs import IMAGE_COLUMNS, check_image_prompt

TOKENISED = "prompt_token_ids"  # column of prompts that are tokenised; `prompt` is then for people and rewards


def end_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's end token and all that the model's generation config names."""
    known: Any = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    ids = [] if known is None else [known] if isinstance(known, int) else list(known)
    own: Any = loaded.tokenizer.eos_token_id
    return tuple(ids if own is None or own in ids else [own, *ids])


def training_prompts(
    train_dataset: Any, args: Any, size: int, *, has_environment: bool, takes_images: bool = False
) -> Any:
    """The training set, checked; rows without a prompt of their own where environments make them.

    `size`: prompts of a generation batch, over all ranks. ValueError where the set is missing or does not fill one,
    and what `check_prompts` raises.
    """
    if train_dataset is None:
        if not has_environment:
            raise ValueError("`train_dataset` is required, unless `environment_factory` makes the prompts.")
        if args.max_steps <= 0:
            raise ValueError(f"Without `train_dataset`, `max_steps` must be above 0; it is {args.max_steps}.")
        return Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * size})
    kind = {"has_environment": has_environment, "takes_images": takes_images}
    train_dataset = check_prompts("train_dataset", train_dataset, args, **kind)
    if isinstance(train_dataset, Dataset) and len(train_dataset) < size:
        raise ValueError(
            f"`train_dataset` has {len(train_dataset)} prompts, fewer than the {size} of one generation batch "
            "(generation_batch_size / num_generations). Add prompts, or lower `steps_per_generation`, "
            "`gradient_accumulation_steps` or `per_device_train_batch_size`."
        )
    return train_dataset


def check_prompts(name: str, dataset: Any, args: Any, *, has_environment: bool, takes_images: bool = False) -> Any:
    """`dataset` (or a dict of several) with the columns that are used.

    TypeError for what is no dataset, ValueError for rows without `prompt` (unless environments make it) and for images
    that the trainer does not take.
    """
    kind = {"has_environment": has_environment, "takes_images": takes_images}
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        parts = {f"{name}[{key!r}]": (key, part) for key, part in dataset.items()}
        return {key: check_prompts(own, part, args, **kind) for own, (key, part) in parts.items()}
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"`{name}` must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`.")
    sample = first_row(dataset, name)
    if "prompt" not in sample and not has_environment:
        raise ValueError(
            f"`{name}` has the columns {sorted(sample)}, but no `prompt`: rename the column that holds the prompts "
            "(text or messages)."
        )
    if has_images(sample):
        check_image_prompt(name, sample, **kind)
        reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if args.ddp_find_unused_parameters is None and not reentrant:
            args.ddp_find_unused_parameters = True  # a batch without images gives the vision tower no gradient
    used = [column for column in ("prompt", *IMAGE_COLUMNS) if column in sample]
    return dataset.select_columns(used) if args.remove_unused_columns and "prompt" in sample else dataset


def tokenised_prompts(dataset: Any, tokenizer: Any) -> Any:
    """`dataset` (or a dict of several) of `input_ids`, with the text of the prompt beside; others as they are."""
    if isinstance(dataset, dict):
        return {key: tokenised_prompts(part, tokenizer) for key, part in dataset.items()}
    columns = getattr(dataset, "column_names", None) or ()
    if "input_ids" not in columns or "prompt" in columns:
        return dataset
    others = [name for name in ("attention_mask", "token_type_ids") if name in columns]
    return dataset.remove_columns(others).map(
        lambda rows: {"prompt": tokenizer.batch_decode(rows["input_ids"]), TOKENISED: rows["input_ids"]},
        batched=True,
        remove_columns=["input_ids"],
    )
