"""Model weights and optimizer states as ordinary whole tensors, whatever the number of ranks that hold them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils import logging as hf_logging
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from ..adapters import is_peft_model
from .checkpoint_files import weight_files

logger = logging.getLogger(__name__)
WRAPPER = "_checkpoint_wrapped_module."  # what FSDP's activation checkpointing puts into parameter names


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter is spread over ranks (FSDP2, tensor parallelism)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Any, keep: bool) -> Tensor | None:
    """The full tensor in host memory; all ranks must call it, those with `keep` False get None."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor().detach()
    return full.cpu() if keep else None


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """`tensor` (whole, the same on all ranks) spread over the ranks as `target` is."""
    if not isinstance(target, DTensor):
        return tensor
    value = tensor.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def model_state(model: Any, keep: bool) -> dict[str, Tensor] | None:
    """The whole state dict of a sharded model (None: not sharded, it can be saved as it is); called on all ranks.

    Tied weights come out as one tensor under several names, as in an ordinary model. With `keep` False it is empty.
    Of a PEFT model only adapters and embeddings are collected: what its `save_pretrained` may write.
    """
    if not is_sharded(model):
        return None
    adapters = tuple(f".{name}" for name in model.peft_config) if is_peft_model(model) else ("",)
    names = [(name.replace(WRAPPER, ""), p) for name, p in model.named_parameters(remove_duplicate=False)]
    identity = {name: id(p) for name, p in names}
    full: dict = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not any(part in name for part in (*adapters, "embed", "lm_head")):
            continue
        key = identity.get(name, name)
        if key not in full:
            full[key] = whole(tensor, keep)
        if keep:
            state[name] = full[key]
    return state


def write_model(trainer, folder: str | os.PathLike, state: dict[str, Tensor] | None) -> None:
    """Write weights (adapters of a PEFT model), configs, processing class and arguments; on the writing ranks only.

    `state` is `model_state(trainer.model, True)`, which all ranks made before.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel) or is_peft_model(model):
        with _no_bar():
            model.save_pretrained(folder, state_dict=state)
    else:
        state = model.state_dict() if state is None else state
        save_file({k: v.contiguous() for k, v in state.items()}, folder / SAFE_WEIGHTS_NAME, {"format": "pt"})
    saved_with = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if saved_with is not None:
        saved_with.save_pretrained(folder)
    torch.save(trainer.args, folder / TRAINING_ARGS_NAME)
    for file in folder.rglob("*.safetensors"):  # written for the owner only; readable as the folder is
        file.chmod(folder.stat().st_mode & 0o666)


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Without the progress bar over shards, which would cut through that of the run."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def read_model(trainer, folder: Path) -> None:
    """Copy the weights in `folder` into the model. ValueError naming keys that are missing, unknown or misshapen."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if is_peft_model(model):
        for adapter in model.peft_config:
            _read_adapter(model, adapter, folder if adapter == "default" else folder / adapter)
        return
    state: dict[str, Tensor] = {}
    files = weight_files(folder)
    if ADAPTER_SAFE_WEIGHTS_NAME in files[0]:
        raise ValueError(
            f"{folder / files[0]} holds an adapter, but the model that is trained has none: pass the same peft_config."
        )
    for name in files:
        state |= _read(folder / name)
    own = model.state_dict()
    if not state.keys() <= own.keys() and (converted := _converted(model, folder)) is not None:
        state = converted
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        if source in state and target in own and target not in state:
            state[target] = state[source]
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    _compare(folder / files[0], {k: v for k, v in own.items() if k not in ignored or k in state}, state)
    model.load_state_dict({name: like(value, own[name]) for name, value in state.items()}, strict=False)


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _converted(model: nn.Module, folder: Path) -> dict[str, Tensor] | None:
    """The state dict as Transformers' loading makes it, where names in files differ from those in memory."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not isinstance(model, PreTrainedModel) or not get_model_conversion_mapping(model, add_legacy=False):
        return None
    made_by = next(cls for cls in type(model).__mro__ if not cls.__name__.startswith("FSDP"))
    with _no_bar():
        loaded, info = made_by.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    lost = {k: v for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if lost:
        raise ValueError(f"the weights in {folder} are those of another model: {lost}")
    return loaded.state_dict()


def _read_adapter(model, adapter: str, folder: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    file = folder / ADAPTER_SAFE_WEIGHTS_NAME
    file = file if file.is_file() else folder / "adapter_model.bin"
    if not file.is_file():
        raise ValueError(f"{folder} has no {ADAPTER_SAFE_WEIGHTS_NAME} for the adapter {adapter!r} that is trained.")
    state = _read(file)
    own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    embeddings = [
        layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    ]
    names = {module: name for name, module in model.named_modules()}
    for layer in embeddings:  # saved with the adapter where the vocabulary was resized
        key = f"{names.get(layer)}.weight"
        if key in state and key not in own:
            own[key] = layer.weight
    _compare(file, own, state)
    set_peft_model_state_dict(model, {k: like(v, own[k]) for k, v in state.items()}, adapter_name=adapter)


def _compare(file: Path, own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise ValueError unless both have the same names and shapes."""
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    found = {
        "missing": [k for k in own if k not in state],
        "unknown": [k for k in state if k not in own],
        "of another shape": shapes,
    }
    wrong = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in found.items() if keys]
    if wrong:
        raise ValueError(f"the weights in {file} are those of another model: " + ", ".join(wrong))


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def content_hash(model: nn.Module, skip: tuple[str, ...] = ()) -> str:
    """Digest of all weights by name, type and value, except names that hold one of `skip`."""

    def digest(item: tuple[str, Any]) -> bytes:
        name, tensor = item
        if not isinstance(tensor, Tensor):
            return repr(item).encode()
        data = tensor.detach().cpu().contiguous()
        head = f"{name} {data.dtype} {tuple(data.shape)}".encode()
        values: Any = data.reshape(-1).view(torch.uint8).numpy() if data.numel() else b""
        return hashlib.blake2b(values, key=hashlib.blake2b(head).digest()).digest()

    kept = sorted((k, v) for k, v in model.state_dict().items() if not any(part in k for part in skip))
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:  # hashing releases the interpreter's lock
        return hashlib.sha256(b"".join(pool.map(digest, kept))).hexdigest()


# Optimizer


def optimizer_state(optimizer, keep: bool) -> dict:
    """`optimizer.state_dict()` of whole tensors, called on all ranks; without `keep` the states are left out."""
    state = optimizer.state_dict()
    for key, values in state["state"].items():
        full = {k: whole(v, keep) if isinstance(v, Tensor) else v for k, v in values.items()}
        state["state"][key] = full if keep else {}
    return state


def load_optimizer_state(optimizer, state: dict, file: Path) -> None:
    """Load what `optimizer_state` made. ValueError if the parameters or their shapes differ."""
    mine, theirs = _sizes(optimizer.param_groups), _sizes(state["param_groups"])
    if mine != theirs:
        raise ValueError(
            f"{file} has parameter groups of {theirs} parameters, this optimizer {mine}: it belongs to another model, "
            "adapter or optimizer"
        )
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        values = state["state"].get(index, {})
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or not isinstance(parameter, DTensor):
                continue
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{file} has {name} of shape {tuple(value.shape)} for a sharded parameter of shape "
                    f"{tuple(parameter.shape)}"
                )
            values[name] = like(value, parameter)
    optimizer.load_state_dict(state)


def _sizes(groups: Iterable[dict]) -> list[int]:
    return [len(group["params"]) for group in groups]
