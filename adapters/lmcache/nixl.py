"""LMCache's NIXL storage (``enable_nixl_storage`` and what goes with it in ``extra_config``) as a slow tier of LMKV's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lmkv.errors import ConfigError

__all__ = ["KEYS", "nixl_tier"]

#: What belongs to it in ``extra_config``. The pool of open files has no counterpart: files are opened as they are needed.
KEYS = (
    *("enable_nixl_storage", "nixl_backend", "nixl_path", "nixl_pool_size", "nixl_backend_params", "use_direct_io"),
    *("nixl_buffer_size", "nixl_buffer_device"),
)
#: The OBJ plugin's parameters -> options of s3://.
_OBJ = {
    "access_key": "access_key_id",
    "secret_key": "secret_access_key",
    "session_token": "session_token",
    "region": "region",
    "endpoint_override": "endpoint",
}


def nixl_tier(extra: Mapping[str, object], where: str, warn: Callable[[str], None]) -> dict[str, object] | None:
    """The tier that the keys describe, in LMKV's names; ``None`` where NIXL storage is not asked for.

    Args:
        extra: ``extra_config``.
        where: what messages call it.
        warn: told of what is served in another way.

    Raises:
        ConfigError: a plugin without a directory or bucket.
    """
    if str(extra.get("enable_nixl_storage", False)).strip().lower() not in ("true", "yes", "on", "1"):
        return None
    plugin = str(extra.get("nixl_backend") or "POSIX").upper()
    params = extra.get("nixl_backend_params") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"{where}.nixl_backend_params: expected keys and values; got {params!r}")
    if str(extra.get("nixl_buffer_device") or "cpu").lower() != "cpu":
        warn(f"{where}.nixl_buffer_device has no effect: values pass through slots in host memory")
    if plugin == "UCX":
        raise ConfigError(
            f"{where}.nixl_backend: expected a plugin for storage; got UCX, which reads other engines' memory: set peer_listen "
            "there and a tier nixl://host:port here"
        )
    if plugin == "OBJ":
        return _bucket(params, where, warn)
    path = extra.get("nixl_path")
    if not path:
        raise ConfigError(f"{where}.nixl_path: expected the directory that {plugin} keeps its files in; got none")
    options: dict[str, object] = {"plugin": plugin, "path": str(path).removeprefix("file://")}
    if params:
        options["params"] = dict(params)
    if extra.get("use_direct_io"):
        options["direct_io"] = extra["use_direct_io"]
    return {"name": "nixl", "backend": "nixl", "options": options}


def _bucket(params: Mapping[str, object], where: str, warn: Callable[[str], None]) -> dict[str, object]:
    if not params.get("bucket"):
        raise ConfigError(f"{where}.nixl_backend_params: expected the bucket that OBJ keeps its objects in; got none")
    warn(f"{where}.nixl_backend: OBJ is served by s3:// through obstore, not by NIXL's plugin")
    options = {_OBJ[name]: value for name, value in params.items() if name in _OBJ and value}
    for name in params:
        if name != "bucket" and name not in _OBJ:
            warn(f"{where}.nixl_backend_params.{name} has no effect: s3:// has no use for it")
    return {"name": "nixl", "url": f"s3://{params['bucket']}", "options": options}
