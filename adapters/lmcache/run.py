"""``lmkv run --as-lmcache -- COMMAND …``: LMCache's commands and imports inside COMMAND are LMKV's, and nowhere else.

A temporary directory with a small package ``lmcache`` and commands of LMCache's names stands first on ``PYTHONPATH`` and
``PATH`` of the command, and is gone when it ends. Nothing is installed, and a real ``lmcache`` beside it stays as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmkv import __version__
from lmkv.config import AS_LMCACHE_VARIABLE, SGLANG_VARIABLE

from ..access import is_loopback

__all__ = ["main", "server"]

_MAIN = 'import sys\n\nfrom {module} import {name}\n\nif __name__ == "__main__":\n    sys.exit({name}(sys.argv[1:]))\n'
_SERVER = _MAIN.format(module="lmkv.adapters.lmcache.run", name="server")
_CONTROLLER = _MAIN.format(module="lmkv.adapters.lmcache.run", name="controller")
_ENGINE = '''"""What programs that use LMCache through vLLM call at their end."""


class LMCacheEngineBuilder:
    """LMKV's store closes with the engine that opened it, so there is nothing left to do."""

    @classmethod
    def get(cls, instance_id):
        """The engine of that name: none is kept by name."""
        return None

    @classmethod
    def destroy(cls, instance_id):
        """Nothing: the store writes what waits and closes with its engine."""
'''
_PLUGIN = "lmkv_as_lmcache-1.0.dist-info"
#: The names in here are those of 0.3.15; programs print the version, or want at least some.
_VERSION = f"0.3.15+lmkv.{__version__}"
_INSTALLED = f"lmcache-{_VERSION}.dist-info"
#: A word such as LMCACHE_CHUNK_SIZE=8, which a shell would take for a variable of the command behind it.
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
#: Files of the package and of vLLM's plug-in: path -> text. Folders of the package become packages.
_FILES: Mapping[str, str] = {
    "lmcache/__init__.py": f'"""LMKV under LMCache\'s name, by ``lmkv run --as-lmcache``."""\n\n__version__ = "{_VERSION}"\n',
    "lmcache/c_ops.py": '"""The compiled part of LMKV, under LMCache\'s name for its own."""\n\nimport lmkv._native\n',
    "lmcache/v1/api_server/__main__.py": _CONTROLLER,
    "lmcache/v1/cache_engine.py": _ENGINE,
    "lmcache/v1/server/__main__.py": _SERVER,
    "lmcache/v1/standalone/__main__.py": _MAIN.format(module="lmkv.standalone", name="main"),
    "lmcache/integration/vllm/utils.py": '"""Names that programs import."""\n\nENGINE_NAME = "vllm-instance"\n',
    f"{_INSTALLED}/METADATA": f"Metadata-Version: 2.1\nName: lmcache\nVersion: {_VERSION}\n",
    f"{_PLUGIN}/METADATA": "Metadata-Version: 2.1\nName: lmkv-as-lmcache\nVersion: 1.0\n",
    f"{_PLUGIN}/entry_points.txt": "[vllm.general_plugins]\nlmkv_as_lmcache = lmkv.adapters.lmcache.run:name_connector\n",
}
_COMMANDS: Mapping[str, str] = {
    "lmcache_server": _SERVER,
    "lmcache_controller": _CONTROLLER,
}


def server(argv: Sequence[str]) -> int:
    """``lmcache_server HOST PORT [cpu]``, which listens wherever it is told to, as LMCache's does."""
    from . import serve

    words = list(argv)
    if words and not words[0].startswith("-") and not is_loopback(words[0]) and "--insecure" not in words:
        print(f"lmcache_server (LMKV): anyone who reaches {words[0]} can read and change the values", file=sys.stderr)
        words.append("--insecure")
    return serve.main(words)


def controller(argv: Sequence[str]) -> int:
    """``lmcache_controller``: a server at its pull address, by which the engines that ask for it share KV (``enable_p2p``)."""
    parser = argparse.ArgumentParser(prog="lmcache_controller (LMKV)", allow_abbrev=False)
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--monitor-ports", help='JSON, such as {"pull": 8300, "reply": 8400}')
    parser.add_argument("--monitor-port", type=int, default=9001, help="in older versions")
    args, _ = parser.parse_known_args([word.replace("_", "-") if word.startswith("--") else word for word in argv])
    try:
        port = int(json.loads(args.monitor_ports)["pull"]) if args.monitor_ports else args.monitor_port
    except (ValueError, TypeError, KeyError):
        parser.error(f'--monitor-ports: expected JSON such as {{"pull": 8300, "reply": 8400}}; got {args.monitor_ports!r}')
    print(
        f"lmcache_controller (LMKV): nothing to control: engines with enable_p2p and this controller_pull_url (port {port}) "
        "share KV by this server, if lmkv run --as-lmcache starts them; for others set LMCACHE_REMOTE_URL=lm://HOST:PORT",
        file=sys.stderr,
        flush=True,
    )
    return server([args.host, str(port)])


#: What of vLLM's configuration turns the flags of offloading into a connector.
_OFFLOADING = "_post_init_kv_transfer_config"


def name_connector() -> None:
    """Make LMCache's connectors other names of LMKV's; called by vLLM in each of its processes."""
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from ..vllm import register

    register()
    for name in ("LMCacheConnectorV1", "LMCacheMPConnector"):
        KVConnectorFactory._registry[name] = KVConnectorFactory._registry["LMKVConnector"]
    original = getattr(VllmConfig, _OFFLOADING, None)
    if original is not None and not hasattr(original, "_lmkv"):
        setattr(VllmConfig, _OFFLOADING, _sized(original))


def _sized(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``--kv-offloading-backend lmcache`` with the size that goes with it, which newer vLLM leaves to a server of LMCache."""

    @functools.wraps(original)
    def sized(config: Any) -> None:
        original(config)
        size = getattr(config.cache_config, "kv_offloading_size", None)
        if size and getattr(config.cache_config, "kv_offloading_backend", "") == "lmcache" and config.kv_transfer_config:
            extra = config.kv_transfer_config.kv_connector_extra_config
            if not any(key.endswith(("ram_capacity", "max_local_cpu_size")) for key in extra):
                extra["lmkv.ram_capacity"] = int(size * 1024**3)

    sized._lmkv = True  # type: ignore[attr-defined]
    return sized


@contextlib.contextmanager
def stand_in() -> Iterator[Path]:
    """The temporary directory: ``lib`` for ``PYTHONPATH``, ``bin`` for ``PATH``."""
    with tempfile.TemporaryDirectory(prefix="lmkv-as-lmcache-") as name:
        folder = Path(name)
        for path, text in _FILES.items():
            file = folder / "lib" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        for inner in (folder / "lib" / "lmcache").rglob("*"):
            if inner.is_dir():
                (inner / "__init__.py").touch()
        (folder / "bin").mkdir()
        for command, text in _COMMANDS.items():
            file = folder / "bin" / command
            file.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
            file.chmod(0o755)
        yield folder


def _run(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """The command's exit status. SIGTERM is passed on to it; SIGINT reaches it from the terminal, as it does this process."""
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        process = subprocess.Popen(command, env=environ)
    except OSError as error:
        why = f"{error.strerror} (what a shell does itself, such as export, goes into: bash -c '…')"
        print(f"lmkv run: expected a command that can be run; got {command[0]!r}: {why}", file=sys.stderr)
        return 127
    for number in early:
        process.send_signal(number)
    status = process.wait()
    return status if status >= 0 else 128 - status


def main(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Run a command; returns its exit status (2 for a wrong command line, 127 where it can't be run)."""
    parser = argparse.ArgumentParser(
        prog="lmkv run",
        usage="lmkv run --as-lmcache -- [NAME=VALUE ...] COMMAND [ARG ...]",
        description="Run a command in which lmcache_server, python -m lmcache.v1.standalone and the imports of LMCache's "
        "examples are LMKV's.",
    )
    parser.add_argument("--as-lmcache", action="store_true", required=True, help="the only way to run a command so far")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, behind --")
    args = parser.parse_args(list(argv))
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    env = dict(os.environ if environ is None else environ)
    while command and (assigned := _ASSIGNMENT.fullmatch(command[0])):
        env[assigned[1]] = assigned[2]
        command = command[1:]
    if not command:
        parser.error("expected a command behind --; got none")
    env.setdefault(SGLANG_VARIABLE, "1")
    env[AS_LMCACHE_VARIABLE] = "1"
    with stand_in() as folder:
        for variable, place in (("PATH", "bin"), ("PYTHONPATH", "lib")):
            before = env.get(variable)
            env[variable] = os.pathsep.join([str(folder / place), *([before] if before else [])])
        found = folder / "bin" / command[0]
        return _run([str(found) if command[0] in _COMMANDS else command[0], *command[1:]], env)
