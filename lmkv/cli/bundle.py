"""``lmkv export`` and ``lmkv import``: stored texts as one portable file, to warm another machine.

A bundle is a safetensors file (huggingface.co/docs/safetensors, "Format") whose tensors are whole records; ``docs/format.md``
says more. Records prove themselves, so what was damaged on the way is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..backends import BackendSettings
from ..backends.disk.survey import parse_layout, survey
from ..backends.lmdb_disk import LmdbBackend
from ..chunks import TOKEN_BYTES, ChunkKey, token_bytes
from ..config import parse_bytes
from ..errors import CapacityError, ConfigError, CorruptRecordError, LMKVError
from ..record import payload_offset, read_header, verify
from .disk import open_disk, records_of

__all__ = ["export", "import_"]

FORMAT = "lmkv-bundle/1"


def _chain(backend: LmdbBackend, root: ChunkKey, tokens: bytes, width: int) -> list[ChunkKey]:
    """The stored chunks of a text in one namespace, from its beginning as far as they go."""
    found: list[ChunkKey] = []
    parent = root
    for at in range(0, len(tokens), width):
        piece = tokens[at : at + width]
        best = backend.best_child(parent, piece)
        if best is None:
            break
        key, held, shared = best
        found.append(key)
        if shared * TOKEN_BYTES < len(piece) or len(held) < width:
            break
        parent = key
    return found


def _chosen(backend: LmdbBackend, texts: Path | None, width: int) -> list[ChunkKey]:
    """Keys of the chosen texts' chunks, or of all, parents first."""
    entries = list(backend.entries(0))
    if texts is None:
        return [entry.key for entry in sorted(entries, key=lambda entry: entry.start)]
    try:
        lists = json.loads(texts.read_text(encoding="utf-8"))
        wanted = [token_bytes(tokens) for tokens in lists]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{texts}: expected a JSON list of lists of token ids; got: {error}") from None
    roots = {entry.root for entry in entries}
    keys = [key for root in roots for tokens in wanted for key in _chain(backend, root, tokens, width)]
    return list(dict.fromkeys(keys))


def export(argv: Sequence[str]) -> int:
    """Write a bundle; 1 if there is nothing to write or the directory is none."""
    parser = argparse.ArgumentParser(prog="lmkv export", description="Write stored texts into a bundle for another machine.")
    parser.add_argument("directory", help="a disk tier's directory")
    parser.add_argument("bundle", type=Path, help="the file to write, for example warm.safetensors")
    parser.add_argument("--texts", type=Path, help="a JSON list of lists of token ids; all that is stored by default")
    args = parser.parse_args(list(argv))
    try:
        return _export(args)
    except (LMKVError, OSError) as error:
        print(f"lmkv export: {error}", file=sys.stderr)
        return 1


def _export(args: argparse.Namespace) -> int:
    layout = survey(args.directory).layout
    backend = open_disk(args.directory)
    try:
        keys = _chosen(backend, args.texts, layout.chunk_tokens * TOKEN_BYTES)
        room = payload_offset(layout.chunk_tokens) + 2 * layout.chunk_bytes
        sizes: dict[ChunkKey, int] = {}
        with backend._begin() as txn:
            for key in keys:
                place = backend._index.place(txn, key)
                if place is not None:
                    sizes[key] = place.size
        part = args.bundle.with_name(args.bundle.name + ".part")
        with part.open("wb") as file:
            _write_head(file, layout.describe, sizes)
            for key, record in records_of(backend, list(sizes), room):
                if record is None or len(record) != sizes[key]:
                    raise ConfigError(f"expected {key.hex()} to stay while it is exported; it was evicted: try again")
                file.write(record)
        part.replace(args.bundle)
    finally:
        backend.close()
    print(f"{len(sizes)} chunks, {args.bundle.stat().st_size} bytes in {args.bundle}")
    return int(not sizes)


def _write_head(file: BinaryIO, layout: str, sizes: dict[ChunkKey, int]) -> None:
    """The length of the head as 8 bytes, then the head: JSON, padded with spaces."""
    head: dict[str, object] = {"__metadata__": {"format": FORMAT, "layout": layout, "chunks": str(len(sizes))}}
    at = 0
    for key, size in sizes.items():
        head[key.hex()] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def import_(argv: Sequence[str]) -> int:
    """Put a bundle's chunks into a directory; 1 if some could not be."""
    parser = argparse.ArgumentParser(prog="lmkv import", description="Put the texts of a bundle into a disk tier's directory.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("directory", help="made if it is missing")
    parser.add_argument("--capacity", help="of a directory that is made, for example 10GiB; what an old one has by default")
    args = parser.parse_args(list(argv))
    try:
        return _import(args)
    except (LMKVError, OSError) as error:
        print(f"lmkv import: {error}", file=sys.stderr)
        return 1


def _import(args: argparse.Namespace) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        bundle = safe_open(str(args.bundle), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{args.bundle}: expected a bundle; got: {error}") from None
    with bundle as tensors:
        about = tensors.metadata() or {}
        if about.get("format") != FORMAT:
            raise ConfigError(f"{args.bundle}: expected a bundle of the format {FORMAT}; got {about.get('format')!r}")
        layout = parse_layout(about.get("layout", ""))
        if (Path(args.directory) / "data.mdb").exists():
            backend = open_disk(args.directory, parse_bytes(args.capacity) if args.capacity else 0)
        elif args.capacity:
            settings = BackendSettings(args.directory, layout, parse_bytes(args.capacity), {"path": args.directory})
            backend = LmdbBackend(settings)
        else:
            raise ConfigError(f"expected --capacity for {args.directory}, which is made now")
        try:
            if survey_layout(backend) != layout.describe:
                raise ConfigError(f"expected a directory of the layout {layout.describe!r}; {args.directory} has another")
            new, held, bad = 0, 0, 0
            for name in sorted(tensors.keys()):
                record = memoryview(np.asarray(tensors.get_tensor(name), np.uint8).tobytes())
                try:
                    header = read_header(record)
                    place = {name: getattr(header, name) for name in ("key", "parent", "root", "start")}
                    verify(record, layout=layout.fingerprint, **place)
                    if header.key.hex() != name:
                        raise CorruptRecordError(f"expected the record of {name}; got {header.key.hex()}")
                except CorruptRecordError as error:
                    print(f"left out {name}: {error}", file=sys.stderr)
                    bad += 1
                    continue
                if backend.contains_many([header.key])[0]:
                    held += 1
                    continue
                try:
                    backend.write_many([header.key], [record])
                except CapacityError as error:
                    raise CapacityError(f"{args.directory} is full after {new} chunks: {error}") from None
                new += 1
            backend.sync()
        finally:
            backend.close()
    print(f"{new} chunks new, {held} were there, {bad} damaged")
    return int(bad > 0)


def survey_layout(backend: LmdbBackend) -> str:
    """The description of an open directory's layout."""
    return backend._directory.settings.layout.describe
