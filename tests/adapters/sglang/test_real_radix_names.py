"""Requests that bear a name of one before, behind the prefix tree of a real SGLang on the CPU.

Whoever sends a request may name it (``rid``), and SGLang says of a request that is aborted in its queue nothing to the tree.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang_tree import Machine, make_pool

from lmkv import StoreConfig

torch.set_num_threads(1)
TEXT = list(range(3, 103))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[[], Machine]]:
    """``machine()``: one rank; closed at the end."""
    opened: list[Machine] = []

    def make() -> Machine:
        small = {"ram_capacity": "4MiB", "ram_extent": "1MiB", "ram_ahead": 0, "disk_capacity": 0, "model": "tiny"}
        opened.append(Machine(make_pool("mha", size=512, page_size=1), StoreConfig.from_dict(small)))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def test_a_request_that_is_named_like_one_that_was_aborted_in_the_queue(machine: Callable[[], Machine]) -> None:
    rank = machine()
    rank.run(TEXT)
    rank.flush()
    gone = rank.ask(TEXT, rid="mine")
    found = rank.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", TEXT[:99]), None), req=gone))
    assert found.host_hit_length == 99  # and then it is aborted, of which the tree is not told
    other = [*TEXT[:40], *(token + 100 for token in TEXT[40:])]
    assert rank.run(other, rid="mine") == (0, 40)  # bits are compared in there
    rank.check_pages()
    rank.flush()
    first, second = rank.ask(TEXT, rid="mine"), rank.ask(other, rid="mine")  # the first one is loaded behind the second's match
    matches = [
        rank.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", text[:99]), None), req=request))
        for text, request in ((TEXT, first), (other, second))
    ]
    assert [match.host_hit_length for match in matches] == [99, 99]
    came = []
    for match, request in zip(matches, (first, second), strict=True):
        request.prefix_indices = match.device_indices
        asked = InitLoadBackParams(best_match_node=match.best_match_node, host_hit_length=99, req=request)
        came.append(len(rank.tree.init_load_back(asked)[0]))
        rank._verify(
            request,
            rank.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", request.origin_input_ids)))).device_indices,
        )
    assert came == [0, 99]
    rank.check_pages()


def test_what_a_request_of_an_old_name_computes_is_kept(machine: Callable[[], Machine]) -> None:
    rank = machine()
    rank.tree.match_prefix(
        MatchPrefixParams(key=RadixKey(array("q", TEXT[:99]), "tenant"), req=rank.ask(TEXT, rid="mine", extra_key="tenant"))
    )  # and then it is aborted
    rank.run(TEXT, rid="mine")
    rank.flush()
    assert rank.run(TEXT) == (0, 99)
