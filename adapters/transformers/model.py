"""What a model's KV is: whether it can be kept at all, its layout, and everything that its bytes depend on."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ...errors import ConfigError
from ...layout import KVLayout, dtype_name

__all__ = [
    "accepts",
    "active_adapters",
    "adapter_state",
    "cache_argument",
    "generate_cache_argument",
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

#: Bytes of a row as which a device sums a weight up.
_ROW = 32 * 1024

#: Names of adapters in use, of merged ones, and scales.
_AdapterState = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


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
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{cache_argument(model): cache})
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
    """Names of the PEFT adapters in use, by transformers' own loader or by a ``PeftModel``, that are not switched off."""
    names = dict.fromkeys(name for active, merged, _ in adapter_state(model) for name in (*active, *merged))
    return tuple(names)


def adapter_state(model: PreTrainedModel) -> tuple[_AdapterState, ...]:
    """How layers are tuned now, each way once: the names in use, those merged into the weights, and what they are scaled by."""
    found: dict[_AdapterState, None] = {}
    for module in model.modules():
        if not isinstance(getattr(type(module), "disable_adapters", None), property):
            continue  # no layer of PEFT's
        active = () if module.disable_adapters else tuple(module.active_adapters)
        scaling = getattr(module, "scaling", None)
        known = scaling if isinstance(scaling, Mapping) else {}
        found[active, tuple(getattr(module, "merged_adapters", ())), tuple(repr(known.get(name)) for name in active)] = None
    if not found and not hasattr(type(model), "disable_adapters") and hasattr(model, "peft_config"):
        found[tuple(model.active_adapters), (), ()] = None  # a PeftModel whose adapter is no layer, but a prompt
    return tuple(found)


def kv_fingerprint(model: PreTrainedModel) -> str:
    """32 hexadecimal digits over everything in a model that its KV depends on.

    That is the config without what is mere naming, the adapters in use, and each weight and buffer with its name, shape, dtype
    and all of its elements (about 0.3 s a GB in host memory): two models that only share a name never share a key. Weights that
    change later need a new :class:`KVReuse`.
    """
    h = hashlib.sha256(b"lmkv-transformers/2")
    h.update(json.dumps(_without_noise(model.config.to_dict()), sort_keys=True, default=str).encode())
    h.update(json.dumps(adapter_state(model)).encode())
    for kind, tensors in (("weight", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            h.update(f"{kind} {name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            if not tensor.is_meta:  # offloaded weights can't be looked at
                h.update(_digest(tensor))
    return h.hexdigest()[:32]


def _digest(tensor: torch.Tensor) -> bytes:
    """What all elements of a tensor come to, by their places. On a device it is made there."""
    if hasattr(tensor, "__tensor_flatten__"):  # packed weights, which consist of others
        names, rest = tensor.__tensor_flatten__()
        return b"".join(_digest(getattr(tensor, name)) for name in names) + repr(rest).encode()
    raw = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    if raw.device.type == "cpu":
        return xxhash.xxh3_128_digest(raw.numpy())
    rows = torch.nn.functional.pad(raw, (0, -raw.numel() % _ROW)).view(-1, _ROW).view(torch.int64)
    return b"".join(rows.sum(axis).cpu().numpy().tobytes() for axis in (0, 1))


def accepts(model: PreTrainedModel, argument: str) -> bool:
    """Whether ``model.forward`` names ``argument``."""
    return argument in inspect.signature(model.forward).parameters


def cache_argument(model: PreTrainedModel) -> str:
    """The name by which ``model.forward`` takes a cache: ``cache`` since transformers 5.24, ``past_key_values`` before."""
    for name in ("cache", "past_key_values"):  # a model with code of its own may keep the old name
        if accepts(model, name):
            return name
    return generate_cache_argument()  # a wrapper such as a PeftModel, which hands over whatever it gets


def generate_cache_argument() -> str:
    """The name by which ``model.generate``, which names neither, takes a cache: that of the step after it."""
    named = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in named else "past_key_values"


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
