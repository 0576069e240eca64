"""What LMCache left of an engine's KV serves the engine again, through ``lmkv adopt``; its hashes are vLLM's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import Engine, assert_same, text
from lmcache_values import write_chunks

import lmkv
from lmkv.adapters.lmcache.adopt_command import KnownNamespace, main
from lmkv.adapters.lmcache.old_keys import chains
from lmkv.backends.disk.survey import survey

SEEN, NEW = text(200, 1), text(300, 2)


def answers(model: Path, disk: Path, prompts: list[list[int]]) -> list[Any]:
    with Engine(model, connector={"lmkv.disk_path": str(disk), "lmkv.disk_capacity": "64MiB"}) as engine:
        return engine.one_by_one(prompts)


def kept(disk: Path, prompt: list[int]) -> Any:
    """The KV that an engine left of a prompt: [layers, kv, heads, tokens, head_size]."""
    from lmkv.cli.disk import open_disk

    found = survey(str(disk))
    (group,) = found.layout.groups
    backend = open_disk(str(disk))
    (root,) = {entry.root.hex() for entry in backend.entries(0)}
    backend.close()
    array = np.zeros((group.layers, group.kv, group.heads, len(prompt), group.head_size), group.dtype)
    config = lmkv.StoreConfig.from_dict({"disk_path": str(disk), "disk_capacity": found.capacity, "ram_capacity": "64MiB"})
    namespace = KnownNamespace(found.layout.fingerprint, known=root)
    with lmkv.Store(config, found.layout) as store, store.lease(store.lookup(prompt, namespace=namespace)) as lease:
        assert store.retrieve(lease, lmkv.DenseKV(array)) == len(prompt)
    return array


def test_an_engine_is_served_what_lmcache_left(
    models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, old = models("llama"), tmp_path / "lmcache"
    computed = answers(model, tmp_path / "before", [SEEN, NEW])
    old.mkdir()
    for prompt in (SEEN, NEW):
        write_chunks(old, prompt, [kept(tmp_path / "before", prompt)], "float")
    assert not answers(model, tmp_path / "now", [SEEN])[0].cached
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt_token_ids": prompt}) + "\n" for prompt in (SEEN, NEW)))
    args = [str(tmp_path / "now"), str(lines), "--model", "org/model", "--from", str(old), "--chunk-size", "16"]
    assert main(args, {}) == 0
    assert "differ by 0.0% at most" in capsys.readouterr().err
    (found,) = answers(model, tmp_path / "now", [NEW])
    assert found.cached == len(NEW) - 1
    assert_same([found], computed[1:])


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"])
@pytest.mark.parametrize("seed", ["", "0", "4294967295"])
def test_hashes_are_those_of_vllm(algorithm: str, seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils

    if seed:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    else:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    function = get_hash_fn_by_name(algorithm)
    for name in ("NONE_HASH", "_NONE_HASH_SEED"):  # what they are now comes back at the end
        monkeypatch.setattr(kv_cache_utils, name, getattr(kv_cache_utils, name, None), raising=False)
    kv_cache_utils.init_none_hash(function)
    first = kv_cache_utils.NONE_HASH
    pieces = [tuple(text(256, 3)), tuple(text(31, 4))]
    number, wanted = first, []
    for piece in pieces:
        number = function((number, piece, None))
        wanted.append(number)
    ways = [list(chain.numbers(pieces)) for chain in chains(algorithm, seed, ("vllm",))]
    assert (wanted in ways) == (bool(seed) or algorithm.startswith("sha256")), "without a seed xxhash begins at random"
