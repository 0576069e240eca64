"""``lmkv adopt``: what LMCache 0.3 left of given texts, brought into the directory of a disk tier."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lmkv.backends import BackendSettings
from lmkv.backends.disk.survey import Survey, survey
from lmkv.backends.lmdb_disk import LmdbBackend
from lmkv.chunks import KEY_BYTES, ChunkKey, Namespace, token_bytes
from lmkv.config import StoreConfig, parse_bytes, read_yaml
from lmkv.errors import ConfigError, LMKVError
from lmkv.store import Store

from .adopt import Adopter, Origin
from .old_keys import ALGORITHMS

__all__ = ["KnownNamespace", "main", "make_parser"]

#: The same model on another version of an engine differs by some hundredths, another model or order of layers by about 1.
_MOST_DIFFERENCE = 0.25
_TOKEN_KEYS = ("tokens", "token_ids", "prompt_token_ids")
_TEXT_KEYS = ("text", "prompt")


@dataclass(frozen=True)
class KnownNamespace(Namespace):
    """A namespace of which only the root is known, as a directory shows it."""

    known: str = ""

    @cached_property
    def root(self) -> ChunkKey:
        """See :class:`Namespace`."""
        return ChunkKey(bytes.fromhex(self.known))


def make_parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="lmkv adopt",
        description="Bring what LMCache 0.3 kept of some texts, in a Redis or on a disk, into the directory of a disk tier. "
        "LMCache's values carry no checksum; nothing is ever written where they are. The directory must hold something that "
        "the engine computed with LMKV: it says what namespace to store in, and is compared with what LMCache has.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("directory", help="a disk tier's directory")
    add("texts", type=Path, help='JSON lines: [1, 2, …], {"tokens": […]}, {"prompt_token_ids": […]}, or {"text": "…"}')
    add("--model", required=True, help="the engine's --model, with which LMCache's keys begin")
    add(
        "--from",
        dest="origins",
        action="append",
        default=[],
        metavar="PLACE",
        help="LMCache's local_disk, or redis://host:6379",
    )
    add("--config", metavar="FILE", help="LMCache's YAML file: local_disk, remote_url, chunk_size, pre_caching_hash_algorithm")
    add("--chunk-size", type=int, help="LMCache's chunk_size (default: the file's, or 256)")
    add("--hash-algorithm", choices=ALGORITHMS, help="its pre_caching_hash_algorithm (default: the file's, or builtin)")
    add(
        "--hash-seed",
        help="the engine's PYTHONHASHSEED (default: this process's; without one only keys of engines without vLLM)",
    )
    add("--world-size", type=int, default=1, help="tensor times pipeline parallel size of the engine (default %(default)s)")
    add("--workers", default="", help="ranks whose parts the directory holds, such as 0,1 (default: all)")
    add("--namespace", default="", metavar="HEX", help="as lmkv inspect shows it (default: the directory's only one)")
    add("--key-hash", choices=("sha256", "xxh3"), default="", help="the store's (default: as the directory's keys say)")
    add("--tokenizer", help='of {"text": "…"} lines: a folder or name for transformers (default: --model)')
    add("--ram", default="1GiB", help="memory to work in (default %(default)s)")
    add("--json", action="store_true", help="one JSON object a text")
    return parser


def _texts(path: Path, tokenizer: str) -> Iterator[list[int]]:
    """Token ids, one list a line."""
    encode: Any = None
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a readable file of JSON lines; got: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            said = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: expected a line of JSON; got: {error}") from None
        if isinstance(said, dict):
            said = next((said[key] for key in (*_TOKEN_KEYS, *_TEXT_KEYS) if key in said), None)
        if isinstance(said, str):
            encode = encode or _encoder(tokenizer)
            said = encode(said)
        try:
            token_bytes(said)
        except LMKVError as error:
            raise ConfigError(f"{where}: {error}") from None
        yield said


def _encoder(tokenizer: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ConfigError(
            "expected lines of token ids, or the package transformers for text: pip install transformers"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(tokenizer).encode
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--tokenizer: expected a folder or name that transformers can load; got {tokenizer!r}: {error}"
        ) from None


def _namespace(directory: str, found: Survey, wanted: str, key_hash: str) -> Namespace:
    """The namespace of what the directory holds.

    Raises:
        ConfigError: it has none, or several and none was chosen.
    """
    layout = found.layout.fingerprint
    backend = LmdbBackend(BackendSettings(directory, found.layout, found.capacity, {"path": directory, "ahead": False}))
    try:
        entries = list(backend.entries(0))
        roots = {entry.root.hex(): entry for entry in entries}
        if wanted:
            if len(wanted) != 2 * KEY_BYTES or not all(digit in "0123456789abcdef" for digit in wanted.lower()):
                raise ConfigError(f"--namespace: expected {2 * KEY_BYTES} hexadecimal digits; got {wanted!r}")
            root = wanted.lower()
        elif len(roots) == 1:
            (root,) = roots
        else:
            raise ConfigError(
                f"expected a directory with chunks of one namespace; got {len(roots)}: "
                + (
                    f"choose with --namespace out of {', '.join(sorted(roots))} (lmkv inspect counts their chunks)"
                    if roots
                    else "let the engine answer one request with LMKV first, so that it is known what it stores under"
                )
            )
        entry = roots.get(root)
        tokens = backend.tokens_of(entry.key) if entry else None
        if not key_hash and entry is not None and tokens:
            names = {name: Namespace(layout, key_hash=name).hasher for name in ("sha256", "xxh3")}
            key_hash = next((name for name, h in names.items() if h(entry.parent + tokens)[:KEY_BYTES] == entry.key), "")
        return KnownNamespace(layout, key_hash=key_hash or "sha256", known=root)
    finally:
        backend.close()


def _origin(args: argparse.Namespace, environ: Mapping[str, str]) -> list[Origin]:
    said = read_yaml(args.config) if args.config else {}
    places = list(args.origins)
    if not places:
        places = [part.strip() for part in str(said.get("local_disk") or "").split(",") if part.strip()]
        url, service = str(said.get("remote_url") or ""), environ.get("REDIS_SERVICE_NAME", "")
        if service and "-sentinel://" in url and "master=" not in url:
            url += f"{'&' if '?' in url else '?'}master={service}"
        places += [url] if url else []
    if not places:
        raise ConfigError("expected --from, or a --config with local_disk or remote_url: where did LMCache keep its values?")
    try:
        workers = tuple(int(word) for word in args.workers.split(",") if word.strip())
        chunk_size = int(str(said.get("chunk_size", 256))) if args.chunk_size is None else args.chunk_size
    except (TypeError, ValueError):
        raise ConfigError(
            f"expected whole numbers; got --workers {args.workers!r}, chunk_size {said.get('chunk_size')!r}"
        ) from None
    algorithm = args.hash_algorithm or str(said.get("pre_caching_hash_algorithm", "builtin"))
    seed = args.hash_seed if args.hash_seed is not None else environ.get("PYTHONHASHSEED", "")
    base = Origin("", args.model, chunk_size, algorithm, "" if seed == "random" else seed, args.world_size, workers)
    return [dataclasses.replace(base, where=place) for place in places]


def main(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Adopt; returns the exit status (0 done, 1 nothing was found or something failed, 2 wrong arguments)."""
    args = make_parser().parse_args(list(argv))
    try:
        origins = _origin(args, os.environ if environ is None else environ)
        found = survey(args.directory)
        namespace = _namespace(args.directory, found, args.namespace, args.key_hash)
        settings = {"disk_path": args.directory, "disk_capacity": found.capacity, "ram_capacity": parse_bytes(args.ram)}
        texts = list(_texts(args.texts, args.tokenizer or args.model))
        with Store(StoreConfig.from_dict(settings), found.layout) as store:
            return sum(_adopt(store, origin, texts, namespace, args.json) for origin in origins) == 0
    except (LMKVError, OSError) as error:
        print(f"lmkv adopt: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _adopt(store: Store, origin: Origin, texts: Sequence[list[int]], namespace: Namespace, as_json: bool) -> int:
    """One place; how many texts are held whole, or were found in part."""
    found = 0
    with Adopter(store, origin) as adopter:
        _check(adopter, texts, namespace)
        for number, tokens in enumerate(texts, 1):
            result = adopter.adopt(tokens, namespace=namespace, flush=True)
            found += bool(result.versions) or not result.reason
            if as_json:
                print(json.dumps({"text": number, "place": origin.where, "length": len(tokens), **dataclasses.asdict(result)}))
            else:
                why = f"; {result.reason}" if result.reason else ""
                print(f"text {number}: {result.tokens} tokens new, {result.held} of {len(tokens)} held{why}", flush=True)
        names = [] if found else adopter.some_names()
    if names:
        print(
            f"lmkv adopt: nothing was found. Keys there are for example {', '.join(names)}: compare model, world size, rank; "
            "chunk size, PYTHONHASHSEED, hash algorithm and every token must be LMCache's, too",
            file=sys.stderr,
        )
    elif not found:
        print("lmkv adopt: nothing was found: no chunks of LMCache's are there", file=sys.stderr)
    return found


def _check(adopter: Adopter, texts: Sequence[list[int]], namespace: Namespace) -> None:
    """Compare what both have of a text.

    Raises:
        ConfigError: it is not the same KV.
    """
    for tokens in texts:
        compared = adopter.compare(tokens, namespace=namespace)
        if compared is None:
            continue
        said = f"{compared.tokens} tokens that LMKV has too differ by {compared.difference:.1%} at most"
        if not compared.difference <= _MOST_DIFFERENCE:
            raise ConfigError(
                f"{said}: expected the same KV, so this is another model, or arranged otherwise; nothing was stored"
            )
        print(f"lmkv adopt: {said}", file=sys.stderr)
        return
    print("lmkv adopt: no text is held by both, so nothing could be compared", file=sys.stderr)
