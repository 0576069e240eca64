"""Weights that change while SGLang runs: what was kept before must not be found any more."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from .pages import renew_all

__all__ = ["watch"]

#: Classes whose ``update_weights_from_…`` change the weights; an SGLang has one or the other.
_UPDATERS = (
    ("sglang.srt.managers.scheduler_components.weight_updater", "SchedulerWeightUpdaterManager"),
    ("sglang.srt.managers.scheduler_update_weights_mixin", "SchedulerUpdateWeightsMixin"),
    ("sglang.srt.managers.scheduler", "Scheduler"),
)
_BEGINNINGS = ("update_weights_from_", "begin_weight_update", "end_weight_update")


def watch() -> list[str]:
    """Have every change of weights renew the page stores of this process; names of what is watched now."""
    watched: list[str] = []
    for module, name in _UPDATERS:
        try:
            owner = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError:
            continue
        for attribute in list(vars(owner)) if owner is not None else ():
            if attribute.startswith(_BEGINNINGS) and callable(vars(owner)[attribute]):
                if not hasattr(vars(owner)[attribute], "_lmkv"):
                    setattr(owner, attribute, _renewing(vars(owner)[attribute]))
                watched.append(f"{name}.{attribute}")
    return watched


def _renewing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def changed(*args: Any, **kwargs: Any) -> Any:
        renew_all()
        try:
            return original(*args, **kwargs)
        finally:
            renew_all()  # whatever was kept between belongs to neither

    changed._lmkv = True  # type: ignore[attr-defined]
    return changed
