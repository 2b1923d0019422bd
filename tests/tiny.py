"""Tiny random models and a tokenizer that need no download: what the tests train and compare."""

from __future__ import annotations

import functools

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SIZES = {
    "vocab_size": 331,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {  # family -> (config class, model class, what differs from SIZES; None drops a key)
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"head_dim": None, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 7}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "sliding_window": 7,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"intermediate_size": None, "num_key_value_heads": None, "head_dim": None}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"num_key_value_heads": None, "head_dim": None}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"head_dim": None, "sliding_window": 9}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", {"head_dim": None}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"head_dim": None, "logit_scale": 0.25}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {"head_dim": None, "logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7},
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"intermediate_size": None, "num_attention_heads": None, "num_key_value_heads": None, "head_dim": None}
        | {"state_size": 4, "max_position_embeddings": None},
    ),
}


def tiny_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A random causal language model of `family` (about 30k parameters), in eval mode."""
    config_name, model_name, own = FAMILIES[family]
    settings = {k: v for k, v in (SIZES | own | overrides).items() if v is not None}
    config = getattr(transformers, config_name)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_name)(config)
        for (
            name,
            parameter,
        ) in model.named_parameters():  # biases, sinks and norms away from 0 and 1, so that they show
            if parameter.ndim == 1:
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "lm_head" in name or "embed" in name:
                with torch.no_grad():
                    parameter.mul_(4.0)
    return model.to(dtype).eval()


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "what is two plus two? it is four.",
    "user assistant system: hello there, how are you today?",
    "0 1 2 3 4 5 6 7 8 9 10 11 12",
]


@functools.cache
def tiny_tokenizer(vocab_size: int = 331):
    """A byte-level BPE tokenizer with ChatML template; <pad>=0, <s>=1, </s>=2, and the two ChatML marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
    fast.chat_template = CHATML
    return fast
