"""What can't be served is refused, and the message names the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import CHUNK, COMMON, VOCABULARY, make_model, make_store_config, make_text  # noqa: E402

import lmkv  # noqa: E402
from lmkv.adapters.transformers import KVReuse, layout_of  # noqa: E402 (what it needs is skipped first)

Opened = Callable[..., KVReuse]
TINY = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
ROPE = {"rope_theta": 10000.0}
LONGROPE = {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}

UNSERVABLE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "sliding window": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 64}, "sliding window"),
    "some sliding layers": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 16}, "layer 0 .* sliding window"),
    "other sliding layers": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 16}, "sliding window"),
    "encoder-decoder": ("T5Config", "T5ForConditionalGeneration", {"d_model": 64, "d_kv": 16, "d_ff": 96}, "encoder-decoder"),
    "linear attention": ("MambaConfig", "MambaForCausalLM", {}, "linear attention"),
    "hybrid": ("FalconH1Config", "FalconH1ForCausalLM", {}, "hybrid"),
    "bidirectional": ("BertConfig", "BertLMHeadModel", {}, "looks ahead"),
    "encoder": ("BertConfig", "BertModel", {}, "expected a causal language model"),
    "no head": ("LlamaConfig", "LlamaModel", {}, "expected a causal language model"),
    "dynamic RoPE": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}},
        r"RoPE \(dynamic\)",
    ),
    "longrope": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {"rope_parameters": {**LONGROPE, "factor": 4.0, "original_max_position_embeddings": 128}},
        r"RoPE \(longrope\)",
    ),
    "latent KV": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
        | {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
        | {"num_key_value_heads": 4},
        "K and V of one shape",
    ),
    "own cache": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", {"n_embd": 64}, "does not fill layer 0"),
}


@pytest.mark.parametrize("case", UNSERVABLE)
def test_models_that_can_not_be_served(case: str, tmp_path: Path) -> None:
    config_class, model_class, own, reason = UNSERVABLE[case]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**TINY, **own})).eval()
    with pytest.raises(lmkv.ConfigError, match=reason):
        layout_of(model)
    with pytest.raises(lmkv.ConfigError, match=reason):
        KVReuse.open(model, make_store_config(tmp_path))
    assert not list(tmp_path.iterdir())  # nothing was opened


def test_a_static_cache_by_default_is_refused() -> None:
    model = make_model("llama")
    model.generation_config.cache_implementation = "static"
    with pytest.raises(lmkv.ConfigError, match=r"'static' cache; set cache_implementation to None"):
        layout_of(model)


def test_training_mode_is_refused_at_once_and_later(opened: Opened) -> None:
    model = make_model("llama")
    reuse = opened(model)
    model.train()
    for call in (layout_of, opened):
        with pytest.raises(lmkv.ConfigError, match=r"call model\.eval\(\)"):
            call(model)
    with pytest.raises(lmkv.ConfigError, match=r"call model\.eval\(\)"):
        reuse.prefill(make_text(5))


# Stores


@pytest.mark.parametrize(
    "other",
    [
        {"layers": 2, "heads": 2, "head_size": 16, "dtype": "float32"},
        {"layers": 3, "heads": 4, "head_size": 16, "dtype": "float32"},
        {"layers": 3, "heads": 2, "head_size": 32, "dtype": "float32"},
        {"layers": 3, "heads": 2, "head_size": 16, "dtype": "bfloat16"},
    ],
)
def test_a_store_of_another_layout(other: dict[str, Any], tmp_path: Path) -> None:
    layout = lmkv.KVLayout.dense(**other, chunk_tokens=CHUNK)
    message = r"3x2x2x16:float32; got .*layout_of\(model\)"
    with lmkv.Store(make_store_config(tmp_path), layout) as store, pytest.raises(lmkv.LayoutMismatchError, match=message):
        KVReuse(make_model("llama"), store)


def test_a_store_for_no_model(tmp_path: Path) -> None:
    model = make_model("llama")
    config = make_store_config(tmp_path, model="")
    with lmkv.Store(config, layout_of(model, CHUNK)) as store, pytest.raises(lmkv.ConfigError, match="empty name"):
        KVReuse(model, store)
    with pytest.raises(lmkv.ConfigError, match="made on the spot"):
        KVReuse.open(model, config)


def test_a_namespace_of_another_model(opened: Opened, tmp_path: Path) -> None:
    reuse = opened(make_model("llama"))
    other = opened(make_model("llama", seed=1))
    for namespace in (other.namespace, reuse.store.namespace):
        with pytest.raises(lmkv.ArgumentError, match=r"reuse\.namespace\.replace"):
            reuse.prefill(make_text(5), namespace=namespace)


# Arguments

IDS = make_text(6)
WRONG_IDS: list[tuple[Any, str]] = [
    ([[1, 2, 3]], "got list: tokenize with return_tensors='pt'"),
    (IDS[0], r"got shape \(6,\)"),
    (IDS[None], r"got shape \(1, 1, 6\)"),
    (torch.empty((1, 0), dtype=torch.long), r"at least one token; got shape \(1, 0\)"),
    (torch.empty((0, 4), dtype=torch.long), r"at least one token; got shape \(0, 4\)"),
    (IDS.float(), "got dtype torch.float32"),
    (IDS.to("meta"), "expected input_ids on cpu, where the model is; got meta"),
    (torch.tensor([[4, VOCABULARY]]), f"from 0 to {VOCABULARY - 1}; got {VOCABULARY}"),
    (torch.tensor([[4, -1]]), "got -1"),
]
WRONG_MASKS: list[tuple[Any, str]] = [
    ([[1] * 6], "got list"),
    (torch.ones(1, 5), r"shape \(1, 6\); got \(1, 5\)"),
    (torch.tensor([[1, 1, 1, 1, 1, 0]]), "padding_side='left'"),
    (torch.tensor([[0, 0, 0, 0, 0, 0]]), "padding_side='left'"),
    (torch.tensor([[0, 1, 0, 1, 1, 1]]), "without holes"),
    (torch.tensor([[0, 2, 1, 1, 1, 1]]), "zeros and ones"),
]


@pytest.mark.parametrize("call", ["prefill", "generate"])
@pytest.mark.parametrize(("ids", "message"), WRONG_IDS)
def test_wrong_ids(call: str, ids: Any, message: str, opened: Opened) -> None:
    with pytest.raises(lmkv.ArgumentError, match=message):
        getattr(opened(make_model("llama")), call)(ids)


@pytest.mark.parametrize(("mask", "message"), WRONG_MASKS)
def test_wrong_masks(mask: Any, message: str, opened: Opened) -> None:
    with pytest.raises(lmkv.ArgumentError, match=message):
        opened(make_model("llama")).generate(IDS, mask)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"past_key_values": None}, "'past_key_values', which KVReuse.generate does not take"),
        ({"inputs_embeds": None}, "'inputs_embeds'"),
        ({"max_tokens": 5}, "'max_tokens'"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"use_cache": False}, "use_cache=True"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, "contrastive_search"),
        ({"token_healing": True}, "token_healing=False"),
        ({"num_beams": 2, "keep_generated": True}, "keep_generated=False with beams"),
    ],
)
def test_ways_to_generate_that_can_not_be_served(settings: dict[str, Any], message: str, opened: Opened) -> None:
    reuse = opened(make_model("llama"))
    with pytest.raises(lmkv.ArgumentError, match=message):
        reuse.generate(IDS, **settings)
    given = transformers.GenerationConfig(cache_implementation="static")
    with pytest.raises(lmkv.ArgumentError, match="cache_implementation='static'"):
        reuse.generate(IDS, generation_config=given)


def test_autocast_is_refused(opened: Opened) -> None:
    reuse = opened(make_model("llama"))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(lmkv.LayoutMismatchError, match="autocast"):
        reuse.prefill(IDS)


def test_adapters_have_to_be_named(opened: Opened) -> None:
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    before = opened(model)
    before.prefill(IDS)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.add_adapter(settings, adapter_name="first")
    model.eval()
    with pytest.raises(lmkv.ConfigError, match=r"got \['first'\]: make a KVReuse for each set of adapters"):
        before.prefill(IDS)
    with pytest.raises(lmkv.ConfigError, match=r"names the active adapters \['first'\]"):
        opened(model)
    reuse = opened(model, lora="first@1")
    assert reuse.prefill(IDS).hit_tokens == (0,)
    assert reuse.prefill(IDS).hit_tokens == (5,)
    with torch.no_grad():
        torch.testing.assert_close(reuse.prefill(IDS).logits, model(IDS).logits[:, -1], atol=1e-4, rtol=0)
