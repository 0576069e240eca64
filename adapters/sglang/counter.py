"""What SGLang's KV pools wait on before they hand a layer to the forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from .pages import Load

__all__ = ["LayerCounter"]


class LayerCounter:
    """Batches of loads by number; the forward pass of a batch waits for its own loads, layer by layer.

    Args:
        layers: of the model's part here.
        layerwise: otherwise the first layer waits for all of them.
    """

    def __init__(self, layers: int, *, layerwise: bool = True) -> None:
        self.num_layers = layers
        self._layerwise = layerwise
        self._batches: dict[int, Sequence[Load]] = {}
        self._next = 0
        #: The batch whose forward pass runs; -1 for none.
        self.consumer_index = -1

    def begin(self, loads: Sequence[Load]) -> int:
        """A batch of loads that were begun; returns its number."""
        number, self._next = self._next, self._next + 1
        self._batches[number] = loads
        return number

    def set_consumer(self, index: int) -> None:
        """The batch whose forward pass begins; -1 for one without loads."""
        self.consumer_index = index

    def wait_until(self, threshold: int) -> None:
        """Order what follows on the device behind the layer's arrival. A failure is told by :meth:`finish`."""
        loads = self._batches.get(self.consumer_index)
        if loads is None or (threshold and not self._layerwise):
            return
        layer = threshold if self._layerwise else self.num_layers - 1
        for load in loads:
            load.wait_layer(layer)

    def loads(self, index: int) -> Sequence[Load]:
        """The loads of a batch that is not finished."""
        return self._batches.get(index, ())

    def finish(self, index: int) -> bool:
        """Wait until the batch writes no more; whether all of it arrived."""
        ended = [load.finish() for load in self._batches.pop(index, ())]  # every one of them, whatever the first says
        return all(ended)

    def reset(self) -> None:
        """Wait for everything and forget it."""
        for index in list(self._batches):
            self.finish(index)
        self.consumer_index = -1
