"""``LMKVConnector``: vLLM's interface of a KV connector, handed on to the scheduler's or the worker's half."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # an older vLLM does not tell sources apart
    CacheHitSource = None

from .failures import restart_after_failed_loads
from .hashing import prepare_requests
from .metrics import LMKVPromMetrics, LMKVStats
from .plans import Orders, Report, ShardInfo
from .scheduler import SchedulerHalf
from .settings import read_settings
from .worker import WorkerHalf

__all__ = ["LMKVConnector"]


class LMKVConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps and reuses the KV of vLLM's requests in an :class:`lmkv.Store`.

    vLLM makes one for its scheduler and one for each worker. Settings come from ``kv_connector_extra_config``; ``docs/vllm.md``
    lists them.
    """

    if CacheHitSource is not None:
        _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = read_settings(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(settings, vllm_config)
            prepare_requests(LMKVConnector)
            restart_after_failed_loads(LMKVConnector)
        else:
            self._worker = WorkerHalf(
                vllm_config, kv_cache_config, layerwise=settings.layerwise, pin_at_start=settings.pin == "start"
            )

    # -- the scheduler's half ------------------------------------------------------------------------------------------------

    @property
    def _control(self) -> SchedulerHalf:
        assert self._scheduler is not None, "this connector was made for a worker"
        return self._scheduler

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may drop a store: it is a miss later."""
        return False

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]) -> None:
        """What the workers found their KV to be."""
        shards = {rank: info for rank, info in metadata.items() if isinstance(info, ShardInfo)}
        self._control.open(shards)

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """The same from a vLLM that knows tensor-parallel ranks only."""
        self.set_xfer_handshake_metadata_pp_aware({(0, rank): info for rank, info in metadata.items()})

    def on_new_request(self, request: Any) -> None:
        """See vLLM's base class."""
        self._control.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See vLLM's base class."""
        return self._control.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See vLLM's base class."""
        self._control.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """See vLLM's base class."""
        return self._control.orders(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """See vLLM's base class."""
        report = connector_output.kv_connector_worker_meta
        self._control.learn(report if isinstance(report, Report) else None)

    def _spoilt(self, invalid: set[int]) -> tuple[set[str], set[int]] | None:
        """Requests to begin again, see :mod:`.failures`."""
        return self._control.spoilt(invalid)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See vLLM's base class."""
        return self._control.finished(request), None

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        """See vLLM's base class."""
        return self._control.finished(request), None

    def has_pending_block_frees(self) -> bool:
        """See vLLM's base class."""
        return self._control.holds_blocks

    def reset_cache(self) -> bool | None:
        """See vLLM's base class."""
        return self._control.reset()

    # -- the worker's half ---------------------------------------------------------------------------------------------------

    @property
    def _copies(self) -> WorkerHalf:
        assert self._worker is not None, "this connector was made for the scheduler"
        return self._worker

    def _orders(self) -> Orders | None:
        """This step's orders, if there are any."""
        bound = self._connector_metadata
        return bound if isinstance(bound, Orders) else None

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """See vLLM's base class."""
        self._copies.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """See vLLM's base class."""
        return self._copies.shard_info()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """See vLLM's base class."""
        if isinstance(kv_connector_metadata, Orders):
            self._copies.before_step(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """See vLLM's base class."""
        if (orders := self._orders()) is not None:
            self._copies.start_loads(orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """See vLLM's base class."""
        self._copies.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: stores begin behind the forward pass."""

    def wait_for_save(self) -> None:
        """Begin the step's stores; their blocks are held until they are done."""
        if (orders := self._orders()) is not None:
            self._copies.start_stores(orders)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """See vLLM's base class."""
        orders = self._orders()
        if orders is None:
            return None, None
        sent, received = self._copies.finished(orders)
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See vLLM's base class."""
        return self._copies.take_errors()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """See vLLM's base class."""
        return self._copies.take_report()

    # -- both ----------------------------------------------------------------------------------------------------------------

    def take_events(self) -> Iterable[Any]:
        """See vLLM's base class."""
        published = self._control.published
        return published.take(self._control.store) if published is not None else ()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Counts of the scheduler's half, which knows of all copies."""
        taken = self._scheduler.take_counts() if self._scheduler is not None else None
        return LMKVStats(data=taken) if taken else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """See vLLM's base class."""
        return LMKVStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KVConnectorPromMetrics | None:
        """See vLLM's base class."""
        return LMKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """See vLLM's base class."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Loads layer by layer need Python between the layers."""
        return read_settings(extra_config).layerwise
