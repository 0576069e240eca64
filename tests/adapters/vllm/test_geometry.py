"""Tensors of all arrangements that vLLM makes: what is stored out of some blocks and loaded into others is the same KV."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, MLAAttentionSpec, SlidingWindowSpec

from lmkv.adapters.vllm.copies import Copier
from lmkv.adapters.vllm.geometry import ShardGeometry, shard_geometry
from lmkv.adapters.vllm.packing import packed_views, probe_packing
from lmkv.adapters.vllm.plans import CopyOrder
from lmkv.errors import LayoutMismatchError
from lmkv.layout import KVLayout
from lmkv.pool import HostPool
from lmkv.record import payload_offset

BLOCKS, TOKENS, HEADS, SIZE, CHUNK = 12, 16, 2, 8, 24


def full(**more: Any) -> FullAttentionSpec:
    return FullAttentionSpec(**{"block_size": TOKENS, "num_kv_heads": HEADS, "head_size": SIZE, "dtype": torch.float32, **more})


def config_of(*groups: tuple[Any, list[str]]) -> Any:
    """vLLM's ``KVCacheConfig``, as far as geometry reads it."""
    return SimpleNamespace(
        num_blocks=BLOCKS, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=names) for spec, names in groups]
    )


def random_tensor(*shape: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Random numbers of that shape, lying in memory in another order of axes."""
    order = order or tuple(range(len(shape)))
    stored = torch.randn([shape[i] for i in order])
    return stored.permute([order.index(i) for i in range(len(shape))])


ARRANGEMENTS = {
    "kv inside blocks": lambda: random_tensor(BLOCKS, 2, TOKENS, HEADS, SIZE),
    "kv inside blocks, heads first in memory": lambda: random_tensor(BLOCKS, 2, TOKENS, HEADS, SIZE, order=(0, 1, 3, 2, 4)),
    "kv outside": lambda: random_tensor(2, BLOCKS, TOKENS, HEADS, SIZE),
    "kv outside, blocks first in memory": lambda: random_tensor(2, BLOCKS, TOKENS, HEADS, SIZE, order=(1, 0, 3, 2, 4)),
    "blocks cut in two": lambda: random_tensor(2 * BLOCKS, 2, TOKENS // 2, HEADS, SIZE),
}


def copier_of(geometry: ShardGeometry, slots: int = 4) -> Copier:
    layout = KVLayout(geometry.groups, CHUNK)
    pool = HostPool(payload_offset(CHUNK) + layout.chunk_bytes, slots)
    pool.allocate(slots)
    return Copier(geometry, layout, 0, pool)


def there_and_back(geometry: ShardGeometry, tables: list[list[int]], others: list[list[int]]) -> None:
    """Store a text of 40 tokens out of ``tables``, wipe, load tokens 5 to 40 into ``others``."""
    copier = copier_of(geometry)
    parts = np.array([(0, 0, 24, 0, 24), (1, 24, 40, 24, 40)])
    before = [read(layer, tables[layer.group], 40) for layer in geometry.layers]
    assert copier.store(CopyOrder(1, "r", parts, tuple(np.array(ids, np.int32) for ids in tables), 0, load=False)).error == ""
    for layer in geometry.layers:
        for part in layer.parts:
            part.zero_()
    loaded = np.array([(0, 0, 24, 5, 24), (1, 24, 40, 24, 40)])
    assert copier.load(CopyOrder(2, "r", loaded, tuple(np.array(ids, np.int32) for ids in others), 0, load=True)).error == ""
    for layer, kept in zip(geometry.layers, before, strict=True):
        for there, was in zip(read(layer, others[layer.group], 40), kept, strict=True):
            assert torch.equal(there[:, 5:], was[:, 5:])
            assert not there[:, :5].any()


def read(layer: Any, table: list[int], tokens: int) -> list[torch.Tensor]:
    """K and V of a text, [heads, tokens, head_size], block by block."""
    found = []
    for part in layer.parts:
        plain = part.reshape(*part.shape[:2], -1, part.shape[-2] * part.shape[-1]) if part.ndim == 6 else part
        blocks = [plain[block * layer.pieces + piece] for block in table for piece in range(layer.pieces)]
        found.append(torch.cat(blocks, 1)[:, :tokens].clone())
    return found


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_arrangements_of_keys_and_values(name: str) -> None:
    tensors = {f"layer.{i}": ARRANGEMENTS[name]() for i in range(3)}
    geometry = shard_geometry(tensors, config_of((full(), list(tensors))), {})
    assert [layer.shape for layer in geometry.layers] == [(2, HEADS, SIZE, "float32")] * 3
    for layer in geometry.layers:
        assert {part.data_ptr() for part in layer.parts} & {tensors[layer.name].data_ptr()}, "a view, not a copy"
    there_and_back(geometry, [[3, 7, 1]], [[9, 2, 11]])


@pytest.mark.parametrize("shape", [(BLOCKS, TOKENS, 40), (BLOCKS, 1, TOKENS, 40)])
def test_latents(shape: tuple[int, ...]) -> None:
    spec = MLAAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=40, dtype=torch.float32)
    tensors = {f"layer.{i}": torch.randn(shape) for i in range(2)}
    geometry = shard_geometry(tensors, config_of((spec, list(tensors))), {})
    assert geometry.latent
    assert [layer.shape for layer in geometry.layers] == [(1, 1, 40, "float32")] * 2
    there_and_back(geometry, [[3, 7, 1]], [[9, 2, 11]])


def latent_spec(size: int, **more: Any) -> MLAAttentionSpec:
    return MLAAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=size, **{"dtype": torch.uint8, **more})


def test_latents_of_bytes_are_served_where_a_tokens_lie_together() -> None:
    for size, kind in ((40, "fp8"), (656, "fp8_ds_mla")):
        tensors = {"layer.0": torch.randint(0, 255, (BLOCKS, TOKENS, size), dtype=torch.uint8)}
        config = config_of((latent_spec(size, cache_dtype_str=kind), ["layer.0"]))
        there_and_back(shard_geometry(tensors, config, {}), [[3, 7, 1]], [[9, 2, 11]])
    tensors = {"layer.0": torch.zeros(BLOCKS, TOKENS, 132, dtype=torch.uint8)}  # an indexer's: numbers, then a block's scales
    for spec in (latent_spec(132), latent_spec(132, cache_dtype_str="fp8_ds_mla", model_version="deepseek_v4")):
        with pytest.raises(LayoutMismatchError, match="order within a block"):
            shard_geometry(tensors, config_of((spec, ["layer.0"])), {})
    ratio = "tokens_per_state" if hasattr(latent_spec(40), "tokens_per_state") else "compress_ratio"
    spec = latent_spec(40, dtype=torch.float32, **{ratio: 4})
    with pytest.raises(LayoutMismatchError, match="one for 4 tokens"):
        shard_geometry({"layer.0": torch.zeros(BLOCKS, TOKENS // 4, 40)}, config_of((spec, ["layer.0"])), {})


def test_groups_with_block_tables_of_their_own() -> None:
    window = SlidingWindowSpec(block_size=TOKENS, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.float32, sliding_window=32)
    tensors = {f"layer.{i}": random_tensor(BLOCKS, 2, TOKENS, HEADS, SIZE) for i in range(4)}
    geometry = shard_geometry(tensors, config_of((full(), ["layer.0", "layer.2"]), (window, ["layer.1", "layer.3"])), {})
    assert geometry.windows == (0, 32)
    assert [layer.name for layer in geometry.layers] == ["layer.0", "layer.1", "layer.2", "layer.3"]
    there_and_back(geometry, [[3, 7, 1], [4, 5, 6]], [[9, 2, 11], [8, 10, 0]])


def test_blocks_that_a_window_has_passed_are_left_alone() -> None:
    tensor = random_tensor(BLOCKS, 2, TOKENS, HEADS, SIZE)
    geometry = shard_geometry({"layer.0": tensor}, config_of((full(), ["layer.0"])), {})
    copier = copier_of(geometry)
    parts = np.array([(0, 0, 24, 0, 24)])
    copier.store(CopyOrder(1, "r", parts, (np.array([3, 7], np.int32),), 0, load=False))
    before = tensor.clone()
    tensor[7] = 0
    copier.load(CopyOrder(2, "r", parts, (np.array([-1, 7], np.int32),), 0, load=True))
    assert torch.equal(tensor[7, :, :8], before[7, :, :8])
    assert torch.equal(tensor[3], before[3])


def test_layers_that_share_kv_are_kept_once() -> None:
    tensor = random_tensor(BLOCKS, 2, TOKENS, HEADS, SIZE)
    geometry = shard_geometry({"a": tensor, "b": tensor}, config_of((full(), ["a", "b"])), {})
    assert [layer.name for layer in geometry.layers] == ["a"]


@pytest.mark.parametrize(
    ("tensor", "spec", "message"),
    [
        (torch.zeros(BLOCKS, 2, TOKENS, HEADS, SIZE + 4), full(), "known arrangement"),
        (torch.zeros(2, 2, TOKENS, HEADS, SIZE), full(), "known arrangement"),
        (torch.zeros(BLOCKS - 1, 2, TOKENS, HEADS, SIZE), full(), "12 blocks of 16 tokens"),
        (torch.zeros(BLOCKS, 2, 5, HEADS, SIZE), full(), "12 blocks of 16 tokens"),
        (torch.zeros(BLOCKS, 2, TOKENS, HEADS, SIZE), full(head_size_v=4), "of one size"),
        (
            torch.zeros(BLOCKS, 2, TOKENS, HEADS, SIZE),
            SimpleNamespace(block_size=TOKENS),
            "SimpleNamespace, which is not served",
        ),
        ([torch.zeros(1)], MambaSpec(block_size=TOKENS, shapes=((1,),), dtypes=(torch.float32,)), "MambaSpec"),
    ],
)
def test_what_is_not_understood_is_refused(tensor: Any, spec: Any, message: str) -> None:
    with pytest.raises(LayoutMismatchError, match=message):
        shard_geometry({"layer.0": tensor}, config_of((spec, ["layer.0"])), {})


@pytest.mark.parametrize(
    ("dtype", "tokens", "size"), [(torch.float32, 128, 64), (torch.bfloat16, 64, 64), (torch.float16, 32, 80)], ids=str
)
def test_cpu_kernels_are_asked_how_they_pack(dtype: torch.dtype, tokens: int, size: int) -> None:
    import vllm._custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(dtype, tokens, size)

    def update(layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, places: torch.Tensor) -> None:
        keys, values = cache.view(*cache.shape[:2], 2 * tokens, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, places, isa)

    layer = SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=update))
    cache = torch.zeros(BLOCKS, HEADS, tokens, 2 * size, dtype=dtype)
    key, value = (torch.randn(2 * tokens, HEADS, size).to(dtype) for _ in range(2))
    places = torch.cat([torch.arange(tokens) + 5 * tokens, torch.arange(tokens) + 2 * tokens])
    update(layer, key, value, cache, places)
    views = packed_views(cache, probe_packing("layer.0", layer, cache, HEADS, size))
    for view, written in zip(views, (key, value), strict=True):
        plain = view[[5, 2]].reshape(2, HEADS, tokens, size).permute(0, 2, 1, 3).reshape(2 * tokens, HEADS, size)
        assert torch.equal(plain, written)
    spec = full(block_size=tokens, head_size=size, dtype=dtype)
    geometry = shard_geometry({"layer.0": cache}, config_of((spec, ["layer.0"])), {"layer.0": layer})
    assert geometry.layers[0].packed
    there_and_back(geometry, [[5, 2]], [[7, 1]])


@pytest.mark.parametrize("steady", [True, False])
def test_a_kernel_that_is_not_understood_is_refused(steady: bool) -> None:
    fixed = torch.randperm(TOKENS * SIZE, generator=torch.Generator().manual_seed(1))

    def update(layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, places: torch.Tensor) -> None:
        order = fixed if steady else torch.randperm(TOKENS * SIZE)
        cache.view(HEADS, 2, -1)[:, 0] = key.permute(1, 0, 2).reshape(HEADS, -1)[:, order]

    layer = SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=update))
    cache = torch.zeros(BLOCKS, HEADS, TOKENS, 2 * SIZE)
    with pytest.raises(LayoutMismatchError, match=r"layer\.0"):
        shard_geometry({"layer.0": cache}, config_of((full(), ["layer.0"])), {"layer.0": layer})


def test_a_kernel_that_can_not_be_asked_is_refused() -> None:
    cache = torch.zeros(BLOCKS, HEADS, TOKENS, 2 * SIZE)
    with pytest.raises(LayoutMismatchError, match="can be asked"):
        shard_geometry({"layer.0": cache}, config_of((full(), ["layer.0"])), {})


def latents_layer(write: Any) -> Any:
    """A layer whose kernel writes latents, [tokens, 40], into a flat cache by ``write``."""

    def update(kv: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor, places: torch.Tensor, kind: str, scale: Any) -> None:
        write(cache.view(-1, 40), places, torch.cat([kv, rope.squeeze(1)], 1))

    return SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=update, kv_lora_rank=32))


@pytest.mark.parametrize("shape", [(BLOCKS, TOKENS, 40), (BLOCKS, 1, TOKENS, 40)])
def test_latents_of_a_cpu_kernel_are_served_as_it_writes_them(shape: tuple[int, ...]) -> None:
    spec = MLAAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=40, dtype=torch.float32)
    config = config_of((spec, ["layer.0"]))

    def plain(cache: torch.Tensor, places: torch.Tensor, latents: torch.Tensor) -> None:
        cache[places] = latents

    def turned(cache: torch.Tensor, places: torch.Tensor, latents: torch.Tensor) -> None:
        cache[places] = latents.flip(1)

    def spread(cache: torch.Tensor, places: torch.Tensor, latents: torch.Tensor) -> None:
        cache[places] = latents
        cache[0] = 1

    geometry = shard_geometry({"layer.0": torch.randn(shape)}, config, {"layer.0": latents_layer(plain)})
    there_and_back(geometry, [[3, 7, 1]], [[9, 2, 11]])
    for write in (turned, spread):
        with pytest.raises(LayoutMismatchError, match="something else"):
            shard_geometry({"layer.0": torch.randn(shape)}, config, {"layer.0": latents_layer(write)})
    with pytest.raises(LayoutMismatchError, match="can be asked"):
        shard_geometry({"layer.0": torch.randn(shape)}, config, {"layer.0": SimpleNamespace()})
