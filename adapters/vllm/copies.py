"""A worker's copies: the scheduler's orders as calls of :class:`lmkv.transfer.CopyEngine`. The only module that calls it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ...errors import LayoutMismatchError, LMKVError
from ...layout import KVLayout
from ...record import payload_offset
from ...transfer import Copy, CopyEngine, Part, PartTable
from .geometry import ShardGeometry
from .packed_copies import PackedEngine
from .plans import CopyOrder

__all__ = ["Copier", "Running", "SlotMemory"]


class SlotMemory(Protocol):
    """Where slots are: a pool of this process or a mapped one."""

    slot_bytes: int

    def view(self, slot: int) -> memoryview:
        """The memory of a slot."""

    def addresses(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the memory of slots begins."""

    def extents(self) -> list[tuple[int, int]]:
        """Address and size of the memory that slots are in."""

    def complete(self) -> bool:
        """Whether no more extents will come."""


@dataclass
class Running:
    """A copy that was begun.

    Args:
        order: what it was begun for.
        copy: ``None`` once it failed or where there was nothing to copy.
        error: what went wrong, empty if nothing did.
        begun: when, by the performance counter.
        seconds: how long it took, as far as is known; for a copy on a device up to when it was first seen done.
        awaited: by stream, how many layers it waits for already.
    """

    order: CopyOrder
    copy: Copy | None = None
    error: str = ""
    begun: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    awaited: dict[int, int] = field(default_factory=dict)

    def done(self) -> bool:
        """Whether it has ended, well or not; never blocks."""
        if self.copy is None:
            return True
        try:
            done = self.copy.done()
        except LMKVError as error:
            return self._failed(error)
        if done and not self.seconds:
            self.seconds = time.perf_counter() - self.begun
        return done

    def wait(self) -> None:
        """Block until it has ended, well or not."""
        if self.copy is not None:
            try:
                self.copy.wait()
            except LMKVError as error:
                self._failed(error)

    def _failed(self, error: LMKVError) -> bool:
        self.copy, self.error = None, f"{type(error).__name__}: {error}"
        return True


class Copier:
    """Copies between slots and one worker's KV tensors.

    Args:
        geometry: the tensors.
        layout: of a whole chunk.
        first_layer: number in the layout of this worker's first layer.
        slots: where slots are.

    Raises:
        LayoutMismatchError: the tensors are not that part of the layout.
    """

    def __init__(self, geometry: ShardGeometry, layout: KVLayout, first_layer: int, slots: SlotMemory) -> None:
        packed = {layer.packed for layer in geometry.layers}
        if len(packed) > 1:
            raise LayoutMismatchError("expected all layers packed by a CPU kernel or none; got some")
        self._engine: CopyEngine | PackedEngine
        if packed.pop():
            self._engine = PackedEngine(geometry.layers, layout, first_layer)
        else:
            layers = [layer.parts if len(layer.parts) == 2 else layer.parts[0] for layer in geometry.layers]
            tables = [layer.group for layer in geometry.layers]
            self._engine = CopyEngine(layers, layout, order="HND", first_layer=first_layer, tables=tables)
        #: CUDA ordinal of the tensors' device, ``None`` on a CPU.
        self.device = self._engine.device if isinstance(self._engine, CopyEngine) else None
        #: Nothing is ever put into it.
        self._idle_stream = None if self.device is None else torch.cuda.Stream(self.device)
        self._slots = slots
        self._offset = payload_offset(layout.chunk_tokens)
        self._token_bytes = layout.token_bytes
        pieces = {layer.group: layer.pieces for layer in geometry.layers}
        self._pieces = [pieces[group] for group in sorted(pieces)]
        self._layer_numbers = {layer.name: i for i, layer in enumerate(geometry.layers)}

    def load(self, order: CopyOrder, *, layerwise: bool = False, quick_pass: bool = False, behind: bool = True) -> Running:
        """Begin to copy slots into blocks.

        Args:
            layerwise, quick_pass: see :meth:`lmkv.transfer.CopyEngine.scatter`.
            behind: what torch's current stream does; else at once.
        """
        running = Running(order)
        try:
            parts, blocks = self._arguments(order)
            stream = None if behind or self._idle_stream is None else int(self._idle_stream.cuda_stream)
            running.copy = self._engine.scatter(parts, blocks, stream=stream, layerwise=layerwise, quick_pass=quick_pass)
        except LMKVError as error:
            running.error = f"{type(error).__name__}: {error}"
        running.done()
        return running

    def store(self, order: CopyOrder) -> Running:
        """Begin to copy blocks into slots, behind what torch's current stream does."""
        running = Running(order)
        try:
            parts, blocks = self._arguments(order)
            running.copy = self._engine.gather(parts, blocks)
        except LMKVError as error:
            running.error = f"{type(error).__name__}: {error}"
        running.done()
        return running

    def wait_layer(self, running: Running, name: str) -> None:
        """Have torch's current stream wait for one layer of a load; an unknown layer waits for none."""
        number = self._layer_numbers.get(name)
        if number is not None:
            self._wait(running, number)

    def wait_all(self, running: Running) -> None:
        """Have torch's current stream wait for all of a load."""
        self._wait(running, len(self._layer_numbers) - 1)

    def _wait(self, running: Running, layer: int) -> None:
        """Layers come in groups: one wait a group, since each costs a place among what was launched ahead."""
        if running.copy is None or self.device is None:
            return
        stream = int(torch.cuda.current_stream(self.device).cuda_stream)
        if layer >= running.awaited.get(stream, 0):
            running.awaited[stream] = running.copy.wait_layer(layer, stream)

    def _arguments(self, order: CopyOrder) -> tuple[list[Part] | PartTable, list[npt.NDArray[np.int32]]]:
        """The order as the engine takes it: positions are counted from the base, since blocks before it are not named."""
        return self._parts(order), [_tensor_blocks(ids, pieces) for ids, pieces in zip(order.blocks, self._pieces, strict=True)]

    def _parts(self, order: CopyOrder) -> list[Part] | PartTable:
        spans = order.parts[:, 1:] - order.base
        if self.device is not None:  # nothing reaches the wire before this is done
            return PartTable(self._slots.addresses(order.parts[:, 0]) + self._offset, spans, self._slots)
        parts: list[Part] = []
        for slot, (first, last, start, stop) in zip(order.parts[:, 0].tolist(), spans.tolist(), strict=True):
            payload = self._slots.view(slot)[self._offset : self._offset + (last - first) * self._token_bytes]
            parts.append(Part(payload, first, last, start, stop))
        return parts


def _tensor_blocks(blocks: npt.NDArray[np.int32], pieces: int) -> npt.NDArray[np.int32]:
    """Blocks of the tensors that the scheduler's blocks consist of."""
    if pieces == 1:
        return blocks
    wide = blocks[:, None] * pieces + np.arange(pieces, dtype=np.int32)
    return np.where(blocks[:, None] < 0, -1, wide).ravel().astype(np.int32)
