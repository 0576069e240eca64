"""What enters a request's keys, and what its sender and the configuration may ask for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmkv.adapters.vllm.settings import read_settings
from lmkv.adapters.vllm.texts import AdapterVersions, must_compute, namespace_of, refusal, text_of, wishes_of
from lmkv.chunks import Namespace
from lmkv.errors import ConfigError
from lmkv.layout import KVLayout

BASE = Namespace.of(KVLayout.dense(layers=1, heads=1, head_size=8, dtype="float32"), model="m")


def request(**more: Any) -> Any:
    """A vLLM request, as far as texts read it."""
    given: dict[str, Any] = {
        "all_token_ids": list(range(20)),
        "prompt_token_ids": list(range(20)),
        "prompt_embeds": None,
        "pooling_params": None,
        "sampling_params": SimpleNamespace(prompt_logprobs=None),
        "mm_features": [],
        "cache_salt": None,
        "lora_request": None,
        "kv_transfer_params": None,
    }
    return SimpleNamespace(**(given | more))


def image(identifier: str, offset: int, length: int) -> Any:
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))


def root(asked: Any, adapters: AdapterVersions | None = None) -> bytes:
    return namespace_of(BASE, asked, wishes_of(asked.kv_transfer_params), adapters or AdapterVersions()).root


def test_inputs_stand_in_the_text_where_they_belong() -> None:
    plain = text_of(request())
    cat, dog = (text_of(request(mm_features=[image(name, 5, 8)])) for name in ("cat", "dog"))
    assert np.array_equal(cat[:5], plain[:5])
    assert np.array_equal(cat[13:], plain[13:])
    assert not (cat[5:13] == plain[5:13]).any()
    assert not (cat[5:13] == dog[5:13]).any()
    assert np.array_equal(cat, text_of(request(mm_features=[image("cat", 5, 8)])))
    longer = text_of(request(mm_features=[image("cat", 5, 30)]))  # the prompt ends in it
    assert not (longer[5:13] == cat[5:13]).any()  # it was seen in another way
    assert len(longer) == 20


def test_inputs_in_one_place_are_both_seen() -> None:
    frames, sound, other = image("frames", 5, 8), image("sound", 5, 8), image("other sound", 5, 8)
    both, last, alone = ([frames, sound], [frames, other], [frames])
    found = [text_of(request(mm_features=features)) for features in (both, last, alone, [sound, frames])]
    found += [text_of(request(mm_features=[image(name, 3, 8), frames])) for name in ("before", "before it")]
    assert len({one[5:13].tobytes() for one in found}) == len(found)
    assert all(np.array_equal(one[13:], found[0][13:]) for one in found)


def test_inputs_of_few_tokens_are_named_beside_the_text() -> None:
    assert root(request(mm_features=[image("cat", 5, 8)])) == root(request())
    short = [root(request(mm_features=[image(name, 5, 1)])) for name in ("cat", "dog")]
    assert len({*short, root(request())}) == 3


def test_salts_tags_and_adapters_separate(tmp_path: Path) -> None:
    weights = tmp_path / "adapter.safetensors"
    weights.write_bytes(b"1")
    lora = SimpleNamespace(lora_name="a", lora_int_id=1, lora_path=str(tmp_path), load_inplace=False)
    asked = [
        request(),
        request(cache_salt="x"),
        request(kv_transfer_params={"lmkv.salt": "x", "lmkv.tag.u": 1}),
        request(cache_salt="x", kv_transfer_params={"lmkv.salt": "y"}),
        request(cache_salt="xy"),
        request(kv_transfer_params={"lmkv.tag.u": 1}),
        request(kv_transfer_params={"lmkv.tag.u": 2}),
        request(kv_transfer_params={"lmkv.tag.u": 1, "lmkv.tag.v": 2}),
        request(kv_transfer_params={"lmkv.tag.u": "1;tag:v=2"}),  # a value is no second tag
        request(kv_transfer_params={"lmkv.tag.u=1;tag:v": "2"}),
        request(kv_transfer_params={"lmkv.tag.u": "1;input:cat@5+1"}),
        request(kv_transfer_params={"lmkv.tag.u": 1}, mm_features=[image("cat", 5, 1)]),
        request(lora_request=lora),
    ]
    assert len({root(one) for one in asked}) == len(asked)
    same = request(kv_transfer_params={"lmcache.tag.u": "1", "disagg_spec": {}, "other": 1})
    assert root(same) == root(asked[5])
    # one process keeps the version that vLLM loaded; another one, or a new load, sees the files as they are
    known = AdapterVersions()
    before = root(request(lora_request=lora), known)
    weights.write_bytes(b"22")
    assert root(request(lora_request=lora), known) == before
    assert root(request(lora_request=lora)) != before
    lora.load_inplace = True
    assert root(request(lora_request=lora), known) != before


def test_priorities() -> None:
    assert wishes_of({"lmkv.priority": "7"}).priority == wishes_of({"lmcache.priority": 7}).priority == 7
    assert wishes_of({"lmkv.salt": "x"}).priority == 0
    for wrong in (-1, 256, "high", None, True):
        wishes = wishes_of({"lmkv.priority": wrong})
        assert (wishes.priority, wishes.unknown) == (0, ("lmkv.priority",))


def test_what_can_not_be_reused_is_named() -> None:
    assert refusal(request()) == ""
    assert "pooling" in refusal(request(pooling_params=object()))
    assert "embeddings" in refusal(request(prompt_embeds=object()))
    assert "embeddings" in refusal(request(prompt_token_ids=None))
    assert "streamed" in refusal(request(resumable=True))
    assert not must_compute(request())
    assert must_compute(request(sampling_params=SimpleNamespace(prompt_logprobs=0)))
    assert must_compute(request(skip_reading_prefix_cache=True))


def test_wishes() -> None:
    found = wishes_of({"lmkv.skip_save": True, "lmcache.skip_load": "yes", "lmkv.skip_sve": 1})
    assert (found.skip_save, found.skip_load, found.unknown) == (True, True, ("lmkv.skip_sve",))
    assert wishes_of(None) == wishes_of({})


def test_settings_of_both_projects(tmp_path: Path) -> None:
    plain = read_settings({}, {})
    assert (plain.store.ram_capacity, plain.store.disk_capacity) == (5 * 1024**3, 0)
    file = tmp_path / "lmcache.yaml"
    file.write_text("chunk_size: 8\nlocal_cpu: true\nmax_local_cpu_size: 2\n")
    found = read_settings({"lmkv.chunk_size": 16}, {"LMCACHE_CONFIG_FILE": str(file), "LMCACHE_USE_EXPERIMENTAL": "True"})
    assert (found.store.chunk_size, found.store.ram_capacity, found.store.disk_capacity) == (16, 2 * 1024**3, 0)
    disk = read_settings({}, {"LMCACHE_LOCAL_DISK": f"file://{tmp_path}/kv/", "LMCACHE_MAX_LOCAL_DISK_SIZE": "50"})
    assert (disk.store.disk_path, disk.store.disk_capacity) == (f"{tmp_path}/kv/", 50 * 1024**3)
    assert read_settings({"lmkv.disk_path": str(tmp_path)}, {}).store.disk_capacity > 0
    assert read_settings({"lmcache.use_layerwise": True}, {}).layerwise
    assert read_settings({}, {"LMCACHE_USE_LAYERWISE": "true"}).layerwise
    assert read_settings({"lmcache.min_retrieve_tokens": 0}, {}) == plain
    assert read_settings({"discard_partial_chunks": False, "lmcache_rpc_port": "producer1"}, {}) == plain


def test_the_connectors_own_settings_may_stand_anywhere(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "lmkv.yaml", tmp_path / "lmcache.yaml"
    ours.write_text("layerwise: true\nload: async\nmin_load_tokens: 3\nlog_requests: false\npin: start\nchunk_size: 8\n")
    theirs.write_text("use_layerwise: true\nsave_decode_cache: true\nmin_retrieve_tokens: 9\nlayerwise:\n")
    found = read_settings({"lmkv.load": "sync"}, {"LMKV_CONFIG_FILE": str(ours), "LMKV_MIN_LOAD_TOKENS": "5", "LMKV_PIN": ""})
    assert (found.layerwise, found.load, found.min_load_tokens, found.log_requests) == (True, "sync", 5, False)
    assert (found.pin, found.store.chunk_size, found.warnings) == ("start", 8, ())
    lmcache = {"LMCACHE_CONFIG_FILE": str(theirs)}
    found = read_settings({}, lmcache)
    assert (found.layerwise, found.save_decode_cache, found.min_load_tokens, found.warnings) == (True, True, 9, ())
    found = read_settings({}, {**lmcache, "LMCACHE_USE_LAYERWISE": "false", "LMCACHE_MIN_RETRIEVE_TOKENS": "7"})
    assert (found.layerwise, found.min_load_tokens, found.warnings) == (False, 7, ())
    assert read_settings({"use_layerwise": False, "layerwise": True}, {}).layerwise
    with pytest.raises(ConfigError, match=r"LMKV_\*: layerwise: expected true or false"):
        read_settings({}, {"LMKV_LAYERWISE": "perhaps"})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"lmkv.chunk_sise": 8}, "chunk_size"),
        ({"lmkv.lod": "sync"}, "kv_connector_extra_config: unknown key 'lod'; did you mean 'load'"),
        ({"lmkv.log_request": False}, "did you mean 'log_requests'"),
        ({"lmkv.quite_another": 1}, "help"),
        ({"lmkv.load": "later"}, "sync"),
        ({"lmkv.min_load_tokens": 0}, "at least 1"),
        ({"lmkv.layerwise": "perhaps"}, "true or false"),
        ({"lmkv.chunk_size": 8, "lmcache.chunk_size": 9}, "one value"),
    ],
)
def test_wrong_settings_are_errors(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(extra, {})
