"""``lmkv doctor``: what this machine has, and what LMKV can use of it."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import StoreConfig, cache_home
from ..errors import ConfigError, LMKVError

__all__ = ["examine", "main"]

#: distribution -> what it is for
_EXTRAS = {
    "torch": "tensors of engines and models",
    "transformers": "reuse for Hugging Face models, the demo",
    "aiohttp": "the standalone service",
    "blosc2": "the codec lossless (blosc2)",
    "cryptography": "encryption of remote tiers",
    "infinistore": "tiers in an InfiniStore",
    "mooncake-transfer-engine-non-cuda": "tiers in a Mooncake store",
    "nixl": "tiers through NIXL",
    "obstore": "tiers in S3 buckets",
    "redis": "tiers in Redis, Sentinel, Cluster, Valkey",
    "vllm": "the vLLM engine",
    "sglang": "the SGLang engine",
}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str:
    from ..transfer.gpu import Gpu, count

    try:
        names = [Gpu.of(device).fact("name") for device in range(count())]
    except LMKVError as error:
        return f"none to copy to: {error}"
    return f"{len(names)}: {', '.join(names)}" if names else "a driver, but no device"


def _kernels() -> str:
    from ..transfer import kernels

    if importlib.import_module("lmkv._native").lib is None:
        return "not to be had without the compiled part"
    image = kernels.built_in()
    if image is not None:
        return f"built in, {len(image)} bytes"
    library = kernels.nvrtc_path()
    return f"compiled on first use by {library}" if library else "neither built in nor NVRTC to compile them: no GPU copies"


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return "unknown"
    return f"{pages * size / 2**30:.1f} GiB"


def _nixl_plugins() -> str:
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # what does not load is said in this report
    from ..backends.nixl_agent import plugin_states

    try:
        states = plugin_states()
    except ConfigError:
        return "NIXL is not installed"
    return ", ".join(f"{name}: {f'does not load ({state})' if state else 'loads'}" for name, state in states.items())


def _nearest(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def examine() -> dict[str, dict[str, str]]:
    """Findings by section, as plain text."""
    native = importlib.import_module("lmkv._native")
    home = cache_home() / "lmkv"
    there = _nearest(home)
    writable = os.access(there, os.W_OK)
    free = shutil.disk_usage(there).free / 2**30
    from .. import __version__

    try:
        config = StoreConfig.load()
        settings = f"fine: RAM {config.ram_capacity / 2**30:.1f} GiB, disk {config.disk_capacity / 2**30:.1f} GiB"
    except LMKVError as error:
        settings = f"wrong: {error}"
    return {
        "lmkv": {
            "version": __version__,
            "compiled copies": "built" if native.lib is not None else "not built (no C compiler at install): numpy copies",
            "configuration": settings,
        },
        "machine": {
            "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
            "processors": str(os.cpu_count()),
            "memory": _memory(),
            "gpu": _gpu(),
            "gpu kernels": _kernels(),
            "NIXL plugins": _nixl_plugins(),
            "shared slots": "to be had" if hasattr(os, "memfd_create") else "not to be had: memfd is missing",
            "cache directory": f"{home}, {'writable' if writable else 'NOT writable'}, {free:.1f} GiB free",
        },
        "needed": {
            name: _version(name) or "MISSING" for name in ("numpy", "xxhash", "cffi", "lmdb", "sortedcontainers", "PyYAML")
        },
        "optional": {name: _version(name) or f"not installed ({purpose})" for name, purpose in _EXTRAS.items()},
    }


def main(argv: Sequence[str]) -> int:
    """Print the findings; 1 if something needed is missing or the configuration is wrong."""
    parser = argparse.ArgumentParser(prog="lmkv doctor", description="What this machine has, and what LMKV can use of it.")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(list(argv))
    found = examine()
    if args.json:
        print(json.dumps(found))
    else:
        for section, lines in found.items():
            print(section)
            for name, text in lines.items():
                print(f"  {name:<18} {text}")
    bad = "MISSING" in found["needed"].values() or found["lmkv"]["configuration"].startswith("wrong")
    if bad:
        print("lmkv doctor: see the lines marked MISSING or wrong above", file=sys.stderr)
    return int(bad)
