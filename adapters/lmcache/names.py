"""LMCache's names that are no settings of a store: old spellings, keys without effect here, variables of other programs."""

from __future__ import annotations

__all__ = ["ALIASES", "EXTRA_WAYS", "INERT", "OTHER_PREFIXES", "OTHER_VARIABLES", "PREFIX"]

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
        maru_path maru_pool_size""",
    "a storage of your own is a backend, registered by entry point and listed under 'tiers' (docs/writing-a-backend.md)": """
        remote_storage_plugins""",
    "a mounted file system is disk_path for one machine, and a tier file:///mnt/shared/kv for several": """weka_path""",
    "LMKV has no server process to configure: each engine has its store, and tiers are what they share": """
        mp_host mp_port external_lookup_client remote_config_url""",
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
    "chunks go to the directories of disk_paths by their key, whichever rank they are of": """local_disk_path_sharding""",
    "only engines load layer by layer: layerwise of the vLLM connector; on by default under SGLang": """use_layerwise""",
    "the vLLM connector has save_decode_cache; under SGLang generated tokens are always kept": """save_decode_cache""",
    "all tiers are written and asked; ram_cache, disk_capacity and tiers say which ones there are": """
        retrieve_locations store_location""",
    "min_load_tokens of the engines' connectors": """min_retrieve_tokens""",
    "a request that is not to be kept says so itself (skip_save in its kv_transfer_params)": """priority_limit""",
    "leases end by themselves after lease_seconds (pin_timeout_sec)": """pin_check_interval_sec""",
    "LMKV keeps KV, no hidden states": """
        enable_hidden_state_cache max_hidden_state_cpu_size hidden_state_layers hidden_states_retrieve_mode""",
    "LMKV has one way of copying, and leaves Python's garbage collector and hit rates as they are": """
        py_enable_gc hit_miss_ratio use_gpu_connector_v3""",
}
INERT = {key: why for why, keys in _INERT_GROUPS.items() for key in keys.split()}

#: What to do instead of a key of ``extra_config`` that begins so, where it means nothing to the storage that is used.
_EXTRA_GROUPS = {
    "breaker_seconds and breaker_failures say how long a tier that failed is left alone": """
        lookup_backoff_time ping_interval waiting_time_for_recovery get_blocking_failed_threshold""",
    "deadline_seconds of the tier bounds every call": """
        connection_timeout request_timeout transfer_timeout ping_timeout p2p_socket_ p2p_max_retry_count worker_socket_
        maru_timeout_ms""",
    "values carry checksums of their own, and Store.stats() counts calls": """audit_""",
    "remote_url names the Redis: redis://host:port, rediss:// with TLS, redis-sentinel://, redis-cluster://": """
        redis_url remote_storage_plugin.redis. resp_ tls_enable valkey_ username password""",
    "remote_url: s3://bucket, or a tier with that url": """s3_ aws_ disable_tls""",
    "LMKV has no Azure storage; s3:// is one, and others are backends by entry point": """azure_""",
    "a tier {backend: nixl, options: {plugin, path, direct_io}} moves by NIXL; its files are opened as they are needed": """
        nixl_ use_direct_io fs_connector_use_odirect""",
    "a shared directory is a tier file:///mnt/shared/kv": """fs_ hf3fs_ storage_root_dir""",
    "storages of your own are backends, registered by entry point (docs/writing-a-backend.md)": """
        storage_plugin. remote_storage_plugin. plugin.""",
    "LMKV has no controller to tell: a tier that engines share is asked directly": """
        full_sync_ kv_msg_ heartbeat_url lmcache_rpc_port""",
    "LMKV has no server process of LMCache's kind; lmkv serve and python -m lmkv.standalone have flags of their own": """
        lmcache.mp. lmcache.q. lmcache.max_tokens_per_load internal_api_server_""",
    "Store.stats(), /v1/stats of the standalone service and the engines' metrics count": """
        chunk_statistics_ histogram_bucket_ enable_cache_usage_details_in_response""",
    "disk_path on a file system of that device; disk_direct reads and writes past the page cache": """
        rust_raw_block. disk_io_threads dax.""",
    "ram_capacity is shared out among the ranks of a machine; ram_numa_node and ram_huge_pages shape it": """
        first_rank_max_local_cpu_size gpu_to_numa_mapping local_cpu. shm_name""",
    "ranks that hold the same latents share one copy in the slow tiers by themselves": """
        save_only_first_rank remote_enable_mla_worker_id_as0""",
    "save_partial_chunk says whether a text's last, short chunk is kept": """discard_partial_chunks""",
    "remote_url: mooncakestore://host:50051, whose options these are": """
        local_hostname metadata_server protocol device_name global_segment_size master_server_address local_buffer_size
        mooncake_""",
    "each record describes itself, and existence is one question": """save_chunk_meta use_exists_sync""",
    "list another slow tier under 'tiers', such as redis://, s3:// or file:///mnt/shared/kv": """
        maru_ sagemaker_hyperpod_ infinistore_""",
    "loads and stores run beside the engine, of all tokens that are asked for": """
        force_store_wait skip_last_n_tokens enable_sparse""",
}
EXTRA_WAYS = tuple((beginning, why) for why, keys in _EXTRA_GROUPS.items() for beginning in keys.split())

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
