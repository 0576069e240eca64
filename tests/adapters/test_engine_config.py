"""Settings that adapters for engines share."""

from __future__ import annotations

import pytest

import lmkv
from lmkv.adapters.engine_config import on_gpus_node


@pytest.mark.parametrize(
    ("setting", "nodes", "wanted"),
    [
        ("auto", [1, 1, 0], "1"),
        ("auto", [None, 0], "0"),
        ("auto", [None], "auto"),
        ("auto", [], "auto"),
        (None, [1], None),
        ("0", [1], "0"),
    ],
)
def test_slots_on_the_node_of_most_gpus(setting: str | None, nodes: list[int | None], wanted: str | None) -> None:
    assert on_gpus_node(lmkv.StoreConfig(ram_numa_node=setting), nodes).ram_numa_node == wanted


def test_a_store_that_nobody_names_a_gpu_to() -> None:
    layout = lmkv.KVLayout.dense(layers=1, heads=1, head_size=8, dtype="float32", chunk_tokens=16)
    for node in ("auto", "0"):
        with lmkv.Store(lmkv.StoreConfig(ram_capacity="1MiB", ram_numa_node=node, disk_capacity=0), layout) as store:
            assert store.stats().tiers[0].capacity_bytes
