"""No interleaving of the store's verbs, evictions and crashes gives back bytes other than those stored under that text."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import lmkv

HEADS, LAYERS, SIZE = 2, 2, 4
CHUNK = 4


def truth(tokens: list[int], tenant: str) -> np.ndarray:
    """The KV of a text: every token's bytes depend on all tokens up to it and on the tenant, as a model's do."""
    out = np.empty((LAYERS, 2, HEADS, len(tokens), SIZE), np.uint8)
    state = sum(tenant.encode()) + 7
    for i, token in enumerate(tokens):
        state = (state * 6364136223846793005 + token + 1442695040888963407) % 2**64
        values = np.frombuffer((state.to_bytes(8, "little") * 8)[: LAYERS * 2 * HEADS * SIZE], np.uint8)
        out[:, :, :, i] = values.reshape(LAYERS, 2, HEADS, SIZE)
    return out


def text(stem: int, shared: int, more: int, end: int) -> list[int]:
    """One of three stems up to some token, then one of three endings: texts share beginnings of every length."""
    return [stem * 100 + i for i in range(shared)] + [1000 + end * 100 + i for i in range(more)]


TEXTS = st.builds(text, st.integers(0, 2), st.integers(1, 18), st.integers(0, 9), st.integers(0, 2))
TENANTS = st.sampled_from(["", "a"])


class StoreMachine(RuleBasedStateMachine):
    """A store of six RAM slots over a disk of about thirty chunks, beside a model that only knows what was ever stored."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="lmkv-state-"))
        self.layout = lmkv.KVLayout.dense(layers=LAYERS, heads=HEADS, head_size=SIZE, dtype="uint8", chunk_tokens=CHUNK)
        self.stored: dict[str, list[list[int]]] = {}
        self.leases: list[tuple[lmkv.Lease, list[int], str]] = []
        self.reservations: list[tuple[lmkv.Reservation, list[int], str]] = []
        self.corrupt = 0
        self.given_up = 0  # events of writes that were, since the last flush, clear or restart
        self.saves = 0  # since the last restart or clear, which would else leave little to find

    @initialize(
        policy=st.sampled_from(["lru", "lfu", "fifo", "mru", "s3fifo"]),
        partial=st.booleans(),
        disk=st.booleans(),
        cache=st.booleans(),
    )
    def open(self, policy: str, partial: bool, disk: bool, cache: bool) -> None:
        self.config = lmkv.StoreConfig(
            model="m",
            ram_capacity=6 * 8192,
            ram_extent=8192,
            ram_policy=policy,
            ram_cache=cache or not disk,
            disk_capacity=512 * 1024 if disk else 0,
            disk_policy=policy,
            disk_path=str(self.folder / "disk"),
            save_partial_chunk=partial,
            lease_seconds=3600,
        )
        self.disk = disk
        self.reopen()

    def reopen(self) -> None:
        self.given_up = 0
        self.store = lmkv.Store(self.config, self.layout, on_event=self.seen)

    def seen(self, event: lmkv.Event) -> None:
        self.corrupt += event.kind in ("corrupt", "tier_failed")
        self.given_up += event.kind == "write_dropped"

    def space(self, tenant: str) -> lmkv.Namespace:
        return self.store.namespace.replace(salt=tenant)

    def longest(self, tokens: list[int], tenant: str) -> int:
        """The most leading tokens that any text ever stored shares."""
        best = 0
        for known in self.stored.get(tenant, []):
            shared = 0
            while shared < min(len(known), len(tokens)) and known[shared] == tokens[shared]:
                shared += 1
            best = max(best, shared)
        return best

    @rule(tokens=TEXTS, tenant=TENANTS)
    def save(self, tokens: list[int], tenant: str) -> None:
        new = self.store.store(tokens, truth(tokens, tenant), namespace=self.space(tenant))
        assert 0 <= new <= len(tokens)
        self.saves += 1
        self.stored.setdefault(tenant, []).append(tokens)

    @rule(tokens=TEXTS, end=st.integers(0, 2), tenant=TENANTS)
    def save_two(self, tokens: list[int], end: int, tenant: str) -> None:
        """Two texts that part somewhere."""
        self.save(tokens, tenant)
        self.save(tokens[: len(tokens) * 2 // 3] + [2000 + end] * 5, tenant)

    @rule(tokens=TEXTS, tenant=TENANTS)
    def load(self, tokens: list[int], tenant: str) -> None:
        match = self.store.lookup(tokens, namespace=self.space(tenant))
        assert match.hit_tokens <= self.longest(tokens, tenant)
        out = np.full((LAYERS, 2, HEADS, len(tokens), SIZE), 0xEE, np.uint8)
        with self.store.lease(match) as lease:
            assert lease.hit_tokens <= match.hit_tokens
            if not self.disk:
                assert lease.hit_tokens == match.hit_tokens
            got = self.store.retrieve(lease, out)
            assert got == lease.hit_tokens
        wanted = truth(tokens, tenant)
        assert np.array_equal(out[:, :, :, :got], wanted[:, :, :, :got])
        assert np.all(out[:, :, :, got:] == 0xEE)

    @rule(tokens=TEXTS, tenant=TENANTS)
    def prefetch(self, tokens: list[int], tenant: str) -> None:
        match = self.store.lookup(tokens, namespace=self.space(tenant))
        assert 0 <= self.store.prefetch(match).result(30) <= match.hit_tokens

    @precondition(lambda self: len(self.leases) < 2)
    @rule(tokens=TEXTS, tenant=TENANTS)
    def hold(self, tokens: list[int], tenant: str) -> None:
        lease = self.store.lease(self.store.lookup(tokens, namespace=self.space(tenant)))
        self.leases.append((lease, tokens, tenant))

    @precondition(lambda self: self.leases)
    @rule(back=st.booleans())
    def let_go(self, back: bool) -> None:
        lease, tokens, tenant = self.leases.pop(-1 if back else 0)
        out = np.zeros((LAYERS, 2, HEADS, len(tokens), SIZE), np.uint8)
        got = self.store.retrieve(lease, out)
        assert got == lease.hit_tokens, "a leased chunk was evicted"
        assert np.array_equal(out[:, :, :, :got], truth(tokens, tenant)[:, :, :, :got])
        lease.release()

    @precondition(lambda self: len(self.reservations) < 2)
    @rule(tokens=TEXTS, tenant=TENANTS)
    def reserve(self, tokens: list[int], tenant: str) -> None:
        reservation = self.store.reserve(tokens, namespace=self.space(tenant))
        for slot in reservation.slots:
            slot.payload[:] = bytes([0xBB]) * len(slot.payload)  # what must never be seen
        self.reservations.append((reservation, tokens, tenant))

    @precondition(lambda self: self.reservations)
    @rule(commit=st.booleans())
    def end_reservation(self, commit: bool) -> None:
        reservation, tokens, tenant = self.reservations.pop(0)
        if not commit:
            reservation.abort()
            return
        kv = truth(tokens, tenant)
        for slot in reservation.slots:
            slot.payload[:] = kv[:, :, :, slot.start : slot.start + slot.tokens].tobytes()
        reservation.commit()
        self.stored.setdefault(tenant, []).append(tokens)

    @rule(tokens=TEXTS, tenant=TENANTS)
    def search(self, tokens: list[int], tenant: str) -> None:
        match = self.store.lookup(tokens, anywhere=True, namespace=self.space(tenant))
        end = match.hit_tokens
        for hit in match.elsewhere:
            assert hit.start >= end
            end = hit.start + hit.tokens
            there = tokens[hit.start : end]
            texts = self.stored.get(tenant, [])
            assert any(known[hit.position : hit.position + hit.tokens] == there for known in texts)

    @precondition(lambda self: self.saves > 3)
    @rule()
    def flush(self) -> None:
        assert self.store.flush(30) == (not self.given_up)
        self.given_up = 0

    @precondition(lambda self: self.saves > 15 and not self.leases and not self.reservations)
    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.given_up = 0
        assert self.store.flush(30)
        self.stored.clear()
        self.saves = 0

    @precondition(lambda self: self.saves > 10)
    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        """Close cleanly, or leave the disk as a killed process would: whatever was not written yet is gone."""
        self.saves = 0
        self.leases.clear()
        self.reservations.clear()
        old = self.store
        if clean or not self.disk:
            old.close()
        else:
            copy = self.folder / "crashed"
            shutil.copytree(self.folder / "disk", copy)
            old.close()
            shutil.rmtree(self.folder / "disk")
            copy.rename(self.folder / "disk")
        self.reopen()

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "store"):
            for tier in self.store._slow:
                tier.writer.flush(30)
            self.store._check()
            for tier in self.store._slow:
                tier.backend._check()
            assert self.corrupt == 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self.folder, ignore_errors=True)


StoreMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestStore = StoreMachine.TestCase
