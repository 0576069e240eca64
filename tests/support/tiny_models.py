"""Tiny random language models of several architectures, texts for them and settings of stores for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

import lmkv

VOCABULARY = 211
#: Small, so that short texts have several chunks and end inside one.
CHUNK = 16

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
#: name -> (config class, model class, settings beside the common ones)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2, "intermediate_size": 96}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 96}),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {"num_key_value_heads": 1, "sliding_window": None, "intermediate_size": 96},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"intermediate_size": 96}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}


def make_config(name: str, **settings: Any) -> Any:
    """The config of a tiny model."""
    config_class, _, own = MODELS[name]
    return getattr(transformers, config_class)(**{**COMMON, **own, **settings})


def make_model(name: str, dtype: str = "float32", seed: int = 0, **settings: Any) -> Any:
    """A random model in evaluation mode, with weights so large that its answers depend on all of the text."""
    torch.manual_seed(seed)
    model = getattr(transformers, MODELS[name][1])(make_config(name, **settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.3)
    return model.to(getattr(torch, dtype)).eval()


def make_text(length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [1, length] without the pad token."""
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def make_store_config(path: Path, **settings: Any) -> lmkv.StoreConfig:
    """A small store in ``path`` for a model named ``tiny``."""
    small = {"ram_capacity": "32MiB", "ram_extent": "1MiB", "disk_capacity": "64MiB", "chunk_size": CHUNK}
    return lmkv.StoreConfig.from_dict({"model": "tiny", "disk_path": str(path), **small, **settings})
