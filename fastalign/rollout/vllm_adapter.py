"""LoRA adapters of the training model in a vLLM engine, beside its weights instead of merged into them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..adapters import is_peft_model
from .weights import whole

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
NOT_THERE = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication")
NOT_THERE += ("target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "megatron_config")
SHARED_MEMORY = Path("/dev/shm")


def why_merged(model: Any) -> str:
    """Why the adapter of `model` has to be merged into the weights for vLLM; '' where vLLM can run it beside them."""
    if not is_peft_model(model):
        return ""
    if len(model.active_adapters) != 1:
        return f"{len(model.active_adapters)} adapters are active"
    config = model.peft_config[model.active_adapters[0]]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"the adapter is {kind}, not LoRA"
    for name in NOT_THERE:
        if getattr(config, name, None):
            return f"the adapter has `{name}`"
    if config.bias != "none":
        return f"the adapter trains biases (`bias={config.bias!r}`)"
    layers = {name.split(".lora_A.")[0] for name, _ in model.named_modules() if ".lora_A." in name}
    if any("lora_embedding_" in name for name, _ in model.named_parameters()) or any(
        not isinstance(model.get_submodule(name).get_base_layer(), torch.nn.Linear) for name in layers
    ):
        return "the adapter is on layers other than linear ones"
    return f"its rank is above {RANKS[-1]}" if highest_rank(config) > RANKS[-1] else ""


def highest_rank(config: Any) -> int:
    return max([config.r, *(config.rank_pattern or {}).values()])


def engine_options(model: Any) -> dict[str, Any]:
    """Arguments of the engine for the adapter of `model`."""
    rank = highest_rank(model.peft_config[model.active_adapters[0]])
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(r for r in RANKS if r >= rank)}


def memory_folder(prefix: str) -> tempfile.TemporaryDirectory:
    """A folder in memory where this machine has one; a server that runs as another user may read it."""
    place = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    folder = tempfile.TemporaryDirectory(prefix=prefix, dir=place)
    os.chmod(folder.name, 0o755)
    return folder


class AdapterFiles:
    """The adapter written to shared memory, from where the engine reads it in place of the one before."""

    def __init__(self, model: Any):
        self.model = model
        self._folder = memory_folder("fastalign_adapter_")
        self.folder = self._folder.name
        self._described = False

    def request(self, in_place: bool = False) -> Any:
        """vLLM's name for it; `in_place` makes the engine read the files again."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        return LoRARequest("policy", 1, self.folder, load_inplace=in_place)

    def write(self) -> int:
        """Write the weights of now; returns their bytes. All ranks must call it where they are sharded."""
        adapter = self.model.active_adapters[0]
        if not self._described:
            config = self.model.peft_config[adapter]
            kept = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
            described: dict[str, Any] = {name: getattr(config, name) for name in kept}
            # the base weights here are those of training, so an initialisation that changed them is in them already
            described |= {"peft_type": "LORA", "bias": "none", "target_modules": sorted(self._targets())}
            Path(self.folder, "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
            self._described = True
        state = {
            name.replace(f".{adapter}.", "."): whole(parameter).contiguous()
            for name, parameter in self.model.named_parameters()
            if f".lora_A.{adapter}." in name or f".lora_B.{adapter}." in name
        }
        save_file(state, Path(self.folder, "adapter_model.safetensors"))
        return sum(t.numel() * t.element_size() for t in state.values())

    def _targets(self) -> set[str]:
        names = (name for name, _ in self.model.named_modules() if name.endswith(".lora_A"))
        return {name.split(".")[-2] for name in names}

    def close(self) -> None:
        self._folder.cleanup()
