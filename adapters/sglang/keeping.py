"""Texts kept beside what SGLang computes: their KV is copied out of the device's pages on a thread of its own.

On a GPU two things may still be under way when a request ends. The step behind the one that ended it may be running, and with
SGLang's overlap schedule that step computes the KV of the request's last token. And the numbers of its slots are in device
memory, behind what the scheduler's stream waits for. The scheduler's thread waits for neither: copies begin on the device
behind all that was submitted before, and the tree holds the pages until their copy is done.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ...errors import LMKVError
from .pages import PageStore, Text, slot_numbers
from .telling import Telling

__all__ = ["Keeper", "Order"]


class Order:
    """How copies are ordered against what SGLang runs on its device.

    Args:
        device: CUDA ordinal of the pool; ``None`` in host memory, where there is nothing to order.
        forward_stream: what SGLang's forward passes run on beside the scheduler's own stream, if anything.
    """

    def __init__(self, device: int | None = None, forward_stream: Any = None) -> None:
        self._device = device
        self._forward = forward_stream

    def behind_everything(self) -> Any:
        """A stream that is behind all that may still read or write the pool's pages; ``None`` in host memory.

        It is not enough to be behind the scheduler's stream: that one waits for a step's reads of shared tables at most.
        """
        if self._device is None:
            return None
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        if self._forward is not None:
            stream.wait_stream(self._forward)
        return stream


class Keeper:
    """Stores texts, one after the other, on a thread of its own. Called on the scheduler's thread.

    Args:
        pages: this rank's store.
        order: of copies on the device.
        told: counts, and tells of trouble.
    """

    def __init__(self, pages: PageStore, order: Order, told: Telling) -> None:
        self._pages = pages
        self._order = order
        self._told = told
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lmkv-keep")

    def keep(self, text: Text, slots: torch.Tensor) -> Future[int]:
        """Begin to store a text's KV; what is there already is skipped.

        Args:
            slots: slot numbers of all its tokens. They must keep their KV until the result is there.

        Returns:
            Tokens newly stored; 0 if it failed, of which is told.
        """
        return self._thread.submit(self._keep, text, _brought(slots), self._order.behind_everything())

    def close(self) -> None:
        """Wait for everything that was begun."""
        self._thread.shutdown()

    def _keep(self, text: Text, numbers: Callable[[], Any], stream: Any) -> int:
        try:
            save = self._pages.save(text, numbers(), stream=None if stream is None else int(stream.cuda_stream))
            if save.finish():
                self._told.add(stores=1, stored_tokens=save.tokens)
                return save.tokens
            why = save.error
        except (LMKVError, RuntimeError) as error:  # of the store, or of a device that has failed
            why = f"{type(error).__name__}: {error}"
        self._told.add(store_failures=1)
        self._told.trouble("a text was not kept", why)
        return 0


def _brought(slots: torch.Tensor) -> Callable[[], Any]:
    """Begin to bring slot numbers to host memory; what is returned waits for them, on any thread."""
    if not slots.is_cuda:
        numbers = slot_numbers(slots.clone())
        return lambda: numbers
    host = torch.empty(slots.shape, dtype=slots.dtype, pin_memory=True)
    host.copy_(slots, non_blocking=True)
    here = torch.cuda.Event(blocking=True)
    here.record(torch.cuda.current_stream(slots.device))

    def arrived() -> Any:
        here.synchronize()
        return slot_numbers(host)

    return arrived
