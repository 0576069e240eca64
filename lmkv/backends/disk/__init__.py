"""Parts of the disk backend: how its bytes are shared out, segment files, slots, the index of records, its directory."""

from __future__ import annotations
