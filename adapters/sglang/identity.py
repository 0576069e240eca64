"""What a KV cache under SGLang depends on besides the tokens: model, numbers, this rank's part of it, adapters, tenant."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import StoreConfig
from ...errors import LayoutMismatchError
from ..engine_config import folder_fingerprint, hub_commit, plain

__all__ = ["Rank", "identified", "request_salt", "unique_mark"]

#: Fields of SGLang's arguments that change what KV is, whatever the weights' files are.
_NAMED = (
    *("load_format", "quantization", "kv_cache_dtype", "dtype", "json_model_override_args", "quantization_param_path"),
    *("model_impl", "rope_scaling", "torchao_config", "model_loader_extra_config", "enable_fp32_lm_head"),
)
_EMPTY = ("", "None", "auto", "{}")


@dataclass(frozen=True)
class Rank:
    """Which part of the model this process holds.

    Args:
        tp_rank, tp_size: within the group that splits attention heads.
        processes: of this engine on this machine; each has a store of its own and takes its share of the RAM.
    """

    tp_rank: int = 0
    tp_size: int = 1
    processes: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.tp_rank < self.tp_size:
            raise LayoutMismatchError(f"expected a rank from 0 to {self.tp_size - 1}; got {self.tp_rank}")

    def shard(self, *, latent: bool) -> str:
        """The namespace's ``shard``: ranks that hold the same latents (MLA) share it."""
        return "" if latent or self.tp_size == 1 else f"tp{self.tp_rank}/{self.tp_size}"


def identified(config: StoreConfig, server_args: Any, rank: Rank, *, latent: bool) -> tuple[StoreConfig, str]:
    """A store's config for this rank, and what else its KV depends on, as a namespace's ``extra``.

    Args:
        server_args: SGLang's arguments; fields that a version does not have count as unset.
    """
    named = {name: plain(getattr(server_args, name, None)) or str(getattr(server_args, name, None)) for name in _NAMED}
    model = str(server_args.model_path)
    named["weights"] = folder_fingerprint(model) or hub_commit(model, getattr(server_args, "revision", None))
    if "dummy" in named["load_format"]:
        named["seed"] = str(getattr(server_args, "random_seed", None))
    named["lora"] = _adapters(getattr(server_args, "lora_paths", None))
    changed = dataclasses.replace(
        config,
        model=config.model or (Path(model).name if Path(model).is_dir() else model),
        revision=config.revision or str(getattr(server_args, "revision", None) or ""),
        shard=config.shard or rank.shard(latent=latent),
        ram_capacity=max(1, config.ram_capacity // rank.processes),
    )
    said = ";".join(f"{name}={value}" for name, value in sorted(named.items()) if value.strip("'\"") not in _EMPTY)
    return changed, f"sglang:{said}"


def _adapters(lora_paths: Any) -> str:
    """LoRA adapters given at the start, with what is in their files: SGLang names them by name and path alone, so that an
    adapter trained anew in its old place would pass for the old one."""
    if not lora_paths:
        return ""
    found: list[str] = []
    entries = lora_paths.items() if isinstance(lora_paths, Mapping) else enumerate(lora_paths)
    for name, entry in entries:
        if isinstance(entry, Mapping):
            path = entry.get("lora_path") or entry.get("path") or ""
        else:
            path = getattr(entry, "lora_path", None) or str(entry).partition("=")[2] or str(entry)
        found.append(f"{name}:{path}:{folder_fingerprint(str(path))}")
    return "|".join(found)


def request_salt(salt: str, extra_key: str | None, cache_salt: str | None) -> str:
    """The namespace's ``salt`` of a request: the store's own, and what SGLang keeps prefixes apart by (a LoRA adapter's id is
    part of ``extra_key``). Requests without either have the store's own."""
    if extra_key is None and cache_salt is None:
        return salt
    return json.dumps([salt, extra_key, cache_salt])


def unique_mark() -> str:
    """A mark that no other process and no earlier moment has: for KV of weights that were changed while the engine ran."""
    return f"changed={uuid.uuid4().hex}"
