"""Opening a slow tier: its backend by name or URL, and the tier around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..backends import BackendSettings, open_backend
from ..backends.base import LocalIndex, ReadOnly
from ..config import StoreConfig, TierConfig
from ..errors import ConfigError
from ..events import Emitter
from ..index import Node
from ..layout import KVLayout
from .envelope import Envelope, read_keys
from .slow import SlowTier

__all__ = ["open_tier"]

#: YAML reads ``off`` as false.
_OFF = ("off", "false", "no", "none")


def open_tier(
    settings: TierConfig,
    config: StoreConfig,
    layout: KVLayout,
    *,
    slot_view: Callable[[int], memoryview],
    release: Callable[[Sequence[Node]], None],
    emit: Emitter,
) -> SlowTier:
    """The tier that the settings describe; the arguments are those of :class:`SlowTier`.

    Raises:
        ConfigError: an unknown backend, option, policy or codec, or keys for encryption that can't be read.
        BackendUnavailableError: the storage can't be opened now; remote ones connect later, on first use.
        CapacityError: the capacity is below one chunk.
    """

    where = f"tier {settings.name}"

    def report(operation: str, reason: str) -> None:
        emit("tier_failed", settings.name, operation=operation, reason=reason)

    encryption = settings.encryption or config.encryption
    envelope = None
    if encryption.lower() not in ("", *_OFF):
        envelope = Envelope(read_keys(encryption, where), layout.fingerprint, where)
    backend = open_backend(
        settings.backend,
        BackendSettings(
            settings.name,
            layout,
            settings.capacity,
            settings.options,
            url=settings.url,
            deadline_seconds=settings.deadline_seconds,
            report=report,
        ),
    )
    try:
        if isinstance(backend, ReadOnly):
            if settings.encryption.lower() not in ("", *_OFF):
                raise ConfigError(f"{where}: encryption: expected none for a peer, which lends records as they are in its RAM")
            envelope = None
        if envelope is not None and isinstance(backend, LocalIndex):
            raise ConfigError(
                f"{where}: encryption: expected a storage that keeps records without reading them; the index of "
                f"{settings.backend} holds their tokens: use an encrypted file system"
            )
        return SlowTier(settings, config, layout, backend, slot_view=slot_view, release=release, emit=emit, envelope=envelope)
    except BaseException:
        backend.close()
        raise
