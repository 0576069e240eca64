"""Keys by the letter of the format, sharing no code with lmkv: what the test vectors were made with.

``python tests/support/reference_keys.py`` prints the vectors; they are fixed in ``tests/fixtures/key_vectors.json``.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import xxhash

_MIXED = "27x1x1x576:bfloat16;1x2x8x128:float8_e4m3fn"
_RANK = {"model": "m", "shard": "tp1/8"}

#: name, layout text, settings, tokens a chunk, tokens (a list, or first and last of a run)
CASES: list[tuple[str, str, dict[str, str], int, list[int] | dict[str, int]]] = [
    ("plain", "1x2x1x4:float32", {"model": "m"}, 4, [0, 1, 2, 3, 4, 5, 6, 7]),
    ("plain, xxh3", "1x2x1x4:float32", {"model": "m", "key_hash": "xxh3"}, 4, [0, 1, 2, 3, 4, 5, 6, 7]),
    ("short last chunk, extreme ids", "1x2x1x4:float32", {"model": "m"}, 4, [4294967295, 0, 65536, 256, 1, 4294967295]),
    ("no settings, one token", "2x2x3x8:bfloat16", {}, 1, [7]),
    (
        "every setting",
        "30x2x3x64:float16",
        {
            "model": "org/model",
            "revision": "9f3c",
            "rope": "yarn factor=4",
            "lora": "adapter@2",
            "shard": "tp0/2",
            "salt": "tenant-7 \u00e9\u4e2d\U0001f511",
            "extra": "image:00ff",
        },
        16,
        {"first": 100, "last": 139},
    ),
    ("several groups, MLA", _MIXED, _RANK, 256, {"first": 0, "last": 599}),
    ("several groups, MLA, xxh3", _MIXED, _RANK | {"key_hash": "xxh3"}, 256, {"first": 0, "last": 599}),
]

_FIELDS = ("model", "revision", "rope", "lora", "shard", "salt", "extra", "key_hash")


def fingerprint(groups: str, chunk_tokens: int) -> bytes:
    """Of a layout."""
    return hashlib.sha256(f"lmkv-layout/1 tokens={chunk_tokens} groups={groups}".encode()).digest()[:16]


def root(purpose: bytes, layout: bytes, settings: dict[str, str]) -> bytes:
    """Of a namespace: ``purpose`` is ``prefix`` or ``content``."""
    text = b"lmkv-namespace/1\0" + purpose
    values = {"layout": layout} | {name: settings.get(name, "").encode("utf-8") for name in _FIELDS}
    if not values["key_hash"]:
        values["key_hash"] = b"sha256"
    for name, value in values.items():
        text += struct.pack("<I", len(name)) + name.encode("ascii") + struct.pack("<I", len(value)) + value
    return hashlib.sha256(text).digest()[:16]


def expand(tokens: list[int] | dict[str, int]) -> list[int]:
    """The token ids of a case."""
    return list(range(tokens["first"], tokens["last"] + 1)) if isinstance(tokens, dict) else tokens


def vector(name: str, groups: str, settings: dict[str, str], chunk_tokens: int, tokens: Any) -> dict[str, Any]:
    """A test vector, as it stands in the file."""
    layout = fingerprint(groups, chunk_tokens)
    ids = expand(tokens)
    pieces = [
        struct.pack(f"<{len(ids[i : i + chunk_tokens])}I", *ids[i : i + chunk_tokens]) for i in range(0, len(ids), chunk_tokens)
    ]

    def h(data: bytes) -> bytes:
        whole = xxhash.xxh3_128(data).digest() if settings.get("key_hash") == "xxh3" else hashlib.sha256(data).digest()
        return whole[:16]

    prefix_root, content_root = root(b"prefix", layout, settings), root(b"content", layout, settings)
    chain = [prefix_root]
    for piece in pieces:
        chain.append(h(chain[-1] + piece))
    return {
        "name": name,
        "groups": groups,
        "chunk_tokens": chunk_tokens,
        "settings": settings,
        "tokens": tokens,
        "layout": layout.hex(),
        "root": prefix_root.hex(),
        "content_root": content_root.hex(),
        "prefix_keys": [key.hex() for key in chain[1:]],
        "content_keys": [h(content_root + piece).hex() for piece in pieces],
    }


if __name__ == "__main__":
    print(json.dumps([vector(*case) for case in CASES], indent=2))
