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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["Ended", "case_outcome", "end_with_me", "mode_results", "print_beside_none", "print_cases", "run_process"]

T = TypeVar("T")
#: Process groups that run now.
_groups: set[int] = set()


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
        return [result for result in map(_result, self.lines) if result is not None]


def _result(line: str) -> dict[str, Any] | None:
    """The result on a line, on which other processes may have written, too; ``None`` if there is none, or not all of it."""
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.JSONDecoder().raw_decode(line, line.index("R {") + 2)[0]
        return found
    return None


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
        _groups.add(process.pid)
        while code is None and time.monotonic() - begun < limit:
            time.sleep(0.3)
            code = process.poll()
            if said_all(log.read_text(errors="replace").splitlines()):
                code = 0
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _groups.discard(process.pid)
    return Ended(code, log.read_text(errors="replace").splitlines(), round(time.monotonic() - begun, 1))


def end_with_me() -> None:
    """Have what :func:`run_process` runs end when this process is told to, as by ``timeout``; it would keep the memory."""

    def end(number: int, _: object) -> None:
        for group in list(_groups):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def case_outcome(
    name: str, command: Sequence[str], log: Path, *, limit: float, environ: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], Ended]:
    """Run the process of a case, which tells one result; that, or an error, and what it said."""
    ended = run_process(command, log, limit=limit, said_all=lambda lines: any(map(_result, lines[-40:])), environ=environ)
    if ended.results:
        return ended.results[-1], ended
    print(name, *ended.lines[-30:], sep="\n", file=sys.stderr)
    return {"ok": False, "error": f"no result; exit status {ended.code}, log {log}"}, ended


def print_cases(cases: Sequence[T], run_case: Callable[[T], dict[str, Any]], jobs: int) -> int:
    """Print what was found in cases, of which ``jobs`` run at a time, in their order; returns 1 if one failed, else 0."""
    end_with_me()
    failed = False
    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(run_case, cases):
            failed |= not found["ok"]
            print(json.dumps(found), flush=True)
    return int(failed)


def print_beside_none(modes: Sequence[str], run_mode: Callable[[str], list[dict[str, Any]]]) -> int:
    """Print the results of modes as they come, beside those of mode ``none``; returns 1 if a process failed, else 0."""
    end_with_me()
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
