"""Eviction policies: which chunks go when a tier is full.

Built in are ``lru``, ``lfu``, ``fifo``, ``mru`` and ``s3fifo``. A package adds its own under the entry point group
``lmkv.policies``, as anything that makes an :class:`~lmkv.eviction.base.EvictionPolicy` from a capacity in chunks::

    [project.entry-points."lmkv.policies"]
    mine = "my_package:MyPolicy"

It is imported when it is first asked for by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points

from ..errors import ConfigError
from .base import EvictionPolicy
from .fifo import FIFO
from .lfu import LFU
from .lru import LRU
from .mru import MRU
from .s3fifo import S3FIFO

__all__ = ["ENTRY_POINTS", "make_policy", "policy_names"]

#: The entry point group of policies from other packages.
ENTRY_POINTS = "lmkv.policies"

_BUILT_IN: Mapping[str, Callable[[int], EvictionPolicy]] = {"lru": LRU, "lfu": LFU, "fifo": FIFO, "mru": MRU, "s3fifo": S3FIFO}


def _registered() -> dict[str, EntryPoint]:
    return {point.name.lower(): point for point in entry_points(group=ENTRY_POINTS)}


def policy_names() -> list[str]:
    """The names that :func:`make_policy` knows: the built-in ones first, then those of installed packages."""
    return [*_BUILT_IN, *sorted(_registered().keys() - _BUILT_IN.keys())]


def make_policy(name: str, capacity: int) -> EvictionPolicy:
    """An empty policy.

    Args:
        name: a built-in policy or one registered under :data:`ENTRY_POINTS`; upper and lower case are the same, and a
            built-in one wins over another of its name.
        capacity: how many chunks its tier holds, at least 1. Costs nothing before the chunks are there.

    Raises:
        ConfigError: the name is unknown (the nearest known one is named), the capacity is below 1, or what is registered
            under the name can't be loaded or is no policy.
    """
    if capacity < 1:
        raise ConfigError(f"policy {name}: expected a capacity of at least 1 chunk; got {capacity}")
    built_in = _BUILT_IN.get(name.lower())
    if built_in is not None:
        return built_in(capacity)
    point = _registered().get(name.lower())
    if point is None:
        known = policy_names()
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"policy: expected one of {', '.join(known)}; got {name!r}{hint}")
    try:
        factory = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"policy {name}: expected {point.value} to be importable; got: {error}: reinstall its package"
        ) from error
    policy = factory(capacity)
    if not isinstance(policy, EvictionPolicy):
        raise ConfigError(f"policy {name}: expected {point.value} to make an EvictionPolicy; got {type(policy).__name__}")
    return policy
