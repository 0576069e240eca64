"""LMCache's names that are no settings of a store: old spellings, keys without effect here, variables of other programs."""

from __future__ import annotations

__all__ = ["ALIASES", "INERT", "OTHER_PREFIXES", "OTHER_VARIABLES", "PREFIX"]

PREFIX = "LMCACHE_"

#: Old spelling -> the one that LMCache uses since. LMCache itself has dropped all but the last two without a word.
ALIASES = {
    "enable_xpyd": "enable_pd",
    "nixl_role": "pd_role",
    "nixl_peer_host": "pd_peer_host",
    "nixl_peer_init_port": "pd_peer_init_port",
    "nixl_peer_alloc_port": "pd_peer_alloc_port",
    "nixl_proxy_host": "pd_proxy_host",
    "nixl_proxy_port": "pd_proxy_port",
    "controller_url": "controller_pull_url",
    "lmcache_worker_port": "lmcache_worker_ports",
    "plugin_locations": "runtime_plugin_locations",
    "external_backends": "storage_plugins",
}

#: Why a key has no effect and what to do, and the keys: LMCache 0.3.9.post2, 0.3.15 and 0.5.6 together.
_INERT_GROUPS = {
    "LMKV does not serve this remote storage of LMCache's; slow tiers are listed under 'tiers'": """
        audit_actual_remote_url remote_storage_plugins external_lookup_client remote_config_url
        mp_host mp_port maru_path maru_pool_size weka_path""",
    "engines share a tier such as lm:// (lmkv serve) or redis://, or read each other's RAM (peer_listen, nixl://host:port)": """
        enable_p2p p2p_host p2p_init_ports p2p_lookup_ports""",
    "prefillers store into, and decoders load from, a tier that both reach, such as lm:// (lmkv serve) or redis://": """
        enable_pd pd_role pd_buffer_size pd_buffer_device pd_peer_host
        pd_peer_init_port pd_peer_alloc_port pd_peer_query_port pd_proxy_host pd_proxy_port pd_allocation_timeout_sec
        pd_shutdown_timeout_sec pd_condition_poll_interval_sec pd_max_prefill_len pd_backend_mode pd_skip_proxy_notification
        pd_bidirectional transfer_channel""",
    "NIXL between engines is peer_listen and tiers nixl://host:port; storage moved by NIXL, GDS included, is backend: nixl": """
        nixl_backends enable_nixl gds_path gds_path_sharding gds_buffer_size use_gds gds_backend cufile_buffer_size""",
    "LMKV has no controller: a tier that engines share is asked directly": """
        enable_controller lmcache_instance_id controller_pull_url controller_reply_url
        lmcache_worker_ports lmcache_worker_ids lmcache_worker_heartbeat_delay_time lmcache_worker_heartbeat_time app_id""",
    "LMKV does not blend texts; lookup(anywhere=True) finds them": """
        enable_blending blend_recompute_ratios blend_thresholds blend_check_layers blend_min_tokens blend_special_str""",
    "LMKV has no plugins of LMCache's kind; backends, policies and codecs register by entry point": """
        runtime_plugin_locations storage_plugins script_allowed_imports run_script_api_enabled""",
    "LMKV has no internal API server; the standalone service has its own statistics": """
        internal_api_server_enabled internal_api_server_host internal_api_server_port_start
        internal_api_server_include_index_list internal_api_server_socket_path_prefix enable_chunk_statistics
        chunk_statistics_auto_start_statistics chunk_statistics_auto_exit_timeout_hours
        chunk_statistics_auto_exit_target_unique_chunks chunk_statistics_strategy enable_kv_events""",
    "LMKV's pool grows lazily and by itself; ram_huge_pages, ram_numa_node and ram_extent shape it": """
        local_cpu_use_hugepages reserve_local_cpu_size enable_lazy_memory_allocator lazy_memory_initial_ratio
        lazy_memory_expand_trigger_ratio lazy_memory_step_ratio lazy_memory_safe_size""",
    "LMKV's lookups never wait for slow tiers, and loads run beside the caller": """
        enable_async_loading lookup_timeout_ms enable_scheduler_bypass_lookup lookup_server_worker_ids""",
    "nothing in LMKV corresponds to it": """
        local_disk_path_sharding use_layerwise save_decode_cache retrieve_locations store_location py_enable_gc
        priority_limit min_retrieve_tokens hit_miss_ratio use_gpu_connector_v3 pin_check_interval_sec
        enable_hidden_state_cache max_hidden_state_cpu_size hidden_state_layers hidden_states_retrieve_mode""",
}
INERT = {key: why for why, keys in _INERT_GROUPS.items() for key in keys.split()}

#: ``LMCACHE_*`` variables outside the configuration table. They steer LMCache's own processes: passed over in silence.
_OTHER_NAMES = """
        CONFIG_FILE USE_EXPERIMENTAL CONTROLLER_CONFIG_FILE COORDINATOR_ADVERTISE_IP
        COORDINATOR_EVENT_FLUSH_INTERVAL COORDINATOR_EVENT_REPORTING COORDINATOR_HEARTBEAT_INTERVAL COORDINATOR_URL
        DEVICE_BACKEND DISABLE_BANNER FORCE_SKIP_SAVE GPU_STAGING_BUFFER_BYTES LOG_LEVEL MP_TRANSFER_MODE MQ_TIMEOUT
        MUSA_HANDLE_TRANSFER MUSA_NATIVE_KV_TRANSFER OFFLOAD_RPC_PORT PLUGIN_CONFIG PLUGIN_ROLE PLUGIN_WORKER_COUNT
        PLUGIN_WORKER_ID REQUEST_TELEMETRY_ENDPOINT REQUEST_TELEMETRY_TYPE RESP_HOST RESP_PASSWORD RESP_PORT RESP_USERNAME
        RUNTIME_PLUGIN_CONFIG RUNTIME_PLUGIN_ROLE RUNTIME_PLUGIN_WORKER_COUNT RUNTIME_PLUGIN_WORKER_ID SERVER_URL TRACK_USAGE
        USAGE_TRACK_INTERVAL USAGE_TRACK_URL"""
OTHER_VARIABLES = frozenset(PREFIX + name for name in _OTHER_NAMES.split())
OTHER_PREFIXES = tuple(PREFIX + name for name in ("AEROSPIKE_", "CONTROLLER_", "EC_"))
