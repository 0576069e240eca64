"""How copies are made best on this machine: measured once, when a device is first used, and kept in the cache directory.

What differs between machines is up to which size one kernel on pinned host memory beats a transfer through the staging ring.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..config import cache_home
from ..errors import NativeError
from ..layout import KVLayout
from ..pool import HostPool, populate
from .gpu import Gpu, GpuOptions
from .plan import Part, PartTable, Plan
from .rows import Layers, row_table

__all__ = ["calibrate", "calibrated", "tuned"]

_VERSION = 2
_lock = threading.Lock()
_tuned: set[int] = set()
#: Bytes a token and tokens of the KV that is copied to measure: 64 rows of 1 KiB.
_LAYOUT = KVLayout.dense(layers=32, heads=4, head_size=128, dtype="bfloat16", chunk_tokens=256)
_TOKENS = (4, 8, 16, 32, 64, 128, 256)


def calibrated(gpu: Gpu, *, cache: Path | None = None) -> GpuOptions:
    """The options for a device: what was measured before on this kind of device, or what is measured now.

    Args:
        gpu: it is tuned to the result.
        cache: folder of earlier results; in the user's cache directory by default.
    """
    folder = cache_home() / "lmkv" / "copies" if cache is None else cache
    name = "".join(c if c.isalnum() else "-" for c in gpu.fact("name"))
    path = folder / f"{name}-{os.cpu_count()}.json"
    options = _read(path)
    if options is not None:
        with contextlib.suppress(NativeError):  # values out of range: measure anew
            gpu.tune(options)
            return options
    try:
        options = calibrate(gpu)
    except (NativeError, RuntimeError):  # no memory to spare for a measurement: torch raises RuntimeError then
        gpu.tune(GpuOptions())
        return gpu.options
    _write(path, options)
    return options


def tuned(device: int) -> Gpu:
    """The process's object for a device, tuned at the first call. Without torch there is nothing to measure with."""
    gpu = Gpu.of(device)
    with _lock:
        if device not in _tuned and "torch" in sys.modules:
            _tuned.add(device)
            calibrated(gpu)
    return gpu


def calibrate(gpu: Gpu) -> GpuOptions:
    """Measure on a device; takes about 0.1 s and 32 MiB of its memory, through torch.

    Raises:
        NativeError: copies do not work there.
        RuntimeError: torch finds no memory.
    """
    import torch

    defaults = GpuOptions()
    shape = (_LAYOUT.chunk_tokens // 16, 16, 4, 128)
    where = torch.device("cuda", gpu.device)
    layers = [[torch.zeros(shape, dtype=torch.bfloat16, device=where) for _ in range(2)] for _ in range(32)]
    rows = Layers(layers, "NHD").rows(_LAYOUT, 4)
    pool = HostPool(_LAYOUT.chunk_bytes, 1, extent_bytes=_LAYOUT.chunk_bytes)
    pool.allocate(1)
    (extent,) = pool.extents()
    populate([extent])
    gpu.pin(*extent)
    try:
        best = 0
        for tokens in _TOKENS:
            part = Part(pool.view(0), 0, tokens, 0, tokens)
            places = np.array([(t // 16, t % 16) for t in range(tokens)], np.int32)
            plan = Plan(row_table(rows, _LAYOUT), PartTable.of([part]), [places])
            size = tokens * _LAYOUT.token_bytes
            gpu.tune(dataclasses.replace(defaults, direct_bytes=size))
            direct = _seconds(gpu, plan, len(rows))
            gpu.tune(dataclasses.replace(defaults, direct_bytes=0))
            if direct > _seconds(gpu, plan, len(rows)):
                break
            best = size
    finally:
        gpu.unpin(extent[0])
        pool.close()
    options = dataclasses.replace(defaults, direct_bytes=best)
    gpu.tune(options)
    return options


def _seconds(gpu: Gpu, plan: Plan, rows: int) -> float:
    """The quicker half's slowest of some scatters, the first one not counted."""
    times: list[float] = []
    everything = np.array([rows])
    for _ in range(10):
        begun = time.perf_counter()
        gpu.start(plan, everything, [rows], 0, into_payloads=False, stream=0).wait()
        times.append(time.perf_counter() - begun)
    return sorted(times[1:])[len(times) // 2]


def _read(path: Path) -> GpuOptions | None:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return GpuOptions(**found["options"]) if found["version"] == _VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, options: GpuOptions) -> None:
    text = json.dumps({"version": _VERSION, "options": dataclasses.asdict(options)})
    with contextlib.suppress(OSError):  # measured again at the next start
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
