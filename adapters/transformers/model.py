"""What a model's KV is: whether it can be kept at all, its layout, and everything that its bytes depend on."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ...errors import ConfigError
from ...layout import KVLayout, dtype_name

__all__ = [
    "accepts",
    "active_adapters",
    "kv_fingerprint",
    "layout_from",
    "layout_of",
    "namespace_settings",
    "probe",
    "refuse_unservable",
    "rope_text",
]

#: Fields of a config that change no KV, or that the weights' fingerprint or the layout covers.
_NOISE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

#: Elements of each weight that enter the fingerprint.
_SAMPLE = 64


def layout_of(model: PreTrainedModel, chunk_tokens: int = 256) -> KVLayout:
    """The layout of a model's KV, found by running one token through it.

    Args:
        model: a causal language model, in evaluation mode.
        chunk_tokens: tokens a chunk.

    Raises:
        ConfigError: the model's KV can't be kept; the message says why.
    """
    return layout_from(probe(model), chunk_tokens)


def layout_from(keys: Sequence[torch.Tensor], chunk_tokens: int) -> KVLayout:
    """The layout of layers whose keys :func:`probe` found."""
    _, heads, _, head_size = keys[0].shape
    return KVLayout.dense(
        layers=len(keys), heads=heads, head_size=head_size, dtype=dtype_name(keys[0].dtype), chunk_tokens=chunk_tokens
    )


def namespace_settings(model: PreTrainedModel) -> dict[str, str]:
    """What a :class:`lmkv.StoreConfig` says about a model: ``model``, ``revision`` and ``rope``.

    ``model`` is empty for a model made on the spot, which has no name.
    """
    return {
        "model": model.config.name_or_path or "",
        "revision": getattr(model.config, "_commit_hash", None) or "",
        "rope": rope_text(model),
    }


def rope_text(model: PreTrainedModel) -> str:
    """The RoPE parameters as JSON with sorted keys; empty where the model has none."""
    parameters = getattr(_decoder_config(model), "rope_parameters", None)
    return json.dumps(parameters, sort_keys=True, default=str) if parameters else ""


def refuse_unservable(model: PreTrainedModel) -> None:
    """Raise where a text's KV is not what this package keeps: one K and V a token and layer that depend on the text before.

    Raises:
        ConfigError: with the reason.
    """
    name = type(model).__name__
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config") or not hasattr(model, "generate"):
        raise ConfigError(f"expected a causal language model of transformers; got {name}: load it with AutoModelForCausalLM")
    reason = _unservable(model)
    if reason:
        raise ConfigError(f"KV of {name} can't be kept: {reason}")
    if model.training:
        raise ConfigError(f"expected {name} in evaluation mode (dropout changes its KV); call model.eval() first")


def _unservable(model: PreTrainedModel) -> str | None:
    config = _decoder_config(model)
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model, whose KV depends on the encoder's input, too"
    if not model.can_generate():
        return "it has no language modelling head to generate with; load it with AutoModelForCausalLM"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention looks ahead (use_bidirectional_attention), so a prefix's KV depends on what follows"
    for rope in _rope_types(getattr(config, "rope_parameters", None)):
        if "dynamic" in rope or rope == "longrope":  # the types that transformers' dynamic_rope_update re-computes
            return f"its RoPE ({rope}) depends on the length of the whole text, so a prefix's KV does not serve longer texts"
    implementation = getattr(model.generation_config, "cache_implementation", None)
    if implementation not in (None, "dynamic", "hybrid"):  # transformers reads a default "hybrid" as dynamic
        return f"its generation_config asks for a {implementation!r} cache; set cache_implementation to None"
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        return "its weights are spread over processes (DTensor); this adapter serves models of one process"
    try:
        kinds = [type(layer) for layer in DynamicCache(config=model.config).layers]
    except (KeyError, AttributeError, TypeError) as error:  # layer types that only the model's own code knows
        return f"transformers makes no DynamicCache for it ({type(error).__name__}: {error})"
    for i, kind in enumerate(kinds):
        if kind is not DynamicLayer:
            return f"layer {i} keeps a {kind.__name__}, {_KINDS.get(kind.__name__, 'which is not one K and V a token')}"
    return None


_KINDS = {
    "DynamicSlidingWindowLayer": "a sliding window that forgets tokens",
    "LinearAttentionLayer": "one state for the whole text (linear attention)",
    "LinearAttentionAndFullAttentionLayer": "a state of the whole text beside its K and V (hybrid)",
    "LinearAttentionAndSlidingWindowAttentionLayer": "a state of the whole text beside a sliding window (hybrid)",
    "DummyLayer": "no KV of its own",
}


def probe(model: PreTrainedModel) -> list[torch.Tensor]:
    """Keys of each layer after two tokens: ``[2, heads, 2, head_size]`` of one shape and dtype, each on its layer's device.

    Raises:
        ConfigError: the model's KV can't be kept; the message says why.
    """
    refuse_unservable(model)
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([[0, 1], [0, 2]], device=model.get_input_embeddings().weight.device)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    name = type(model).__name__
    keys: list[torch.Tensor] = []
    for i, layer in enumerate(cache.layers):
        if not layer.is_initialized or layer.keys.ndim != 4 or layer.keys.shape[2] != 2:
            raise ConfigError(f"KV of {name} can't be kept: it does not fill layer {i} of a DynamicCache")
        first = keys[0] if keys else layer.keys
        for found, what in ((layer.keys, "K"), (layer.values, "V")):
            if (found.shape, found.dtype) != (first.shape, first.dtype):
                raise ConfigError(
                    f"KV of {name} can't be kept: expected all layers' K and V of one shape; {what} of layer {i} is "
                    f"{_describe(found)}, K of layer 0 {_describe(first)}"
                )
            if _first_tokens_differ(found):
                raise ConfigError(
                    f"KV of {name} can't be kept: its attention looks ahead (a token's KV depends on the next token)"
                )
        keys.append(layer.keys)
    if not keys:
        raise ConfigError(f"KV of {name} can't be kept: it fills no DynamicCache")
    return keys


def _describe(found: torch.Tensor) -> str:
    return f"{found.shape[1]}x{found.shape[-1]} {str(found.dtype).removeprefix('torch.')}"


def _first_tokens_differ(found: torch.Tensor) -> bool:
    """Whether the KV of the same first token differs between two rows with another second token, beyond rounding."""
    first = found[:, :, 0].float()
    rounding = max(1e-4, 8 * torch.finfo(found.dtype).eps) * float(first.abs().max())
    return bool((first[0] - first[1]).abs().max() > rounding)


def active_adapters(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the PEFT adapters in use, by transformers' own loader or by a ``PeftModel``."""
    if not getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
        return ()
    names = model.active_adapters  # a method in transformers, a property in peft
    return tuple(names() if callable(names) else names)


def kv_fingerprint(model: PreTrainedModel) -> str:
    """32 hexadecimal digits over everything in a model that its KV depends on.

    That is the config without what is mere naming, the active adapters, and of each weight its name, shape, dtype and 64
    evenly spaced elements: a few ms, and two models that only share a name never share a key. Weights that change later
    need a new :class:`KVReuse`.
    """
    h = hashlib.sha256(b"lmkv-transformers/1")
    h.update(json.dumps(_without_noise(model.config.to_dict()), sort_keys=True, default=str).encode())
    h.update(json.dumps(active_adapters(model)).encode())
    for name, weight in model.named_parameters():
        h.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        if not weight.is_meta:  # offloaded weights can't be looked at
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].contiguous().cpu()
            h.update(sample.view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:32]


def accepts(model: PreTrainedModel, argument: str) -> bool:
    """Whether ``model.forward`` names ``argument``."""
    return argument in inspect.signature(model.forward).parameters


def _without_noise(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    return {str(name): _without_noise(inner) for name, inner in value.items() if name not in _NOISE}


def _decoder_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _rope_types(parameters: object) -> Iterator[str]:
    """Every ``rope_type`` in a config's RoPE parameters, which may be nested by layer type."""
    if isinstance(parameters, Mapping):
        kind = parameters.get("rope_type")
        if isinstance(kind, str):
            yield kind
        for value in parameters.values():
            yield from _rope_types(value)
