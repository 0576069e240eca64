"""The contract of backends as tests (needs pytest and hypothesis).

A backend's author inherits it and says how to make one::

    from lmkv.testing import BackendSuite

    class TestMyBackend(BackendSuite):
        offers = (Bounded, Syncing)  # what it offers beside the Backend Protocol
        persistent = True            # what was written is there again after close() and make() with the same settings.name

        def make(self, settings):
            options = {**settings.options, "path": str(self.directory / settings.name)}
            return MyBackend(dataclasses.replace(settings, options=options))

It checks what :mod:`lmkv.backends.base` promises: the Backend Protocol for all, and ``LocalIndex``, ``Bounded``, ``Syncing``
and ``Clearable`` where ``offers`` names them. A ``_check`` method, if there is one, is called after each step of the random
tests.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from ..backends.base import Backend, BackendSettings, Bounded, Clearable, LocalIndex, Syncing
from ..chunks import ChunkKey
from ..errors import CapacityError, ConfigError
from ..layout import KVLayout
from ._chunks import Chunk, best_shared, covered, text_chunks
from ._optional_parts import OptionalParts

__all__ = ["BackendSuite"]

_WIDTH = 16


def _layout(chunk_tokens: int = _WIDTH) -> KVLayout:
    return KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=chunk_tokens)


def _read(backend: Backend, keys: Sequence[ChunkKey], room: int = 1 << 16) -> list[bytes | None]:
    buffers = [memoryview(bytearray(room)) for _ in keys]
    sizes = backend.read_many(keys, buffers)
    assert len(sizes) == len(keys), f"expected {len(keys)} sizes; got {len(sizes)}"
    return [None if size is None else bytes(buffer[:size]) for size, buffer in zip(sizes, buffers, strict=True)]


class BackendSuite(OptionalParts):
    """Inherit, define :meth:`make`, and name the class ``Test…``."""

    #: Bytes that the backends are opened with.
    capacity: ClassVar[int] = 64 * 1024**2
    #: The optional Protocols that it offers, out of LocalIndex, Bounded, Syncing and Clearable.
    offers: ClassVar[tuple[type, ...]] = ()
    #: Whether data outlive ``close``.
    persistent: ClassVar[bool] = False
    #: Whether it raises CapacityError for what does not fit; one that makes room by itself does not.
    refuses_when_full: ClassVar[bool] = True
    #: Whether who reads while a value is replaced meets the old or the new one. If not, they may meet neither, or a mixture: a
    #: tier replaces nothing that is there, and its checks turn such bytes into a miss.
    replaces_at_once: ClassVar[bool] = True
    #: How many random sequences of calls are tried, and how long one is.
    examples: ClassVar[int] = 25
    steps: ClassVar[int] = 25
    #: An empty directory of this test's own.
    directory: Path

    def make(self, settings: BackendSettings) -> Backend:
        """A backend; empty when ``settings.name`` is new in this test, with what was there before when it is not."""
        raise NotImplementedError(f"{type(self).__name__}: define make(self, settings) so that it returns a backend")

    @pytest.fixture(autouse=True)
    def _own_directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path
        self._opened = 0

    @contextlib.contextmanager
    def opened(self, chunk_tokens: int = _WIDTH, capacity: int = 0, name: str = "") -> Iterator[Any]:
        """A backend of its own, closed at the end."""
        self._opened += 1
        backend = self.make(BackendSettings(name or f"suite-{self._opened}", _layout(chunk_tokens), capacity or self.capacity))
        try:
            yield backend
        finally:
            backend.close()

    # -- one call at a time ----------------------------------------------------------------------------------------------

    def test_is_a_backend(self) -> None:
        with self.opened() as backend:
            name = type(backend).__name__
            assert isinstance(backend, Backend), f"{name} lacks a method of Backend"
            for part in (LocalIndex, Bounded, Syncing, Clearable):
                there = isinstance(backend, part)
                assert there == (part in self.offers), f"{name} {'is' if there else 'is no'} {part.__name__}: say so in offers"

    def test_refuses_options_it_does_not_know(self) -> None:
        with pytest.raises(ConfigError):
            self.make(BackendSettings("suite", _layout(), self.capacity, {"no_such_option": 1}))

    def test_new_backend_is_empty(self) -> None:
        keys = [chunk.key for chunk in text_chunks(_layout(), range(40))]
        with self.opened() as backend:
            assert backend.contains_many(keys) == [False] * 3
            assert _read(backend, keys) == [None] * 3

    def test_no_keys_are_no_work(self) -> None:
        with self.opened() as backend:
            assert list(backend.contains_many([])) == []
            assert list(backend.read_many([], [])) == []
            backend.write_many([], [])
            backend.delete_many([])

    def test_results_follow_the_keys(self) -> None:
        chunks = text_chunks(_layout(), range(100))
        records = [chunk.record(_layout()) for chunk in chunks]
        with self.opened() as backend:
            backend.write_many([c.key for c in chunks[::2]], records[::2])
            asked = [chunks[i] for i in (5, 0, 3, 4, 0, 2, 1)]
            there = [chunk in chunks[::2] for chunk in asked]
            assert backend.contains_many([c.key for c in asked]) == there
            wanted = [bytes(c.record(_layout())) if held else None for c, held in zip(asked, there, strict=True)]
            assert _read(backend, [c.key for c in asked]) == wanted

    def test_a_value_is_replaced_by_a_larger_and_by_a_smaller_one(self) -> None:
        short, long = text_chunks(_layout(), range(3))[0], text_chunks(_layout(), range(16))[0]
        with self.opened() as backend:
            for chunk, version in ((short, 0), (long, 1), (short, 2), (long, 3), (long, 4)):
                renamed = Chunk(short.key, chunk.parent, chunk.root, chunk.tokens, chunk.start)
                record = renamed.record(_layout(), version)
                backend.write_many([short.key], [record])
                assert _read(backend, [short.key]) == [bytes(record)]

    def test_a_value_larger_than_its_buffer_is_absent(self) -> None:
        first, second = text_chunks(_layout(), range(32))
        records = [chunk.record(_layout()) for chunk in (first, second)]
        size = len(records[0])
        with self.opened() as backend:
            backend.write_many([first.key, second.key], records)
            buffers = [memoryview(bytearray(size - 1)), memoryview(bytearray(size))]
            assert list(backend.read_many([first.key, second.key], buffers)) == [None, size]
            assert bytes(buffers[1]) == bytes(records[1])

    def test_buffers_stay_the_callers(self) -> None:
        chunk = text_chunks(_layout(), range(16))[0]
        whole = bytes(chunk.record(_layout()))
        mine = bytearray(b"before" + whole + b"behind")
        with self.opened() as backend:
            backend.write_many([chunk.key], [memoryview(mine)[6 : 6 + len(whole)]])
            mine[:] = bytes(len(mine))
            target = bytearray(b"\xaa" * (len(whole) + 12))
            assert list(backend.read_many([chunk.key], [memoryview(target)[6 : 6 + len(whole)]])) == [len(whole)]
            assert bytes(target) == b"\xaa" * 6 + whole + b"\xaa" * 6, "expected the value in the given place and nowhere else"

    def test_deleted_keys_are_gone_and_may_come_back(self) -> None:
        chunks = text_chunks(_layout(), range(48))
        keys = [chunk.key for chunk in chunks]
        records = [chunk.record(_layout()) for chunk in chunks]
        with self.opened() as backend:
            backend.write_many(keys, records)
            backend.delete_many([keys[1], text_chunks(_layout(), range(9))[0].key])
            assert backend.contains_many(keys) == [True, False, True]
            backend.delete_many(keys)
            assert _read(backend, keys) == [None] * 3
            backend.write_many(keys[1:2], records[1:2])
            assert _read(backend, keys) == [None, bytes(records[1]), None]

    def test_many_values_at_once(self) -> None:
        chunks = text_chunks(_layout(), range(_WIDTH * 300))
        keys = [chunk.key for chunk in chunks]
        with self.opened() as backend:
            backend.write_many(keys, [chunk.record(_layout()) for chunk in chunks])
            assert all(backend.contains_many(keys))
            assert _read(backend, keys, room=8192) == [bytes(chunk.record(_layout())) for chunk in chunks]

    # -- the end ---------------------------------------------------------------------------------------------------------

    def test_closing_twice_is_harmless(self) -> None:
        chunk = text_chunks(_layout(), range(16))[0]
        with self.opened() as backend:
            backend.write_many([chunk.key], [chunk.record(_layout())])
            backend.close()
            backend.close()

    def test_data_outlive_close(self) -> None:
        chunks = text_chunks(_layout(), range(70))
        keys = [chunk.key for chunk in chunks]
        with self.opened(name="twice") as backend:
            backend.write_many(keys, [chunk.record(_layout()) for chunk in chunks])
            backend.delete_many(keys[2:3])
        with self.opened(name="twice") as backend:
            if self.persistent:
                wanted = [None if i == 2 else bytes(chunk.record(_layout())) for i, chunk in enumerate(chunks)]
                assert _read(backend, keys) == wanted
            else:
                assert not any(backend.contains_many(keys)), "it keeps its data: say so in persistent"

    # -- at once ---------------------------------------------------------------------------------------------------------

    def test_threads_do_not_disturb_each_other(self) -> None:
        shared = text_chunks(_layout(), range(16))[0]
        versions = [bytes(shared.record(_layout(), version)) for version in range(8)]
        with self.opened() as backend:
            backend.write_many([shared.key], [memoryview(versions[0])])
            start = threading.Barrier(8)
            errors: list[BaseException] = []

            def work(number: int) -> None:
                try:
                    chunks = text_chunks(_layout(), range(64), salt=str(number))
                    keys = [chunk.key for chunk in chunks]
                    start.wait(30)
                    for version in range(6):
                        records = [chunk.record(_layout(), version) for chunk in chunks]
                        backend.write_many(keys, records)
                        backend.write_many([shared.key], [memoryview(versions[number])])
                        assert _read(backend, keys) == [bytes(record) for record in records]
                        seen = _read(backend, [shared.key])[0]
                        assert seen in versions or not self.replaces_at_once, "expected one whole value that somebody wrote"
                        backend.delete_many(keys[version % 2 :: 2])
                        assert backend.contains_many(keys) == [i % 2 != version % 2 for i in range(4)]
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors, errors[0]

    # -- full ------------------------------------------------------------------------------------------------------------

    def test_what_does_not_fit_is_refused_whole(self) -> None:
        capacity = 1024**2
        chunks = text_chunks(_layout(), range(_WIDTH * 4 * capacity // 4096))
        groups = [chunks[i : i + 4] for i in range(0, len(chunks), 4)]
        with self.opened(capacity=capacity) as backend:
            done: list[Chunk] = []
            for group in groups:
                keys = [chunk.key for chunk in group]
                try:
                    backend.write_many(keys, [chunk.record(_layout()) for chunk in group])
                except CapacityError:
                    break
                done += group
            else:
                assert not self.refuses_when_full, f"expected a CapacityError within {capacity} bytes; got none"
                return
            assert self.refuses_when_full, "it refuses what does not fit: say so in refuses_when_full"
            assert backend.contains_many(keys) == [False] * 4, "expected none of a refused batch to be stored"
            held = [chunk.key for chunk in done]
            if Bounded in self.offers:
                assert all(backend.contains_many(held)), "expected a Bounded backend to leave eviction to its tier"
                assert backend.used_bytes() <= backend.capacity <= capacity
            while True:
                with contextlib.suppress(CapacityError):
                    backend.write_many(keys, [chunk.record(_layout()) for chunk in group])
                    break
                assert held, "expected room once everything else was deleted"
                backend.delete_many(held[:4])
                del held[:4]
            assert _read(backend, keys) == [bytes(chunk.record(_layout())) for chunk in group]

    # -- any sequence of calls -------------------------------------------------------------------------------------------

    def test_any_sequence_of_calls(self) -> None:
        machine = type("Machine", (_Machine,), {"suite": self})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=self.examples,
                stateful_step_count=self.steps,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            ),
        )


def _universe() -> list[Chunk]:
    """Chains with branches, short ends, and ends that longer chunks make redundant."""
    base = list(range(50))
    texts = [
        base[:5],
        base[:12],
        base,
        base[:40],
        [*base[:36], 7, 7],
        [*base[:16], *range(90, 106), 1],
        [9],
        [9, 9, 9],
        base[::-1],
    ]
    found = {chunk.key: chunk for text in texts for chunk in text_chunks(_layout(), text)}
    return list(found.values())


_CHUNKS = _universe()
_SOME = st.lists(st.sampled_from(_CHUNKS), max_size=6, unique_by=lambda chunk: chunk.key)


class _Machine(RuleBasedStateMachine):
    """Any sequence of calls, beside a dictionary of what must be held."""

    suite: ClassVar[BackendSuite]

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[ChunkKey, tuple[Chunk, bytes]] = {}  # in order of last use
        self.close: Callable[[], None] = lambda: None

    @initialize()
    def start(self) -> None:
        self.suite._opened += 1
        self.name = f"machine-{self.suite._opened}"
        self.open()

    def open(self) -> None:
        stack = contextlib.ExitStack()
        self.backend: Any = stack.enter_context(self.suite.opened(name=self.name))
        self.close = stack.close

    def teardown(self) -> None:
        self.close()

    @rule(chunks=_SOME, version=st.integers(0, 2))
    def write(self, chunks: list[Chunk], version: int) -> None:
        records = [chunk.record(_layout(), version) for chunk in chunks]
        self.backend.write_many([chunk.key for chunk in chunks], records)
        for chunk, record in zip(chunks, records, strict=True):
            self.held.pop(chunk.key, None)
            self.held[chunk.key] = (chunk, bytes(record))

    @rule(chunks=_SOME)
    def delete(self, chunks: list[Chunk]) -> None:
        self.backend.delete_many([chunk.key for chunk in chunks])
        for chunk in chunks:
            self.held.pop(chunk.key, None)

    @rule(chunks=st.lists(st.sampled_from(_CHUNKS), max_size=8))
    def read(self, chunks: list[Chunk]) -> None:
        wanted = [self.held[chunk.key][1] if chunk.key in self.held else None for chunk in chunks]
        assert _read(self.backend, [chunk.key for chunk in chunks]) == wanted

    @precondition(lambda self: Bounded in self.suite.offers)
    @rule(chunks=st.lists(st.sampled_from(_CHUNKS), max_size=8))
    def touch(self, chunks: list[Chunk]) -> None:
        self.backend.touch_many([chunk.key for chunk in chunks])
        for chunk in chunks:
            if chunk.key in self.held:
                self.held[chunk.key] = self.held.pop(chunk.key)

    @precondition(lambda self: Clearable in self.suite.offers)
    @rule()
    def clear(self) -> None:
        self.backend.clear()
        self.held.clear()

    @precondition(lambda self: Syncing in self.suite.offers)
    @rule()
    def sync(self) -> None:
        self.backend.sync()

    @precondition(lambda self: self.suite.persistent)
    @rule()
    def reopen(self) -> None:
        self.close()
        self.open()

    @invariant()
    def holds_what_it_was_given(self) -> None:
        check = getattr(self.backend, "_check", None)
        if check is not None:
            check()
        keys = [chunk.key for chunk in _CHUNKS]
        assert list(self.backend.contains_many(keys)) == [key in self.held for key in keys]

    @invariant()
    def counts_what_it_holds(self) -> None:
        backend = self.backend
        if Bounded not in self.suite.offers:
            return
        assert backend.count() == len(self.held)
        assert backend.used_bytes() == sum(backend.cost(len(record)) for _, record in self.held.values())
        entries = list(backend.entries(0))
        assert [entry.key for entry in entries] == list(self.held), "expected the keys in the order of their last use"

    @invariant()
    def knows_its_chains(self) -> None:
        backend = self.backend
        if LocalIndex not in self.suite.offers:
            return
        held = [chunk for chunk, _ in self.held.values()]
        for chunk in _CHUNKS:
            found = backend.best_child(chunk.parent, chunk.tokens)
            assert (found[2] if found else 0) == best_shared(held, chunk.parent, chunk.tokens)
            assert set(backend.covered_siblings(chunk.parent, chunk.tokens)) == covered(held, chunk.parent, chunk.tokens)
