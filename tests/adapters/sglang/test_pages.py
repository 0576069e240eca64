"""The page store on pools of the kinds that SGLang has, without SGLang."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmkv import StoreConfig
from lmkv.adapters.sglang.identity import Rank, identified
from lmkv.adapters.sglang.pages import PageStore, renew_all
from lmkv.adapters.sglang.pools import KVPool, device_pool
from lmkv.errors import ArgumentError, LayoutMismatchError

torch.set_num_threads(1)
SLOTS, LAYERS, HEADS, SIZE = 400, 3, 2, 16


class MHATokenToKVPool(SimpleNamespace):
    """A pool as SGLang has it for most models."""


class MLATokenToKVPool(SimpleNamespace):
    """A pool of latents."""


class MHATokenToKVPoolFP4(MHATokenToKVPool):
    """A pool that needs more than its tensors to be read."""


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 255, (*shape[:-1], shape[-1] * size), generator=made, dtype=torch.uint8).view(dtype)


def mha(dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> MHATokenToKVPool:
    store = torch.uint8 if dtype.itemsize == 1 else dtype
    k = [numbers((SLOTS, HEADS, SIZE), store, seed + i) for i in range(LAYERS)]
    v = [numbers((SLOTS, HEADS, SIZE), store, seed + 50 + i) for i in range(LAYERS)]
    return MHATokenToKVPool(k_buffer=k, v_buffer=v, dtype=dtype, layer_num=LAYERS, kv_cache_layout="nhd", **more)


def mla(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> MLATokenToKVPool:
    kv = [numbers((SLOTS, 1, 72), dtype, seed + i) for i in range(LAYERS)]
    return MLATokenToKVPool(kv_buffer=kv, dtype=dtype, layer_num=LAYERS)


def bits(pool: Any, slots: list[int]) -> list[bytes]:
    """What a pool holds in slots, tensor by tensor, token by token."""
    tensors = pool.kv_buffer if hasattr(pool, "kv_buffer") else [*pool.k_buffer, *pool.v_buffer]
    return [tensor[slot].contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors for slot in slots]


def config(**more: Any) -> StoreConfig:
    return StoreConfig(**{"ram_capacity": 8 << 20, "disk_capacity": 0, "chunk_size": 32, "model": "m", **more})


@pytest.fixture
def opened() -> Iterator[Callable[..., PageStore]]:
    stores: list[PageStore] = []

    def open_one(pool: Any, extra: str = "e", **more: Any) -> PageStore:
        page_tokens = more.pop("page_tokens", None)
        stores.append(PageStore(config(**more), extra, device_pool(pool), page_tokens=page_tokens))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


def shuffled(n: int, seed: int, page: int = 1) -> list[int]:
    """``n`` slots in whole pages that lie anywhere."""
    pages = torch.randperm(SLOTS // page, generator=torch.Generator().manual_seed(seed))[: -(-n // page)]
    return [int(p) * page + i for p in pages for i in range(page)][:n]


KINDS = [
    lambda: mha(),
    lambda: mha(torch.bfloat16),
    lambda: mha(torch.float8_e4m3fn),
    lambda: mla(),
    lambda: mla(torch.float16),
]


@pytest.mark.parametrize("made", KINDS)
@pytest.mark.parametrize("page", [1, 16])
def test_what_was_kept_comes_back_into_other_slots(
    made: Callable[[], Any], page: int, opened: Callable[..., PageStore]
) -> None:
    pool = made()
    store = opened(pool)
    tokens = list(range(1000, 1112))
    here, there = shuffled(112, 1, page), shuffled(112, 2, page)
    kept = bits(pool, here)
    assert store.save(store.text(tokens), here).finish()
    for tensor in getattr(pool, "kv_buffer", None) or [*pool.k_buffer, *pool.v_buffer]:
        tensor.view(torch.uint8).fill_(7)
    match = store.find(store.text([*tokens, 5, 6]))
    assert store.tokens(match) == 112
    load = store.load(store.lease(match), there[40:], first=40)
    assert load.finish()
    assert load.tokens == 72
    n = 112
    assert bits(pool, there[40:]) == [part for at in range(0, len(kept), n) for part in kept[at + 40 : at + n]]
    untouched = [slot for slot in shuffled(SLOTS, 3) if slot not in there[40:]]
    assert all(part == b"\7" * len(part) for part in bits(pool, untouched))


@pytest.mark.parametrize("page", [1, 2, 8, 32])
@pytest.mark.parametrize("made", KINDS[:4])
def test_pages_named_by_hash(made: Callable[[], Any], page: int, opened: Callable[..., PageStore]) -> None:
    pool = made()
    store = opened(pool, page_tokens=page)
    here, there = shuffled(4 * page, 1, page), shuffled(4 * page, 9, page)
    hashes = [hashlib.sha256(bytes([i])).hexdigest() for i in range(4)]
    kept = [bits(pool, here[i * page : (i + 1) * page]) for i in range(4)]
    for i, name in enumerate(hashes):
        assert store.save(store.page(name), here[i * page : (i + 1) * page]).finish()
    for i in (3, 1, 0, 2):
        match = store.find(store.page(hashes[i]))
        assert store.tokens(match) == page
        assert store.load(store.lease(match), there[i * page : (i + 1) * page]).finish()
    assert [bits(pool, there[i * page : (i + 1) * page]) for i in range(4)] == kept


@pytest.mark.parametrize("page", [1, 4, 8, 32])
def test_hashes_that_share_their_first_words_are_other_pages(page: int, opened: Callable[..., PageStore]) -> None:
    store = opened(mha(), page_tokens=page)
    name = hashlib.sha256(b"x").hexdigest()
    assert store.save(store.page(name), shuffled(page, 1, page)).finish()
    for digits in (8, 32, 56, 62):
        other = name[:digits] + "".join("%x" % (15 - int(digit, 16)) for digit in name[digits:])
        assert store.tokens(store.find(store.page(other))) < page
    assert store.tokens(store.find(store.page(name))) == page


def test_tenants_adapters_ranks_and_models_never_share(opened: Callable[..., PageStore], tmp_path: Path) -> None:
    tokens = list(range(64))
    store = opened(mha(), shard="tp0/2", disk_capacity=64 << 20, disk_path=str(tmp_path))
    assert store.save(store.text(tokens, "lora-1", "tenant"), shuffled(64, 1)).finish()
    assert store.tokens(store.find(store.text(tokens, "lora-1", "tenant"))) == 64
    others = [
        (None, None),
        ("lora-1", None),
        (None, "tenant"),
        ("tenant", "lora-1"),
        ("lora-1", "Tenant"),
        ("lora-1tenant", ""),
    ]
    for extra_key, cache_salt in [*others, ("", "lora-1tenant")]:
        assert store.tokens(store.find(store.text(tokens, extra_key, cache_salt))) == 0
    assert store.flush(10)
    for changed in ({"shard": "tp1/2"}, {"shard": ""}, {"model": "n"}, {"extra": "f"}, {"salt": "s"}):
        other = opened(mha(), **{"shard": "tp0/2", "disk_capacity": 64 << 20, "disk_path": str(tmp_path), **changed})
        assert other.tokens(other.find(other.text(tokens, "lora-1", "tenant"))) == 0
    again = opened(mha(), shard="tp0/2", disk_capacity=64 << 20, disk_path=str(tmp_path))
    assert again.tokens(again.find(again.text(tokens, "lora-1", "tenant"))) == 64


def test_changed_weights_find_nothing_of_before(opened: Callable[..., PageStore]) -> None:
    store, other = opened(mha()), opened(mha(), page_tokens=8)
    name = hashlib.sha256(b"x").hexdigest()
    tokens = list(range(64))
    for _ in range(2):
        assert store.save(store.text(tokens), shuffled(64, 1)).finish()
        assert other.save(other.page(name), shuffled(8, 1, 8)).finish()
        assert store.tokens(store.find(store.text(tokens))) == 64
        renew_all()
        assert store.tokens(store.find(store.text(tokens))) == 0
        assert other.tokens(other.find(other.page(name))) == 0


def test_a_load_of_more_than_is_leased_copies_nothing(opened: Callable[..., PageStore]) -> None:
    pool = mha()
    store = opened(pool)
    text = store.text(list(range(64)))
    assert store.save(text, shuffled(64, 1)).finish()
    before = bits(pool, shuffled(SLOTS, 3))
    load = store.load(store.lease(store.find(text)), shuffled(65, 2))
    assert not load.finish()
    assert "leased" in load.error
    assert bits(pool, shuffled(SLOTS, 3)) == before
    assert store.stats().leases == 0


def test_a_load_whose_lease_ran_out_says_so(opened: Callable[..., PageStore]) -> None:
    store = opened(mha())
    text = store.text(list(range(64)))
    assert store.save(text, shuffled(64, 1)).finish()
    lease = store.lease(store.find(text))
    lease.release()
    load = store.load(lease, shuffled(64, 2))
    assert not load.finish()
    assert "ran out" in load.error


def test_slots_beyond_the_pool_are_refused(opened: Callable[..., PageStore]) -> None:
    pool = mha()
    store = opened(pool)
    text = store.text(list(range(64)))
    save = store.save(text, [SLOTS + i for i in range(64)])
    assert not save.finish()
    assert store.tokens(store.find(text)) == 0
    assert store.save(text, shuffled(64, 1)).finish()
    assert not store.load(store.lease(store.find(text)), [SLOTS + i for i in range(64)]).finish()
    with pytest.raises(ArgumentError):
        store.text([-1])
    assert store.stats().reservations == 0
    assert store.stats().leases == 0


@pytest.mark.parametrize(
    ("pool", "why"),
    [
        (MHATokenToKVPoolFP4(**vars(mha())), "MHATokenToKVPoolFP4"),
        (mha(k_scale_buffer=[1]), "scales"),
        (MHATokenToKVPool(**{**vars(mha()), "kv_cache_layout": "hnd"}), "arrangement"),
        (MHATokenToKVPool(**{**vars(mha()), "layer_num": 4}), "4 layers"),
        (MHATokenToKVPool(**{**vars(mha()), "v_buffer": [torch.zeros(SLOTS, HEADS, 8)] * LAYERS}), "one shape"),
        (MLATokenToKVPool(**vars(mla()), use_dsa=True), "indexer"),
        (SimpleNamespace(), "SimpleNamespace"),
    ],
)
def test_other_pools_are_refused_by_name(pool: Any, why: str) -> None:
    with pytest.raises(LayoutMismatchError, match=why):
        _ = device_pool(pool).groups


def test_host_pools_of_whole_pages(opened: Callable[..., PageStore]) -> None:
    page, pages = 8, 20
    host = numbers((2, pages, LAYERS, page, HEADS, SIZE), torch.float32, 3)
    pool = KVPool(tuple((host[0, :, layer], host[1, :, layer]) for layer in range(LAYERS)))
    store = PageStore(config(), "e", pool, page_tokens=page)
    name = hashlib.sha256(b"x").hexdigest()
    slots = torch.arange(3 * page, 4 * page)
    assert store.save(store.page(name), slots).finish()
    assert store.load(store.lease(store.find(store.page(name))), torch.arange(5 * page, 6 * page)).finish()
    assert torch.equal(host[:, 5].view(torch.int32), host[:, 3].view(torch.int32))
    crooked = store.save(store.page(hashlib.sha256(b"y").hexdigest()), torch.arange(3 * page + 1, 4 * page + 1))
    assert not crooked.finish()
    store.close()


def arguments(folder: Path, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"model_path": str(folder), "load_format": "auto", "dtype": "auto", **more})


def test_what_a_key_names(tmp_path: Path) -> None:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder in (model, adapter):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"a" * 100)
    base = arguments(model, lora_paths={"a": str(adapter)})
    seen = [identified(config(), base, Rank(), latent=False)]
    changes = ({"kv_cache_dtype": "fp8_e5m2"}, {"quantization": "fp8"}, {"json_model_override_args": "{'rope': 2}"})
    lora = {"a": str(adapter)}
    seen += [identified(config(), arguments(model, lora_paths=lora, **more), Rank(), latent=False) for more in changes]
    (adapter / "model.safetensors").write_bytes(b"b" * 100)
    seen.append(identified(config(), base, Rank(), latent=False))
    (model / "model.safetensors").write_bytes(b"b" * 100)
    seen.append(identified(config(), base, Rank(), latent=False))
    seen.append(identified(config(), base, Rank(1, 2, 2), latent=False))
    assert len({(made.shard, made.model, extra) for made, extra in seen}) == len(seen)
    assert seen[-1][0].ram_capacity == config().ram_capacity // 2
    assert identified(config(), base, Rank(1, 2, 2), latent=True)[0].shard == ""


def test_a_model_of_a_hub_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen = set()
    for commit in ("a" * 40, "b" * 40):
        file = str(tmp_path / "snapshots" / commit / "config.json")
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, file=file, **__: file)
        made, extra = identified(
            config(model=""), SimpleNamespace(model_path="org/model", load_format="auto"), Rank(), latent=False
        )
        assert made.model == "org/model"
        seen.add(extra)
    assert len(seen) == 2
    monkeypatch.undo()
    identified(config(), SimpleNamespace(model_path="no such/name/at all", load_format="auto"), Rank(), latent=False)
