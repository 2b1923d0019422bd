"""What a model does to its logits after the head, read from its config, and switched off while the head scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastalign_kernels.head.token_stats import LogitForm
from torch import Tensor, nn

SCALES = {  # field -> power of its value that multiplies the logits
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "output_multiplier": 1,  # Muse
    "logits_scaling": -1,  # Granite divides
}
SCALES_OF = {"hyperclovax": {"logits_scaling": 1}, "minicpm3": {"logits_scaling": 0}}  # MiniCPM scales hidden states
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
NO_CAP = 2.0**40  # cap * tanh(x / cap) is x to the last bit here; None is not understood by all models


def _powers(model: Any) -> dict[str, int]:
    return SCALES | SCALES_OF.get(getattr(model.config, "model_type", ""), {})


def _owners(model: Any) -> list[Any]:
    """The objects whose fields the forward of a causal model reads."""
    inner = getattr(model, getattr(model, "base_model_prefix", ""), None)
    owners = [model, inner, model.config, model.config.get_text_config()]
    return list({id(x): x for x in owners if x is not None}.values())


def _number(owner: Any, name: str) -> float | None:
    value: Any = getattr(owner, name, None)
    if isinstance(value, Tensor) and isinstance(owner, nn.Module):
        raise ValueError(
            f"{type(owner).__name__}.{name} is a tensor; only a fixed number after the head is supported."
        )
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def read_logit_form(model: Any) -> LogitForm:
    """The scale and soft-cap that `model` (a causal model of Transformers) applies after its head."""
    scale, softcap = 1.0, None
    for name, power in _powers(model).items():
        value = next((v for owner in _owners(model) if (v := _number(owner, name)) is not None), None)
        if value is not None:
            scale *= value**power
    for name in SOFTCAPS:
        value = next((v for owner in _owners(model) if (v := _number(owner, name)) is not None), None)
        softcap = softcap if value is None else float(value)
    return LogitForm(scale=float(scale), softcap=softcap)


@contextmanager
def head_output_kept(model: Any) -> Iterator[None]:
    """Inside, `model` returns what its head returns: scale 1 and no soft-cap. Not for two threads at one model."""
    changed: list[tuple[Any, str, float]] = []
    neutral = {name: 1.0 for name, power in _powers(model).items() if power} | dict.fromkeys(SOFTCAPS, NO_CAP)
    try:
        for owner in _owners(model):
            for name, number in neutral.items():
                value = _number(owner, name)
                if value is not None and value != number:
                    changed.append((owner, name, value))
                    setattr(owner, name, type(value)(number))
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)
