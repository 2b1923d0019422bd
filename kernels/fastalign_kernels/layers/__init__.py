"""The layers of a transformer that are bound by memory: norms, gated activations, RoPE, LoRA, embedding gradient."""

from fastalign_kernels.layers.embedding import embedding
from fastalign_kernels.layers.glu import glu, glu_packed
from fastalign_kernels.layers.lora import lora_linear
from fastalign_kernels.layers.rms_norm import add_rms_norm, rms_norm
from fastalign_kernels.layers.rope import rope

__all__ = ["add_rms_norm", "embedding", "glu", "glu_packed", "lora_linear", "rms_norm", "rope"]
