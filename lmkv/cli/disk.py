"""``lmkv inspect``, ``lmkv verify`` and ``lmkv compact``: a disk tier's directory from outside."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

from ..backends import BackendSettings
from ..backends.disk.survey import compact as compact_directory
from ..backends.disk.survey import survey
from ..backends.lmdb_disk import LmdbBackend
from ..chunks import TOKEN_BYTES, ChunkKey
from ..errors import CorruptRecordError, LMKVError
from ..record import payload_offset, read_header
from ..record import verify as verify_record

__all__ = ["compact", "inspect", "open_disk", "records_of", "verify"]

_BATCH = 8


def open_disk(path: str, capacity: int = 0) -> LmdbBackend:
    """A directory's backend, with the capacity that it was opened with last unless another one is given.

    Raises:
        ConfigError: it is no directory of a disk tier.
    """
    found = survey(path)
    return LmdbBackend(BackendSettings(path, found.layout, capacity or found.capacity, {"path": path, "ahead": False}))


def records_of(backend: LmdbBackend, keys: Sequence[ChunkKey], size: int) -> Iterator[tuple[ChunkKey, memoryview | None]]:
    """Each key with its record, ``None`` where that can't be read; a few at a time."""
    buffers = [memoryview(bytearray(size)) for _ in range(min(_BATCH, len(keys)))]
    for i in range(0, len(keys), _BATCH):
        some = keys[i : i + _BATCH]
        sizes = backend.read_many(some, buffers[: len(some)])
        for key, length, buffer in zip(some, sizes, buffers, strict=False):
            yield key, None if length is None else buffer[:length]


def _guarded(command: str, work: object, *arguments: object) -> int:
    try:
        return int(work(*arguments))  # type: ignore[operator]
    except LMKVError as error:
        print(f"lmkv {command}: {error}", file=sys.stderr)
        return 1


def inspect(argv: Sequence[str]) -> int:
    """Print what a directory holds; 1 if it is none."""
    parser = argparse.ArgumentParser(prog="lmkv inspect", description="What a disk tier's directory holds.")
    parser.add_argument("directory")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(list(argv))
    return _guarded("inspect", _inspect, args)


def _inspect(args: argparse.Namespace) -> int:
    found = survey(args.directory)
    backend = open_disk(args.directory)
    try:
        entries = list(backend.entries(0))
        tokens = sum(len(backend.tokens_of(entry.key) or b"") // TOKEN_BYTES for entry in entries)
        roots: dict[str, int] = {}
        for entry in entries:
            roots[entry.root.hex()] = roots.get(entry.root.hex(), 0) + 1
        geometry = backend._geometry
        lines: dict[str, object] = {
            "layout": found.layout.describe,
            "capacity_bytes": found.capacity,
            "bytes_on_disk": found.bytes_on_disk,
            "record_bytes": backend.used_bytes(),
            "record_capacity_bytes": backend.capacity,
            "chunks": len(entries),
            "tokens": tokens,
            "texts": len({entry.key for entry in entries} - {entry.parent for entry in entries}),
            "slot_bytes": geometry.slot_bytes,
            "segment_bytes": geometry.segment_bytes,
            "direct": backend._directory.files.direct if backend._directory.files else False,
            "chunks_by_namespace": roots,
        }
    finally:
        backend.close()
    if args.json:
        print(json.dumps(lines))
    else:
        for name, value in lines.items():
            print(f"{name:<22} {value}")
    return 0


def verify(argv: Sequence[str]) -> int:
    """Prove every record; 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="lmkv verify", description="Read every record of a disk tier's directory and prove it, and the index with it."
    )
    parser.add_argument("directory")
    parser.add_argument("--delete", action="store_true", help="delete records that are damaged")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(list(argv))
    return _guarded("verify", _verify, args)


def _verify(args: argparse.Namespace) -> int:
    layout = survey(args.directory).layout
    backend = open_disk(args.directory)
    try:
        with backend._begin() as txn:
            problems = list(backend._index.problems(txn))
        entries = {entry.key: entry for entry in backend.entries(0)}
        size = payload_offset(layout.chunk_tokens) + 2 * layout.chunk_bytes  # a codec may make a record larger
        bad: list[ChunkKey] = []
        for key, record in records_of(backend, list(entries), size):
            entry = entries[key]
            try:
                if record is None:
                    raise CorruptRecordError("its slots can't be read; it is deleted")
                verify_record(
                    record, key=key, parent=entry.parent, root=entry.root, layout=layout.fingerprint, start=entry.start
                )
                if read_header(record).tokens != backend.tokens_of(key):
                    raise CorruptRecordError("the index has other tokens")
            except CorruptRecordError as error:
                if record is not None and not backend.contains_many([key])[0]:
                    continue  # an engine that uses the directory, too, evicted it meanwhile
                bad.append(key)
                problems.append(f"{key.hex()}: {error}")
        if args.delete:
            backend.delete_many(bad)
    finally:
        backend.close()
    deleted = len(bad) if args.delete else 0
    if args.json:
        print(json.dumps({"chunks": len(entries), "problems": problems, "deleted": deleted}))
    else:
        print(f"{len(entries)} chunks, {len(problems)} problems, {deleted} chunks deleted", *problems, sep="\n  ")
    return int(bool(problems))


def compact(argv: Sequence[str]) -> int:
    """Make a directory as small as what it holds; 1 if somebody uses it."""
    parser = argparse.ArgumentParser(
        prog="lmkv compact",
        description="Write the index anew without its free pages and remove segment files that hold nothing. "
        "Nobody may have the directory open. While it works, the index is there twice.",
    )
    parser.add_argument("directory")
    args = parser.parse_args(list(argv))
    return _guarded("compact", _compact, args)


def _compact(args: argparse.Namespace) -> int:
    before, after = compact_directory(args.directory)
    print(f"{before} bytes before, {after} after")
    return 0
