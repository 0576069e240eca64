"""Engines in processes of their own, which tell results as lines ``R {…}``, for the scripts beside this one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Ended", "mode_results", "print_beside_none", "run_process"]


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Args:
        code: its exit status, 0 as well where it had said all and was ended; ``None`` where time was up.
        lines: its output.
        seconds: how long it ran.
    """

    code: int | None
    lines: list[str]
    seconds: float

    @property
    def results(self) -> list[dict[str, Any]]:
        """What it told."""
        return [json.loads(line[line.index("R {") + 2 :]) for line in self.lines if "R {" in line]


def run_process(
    command: Sequence[str],
    log: Path,
    *,
    limit: float,
    said_all: Callable[[list[str]], bool],
    environ: Mapping[str, str] | None = None,
) -> Ended:
    """Run a command until it ends, has said all, or time is up. An engine's processes may outlive their parent: all are ended.

    Args:
        log: takes its output.
        limit: seconds.
        said_all: whether nothing that matters will follow these lines.
    """
    begun = time.monotonic()
    code: int | None = None
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environ)
        while code is None and time.monotonic() - begun < limit:
            time.sleep(0.3)
            code = process.poll()
            if said_all(log.read_text(errors="replace").splitlines()):
                code = 0
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Ended(code, log.read_text(errors="replace").splitlines(), round(time.monotonic() - begun, 1))


def print_beside_none(modes: Sequence[str], run_mode: Callable[[str], list[dict[str, Any]]]) -> int:
    """Print the results of modes as they come, beside those of mode ``none``; returns 1 if a process failed, else 0."""
    plain: dict[str, float] = {}
    failed = False
    for mode in modes:
        for result in run_mode(mode):
            what = result["name"].split("/", 1)[1]
            if mode == "none":
                plain[what] = result["value"]
            elif plain.get(what):
                result |= {"reference": plain[what], "ratio": round(result["value"] / plain[what], 4)}
            failed |= bool(result.get("exit"))
            print(json.dumps(result), flush=True)
    return int(failed)


def mode_results(mode: str, command: Sequence[str], log: Path, limit: float) -> list[dict[str, Any]]:
    """Run the process of a mode, which ends with a result ``mode/end``; its results, and last those about the process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    ended = run_process(command, log, limit=limit, said_all=lambda lines: any(f"{mode}/end" in line for line in lines))
    code = 124 if ended.code is None else ended.code
    told = sorted({line[line.index("LMKV: ") :][:300] for line in ended.lines if "LMKV: " in line})
    if code:
        print(*ended.lines[-40:], sep="\n", file=sys.stderr)
    return [*ended.results, {"name": f"{mode}/process", "value": ended.seconds, "unit": "s", "exit": code, "told": told}]
