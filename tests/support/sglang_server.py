"""A real ``python -m sglang.launch_server`` on the CPU, as a user starts it; requests by its HTTP interface."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CPU", "Server", "serving"]

#: What it takes to run without a GPU.
CPU = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "skip_tokenizer_init": True,
    "max_total_tokens": 4096,
    "mem_fraction_static": 0.1,
}


class Server:
    """A server that answers.

    Args:
        url: of its HTTP interface.
        log: where its lines are.
    """

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request; JSON where the answer is JSON, else its text."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
        with contextlib.suppress(ValueError):
            return json.loads(text)
        return text

    def generate(self, ids: list[int], **more: Any) -> tuple[list[int], int, Any]:
        """Eight tokens behind a prompt, the prompt's cached tokens, and where these came from."""
        sampling = {"max_new_tokens": 8, "temperature": 0}
        answer = self.ask("/generate", {"input_ids": ids, "sampling_params": sampling, **more})
        told = answer["meta_info"]
        return answer["output_ids"], told["cached_tokens"], told.get("cached_tokens_details")

    def flush(self) -> None:
        """Empty the server's own cache."""
        deadline = time.monotonic() + 30
        while True:  # refused while a request is not quite finished
            try:
                self.ask("/flush_cache", {})
                return
            except urllib.error.HTTPError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def lines(self, beginning: str) -> list[str]:
        """Lines of the log that have this in them."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if beginning in line]


@contextlib.contextmanager
def serving(model: Path, log: Path, environ: Mapping[str, str], *flags: str, before: Sequence[str] = ()) -> Iterator[Server]:
    """A server of that model, ended with all of its processes; ``before`` stands in front of its command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*before, sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port), *flags]
    for name, value in CPU.items():
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environ}, start_new_session=True
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", log)
            _wait(server, process)
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {server.log.read_text(errors='replace')[-4000:]}")
        try:
            server.ask("/health")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise TimeoutError(server.log.read_text(errors="replace")[-4000:])
