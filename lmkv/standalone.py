"""``python -m lmkv.standalone``: the cache as a service of its own. The work is done in ``lmkv.adapters.standalone``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service; returns the exit status (0 done, 1 failed, 2 wrong arguments)."""
    return int(importlib.import_module("lmkv.adapters.standalone").main(argv))


if __name__ == "__main__":
    sys.exit(main())
