"""The worker's half: it copies between slots and its KV tensors as the scheduler's half orders, and holds no index."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger

from ...errors import LayoutMismatchError, LMKVError, NativeError
from ...events import Emitter, Event
from ...pool import MappedPool
from ...transfer import Gpu, Pinner
from .copies import Copier, Running, SlotMemory
from .geometry import ShardGeometry, shard_geometry
from .plans import CopyOrder, Orders, PoolInfo, Report, ShardInfo
from .pools import local_pool

__all__ = ["WorkerHalf"]

logger = init_logger("vllm.lmkv.worker")


class WorkerHalf:
    """Copies of one worker.

    Args:
        vllm_config, kv_cache_config: vLLM's.
        layerwise: order the forward pass behind each layer of a load by itself.
        pin_at_start: pin the slots before the first step, not beside it.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *, layerwise: bool, pin_at_start: bool = False) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._layerwise = layerwise
        self._pin_at_start = pin_at_start
        self._pinner: Pinner | None = None
        self._geometry: ShardGeometry | None = None
        self._refusal = "no KV tensors were registered"
        self._rank = (0, 0)
        self._copier: Copier | None = None
        self._mapped: MappedPool | None = None
        self._running: list[Running] = []
        self._loading: list[Running] = []  # loads that this step's forward pass needs
        self._held: set[str] = set()
        self._begun_step = -1  # the step whose stores were begun
        self._step = -1
        self._failed_step = -1  # the last step whose forward pass may have read blocks that were never filled
        self._stores = True
        self._errors: set[int] = set()
        self._received: set[str] = set()
        self._report = Report()

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """Learn what vLLM's tensors are; what is not understood switches reuse off."""
        self._rank = (get_pp_group().rank_in_group, get_tp_group().rank_in_group)
        try:
            modules = self._vllm_config.compilation_config.static_forward_context
            self._geometry = shard_geometry(kv_caches, self._kv_cache_config, modules)
            self._refusal = ""
        except LayoutMismatchError as error:
            self._refusal = str(error)

    def shard_info(self) -> ShardInfo:
        """What the scheduler's half has to know before the first request."""
        geometry = self._geometry
        if geometry is None:
            return ShardInfo(refusal=self._refusal)
        node = None
        if geometry.device == "cuda":
            with contextlib.suppress(NativeError):  # what keeps the GPU from being used is said once copies are made
                node = Gpu.of(geometry.layers[0].parts[0].device.index).numa_node()
        names = tuple(layer.name for layer in geometry.layers)
        return ShardInfo(
            geometry.groups, names, geometry.latent, geometry.windows, geometry.block_tokens, geometry.device, node
        )

    # -- one step ------------------------------------------------------------------------------------------------------------

    def before_step(self, orders: Orders) -> None:
        """Let the stores of preempted requests end before their blocks are written by others, and begin loads if that is safe.

        The wire works while vLLM prepares the step's inputs; the forward pass waits in :meth:`start_loads`.
        """
        for running in self._running:
            if running.order.request in orders.preempted:
                running.wait()
        if orders.early:
            self._begin_loads(orders)

    def start_loads(self, orders: Orders) -> None:
        """Begin this step's loads, if they were not begun before, and have the forward pass wait for those it needs."""
        self._begin_loads(orders)
        if not self._layerwise:
            self._wait_for_loads()

    def _begin_loads(self, orders: Orders) -> None:
        if self._step == orders.step:
            return
        self._step = orders.step
        if orders.pool is not None and self._copier is None:
            self._open(orders.pool)
        awaited = sorted((order for order in orders.loads if order.waits), key=lambda order: order.tokens)
        whole = awaited[:-1] if orders.quick_pass else []  # layers are computed beside the last and largest load only
        for order in awaited + [order for order in orders.loads if not order.waits]:
            by_layers = order not in whole
            running = self._begin_load(order, behind=orders.behind, quick_pass=orders.quick_pass, by_layers=by_layers)
            self._running.append(running)
            if running.error and running.order.waits:
                self._failed_step = self._step
            elif running.order.waits:
                self._loading.append(running)

    def _wait_for_loads(self) -> None:
        assert self._copier is not None or not self._loading
        for running in self._loading:
            self._copier.wait_all(running)  # type: ignore[union-attr]
        self._loading.clear()

    def wait_for_layer(self, name: str) -> None:
        """Order the forward pass behind one layer of this step's loads."""
        if self._copier is not None:
            for running in self._loading:
                self._copier.wait_layer(running, name)

    def start_stores(self, orders: Orders) -> None:
        """Begin this step's stores, behind its forward pass."""
        self._loading.clear()
        if self._begun_step == orders.step:
            return
        self._begun_step = orders.step
        for order in orders.stores:
            if self._failed_step > orders.healed:  # the pass may have read blocks that were never filled
                self._running.append(Running(order, error="a load failed before the pass that computed it"))
            else:
                running = self._begin_store(order)
                self._running.append(running)
                if self._copier is not None and self._geometry is not None and any(self._geometry.windows):
                    self._copier.wait_all(running)  # a window's blocks are taken back as it moves on, while the request runs

    def finished(self, orders: Orders) -> tuple[set[str], set[str]]:
        """Requests that need their blocks no longer, and requests whose loads have ended."""
        if not orders.forward:
            self.start_stores(orders)
        self._held |= orders.held
        self._collect()
        busy = {running.order.request for running in self._running}
        stores_to_come = orders.forward and self._begun_step != orders.step
        if stores_to_come:
            busy |= {order.request for order in orders.stores}
        sent = self._held - busy
        self._held -= sent
        received, self._received = self._received, set()
        return sent, received

    def take_errors(self) -> set[int]:
        """Blocks that were to be filled and were not, since the last call."""
        errors, self._errors = self._errors, set()
        return errors

    def take_report(self) -> Report | None:
        """What ended since the last call."""
        report, self._report = self._report, Report()
        return report or None

    def close(self) -> None:
        """End all copies and let the slots go."""
        for running in self._running:
            running.wait()
        self._collect()
        self._copier = None
        if self._pinner is not None:
            self._pinner.close()
            self._pinner = None
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None

    # -- the rest ------------------------------------------------------------------------------------------------------------

    def _open(self, info: PoolInfo) -> None:
        geometry = self._geometry
        if geometry is None:
            return
        try:
            slots: SlotMemory | None = local_pool(info.key)
            if slots is None:
                if info.handle is None:
                    raise LayoutMismatchError(
                        "expected the slots of this process or shared ones; they are another process's own"
                    )
                slots = self._mapped = MappedPool(info.handle)
            self._stores = self._rank in info.stores
            self._copier = Copier(geometry, info.layout, info.first_layer[self._rank], slots)
            if info.pin and self._copier.device is not None:
                gpu = Gpu.of(self._copier.device)
                self._pinner = Pinner(slots, gpu, emit=Emitter(self._told), at_start=self._pin_at_start)
        except LMKVError as error:
            self._refusal = f"{type(error).__name__}: {error}"
            logger.warning("LMKV: rank %s can't reach the slots: %s", self._rank, self._refusal)
            self._report.unreachable = self._refusal
            return
        self._report.mapped += 1

    @staticmethod
    def _told(event: Event) -> None:
        logger.warning("LMKV: %s: %s", event.kind, dict(event.detail))

    def _begin_load(self, order: CopyOrder, *, behind: bool, quick_pass: bool, by_layers: bool) -> Running:
        if self._copier is None:
            return self._unmapped(order)
        layerwise = self._layerwise and order.waits and by_layers
        return self._copier.load(order, layerwise=layerwise, quick_pass=quick_pass, behind=behind)

    def _begin_store(self, order: CopyOrder) -> Running:
        if self._copier is None:
            return self._unmapped(order)
        return self._copier.store(order) if self._stores else Running(order)

    def _unmapped(self, order: CopyOrder) -> Running:
        return Running(order, error=self._refusal or "the slots are not mapped")

    def _collect(self) -> None:
        """Note copies that ended."""
        left: list[Running] = []
        for running in self._running:
            if not running.done():
                left.append(running)
                continue
            order = running.order
            self._report.done[order.id] = self._report.done.get(order.id, 0) + 1
            self._report.seconds[order.id] = running.seconds
            if running.error:
                self._report.failed.add(order.id)
                self._report.reasons.append(f"{order.request}: {running.error}")
                if order.load:
                    self._errors |= {block for ids in order.blocks for block in ids.tolist() if block > 0}
                    if order.waits:
                        self._failed_step = max(self._failed_step, self._step)
                        self._report.failed_step = self._failed_step
            if order.load and not order.waits:
                self._received.add(order.request)
        self._running = left
