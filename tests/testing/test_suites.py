"""The suites fail where a backend or codec breaks its contract: each of these breaks one thing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import lmkv
from lmkv.backends import BackendSettings
from lmkv.backends.base import Bounded, Clearable, Entry, LocalIndex, Syncing
from lmkv.backends.lmdb_disk import LmdbBackend
from lmkv.backends.memory import MemoryBackend
from lmkv.chunks import ChunkKey
from lmkv.codecs.raw import RawCodec
from lmkv.errors import CapacityError
from lmkv.testing import BackendSuite, CodecSuite


class Forgetful(MemoryBackend):
    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        super().write_many(keys[:3], data[:3])


class KeepsBuffers(MemoryBackend):
    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        super().write_many(keys, data)
        self._values.update(zip(keys, data, strict=True))  # type: ignore[arg-type]


class NeverDeletes(MemoryBackend):
    def delete_many(self, keys: Sequence[ChunkKey]) -> None:
        """Not done."""


class ReadsTooMuch(MemoryBackend):
    def read_many(self, keys: Sequence[ChunkKey], out: Sequence[memoryview]) -> list[int | None]:
        sizes = super().read_many(keys, out)
        return [
            len(buffer) if size is None and key in self._values else size
            for key, size, buffer in zip(keys, sizes, out, strict=True)
        ]


class SortsKeys(MemoryBackend):
    def contains_many(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return super().contains_many(sorted(keys))


class HalfBatches(MemoryBackend):
    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        for key, piece in zip(keys, data, strict=True):
            super().write_many([key], [piece])


class ClosesOnce(MemoryBackend):
    def close(self) -> None:
        assert not self._closed
        super().close()


class TakesAnything(MemoryBackend):
    def __init__(self, settings: BackendSettings) -> None:
        super().__init__(BackendSettings(settings.name, settings.layout, settings.capacity))


MEMORY = {
    Forgetful: ["test_many_values_at_once", "test_any_sequence_of_calls"],
    KeepsBuffers: ["test_buffers_stay_the_callers"],
    NeverDeletes: ["test_deleted_keys_are_gone_and_may_come_back", "test_any_sequence_of_calls"],
    ReadsTooMuch: ["test_a_value_larger_than_its_buffer_is_absent"],
    SortsKeys: ["test_results_follow_the_keys"],
    HalfBatches: ["test_what_does_not_fit_is_refused_whole"],
    ClosesOnce: ["test_closing_twice_is_harmless"],
    TakesAnything: ["test_refuses_options_it_does_not_know"],
}


class NearestOnly(LmdbBackend):
    def best_child(self, parent: ChunkKey, tokens: bytes) -> tuple[ChunkKey, bytes, int] | None:
        return super().best_child(parent, tokens[:480])  # what lies behind the first 120 tokens is not looked at


class TrustsKeys(LmdbBackend):
    def match_prefix(self, keys: Sequence[ChunkKey], pieces: Sequence[bytes]) -> int:
        there = self.contains_many(keys)
        return there.index(False) if False in there else len(there)


class CountsBytes(LmdbBackend):
    def used_bytes(self) -> int:
        return super().used_bytes() + 1


class NeverFull(LmdbBackend):
    def __init__(self, settings: BackendSettings) -> None:
        super().__init__(settings)
        self.capacity = 1 << 40

    def write_many(self, keys: Sequence[ChunkKey], data: Sequence[memoryview]) -> None:
        while True:
            try:
                return super().write_many(keys, data)
            except CapacityError:  # makes room by itself
                self.delete_many([next(iter(self.entries(0))).key])


class ListsAll(LmdbBackend):
    def entries(self, after: int) -> Iterator[Entry]:
        return super().entries(0)


class IgnoresUse(LmdbBackend):
    def touch_many(self, keys: Sequence[ChunkKey]) -> None:
        """Not done."""


class NothingCovered(LmdbBackend):
    def covered_siblings(self, parent: ChunkKey, tokens: bytes) -> list[ChunkKey]:
        return []


class ClearsHalf(LmdbBackend):
    def clear(self) -> None:
        self.delete_many([entry.key for entry in self.entries(0)][::2])


DISK = {
    NearestOnly: ["test_siblings_equal_a_slow_reference"],
    TrustsKeys: ["test_match_prefix_proves_hits_by_tokens"],
    CountsBytes: ["test_use_is_counted_as_the_quota_counts"],
    NeverFull: ["test_what_does_not_fit_is_refused_whole"],
    ListsAll: ["test_entries_after_a_number_are_what_came_since"],
    IgnoresUse: ["test_entries_after_a_number_are_what_came_since", "test_any_sequence_of_calls"],
    NothingCovered: ["test_siblings_equal_a_slow_reference", "test_any_sequence_of_calls"],
    ClearsHalf: ["test_clear_removes_everything_and_stays_usable"],
}
CASES = [(cls, name) for broken in (MEMORY, DISK) for cls, names in broken.items() for name in names]


@pytest.fixture
def _no_shrinking() -> Iterator[None]:
    """That it fails is enough: the smallest example is not looked for."""
    default = hypothesis.settings()
    hypothesis.settings.register_profile("default of these tests", default)
    hypothesis.settings.register_profile("no shrinking", default, phases=[hypothesis.Phase.generate])
    hypothesis.settings.load_profile("no shrinking")
    yield
    hypothesis.settings.load_profile("default of these tests")


@pytest.mark.usefixtures("_no_shrinking")
@pytest.mark.parametrize(("broken", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_backend_is_found_out(broken: Any, name: str, tmp_path: Path) -> None:
    class Suite(BackendSuite):
        offers = (Clearable,) if issubclass(broken, MemoryBackend) else (LocalIndex, Bounded, Syncing, Clearable)
        examples = 60

        def make(self, settings: BackendSettings) -> Any:
            if issubclass(broken, MemoryBackend):
                return broken(settings)
            path = str(self.directory / settings.name)
            return broken(
                BackendSettings(settings.name, settings.layout, settings.capacity, {**settings.options, "path": path})
            )

    suite = Suite()
    suite.directory, suite._opened = tmp_path, 0
    arguments = [256] if name == "test_siblings_equal_a_slow_reference" else []
    with pytest.raises((AssertionError, pytest.fail.Exception, lmkv.LMKVError)):
        getattr(suite, name)(*arguments)


class Lossy(RawCodec):
    def decode(self, data: memoryview, out: memoryview) -> None:
        super().decode(data, out)
        out[-1] &= 0xFE


class WritesBeyond(RawCodec):
    def encode(self, payload: memoryview) -> memoryview:
        payload[0] = payload[0] ^ 1
        return payload


class Unbounded(RawCodec):
    def encode(self, payload: memoryview) -> bytes:  # type: ignore[override]
        return bytes(payload) + b"."

    def decode(self, data: memoryview, out: memoryview) -> None:
        super().decode(data[:-1], out)


class Lenient(RawCodec):
    def decode(self, data: memoryview, out: memoryview) -> None:
        n = min(len(data), len(out))
        out[:n] = data[:n]


class LongName(RawCodec):
    name = "a name that is too long"


@pytest.mark.parametrize(
    ("broken", "name", "arguments"),
    [
        (Lossy, "test_what_goes_in_comes_out", [2]),
        (WritesBeyond, "test_what_goes_in_comes_out", [2]),
        (Unbounded, "test_what_goes_in_comes_out", [2]),
        (Lenient, "test_another_size_is_refused", [4998]),
        (Lenient, "test_cut_data_are_refused", []),
        (LongName, "test_is_a_codec", []),
    ],
)
def test_a_broken_codec_is_found_out(broken: Any, name: str, arguments: list[int]) -> None:
    class Suite(CodecSuite):
        def make(self, itemsize: int) -> Any:
            return broken(itemsize)

    with pytest.raises((AssertionError, pytest.fail.Exception)):
        getattr(Suite(), name)(*arguments)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"offers": ()}, "test_is_a_backend"),
        ({"offers": (Clearable, Bounded)}, "test_is_a_backend"),
        ({"persistent": True}, "test_data_outlive_close"),
        ({"refuses_when_full": False}, "test_what_does_not_fit_is_refused_whole"),
    ],
)
def test_a_suite_that_says_something_else_than_its_backend(change: dict[str, Any], name: str, tmp_path: Path) -> None:
    made = {"offers": (Clearable,), "make": lambda self, settings: MemoryBackend(settings)} | change
    suite: Any = type("Suite", (BackendSuite,), made)()
    suite.directory, suite._opened = tmp_path, 0
    with pytest.raises(AssertionError):
        getattr(suite, name)()


def test_what_an_author_has_to_define() -> None:
    with pytest.raises(NotImplementedError, match="define make"):
        BackendSuite().make(BackendSettings("x", None))  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="define make"):
        CodecSuite().make(2)
