"""A cache server without GPU or engine (``python -m lmkv.standalone``), and the client that talks to it.

The client needs numpy and xxhash, the server aiohttp too: names load on first use.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

__all__ = ["RemoteMatch", "StoreClient", "main"]

if TYPE_CHECKING:
    from .client import RemoteMatch as RemoteMatch
    from .client import StoreClient as StoreClient


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until SIGTERM or SIGINT; returns the exit status (0 done, 1 failed, 2 wrong arguments)."""
    try:
        server = importlib.import_module(".server", __name__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lmkv"):
            raise
        print(f"lmkv.standalone: needs the package {error.name!r}: pip install 'lmkv[standalone]'", file=sys.stderr)
        return 1
    return int(server.run(sys.argv[1:] if argv is None else argv))


def __getattr__(name: str) -> Any:
    if name in ("RemoteMatch", "StoreClient"):
        value = getattr(importlib.import_module(".client", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
