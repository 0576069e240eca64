"""A file system that fails on demand, and one that forgets what was not synced: the Python side of ``faulty_io.c``."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

OPERATIONS = ("writes", "syncs", "reads", "allocations", "direct_opens")
_ENTRY = struct.Struct("<IIQQ")
_BLOCK = 4096
_SECTOR = 512


def build(folder: Path) -> Path:
    """Compile the library into ``folder``."""
    library = folder / "faulty_io.so"
    source = Path(__file__).with_suffix(".c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-U_FILE_OFFSET_BITS", "-o", str(library), str(source), "-ldl", "-lpthread"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


class Control:
    """What fails now, and with which errno. Shared with the process that has the library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            self.fail()

    def fail(self, **errors: int) -> None:
        """From here on these operations fail, all others work."""
        assert set(errors) <= set(OPERATIONS)
        values = struct.pack(f"<{len(OPERATIONS)}i", *(errors.get(name, 0) for name in OPERATIONS))
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)  # in place: others have it mapped
        os.pwrite(fd, values, 0)
        os.close(fd)


def environment(library: Path, directory: Path, *, control: Control | None = None, log: Path | None = None) -> dict[str, str]:
    """Variables of a process whose files below ``directory`` are to misbehave or to be logged."""
    found = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "LD_PRELOAD": str(library)}
    found["FAULTY_IO_DIRECTORY"] = str(directory)
    if control is not None:
        found["FAULTY_IO_CONTROL"] = str(control.path)
    if log is not None:
        found["FAULTY_IO_LOG"] = str(log)
    return found


@dataclass
class _File:
    """A file as the device has it, and what it was told since the last sync."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    size: int = 0


@dataclass(frozen=True)
class Change:
    """One entry of the log, and the log's length behind it."""

    kind: str
    name: str
    offset: int
    size: int
    data: bytes
    end: int


def read_log(path: Path) -> Iterator[Change]:
    """The changes in their order."""
    with path.open("rb") as file:
        at = 0
        while head := file.read(_ENTRY.size):
            kind, length, offset, size = _ENTRY.unpack(head)
            name = file.read(length).decode()
            data = file.read(size) if chr(kind) in "WD" else b""
            at += _ENTRY.size + length + len(data)
            yield Change(chr(kind), name, offset, size, data, at)


class Replay:
    """Plays a log and leaves at any time what a power loss could leave: everything synced, and any part of the rest."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}

    def play(self, change: Change) -> None:
        """The next change."""
        file = self._files.setdefault(change.name, _File())
        if change.kind == "S":
            for offset, data in file.pending:
                _put(file.durable, offset, data)
            file.pending.clear()
            file.durable.extend(bytes(max(0, file.size - len(file.durable))))
            del file.durable[file.size :]
        elif change.kind in "AT":
            end = change.offset + change.size
            file.size = end if change.kind == "T" else max(file.size, end)
        else:
            file.size = max(file.size, change.offset + len(change.data))
            if change.kind == "D":
                _put(file.durable, change.offset, change.data)
            else:
                file.pending.append((change.offset, change.data))

    def lose_power(self, directory: Path, rng: random.Random) -> None:
        """Write the files to ``directory``: of what was not synced, blocks and sectors at random, in no order."""
        keep = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        for name, file in self._files.items():
            left = bytearray(file.durable)
            if rng.random() < keep:
                left.extend(bytes(max(0, file.size - len(left))))
            for offset, data in file.pending:
                unit = _SECTOR if rng.random() < 0.2 else _BLOCK
                for at in range(0, len(data), unit):
                    if rng.random() < keep:
                        _put(left, offset + at, data[at : at + unit])
            (directory / name).write_bytes(left)


def _put(target: bytearray, offset: int, data: bytes) -> None:
    target.extend(bytes(max(0, offset - len(target))))
    target[offset : offset + len(data)] = data
