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
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

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


#: Of DeepSeek's: the only sizes that all kernels take. Its rotary embedding is YaRN's: vLLM's CPU kernel for the plain one goes
#: wrong where queries and keys are parts of longer rows.
_LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}


#: Of Phi-3's: factors for short texts and for long ones, of which vLLM takes one for all texts of an engine.
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [4.0 + i for i in range(16)],
    "original_max_position_embeddings": 512,
    "partial_rotary_factor": 1.0,
}


def config_of(kind: str, **changes: int) -> PretrainedConfig:
    """The configuration of a kind of model.

    ``llama``, ``qwen3``, ``window`` (of 64 tokens in all layers), ``hybrid`` (in every other one), ``mla`` (latents; no
    experts), ``mamba`` (state layers between attention's), ``longrope`` (other rotary factors in
    engines for more than 512 tokens).

    Args:
        changes: of the shape of the first two.
    """
    if kind == "llama":
        return LlamaConfig(**{**_COMMON, **changes})
    if kind == "qwen3":
        return Qwen3Config(**{**_COMMON, **changes})
    if kind == "window":
        return MistralConfig(**_COMMON, sliding_window=64)
    if kind == "hybrid":
        layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        return Gemma3TextConfig(**{**_COMMON, "num_hidden_layers": 4}, sliding_window=64, layer_types=layers)
    if kind == "mla":
        common = {name: value for name, value in _COMMON.items() if name != "head_dim"} | {"num_key_value_heads": 4}
        return DeepseekV3Config(**common, **_LATENT, first_k_dense_replace=3, n_routed_experts=4, n_group=1, topk_group=1)
    if kind == "longrope":
        return Phi3Config(**_COMMON, pad_token_id=0, original_max_position_embeddings=512, rope_parameters=_LONG_ROPE)
    if kind == "mamba":
        common = {name: value for name, value in _COMMON.items() if name not in ("head_dim", "num_hidden_layers")}
        return GraniteMoeHybridConfig(
            **{**common, "pad_token_id": 0, "num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2},
            num_local_experts=0,
            shared_intermediate_size=256,
            mamba_n_heads=8,
            mamba_d_head=32,
            mamba_expand=2,
            mamba_d_state=16,
            mamba_n_groups=1,
        )
    raise ValueError(f"expected llama, qwen3, window, hybrid, mla, mamba or longrope; got {kind!r}")


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


def save_model(kind: str, folder: Path, seed: int = 0, **changes: int) -> Path:
    """Write a model of that kind, or of ``images``; returns its folder. ``changes`` as for :func:`config_of`."""
    torch.manual_seed(seed)
    target = folder / kind
    if kind == "images":
        model = _with_images(target)
    else:
        model = AutoModelForCausalLM.from_config(config_of(kind, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or weight.ndim < 2 or "vision" in name or "mamba" in name:
                continue
            if any(part in name for part in ("q_proj", "k_proj")):
                weight.normal_(0, 1.2 / weight.shape[1] ** 0.5)
            elif any(part in name for part in ("v_proj", "o_proj")):
                weight.normal_(0, 2.0 / weight.shape[1] ** 0.5)
            else:
                weight.normal_(0, 1.0 / weight.shape[1] ** 0.5)
    model.save_pretrained(target)
    return target


#: Token that stands for an image in a prompt of ``images``.
IMAGE = 501


def _with_images(target: Path) -> PreTrainedModel:
    """A Llama that sees images of up to 112 by 112 as 16 tokens and three around them; writes its tokenizer and processor.

    Of the architectures whose code vLLM can load without torchvision, and with processors that need nothing but files.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    words = [*(f"w{i}" for i in range(IMAGE - 1)), *special, "<unk>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>", additional_special_tokens=special
    )
    largest = {"longest_edge": 112}
    images = Idefics3ImageProcessorPil(do_image_splitting=False, size=largest, max_image_size=largest)
    Idefics3Processor(images, tokenizer, image_seq_len=16).save_pretrained(target)
    seen = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112}
    pad = words.index("<unk>")
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config={**seen, "patch_size": 14},
            text_config=LlamaConfig(**_COMMON, pad_token_id=pad).to_dict(),
            image_token_id=IMAGE,
            scale_factor=2,
            tie_word_embeddings=False,
            pad_token_id=pad,
        )
    ).float()
