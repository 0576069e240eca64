"""Forward passes that wait for loads layer by layer, where SGLang's batches do not name their loads (0.5.17)."""

from __future__ import annotations

from ...errors import NativeError
from .pages import Load

__all__ = ["LayerWaits"]


class LayerWaits:
    """What SGLang's KV pool waits on before it hands a layer's KV to a forward pass: all loads that are under way.

    Called on the scheduler's thread, which submits the forward passes, too. A pass waits on the device, so each load is done
    before any later pass, which runs behind that one.
    """

    def __init__(self) -> None:
        self._loads: list[Load] = []

    def add(self, load: Load) -> None:
        """A load was begun; the passes submitted from now on wait for it."""
        self._loads.append(load)

    def wait_until(self, threshold: int) -> None:
        """SGLang's: order what follows in the current stream behind the layer's arrival."""
        for load in self._loads:
            load.wait_layer(threshold)

    def let_go(self, *, all_: bool = False) -> None:
        """Release the chunks of loads that have arrived; of all, waiting for them, if that is asked for.

        Raises:
            NativeError: one did not arrive whole. A pass may have computed with it: SGLang must not go on.
        """
        loads, self._loads, failed = self._loads, [], ""
        for load in loads:
            if not all_ and not load.arrived():
                self._loads.append(load)
            elif not load.finish():
                failed = load.error
        if failed:
            raise NativeError(f"LMKV: a load failed under the forward pass that waits for it: {failed}")
