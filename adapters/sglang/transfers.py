"""Pages and speeds of single transfers, as SGLang's metrics of a storage want them."""

from __future__ import annotations

import threading

__all__ = ["Transfers"]

_MOST = 10_000  # that may wait to be asked for


class Transfers:
    """Transfers in one direction that nobody has asked for yet. Safe to use from several threads.

    Args:
        wanted: ``False`` remembers nothing.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._lock = threading.Lock()
        self._pages: list[int] = []
        self._speeds: list[float] = []

    def add(self, pages: int, size: int, seconds: float) -> None:
        """A transfer of pages of ``size`` bytes."""
        if self._wanted and pages and len(self._pages) < _MOST:
            with self._lock:
                self._pages.append(pages)
                self._speeds.append(pages * size / seconds / 2**30)

    def taken(self) -> tuple[list[int], list[float]]:
        """All of them, which are then forgotten."""
        with self._lock:
            pages, self._pages = self._pages, []
            speeds, self._speeds = self._speeds, []
        return pages, speeds
