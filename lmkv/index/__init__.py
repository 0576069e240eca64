"""What is held: by chain (prefix) and by content (anywhere)."""

from __future__ import annotations

from .content import ContentIndex
from .prefix import Node, PrefixIndex

__all__ = ["ContentIndex", "Node", "PrefixIndex"]
