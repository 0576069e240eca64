"""A real Mooncake master on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import servers

__all__ = ["MooncakeMaster"]


class MooncakeMaster:
    """One master process; the memory is the clients'."""

    def __init__(self, folder: Path) -> None:
        self.port, self._metrics = servers.free_ports(2)
        self._log = folder / "mooncake.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return f"mooncakestore://127.0.0.1:{self.port}/"

    def start(self) -> MooncakeMaster:
        """Start and wait until it listens."""
        program = shutil.which("mooncake_master", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert program, "expected the program mooncake_master; pip install 'lmkv[mooncake]'"
        options = {
            "rpc_address": "127.0.0.1",
            "rpc_port": self.port,
            "metrics_host": "127.0.0.1",
            "metrics_port": self._metrics,
        }
        log = self._log.open("ab")
        self._process = subprocess.Popen(
            [program, *(f"--{name}={value}" for name, value in options.items())],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        log.close()
        servers.until(lambda: servers.listens(self.port))
        return self

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> MooncakeMaster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
