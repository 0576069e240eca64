"""What :class:`lmkv.testing.BackendSuite` checks of a backend that offers more than the Backend Protocol."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..backends.base import Bounded, Clearable, LocalIndex, Syncing
from ..chunks import TOKEN_BYTES, ChunkKey, shared_tokens
from ..index.content import chunk_fingerprints, root_seed
from ..layout import KVLayout
from ._chunks import Chunk, best_shared, covered, siblings_of, text_chunks

__all__ = ["OptionalParts", "needs"]

Test = TypeVar("Test", bound=Callable[..., None])

#: Places where siblings part; 120 and 240 are the borders of the segments that the LMDB backend cuts tokens into.
_CUTS = (0, 1, 2, 7, 60, 119, 120, 121, 200, 239, 240, 241, 255)


def _layout(chunk_tokens: int = 16) -> KVLayout:
    return KVLayout.dense(layers=1, heads=1, head_size=4, dtype="float32", chunk_tokens=chunk_tokens)


def _write(backend: Any, layout: KVLayout, chunks: list[Chunk]) -> None:
    backend.write_many([chunk.key for chunk in chunks], [chunk.record(layout) for chunk in chunks])


def needs(part: type) -> Callable[[Test], Test]:
    """Mark a test as one of backends that offer ``part``."""

    def mark(test: Test) -> Test:
        test.part = part  # type: ignore[attr-defined]
        return test

    return mark


def _sibling_texts(rng: random.Random, width: int, count: int) -> list[list[int]]:
    """Pieces of up to ``width`` tokens that share long beginnings."""
    alphabet = (0, 1, 255, 256, 65536, 2**32 - 1)
    pieces = [[rng.choice(alphabet) for _ in range(width)]]
    for _ in range(count):
        cut = min(rng.choice(_CUTS), width)
        tail = [rng.choice(alphabet) for _ in range(width - cut)]
        length = rng.choice((width, width, max(1, cut), rng.randint(1, width)))
        pieces.append((rng.choice(pieces)[:cut] + tail)[:length])
    return pieces


class OptionalParts:
    """Tests of the optional Protocols; a suite has those that its ``offers`` names."""

    offers: ClassVar[tuple[type, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, test in vars(OptionalParts).items():
            if hasattr(test, "part"):
                setattr(cls, name, test if test.part in cls.offers else None)

    def opened(self, chunk_tokens: int = 16, capacity: int = 0, name: str = "") -> AbstractContextManager[Any]:
        """A backend of its own, closed at the end."""
        raise NotImplementedError

    # -- LocalIndex ------------------------------------------------------------------------------------------------------

    @needs(LocalIndex)
    def test_match_prefix_stops_at_the_first_gap(self) -> None:
        layout = _layout()
        chunks = text_chunks(layout, range(85))
        keys, pieces = [c.key for c in chunks], [c.tokens for c in chunks]
        with self.opened() as backend:
            assert backend.match_prefix(keys, pieces) == 0
            assert backend.match_prefix([], []) == 0
            _write(backend, layout, chunks[:2] + chunks[3:])
            assert backend.match_prefix(keys, pieces) == 2
            assert backend.match_prefix(keys[3:], pieces[3:]) == 3
            _write(backend, layout, chunks[2:3])
            assert backend.match_prefix(keys, pieces) == 6

    @needs(LocalIndex)
    def test_match_prefix_proves_hits_by_tokens(self) -> None:
        layout = _layout()
        chunks = text_chunks(layout, range(48))
        keys, pieces = [c.key for c in chunks], [c.tokens for c in chunks]
        pieces[1] = pieces[1][:-1] + b"\x01"
        with self.opened() as backend:
            _write(backend, layout, chunks)
            assert backend.match_prefix(keys, pieces) == 1

    @needs(LocalIndex)
    def test_children_of_one_namespace_do_not_answer_for_another(self) -> None:
        layout = _layout()
        mine, other = (text_chunks(layout, range(16), salt=salt)[0] for salt in ("mine", "other"))
        with self.opened() as backend:
            _write(backend, layout, [mine])
            assert backend.best_child(mine.parent, mine.tokens) == (mine.key, mine.tokens, 16)
            assert backend.best_child(mine.parent, b"") is None
            assert backend.best_child(other.parent, other.tokens) is None
            assert backend.best_child(ChunkKey(bytes(16)), mine.tokens) is None
            assert backend.best_child(ChunkKey(b"\xff" * 16), mine.tokens) is None

    @needs(LocalIndex)
    @pytest.mark.parametrize("width", [1, 8, 16, 256])
    def test_siblings_equal_a_slow_reference(self, width: int) -> None:
        layout = _layout(width)
        with self.opened(chunk_tokens=width) as backend:

            @settings(max_examples=25, deadline=None)
            @given(seed=st.integers(0, 2**32), count=st.integers(1, 14), gone=st.integers(0, 3))
            def compare(seed: int, count: int, gone: int) -> None:
                rng = random.Random(seed)
                pieces = _sibling_texts(rng, width, count)
                chunks = siblings_of(layout, pieces, salt=f"{seed}-{count}")
                _write(backend, layout, chunks)
                backend.delete_many([chunk.key for chunk in chunks[:gone]])
                held = chunks[gone:]
                asked = pieces + [piece[: rng.randint(1, len(piece))] for piece in pieces] + _sibling_texts(rng, width, 4)
                try:
                    for piece in asked:
                        self._compare(backend, held, chunks[0].parent, np.array(piece, "<u4").tobytes())
                finally:
                    backend.delete_many([chunk.key for chunk in chunks])

            compare()

    @staticmethod
    def _compare(backend: LocalIndex, held: list[Chunk], parent: ChunkKey, tokens: bytes) -> None:
        best = best_shared(held, parent, tokens)
        found = backend.best_child(parent, tokens)
        assert (found[2] if found else 0) == best, f"expected {best} shared tokens; got {found and found[2]}"
        if found is not None:
            key, piece, shared = found
            assert {chunk.key: chunk.tokens for chunk in held}.get(key) == piece, "expected a held chunk with its own tokens"
            assert shared == shared_tokens(piece, tokens)
        wanted = covered(held, parent, tokens)
        got = backend.covered_siblings(parent, tokens)
        assert set(got) == wanted, (
            f"expected {len(wanted)} covered siblings of {len(held)}; got {len(set(got) & wanted)} of them"
        )
        assert len(got) == len(set(got))

    # -- Bounded ---------------------------------------------------------------------------------------------------------

    @needs(Bounded)
    def test_use_is_counted_as_the_quota_counts(self) -> None:
        layout = _layout()
        chunks = text_chunks(layout, range(70))
        with self.opened() as backend:
            assert (backend.used_bytes(), backend.count()) == (0, 0)
            total = 0
            for i, chunk in enumerate(chunks):
                record = chunk.record(layout)
                total += backend.cost(len(record))
                assert backend.cost(len(record)) >= len(record)
                backend.write_many([chunk.key], [record])
                assert (backend.used_bytes(), backend.count()) == (total, i + 1)
            backend.write_many([chunks[0].key], [chunks[0].record(layout, 1)])  # replaced, not added
            assert (backend.used_bytes(), backend.count()) == (total, len(chunks))
            backend.delete_many([chunk.key for chunk in chunks])
            assert (backend.used_bytes(), backend.count()) == (0, 0)

    @needs(Bounded)
    def test_entries_say_what_records_say(self) -> None:
        layout = _layout()
        chunks = text_chunks(layout, range(70))
        with self.opened() as backend:
            _write(backend, layout, chunks)
            entries = list(backend.entries(0))
            assert [(e.key, e.parent, e.root, e.start) for e in entries] == [(c.key, c.parent, c.root, c.start) for c in chunks]
            assert sum(entry.size for entry in entries) == backend.used_bytes()
            full = np.frombuffer(b"".join(c.tokens for c in chunks[:-1]), "<u4")
            prints = chunk_fingerprints(full, 16, root_seed(chunks[0].root)).tolist()
            assert [entry.fingerprint for entry in entries] == [*prints, 0], "expected 0 for the short chunk only"
            assert [backend.tokens_of(chunk.key) for chunk in chunks] == [chunk.tokens for chunk in chunks]
            assert backend.tokens_of(ChunkKey(bytes(16))) is None

    @needs(Bounded)
    def test_entries_after_a_number_are_what_came_since(self) -> None:
        layout = _layout()
        chunks = text_chunks(layout, range(96))
        keys = [chunk.key for chunk in chunks]
        with self.opened() as backend:
            _write(backend, layout, chunks)
            first = [entry.sequence for entry in backend.entries(0)]
            assert first == sorted(set(first))
            assert list(backend.entries(first[-1])) == []
            assert [entry.key for entry in backend.entries(first[2])] == keys[3:]
            backend.touch_many([keys[3], ChunkKey(bytes(16)), keys[1]])
            assert [entry.key for entry in backend.entries(first[-1])] == [keys[3], keys[1]]
            _write(backend, layout, [chunks[0]])
            backend.delete_many([keys[3]])
            assert [entry.key for entry in backend.entries(first[-1])] == [keys[1], keys[0]]
            assert [entry.key for entry in backend.entries(0)] == [keys[2], keys[4], keys[5], keys[1], keys[0]]

    @needs(Bounded)
    def test_a_long_list_of_entries_is_complete(self) -> None:
        layout = _layout(1)
        chunks = [text_chunks(layout, [i])[0] for i in range(2500)]
        with self.opened(chunk_tokens=1) as backend:
            _write(backend, layout, chunks)
            assert [entry.key for entry in backend.entries(0)] == [chunk.key for chunk in chunks]

    # -- Syncing, Clearable ----------------------------------------------------------------------------------------------

    @needs(Syncing)
    def test_sync_changes_nothing(self) -> None:
        layout = _layout()
        chunks = text_chunks(layout, range(30))
        with self.opened() as backend:
            backend.sync()
            _write(backend, layout, chunks)
            backend.sync()
            assert all(backend.contains_many([chunk.key for chunk in chunks]))

    @needs(Clearable)
    def test_clear_removes_everything_and_stays_usable(self) -> None:
        layout = _layout()
        chunks = text_chunks(layout, range(90))
        keys = [chunk.key for chunk in chunks]
        with self.opened() as backend:
            _write(backend, layout, chunks)
            backend.clear()
            backend.clear()
            assert not any(backend.contains_many(keys))
            if Bounded in self.offers:
                assert (backend.used_bytes(), backend.count(), list(backend.entries(0))) == (0, 0, [])
            if LocalIndex in self.offers:
                assert backend.match_prefix(keys, [chunk.tokens for chunk in chunks]) == 0
                assert backend.best_child(chunks[0].parent, chunks[0].tokens) is None
            _write(backend, layout, chunks)
            assert all(backend.contains_many(keys))
            assert len(b"".join(chunk.tokens for chunk in chunks)) == 90 * TOKEN_BYTES
