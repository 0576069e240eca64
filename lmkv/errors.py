"""Everything LMKV raises.

::

    LMKVError
    ├── ArgumentError(ValueError)        a wrong argument: tokens, sizes, buffers
    ├── ConfigError(ValueError)          a wrong setting, wherever it was read from
    ├── LayoutMismatchError(ValueError)  tensors, slots or a directory of another shape or dtype
    ├── CapacityError                    something does not fit, now or ever
    ├── StoreClosedError
    ├── NativeError                      the compiled part refused or is missing
    └── BackendError                     a tier's storage failed; seen by backends' authors, not by callers of a store
        ├── BackendUnavailableError      not reachable, not writable, too slow
        └── CorruptRecordError           bytes that are not the record that was asked for

A store turns every :class:`BackendError` into an event and a miss. The others mean that the caller has to change something.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "BackendError",
    "BackendUnavailableError",
    "CapacityError",
    "ConfigError",
    "CorruptRecordError",
    "LMKVError",
    "LayoutMismatchError",
    "NativeError",
    "StoreClosedError",
]


class LMKVError(Exception):
    """Base of all errors of this package."""


class ArgumentError(LMKVError, ValueError):
    """An argument is not what the method takes; nothing was changed."""


class ConfigError(LMKVError, ValueError):
    """A setting is unknown, malformed or contradicts another one; nothing was opened."""


class LayoutMismatchError(LMKVError, ValueError):
    """Shape, dtype, device or fingerprint differs from the store's layout; nothing was changed."""


class CapacityError(LMKVError):
    """There is no room, even after evicting all that may go; nothing was changed."""


class StoreClosedError(LMKVError):
    """The store, pool or backend was closed before this call."""


class NativeError(LMKVError):
    """The compiled part is missing or refused the call."""


class BackendError(LMKVError):
    """A tier's storage failed."""


class BackendUnavailableError(BackendError):
    """The storage does not answer, or not in time."""


class CorruptRecordError(BackendError):
    """Bytes came back that are not the record of the key that was asked for."""
