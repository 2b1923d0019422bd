"""Prompts with images in rollouts and updates: their messages, tensors of several rows, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..data.formats import column_names, has_images, is_conversational, prepare_multimodal_messages
from ..data.vision import TYPE_KEYS, image_rows

IMAGE_COLUMNS = ("image", "images")


def placed_images(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with their images (`image` or `images`) in the messages of `prompt`; the columns stay as they are."""
    images = [row["images"] for row in image_rows(list(rows))]
    return [
        {**row, "prompt": prepare_multimodal_messages(row["prompt"], images=own)}
        for row, own in zip(rows, images, strict=True)
    ]


def without_images(prompt: Any) -> Any:
    """A prompt whose blocks of images say only that they are there."""
    if not isinstance(prompt, list):
        return prompt
    made = []
    for message in prompt:
        if isinstance(content := message.get("content"), list):
            content = [{"type": "image"} if block.get("type") == "image" else block for block in content]
        made.append({**message, "content": content})
    return made


def join_inputs(
    parts: Sequence[dict[str, Tensor]], lengths: Sequence[int], width: int, *, left: bool = False
) -> dict[str, Tensor]:
    """Tensors of each of R prompts (see `Request.model_inputs`) as those of one batch of R padded rows.

    Types of tokens (1, P) become (R, width): 0 for what follows the prompt in the `lengths` tokens of a row, and for
    padding. All others are joined along their first axis; where further axes differ, zeros fill them, as processors
    fill the images of a batch.
    """
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        if name in TYPE_KEYS:
            rows = []
            for part, length in zip(parts, lengths, strict=True):
                types = part[name] if name in part else torch.zeros(1, 0, dtype=torch.int64)
                after, padding = length - types.shape[1], width - length
                rows.append(pad(types, (padding, after) if left else (0, after + padding)))
        else:
            values = [part[name] for part in parts if name in part]
            sizes = torch.tensor([value.shape for value in values]).amax(0)
            rows = []
            for value in values:
                missing = (sizes - torch.tensor(value.shape))[1:].flip(0)
                rows.append(pad(value, torch.stack([torch.zeros_like(missing), missing], 1).flatten().tolist()))
        joined[name] = torch.cat(rows)
    return joined


def check_image_prompt(name: str, sample: dict[str, Any], *, takes_images: bool, has_environment: bool) -> None:
    """ValueError where the rows of the dataset `name`, which have images, are none that we can learn from."""
    if not takes_images:
        raise ValueError(f"`{name}` has images, which this trainer does not take: drop those columns.")
    if has_environment:
        raise ValueError(f"`{name}` has images, which do not go with `environment_factory`: leave one of them out.")
    if not is_conversational({"prompt": sample["prompt"]}):
        raise ValueError(
            f"`{name}` has images and prompts of text: write them as messages, [{{'role': 'user', 'content': ...}}], "
            "so that the processor can put the images in."
        )


def prepare_for_images(trainer: Any, has_tools: bool) -> None:
    """Where the trainer's data has images: check what samples them, and ban the token that stands for an image."""
    data = trainer.eval_dataset
    sets = [trainer.train_dataset, *(data.values() if isinstance(data, dict) else [data])]
    if not any(has_images(column_names(one)) for one in sets if one is not None):
        return
    args, loaded = trainer.args, trainer.loaded
    if not loaded.is_vision:
        raise ValueError(
            "The dataset has images ('image' or 'images'), but the model's processing class is a plain tokenizer. Use "
            "a vision-language model, or drop the image columns."
        )
    if has_tools:
        raise ValueError("The dataset has images, which do not go with `tools`: leave one of them out.")
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(args, name, False):
            raise ValueError(f"`{name}=True` samples from text alone, and the dataset has images: set it to False.")
    config = loaded.model.config
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if token is not None:  # one that is sampled would stand for no image
        trainer.sampling = replace(trainer.sampling, banned=(token,))
