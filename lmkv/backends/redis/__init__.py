"""Redis and what speaks its protocol: one server, Sentinel, Cluster, Valkey.

The client library (package ``redis``) knows topologies, logging in, TLS and pools of connections; values travel over its
connections by :mod:`lmkv.backends.redis.wire`, without a copy in between.
"""
