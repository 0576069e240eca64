"""The scheduler's half: one store beside vLLM's scheduler, which orders loads and stores and learns when they are done."""

from __future__ import annotations

import itertools
import math
import time
import uuid
from collections.abc import Iterable
from typing import Any

from vllm.logger import init_logger

from ...chunks import Namespace
from ...errors import LMKVError
from ...events import Event
from ...handles import Lease, Reservation
from ...layout import KVLayout
from ...store import Store
from ..engine_config import on_gpus_node
from .failures import spoilt_requests
from .lookups import Lookups
from .plans import CopyOrder, Orders, PoolInfo, Report, ShardInfo, SlotParts, copy_order, parts_between
from .pools import drop_pool, offer_pool
from .requests import CopyRecord, Filling, RequestState
from .settings import Settings, unserved, with_model
from .stats import Counts, Published, rate
from .storing import store_orders
from .texts import AdapterVersions, must_compute, namespace_of, refusal, wishes_of

__all__ = ["SchedulerHalf"]

logger = init_logger("vllm.lmkv.scheduler")

#: What a load may make others wait for: more, and it is made between steps while they run. Half a millisecond of a fast wire.
_MOST_BEFORE_A_STEP = 32 << 20
#: A token to compute takes at least as long as so many to load: a forward pass of few tokens is over before their KV is there.
_LOADED_A_COMPUTED = 16


class SchedulerHalf:
    """Lookups, leases, reservations and orders of one engine.

    Args:
        settings: the connector's.
        vllm_config: vLLM's.
    """

    def __init__(self, settings: Settings, vllm_config: Any) -> None:
        self._settings = settings
        self._vllm_config = vllm_config
        transfer = vllm_config.kv_transfer_config
        self._may_load = bool(transfer.is_kv_consumer)
        self._may_store = bool(transfer.is_kv_producer)
        self.store: Store | None = None
        self.refusal = "the workers have not said yet what their KV is"
        self.counts = Counts()
        events = vllm_config.kv_events_config
        self.published = Published() if events is not None and events.enable_kv_cache_events else None
        self._shards: dict[tuple[int, int], ShardInfo] = {}
        self._pool: PoolInfo | None = None
        self._mapped = 0
        self._extra = ""
        self._adapters = AdapterVersions()
        self._lookups = Lookups(self.counts)
        self._requests: dict[str, RequestState] = {}
        self._copies: dict[int, CopyRecord] = {}
        self._numbers = itertools.count(1)  # of copies
        self._loads: list[CopyOrder] = []
        self._newly_held: set[str] = set()
        self._restarted: set[str] = set()  # preempted since the last step, because a load failed
        self._step = 0
        self._healed = -1
        self._freed_step = 0  # the last step up to which a request may have run whose blocks came free
        self._steps_in_flight = math.inf  # at most, the one that is being scheduled counted
        self._renewed = False  # leases, in the step that is being scheduled
        self._on_gpu = False
        self._going_on: list[str] = []  # requests of the last step that had run before
        self._bypass_reasons: set[str] = set()
        for line in settings.warnings:
            logger.warning("LMKV: %s", line)

    # -- opening -------------------------------------------------------------------------------------------------------------

    def open(self, shards: dict[tuple[int, int], ShardInfo]) -> None:
        """Open the store for the KV that the workers have; what can't be served leaves it closed, with a warning.

        Args:
            shards: by ``(pp_rank, tp_rank)``.
        """
        self._shards = shards
        why = next((shard.refusal for shard in shards.values() if shard.refusal), "") or unserved(self._vllm_config, shards)
        if why:
            self.refusal = why
            logger.warning("LMKV: reuse is off, everything is computed: %s", why)
            return
        self.refusal = ""
        if not any(next(iter(shards.values())).windows):  # a window's blocks come free while a request runs
            drafts = self._vllm_config.speculative_config is not None  # computed behind the answer that ends a step
            self._steps_in_flight = getattr(self._vllm_config, "max_concurrent_batches", math.inf) + drafts
        self._on_gpu = any(shard.device == "cuda" for shard in shards.values())
        replicated = all(shard.latent for shard in shards.values())
        first_layer: dict[tuple[int, int], int] = {}
        groups: list[Any] = []
        layers = 0
        stores = frozenset(rank for rank in shards if not (replicated and rank[1] > 0))
        for rank in sorted(shards):
            if rank not in stores:
                first_layer[rank] = first_layer[rank[0], 0]
                continue
            first_layer[rank] = layers
            groups.extend(shards[rank].groups)
            layers += sum(group.layers for group in shards[rank].groups)
        config = self._settings.store
        layout = KVLayout(tuple(groups), config.chunk_size or 256)
        parallel = self._vllm_config.parallel_config
        shared = len(shards) > 1 or parallel.distributed_executor_backend not in (None, "uni")
        names = [shards[rank].layers for rank in sorted(stores)]
        config, self._extra = with_model(config, self._vllm_config, layers=names, shared=shared)
        config = on_gpus_node(config, [shard.numa_node for shard in shards.values()])
        self.store = Store(config, layout, on_event=self._heard)
        self.store.namespace = self.store.namespace.replace(extra=self._extra)
        key = uuid.uuid4().hex
        offer_pool(key, self.store._ram.pool)
        if config.ram_pin and self._on_gpu:
            # mapped now, so that workers can pin ahead of use; pages come when they do
            self.store._ram.pool.grow_ahead(config.ram_capacity)
        handle = self.store.pool_handle() if config.ram_shared else None
        self._pool = PoolInfo(key, handle, layout, first_layer, stores, config.ram_pin)
        tiers = ", ".join(f"{tier.name} {tier.capacity_bytes / 1024**3:.1f} GiB" for tier in self.store.stats().tiers)
        logger.info(
            "LMKV: chunks of %d tokens, %d bytes of KV a token, tiers: %s", layout.chunk_tokens, layout.token_bytes, tiers
        )

    def _heard(self, event: Event) -> None:
        """Listen to the store."""
        self.counts.event(event)
        if self.published is not None:
            self.published.event(event)
        if event.kind in ("tier_disabled", "tier_enabled", "unpinned", "corrupt", "reservation_lost", "lease_expired"):
            logger.warning("LMKV: %s %s: %s", event.tier, event.kind, dict(event.detail))

    # -- looking up ----------------------------------------------------------------------------------------------------------

    def arrived(self, request: Any) -> RequestState:
        """Begin to remember a request."""
        state = self._requests.get(request.request_id)
        if state is not None and state.request is request:  # not one of that name that has ended, but for its copies
            return state
        if getattr(request, "resumable", False):  # its text may be cut while it runs
            self._steps_in_flight = math.inf
        wishes = wishes_of(request.kv_transfer_params)
        namespace = None
        why = self.refusal or refusal(request)
        if self.store is not None and not why:
            namespace = self._namespace(request, wishes)
        state = self._requests[request.request_id] = RequestState(request, namespace, wishes)
        if why:
            self._bypass(state, why)
        for key in wishes.unknown:
            logger.warning("LMKV: request %s: unknown key or value: %r in kv_transfer_params", state.id, key)
        return state

    def _namespace(self, request: Any, wishes: Any) -> Namespace:
        assert self.store is not None
        namespace = namespace_of(self.store.namespace, request, wishes, self._adapters)
        if self.published is not None and request.lora_request is not None:
            self.published.named(namespace.root, request.lora_request.lora_name)
        return namespace

    def _bypass(self, state: RequestState, why: str) -> None:
        self.counts.bypassed(why)
        level = logger.debug if why in self._bypass_reasons else logger.info
        level("LMKV: Reqid: %s is served without reuse: %s", state.id, why)
        self._bypass_reasons.add(why)

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """How many tokens behind ``computed`` can be loaded, and whether between steps; ``None``: ask again."""
        state = self.arrived(request)
        state.computed = computed
        if state.namespace is None or self.store is None or self.refusal or not self._may_load:
            return 0, False
        if state.wishes.skip_load or state.no_load or must_compute(request):
            return 0, False
        if self._mapped < len(self._shards):
            return None, False  # an empty step, in which the workers look for the slots
        if not self._renewed:
            self._renew()
        most = request.num_tokens - 1  # the last token is computed: it yields the next one
        if most - computed < self._settings.min_load_tokens:
            return 0, False
        if not self._lookups.lease(self.store, state, most):
            return None, False
        assert state.lease is not None
        hit = min(state.lease.hit_tokens, most)
        if hit - computed < self._settings.min_load_tokens:
            return 0, False
        state.between_steps = self._between_steps(hit - computed)
        return hit - computed, state.between_steps

    def _between_steps(self, tokens: int) -> bool:
        """Whether a load of so many tokens is made while others run, who would all wait for it if it came before a step."""
        if self._settings.load != "auto":
            return self._settings.load == "async"
        others = any(name in self._requests and not self._requests[name].ended for name in self._going_on)
        if not self._on_gpu or not others:  # a CPU's copies take the processors that others run on
            return False
        behind = any(record.order.load and not record.order.waits for record in self._copies.values())
        return behind or tokens * self._token_bytes > _MOST_BEFORE_A_STEP

    def allocated(self, request: Any, block_ids: tuple[list[int], ...], external: int) -> None:
        """vLLM gave the request blocks; ``external`` tokens of them are to be loaded."""
        state = self.arrived(request)
        if external <= 0:
            state.drop_lease()
            return
        lease = state.lease
        assert self.store is not None
        assert lease is not None, "vLLM loads only what was found for the request"
        state.lease, lease.until = None, math.inf  # a copy that takes long must not lose what it copies from
        start, stop, width = state.computed, state.computed + external, self.store.layout.chunk_tokens
        state.hit_tokens = lease.hit_tokens
        whole = lease.hit_tokens >= request.num_prompt_tokens  # the short last chunk, too
        state.stored_to = max(state.stored_to, lease.hit_tokens if whole else lease.hit_tokens // width * width)
        order = self._order(state, parts_between(lease.spans, start, stop), block_ids, load=True, waits=not state.between_steps)
        self._loads.append(order)
        self._copies[order.id] = CopyRecord(order, state, lease)
        state.copies.add(order.id)
        self.counts.add(hit_tokens=external)
        if self._settings.log_requests:
            logger.info(
                "LMKV: Reqid: %s, Total tokens %d, LMKV hit tokens: %d, need to load: %d",
                *(state.id, request.num_tokens, lease.hit_tokens, external),
            )

    def _order(
        self, state: RequestState, parts: SlotParts, blocks: Iterable[list[int]], *, load: bool, waits: bool = True
    ) -> CopyOrder:
        sizes = next(iter(self._shards.values())).block_tokens
        return copy_order(next(self._numbers), state.id, parts, blocks, sizes, load=load, waits=waits)

    # -- a step --------------------------------------------------------------------------------------------------------------

    def orders(self, output: Any) -> Orders:
        """What workers have to do in the step that vLLM has just scheduled."""
        self._renew()
        self._step += 1
        preempted = frozenset(output.preempted_req_ids or ()) | self._restarted
        if preempted:
            self._freed_step = self._step
        for name in preempted:
            state = self._requests.get(name)
            if state is not None:
                state.blocks = []
                self._drop_filling(state)
        self._follow_blocks(output)
        stores: list[CopyOrder] = []
        if self.store is not None and self._may_store and not self.refusal:
            windows = next(iter(self._shards.values())).windows
            for state, steps in self._scheduled(output):
                for order, filling in store_orders(self.store, self._settings, state, steps, windows, self._order):
                    stores.append(order)
                    self._copies[order.id] = CopyRecord(order, state, filling)
                    self._lookups.filling.update(chunk.key for chunk in filling.reservation.chunks)
                    state.copies.add(order.id)
        cleared = bool(getattr(output, "new_block_ids_to_zero", None))
        orders = Orders(
            step=self._step,
            pool=self._pool if self._mapped < len(self._shards) else None,
            loads=self._loads,
            stores=stores,
            held=frozenset(self._newly_held),
            preempted=preempted,
            forward=output.total_num_scheduled_tokens > 0,
            early=not cleared,
            behind=cleared or self._step - self._freed_step < self._steps_in_flight,
            quick_pass=_LOADED_A_COMPUTED * output.total_num_scheduled_tokens <= sum(order.tokens for order in self._loads),
            healed=self._healed,
        )
        self._loads, self._newly_held, self._restarted, self._renewed = [], set(), set(), False
        self._going_on = list(output.scheduled_cached_reqs.req_ids)
        return orders

    def _follow_blocks(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            state = self._requests.get(new.req_id)
            if state is not None:
                state.blocks, state.since = [list(ids) for ids in new.block_ids], self._step
                if not any(self._copies[number].order.load for number in state.copies):
                    state.computing = (state.request.num_prompt_tokens - new.num_computed_tokens, time.monotonic())
        cached = output.scheduled_cached_reqs
        for name, new_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            state = self._requests.get(name)
            if state is None:
                continue
            self._note_speed(state)
            if name in cached.resumed_req_ids:
                state.blocks, state.since = [list(ids) for ids in new_ids or ()], self._step
                state.computing = None
            elif new_ids is not None:
                for mine, more in zip(state.blocks, new_ids, strict=True):
                    mine.extend(more)

    def _note_speed(self, state: RequestState) -> None:
        """Learn how long a prompt took once its first answer is there."""
        if state.computing is not None and state.request.num_output_tokens:
            tokens, begun = state.computing
            self._lookups.computed.add(tokens, time.monotonic() - begun)
            state.computing = None

    def _scheduled(self, output: Any) -> Iterable[tuple[RequestState, tuple[int, int]]]:
        """Requests of this step, with the tokens they have computed before and will have behind it."""
        cached = output.scheduled_cached_reqs
        pairs = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        pairs += zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        for name, before in pairs:
            state = self._requests.get(name)
            if state is not None and state.namespace is not None and not state.wishes.skip_save:
                yield state, (before, before + output.num_scheduled_tokens[name])

    def _renew(self) -> None:
        """A lease that is still needed must not end because a step took long."""
        self._renewed = True
        for state in self._requests.values():
            if state.lease is not None:
                state.lease.renew()

    # -- afterwards ----------------------------------------------------------------------------------------------------------

    def learn(self, report: Report | None) -> None:
        """Take workers' reports: commit what was stored, release what was loaded."""
        if report is None:
            return
        self._mapped += report.mapped
        if report.unreachable and not self.refusal:
            self.refusal = report.unreachable
            logger.warning("LMKV: reuse is off, everything is computed: %s", self.refusal)
        self._healed = max(self._healed, report.failed_step)
        for reason in report.reasons:
            logger.warning("LMKV: a copy failed: %s", reason)
        for number, count in report.done.items():
            record = self._copies[number]
            record.reports += count
            record.failed |= number in report.failed
            record.seconds = max(record.seconds, report.seconds.get(number, 0.0))
            if record.reports == len(self._shards):
                del self._copies[number]
                self._ended(record)

    def _ended(self, record: CopyRecord) -> None:
        state = record.state
        state.copies.discard(record.order.id)
        if isinstance(record.hold, Lease):
            self._loaded(record, record.hold)
        else:
            self._stored(record, record.hold)
        if state.ended and not state.copies and self._requests.get(state.id) is state:
            del self._requests[state.id]

    def _loaded(self, record: CopyRecord, lease: Lease) -> None:
        lease.release()
        order, state = record.order, record.state
        if record.failed:
            state.no_load, state.stored_to = True, 0  # what was lost since is kept anew
            self.counts.add(load_failures=1)
            return
        size = order.tokens * self._token_bytes
        self.counts.loaded(order.tokens, size, record.seconds)
        if self._settings.log_requests:
            logger.info(
                "LMKV: Retrieved %d out of %d required tokens (from %d total tokens). size: %.4f gb, cost %.4f ms, "
                "throughput: %.4f GB/s; for request %s",
                *(order.tokens, order.tokens, state.hit_tokens, *rate(size, record.seconds), state.id),
            )

    def _stored(self, record: CopyRecord, filling: Filling) -> None:
        order, state, reservation = record.order, record.state, filling.reservation
        filling.copies -= 1
        filling.failed |= record.failed
        if filling.copies == 0 and (filling.failed or filling.reached == filling.stop):
            self._lookups.filling.difference_update(chunk.key for chunk in reservation.chunks)
        if filling.failed:
            if state.filling is filling:
                state.filling = None
            filling.drop()
            state.stored_to = min(state.stored_to, reservation.chunks[0].start)
            self.counts.add(store_failures=int(record.failed))
            return
        if filling.copies or filling.reached < filling.stop:
            return
        stored, size = self._commit(state, reservation), order.tokens * self._token_bytes
        self.counts.stored(stored, size, record.seconds)
        if self._settings.log_requests:
            logger.info(
                "LMKV: Stored %d out of total %d tokens. size: %.4f gb, cost %.4f ms, throughput: %.4f GB/s; for request %s",
                *(stored, order.tokens, *rate(size, record.seconds), state.id),
            )

    def _drop_filling(self, state: RequestState) -> None:
        if state.filling is not None:
            self._lookups.filling.difference_update(chunk.key for chunk in state.filling.reservation.chunks)
            state.drop_filling()

    @property
    def _token_bytes(self) -> int:
        return self.store.layout.token_bytes if self.store is not None else 0

    def _commit(self, state: RequestState, reservation: Reservation) -> int:
        try:
            self._lookups.generation += 1
            stored = reservation.commit()
        except LMKVError as error:
            logger.warning("LMKV: what was copied can't be kept: %s", error)
            return 0
        if self.published is not None:
            self.published.stored(reservation)
        return stored

    def finished(self, request: Any) -> bool:
        """A request has ended; whether its blocks must stay until its copies are done."""
        self._freed_step = self._step
        state = self._requests.get(request.request_id)
        if state is None:
            return False
        self._note_speed(state)
        state.drop_lease()
        self._drop_filling(state)
        state.prefetch = None
        state.ended = True
        if not state.copies:
            del self._requests[state.id]
            return False
        storing = any(not self._copies[number].order.load for number in state.copies)
        if storing:
            self._newly_held.add(state.id)
        return storing

    def spoilt(self, invalid: set[int]) -> tuple[set[str], set[int]] | None:
        """Requests to begin again, and the blocks that could not be filled for them; ``None``: vLLM does what is right."""
        windows = next(iter(self._shards.values())).windows
        if len(windows) == 1 and not any(windows) and not self._vllm_config.scheduler_config.async_scheduling:
            return None
        caching = bool(self._vllm_config.cache_config.enable_prefix_caching)
        names, blocks = spoilt_requests(invalid, self._copies.values(), self._requests.values(), caching=caching)
        self._restarted |= names
        self._freed_step = self._step
        return names, blocks

    @property
    def holds_blocks(self) -> bool:
        """Whether blocks of finished requests will come free once their copies are done."""
        return any(state.ended for state in self._requests.values())

    def reset(self) -> bool:
        """Forget everything; what comes is kept under other names, since vLLM's weights may have been changed."""
        if self.store is not None:
            self.store.namespace = self.store.namespace.replace(extra=f"{self._extra};reset={uuid.uuid4().hex}")
            for state in self._requests.values():
                self._drop_filling(state)
                anew = state.namespace is not None and not state.request.num_computed_tokens
                state.begin_anew(self._namespace(state.request, state.wishes) if anew else None)
            for filling in (record.hold for record in self._copies.values() if isinstance(record.hold, Filling)):
                filling.failed = True
            self.store.clear()
            self._lookups.generation += 1
            if self.published is not None:
                self.published.cleared()
        return True

    def take_counts(self) -> dict[str, Any]:
        """What happened since the last call, with the RAM tier's state; empty if nothing did."""
        taken = self.counts.take()
        if taken and self.store is not None:
            ram = self.store.stats().tiers[0]
            taken |= {"ram_used_bytes": ram.used_bytes, "ram_capacity_bytes": ram.capacity_bytes, "ram_chunks": ram.chunks}
        return taken

    def close(self) -> None:
        """Give up what is under way, write what waits for slow tiers, close the store."""
        for state in self._requests.values():
            state.drop_lease()
        for record in self._copies.values():
            record.hold.release() if isinstance(record.hold, Lease) else record.hold.reservation.abort()
        self._copies.clear()
        self._requests.clear()
        if self._pool is not None:
            drop_pool(self._pool.key)
        if self.store is not None:
            self.store.close()
            self.store = None
            self.refusal = "the store was closed"
