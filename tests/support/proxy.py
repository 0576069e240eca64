"""A TCP proxy on loopback that can stall, cut, damage and count what a server answers."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

__all__ = ["Proxy"]


class Proxy:
    """Passes bytes between a client and a server; the attributes may be changed while it runs.

    ``stalled``: while cleared, nothing passes from the server to clients. ``cut_after``: connections end after so many bytes
    from the server. ``damage``: is given each piece from the server and returns what is passed on instead. ``turns``: how often
    a client, having received something or nothing yet, sent something.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.flowing = threading.Event()
        self.flowing.set()
        self.cut_after: int | None = None
        self.damage: Callable[[bytes], bytes] | None = None
        self.turns = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._open: list[socket.socket] = []
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        """Keep back what the server says from now on."""
        self.flowing.clear()

    def flow(self) -> None:
        """Pass on again."""
        self.flowing.set()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open += [client, server]
            state = {"answered": True}
            threading.Thread(target=self._there, args=(client, server, state), daemon=True).start()
            threading.Thread(target=self._back, args=(server, client, state), daemon=True).start()

    def _there(self, client: socket.socket, server: socket.socket, state: dict[str, bool]) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                if state["answered"]:
                    self.turns += 1
                    state["answered"] = False
                server.sendall(data)
        self._end(client, server)

    def _back(self, server: socket.socket, client: socket.socket, state: dict[str, bool]) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                self.flowing.wait()
                if self.damage is not None:
                    data = self.damage(data)
                if self.cut_after is not None and passed + len(data) >= self.cut_after:
                    client.sendall(data[: max(0, self.cut_after - passed)])
                    break
                passed += len(data)
                state["answered"] = True
                client.sendall(data)
        self._end(client, server)

    @staticmethod
    def _end(*socks: socket.socket) -> None:
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def close(self) -> None:
        """End everything."""
        self._closed = True
        self.flowing.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._end(*self._open)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
