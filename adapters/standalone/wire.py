"""Connections of a client: kept open between requests, bounded in time, errors told in LMKV's own words."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from lmkv.errors import BackendError, BackendUnavailableError, ConfigError, StoreClosedError

from .replies import raise_reply

__all__ = ["Wire"]

#: Idle connections that are kept.
_MOST_IDLE = 8
#: Errors of a connection that the service closed while it was idle.
_STALE = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError, ConnectionAbortedError)
_BROKEN = (OSError, http.client.HTTPException)

Send = Callable[[http.client.HTTPConnection], None]


class Wire:
    """HTTP requests to one service.

    Args:
        url: ``http://host:port`` or ``https://…``.
        token: bearer token, if any.
        timeout_seconds: for each step.

    Raises:
        ConfigError: the URL or the token is not one.
    """

    def __init__(self, url: str, token: str | None, timeout_seconds: float) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.path.strip("/") or parts.query:
            raise ConfigError(f"expected a service's URL such as http://127.0.0.1:7711; got {url!r}")
        if not timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds: expected more than 0; got {timeout_seconds!r}")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ConfigError("token: expected printable ASCII; got something else")
        self.url = url.rstrip("/")
        self._https = parts.scheme == "https"
        self._host, self._port = parts.hostname, port
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout = timeout_seconds
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._closed = False

    def ask(self, method: str, path: str, body: Mapping[str, object] | None = None, *, patience: float = 0.0) -> dict[str, Any]:
        """A JSON request and its JSON answer; the answer may take ``patience`` seconds longer than the timeout.

        Raises:
            LMKVError: see :class:`StoreClient`.
        """
        data = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()

        def send(connection: http.client.HTTPConnection) -> None:
            if data:
                connection.send(data)

        with self.exchange(method, path, len(data), "application/json", send, patience=patience) as response:
            return self.json_of(response)

    @contextmanager
    def exchange(
        self, method: str, path: str, length: int, content_type: str, send: Send, *, patience: float = 0.0
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request of ``length`` bytes by ``send``; the response, whose status is 200, is read inside the block.

        Raises:
            LMKVError: what the service said, or :class:`BackendUnavailableError`.
        """
        connection, response = self._begin(method, path, length, content_type, send, patience)
        try:
            if response.status != 200:
                raise_reply(response.status, response.read(65536), f"{self.url}{path}")
            yield response
        except _BROKEN as error:
            connection.close()
            raise self._unavailable(error) from error
        except BaseException:
            connection.close()  # part of the response may be unread
            raise
        self._give_back(connection, response)

    def _begin(
        self, method: str, path: str, length: int, content_type: str, send: Send, patience: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        while True:
            connection, reused = self._take()
            try:
                if not reused:
                    connection.connect()
                connection.putrequest(method, path, skip_accept_encoding=True)
                for name, value in self._headers.items():
                    connection.putheader(name, value)
                connection.putheader("Content-Type", content_type)
                connection.putheader("Content-Length", str(length))
                connection.endheaders()
                try:
                    send(connection)
                except (BrokenPipeError, ConnectionResetError):
                    if reused:
                        raise
                    # the service refused before it read everything: its answer may be there
                connection.sock.settimeout(self._timeout + patience)
                response = connection.getresponse()
                if connection.sock is not None:  # it has left with the response where that closes the connection
                    connection.sock.settimeout(self._timeout)
                return connection, response
            except _STALE as error:
                connection.close()
                if not reused:
                    raise self._unavailable(error) from error
            except _BROKEN as error:
                connection.close()
                raise self._unavailable(error) from error
            except BaseException:
                connection.close()
                raise

    def _unavailable(self, error: Exception) -> BackendUnavailableError:
        reason = f"no answer within {self._timeout:g} seconds" if isinstance(error, TimeoutError) else str(error) or repr(error)
        return BackendUnavailableError(f"{self.url}: expected an LMKV service; got: {reason}. Is it running there?")

    def json_of(self, response: http.client.HTTPResponse) -> dict[str, Any]:
        """The JSON object of a response."""
        data = response.read()
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise BackendError(f"{self.url}: expected a JSON object; got {data[:100]!r}")
        return value

    def read(self, response: http.client.HTTPResponse, size: int) -> bytes:
        """Exactly ``size`` bytes of a response. Raises as :meth:`read_into`."""
        data = bytearray(size)
        self.read_into(response, memoryview(data))
        return bytes(data)

    def read_into(self, response: http.client.HTTPResponse, target: memoryview) -> None:
        """Fill ``target`` from a response.

        Raises:
            BackendUnavailableError: the response ends early or stalls.
        """
        filled = 0
        while filled < len(target):
            count = response.readinto(target[filled:])
            if not count:
                raise BackendUnavailableError(f"{self.url}: expected {len(target) - filled} more bytes; the answer ended early")
            filled += count

    def _take(self) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._closed:
                raise StoreClosedError(f"{self.url}: expected an open client; it was closed")
            while self._idle:
                connection = self._idle.pop()
                if _at_rest(connection):
                    return connection, True
                connection.close()
        if self._https:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=context), False
        return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout), False

    def _give_back(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        whole = False
        with contextlib.suppress(*_BROKEN):
            whole = not response.read()  # else it is what a well-behaved service would not have sent
        with self._lock:
            if whole and not self._closed and not response.will_close and len(self._idle) < _MOST_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close idle connections; those in use close when they are done."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _at_rest(connection: http.client.HTTPConnection) -> bool:
    """Whether an idle connection stands, and nothing has come that nobody asked for: it would be taken for the next answer."""
    sock = connection.sock
    if sock is None or (isinstance(sock, ssl.SSLSocket) and sock.pending()):
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)
