"""What becomes of open stores when their process ends, or forks."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Any, Protocol

__all__ = ["watch"]


class _Watched(Protocol):
    def close(self, timeout: float | None = ...) -> None: ...

    def _left_behind(self) -> None: ...


_open: weakref.WeakSet[Any] = weakref.WeakSet()
#: Of the process that this one was forked from: never finalized, since what they would close is still in use there.
_inherited: list[_Watched] = []


def watch(store: _Watched) -> None:
    """Close a store at the process's end, and tell it where it finds itself in a forked one."""
    _open.add(store)


@atexit.register
def _close_open() -> None:
    """A process that ends without ``close()`` should not lose what waits to be written."""
    for store in list(_open):
        store.close(10.0)


def _leave_behind() -> None:
    for store in list(_open):
        store._left_behind()
        _inherited.append(store)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_behind)
