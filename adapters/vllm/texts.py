"""A request as a text: its tokens, what else its KV depends on, and what its sender asked for."""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...chunks import Namespace
from ...eviction.priority import PRIORITIES

__all__ = ["AdapterVersions", "Wishes", "keep_prompt", "must_compute", "namespace_of", "refusal", "text_of", "wishes_of"]

#: Inputs of fewer tokens than this are named in the namespace too: so few substituted ids could be met by chance.
_FEW_TOKENS = 4
_PREFIXES = ("lmkv.", "lmcache.")
_TRUE = ("true", "yes", "on", "1")


@dataclass(frozen=True)
class Wishes:
    """What a request's ``kv_transfer_params`` ask for.

    Args:
        skip_save, skip_load: leave the cache as it is; compute everything.
        priority: of what is kept; lower ones are evicted first.
        salt: separates this request's KV from that of other salts.
        tags: separate it, too; ``name=value`` sorted by name.
        unknown: keys of ours that mean nothing.
    """

    skip_save: bool = False
    skip_load: bool = False
    priority: int = 0
    salt: str = ""
    tags: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def wishes_of(params: Mapping[str, Any] | None) -> Wishes:
    """Read ``kv_transfer_params``: ``skip_save``, ``skip_load``, ``priority``, ``salt``, ``tag.<name>``, behind a prefix."""
    flags = {"skip_save": False, "skip_load": False}
    salt, priority, tags, unknown = "", 0, [], []
    for key, value in (params or {}).items():
        prefix = next((prefix for prefix in _PREFIXES if str(key).startswith(prefix)), None)
        if prefix is None:
            continue
        name = str(key).removeprefix(prefix)
        if name in flags:
            flags[name] = str(value).strip().lower() in _TRUE
        elif name == "priority" and str(value).isdecimal() and int(value) in PRIORITIES:
            priority = int(value)
        elif name == "salt":
            salt = str(value)
        elif name.startswith("tag."):
            tags.append(f"{_quoted(name.removeprefix('tag.'))}={_quoted(value)}")
        else:
            unknown.append(str(key))
    return Wishes(flags["skip_save"], flags["skip_load"], priority, salt, tuple(sorted(tags)), tuple(unknown))


def _quoted(value: object) -> str:
    """A sender's text as part of a list, which it can't add to."""
    return "".join(f"%{ord(sign):x}%" if sign in "%;=" else sign for sign in str(value))


def refusal(request: Any) -> str:
    """Why the KV of a vLLM request can be neither looked up nor kept; empty if it can."""
    if request.pooling_params is not None:
        return "pooling requests are not served: what they return depends on every token being computed"
    if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
        return "prompts given as embeddings have no tokens to look up"
    if getattr(request, "resumable", False):
        return "streamed inputs change their text while it is read"
    return ""


def must_compute(request: Any) -> bool:
    """Whether the request needs every prompt token computed, so that nothing may be loaded for it."""
    params = request.sampling_params
    return bool(getattr(request, "skip_reading_prefix_cache", False)) or (
        params is not None and params.prompt_logprobs is not None
    )


def keep_prompt(request: Any) -> None:
    """Make the array of a new request's prompt, for :func:`text_of`."""
    with contextlib.suppress(OverflowError, TypeError):  # no tokens: whoever schedules it says so
        request.lmkv_prompt = np.frombuffer(array("I", request.prompt_token_ids[:]), dtype=np.uint32)


def text_of(request: Any) -> npt.NDArray[np.uint32]:
    """All of a request's tokens so far, with the place-holders of images, audio, … replaced by ids made of their hashes."""
    kept = getattr(request, "lmkv_prompt", None)
    if kept is not None and len(kept) == request.num_tokens:
        tokens: npt.NDArray[np.uint32] = kept
    else:
        tokens = np.frombuffer(array("I", request.all_token_ids[:]), dtype=np.uint32)
    if request.mm_features:
        tokens = tokens.copy()
    reached = 0
    for feature in sorted(request.mm_features or (), key=lambda one: one.mm_position.offset):
        place = feature.mm_position
        stop = min(place.offset + place.length, len(tokens))
        if stop <= place.offset:
            continue
        name = f"{feature.identifier}:{place.length}".encode()
        if place.offset < reached:  # a video's frames and its sound have one place between them
            name += tokens[place.offset : reached].tobytes()
        reached = max(reached, stop)
        digest = hashlib.shake_128(name).digest(4 * place.length)
        tokens[place.offset : stop] = np.frombuffer(digest, "<u4")[: stop - place.offset]
    return tokens


def namespace_of(base: Namespace, request: Any, wishes: Wishes, adapters: AdapterVersions) -> Namespace:
    """The namespace of a request's keys: salts, adapter, tags, and inputs that its tokens can't name."""
    changes: dict[str, str] = {}
    salts = [salt for salt in (base.salt, getattr(request, "cache_salt", None) or "", wishes.salt) if salt]
    if len(salts) > 1 or (salts and salts[0] != base.salt):
        changes["salt"] = "\0".join(f"{len(salt)}:{salt}" for salt in salts)
    if request.lora_request is not None:
        changes["lora"] = adapters.name(request.lora_request)
    few = [
        f"{_quoted(feature.identifier)}@{feature.mm_position.offset}+{feature.mm_position.length}"
        for feature in request.mm_features or ()
        if feature.mm_position.length < _FEW_TOKENS
    ]
    if few or wishes.tags:
        changes["extra"] = (
            base.extra + "".join(f";tag:{tag}" for tag in wishes.tags) + "".join(f";input:{name}" for name in few)
        )
    return base.replace(**changes) if changes else base


class AdapterVersions:
    """Names of LoRA adapters with their versions, as they were when vLLM loaded them."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int, str], str] = {}

    def name(self, lora: Any) -> str:
        """The name of a ``LoRARequest``'s adapter: what it is called, where it lies, and sizes and times of its files."""
        key = (str(lora.lora_name), int(lora.lora_int_id), str(lora.lora_path))
        if key not in self._seen or getattr(lora, "load_inplace", False):
            self._seen[key] = f"{lora.lora_name}@{lora.lora_path}#{self._version(lora)}"
        return self._seen[key]

    @staticmethod
    def _version(lora: Any) -> str:
        path = Path(str(lora.lora_path))
        stamps = []
        if path.is_dir():
            for file in sorted(path.iterdir()):
                if file.suffix in (".safetensors", ".bin", ".json"):
                    stat = file.stat()
                    stamps.append(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}")
        return hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16] if stamps else f"id{lora.lora_int_id}"
