"""Tiny models with random weights, saved as vLLM reads them, whose outputs react to the KV of every position.

Attention of randomly initialised models is nearly uniform and its output small beside the residual stream, so a test that
compares tokens would pass with wrong KV. Here queries, keys and values are scaled up; a test proves that a change at any
position is seen.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config

VOCABULARY = 512
#: Shapes that all models share: small, with grouped-query attention.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def config_of(kind: str) -> PretrainedConfig:
    """The configuration of ``llama``, ``qwen3``, ``window`` (of 64 tokens in all layers) or ``hybrid`` (in every other one)."""
    if kind == "llama":
        return LlamaConfig(**_COMMON)
    if kind == "qwen3":
        return Qwen3Config(**_COMMON)
    if kind == "window":
        return MistralConfig(**_COMMON, sliding_window=64)
    if kind == "hybrid":
        layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        return Gemma3TextConfig(**{**_COMMON, "num_hidden_layers": 4}, sliding_window=64, layer_types=layers)
    raise ValueError(f"expected llama, qwen3, window or hybrid; got {kind!r}")


def save_adapter(folder: Path, seed: int, rank: int = 4) -> Path:
    """Write a LoRA adapter of the attention of ``llama``, as PEFT does; returns its folder."""
    generator = torch.Generator().manual_seed(seed)
    all_heads, kv_heads = _COMMON["num_attention_heads"], _COMMON["num_key_value_heads"]
    heads = {"q_proj": all_heads, "k_proj": kv_heads, "v_proj": kv_heads}
    weights = {}
    for layer in range(_COMMON["num_hidden_layers"]):
        for name, count in heads.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(rank, _COMMON["hidden_size"], generator=generator) * 0.1
            weights[f"{place}.lora_B.weight"] = torch.randn(count * _COMMON["head_dim"], rank, generator=generator)
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(heads), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def save_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a model of that kind; returns its folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                continue
            if any(part in name for part in ("q_proj", "k_proj")):
                weight.normal_(0, 1.2 / weight.shape[1] ** 0.5)
            elif any(part in name for part in ("v_proj", "o_proj")):
                weight.normal_(0, 2.0 / weight.shape[1] ** 0.5)
            else:
                weight.normal_(0, 1.0 / weight.shape[1] ** 0.5)
    target = folder / kind
    model.save_pretrained(target)
    return target
