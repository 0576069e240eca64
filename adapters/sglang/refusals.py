"""What of SGLang's arguments makes reuse unsafe: each with its reason, none of them by version."""

from __future__ import annotations

from typing import Any

__all__ = ["refusal"]


def refusal(server_args: Any, params: Any) -> str:
    """Why a model is not served as it is started; empty if it is.

    Args:
        server_args: SGLang's arguments.
        params: SGLang's ``CacheInitParams``.
    """
    if getattr(params, "is_eagle", False) or getattr(server_args, "speculative_draft_model_path", None):
        return "expected no draft model; speculative decoding keeps KV beside the model's that is not served"
    if getattr(params, "mtp_draft_device_pools", ()) or getattr(params, "sidecar_draft_device_pools", ()):
        return "expected no draft model; its KV beside the model's is not served"
    for name, what in (("pp_size", "pipeline"), ("attn_cp_size", "context"), ("dcp_size", "decode context")):
        size = getattr(params, name, None) or getattr(server_args, name, None) or 1
        if int(size) > 1:
            return f"expected no {what} parallelism; got {name} = {size}, which is not served"
    if getattr(params, "sliding_window_size", None):
        return "expected full attention in all layers; a sliding window is not served"
    if getattr(server_args, "dllm_algorithm", None):
        return "expected a model whose KV depends on earlier tokens alone; a diffusion language model is not served"
    for name in ("enable_kv_cache_sharding", "enable_unified_memory", "enable_hisparse", "enable_double_sparsity"):
        if getattr(server_args, name, False):
            return f"expected one KV slot a token; {name} is not served"
    try:
        multimodal = _is_multimodal(server_args)
    except (ImportError, AttributeError) as error:
        return f"expected to see whether the model takes images; this SGLang does not say: {error}"
    if multimodal:
        return "expected a model for text; SGLang names an image by 30 bits of its hash, too few to tell all images apart"
    return ""


def _is_multimodal(server_args: Any) -> bool:
    """Whether the model takes more than text, as SGLang sees it."""
    if getattr(server_args, "enable_multimodal", None) is False:
        return False
    try:
        from sglang.srt.arg_groups.model_override_base import model_config_of
    except ImportError:
        return bool(server_args.get_model_config().is_multimodal)
    return bool(model_config_of(server_args).is_multimodal)
