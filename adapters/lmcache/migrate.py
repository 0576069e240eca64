"""``lmkv migrate lmcache.yaml``: a configuration in LMCache's keys, written anew in LMKV's."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from lmkv.config import StoreConfig, parse_yaml, read_yaml
from lmkv.errors import ConfigError

from .config import Translated, translate, translate_environment
from .peers import read_peers

__all__ = ["main", "migrated"]

_WIDTH = 110
_NO_EFFECT = " has no effect: "
_UNITS = (("TiB", 1024**4), ("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024))
_SIZES = ("ram_capacity", "ram_extent", "ram_ahead", "disk_capacity", "capacity", "global_segment_size", "local_buffer_size")


def _shown(key: str, value: object) -> object:
    """A size with its unit, where it is a whole number of one."""
    if key in _SIZES and isinstance(value, int) and not isinstance(value, bool) and value > 0:
        for unit, size in _UNITS:
            if value % size == 0:
                return f"{value // size}{unit}"
    return value


def _as_yaml(key: str, value: object) -> list[str]:
    import yaml

    if isinstance(value, list):
        value = [{k: _shown(k, v) for k, v in tier.items() if v != {}} if isinstance(tier, Mapping) else tier for tier in value]
    text = yaml.safe_dump({key: _shown(key, value)}, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return str(text).splitlines()


def _comment(text: str, first: str = "# ") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent="#   ", break_long_words=False)


def _settings(out: Translated) -> Iterator[str]:
    for key, value in out.settings.items():
        lines = _as_yaml(key, value)
        written = out.names.get(key)
        if written is None and key == "disk_capacity":
            written = "nothing is kept on disk without local_disk"
        elif key == "tiers":
            names = [name.rpartition(": ")[2] for name in out.remote.names.values()]
            written = ", ".join(dict.fromkeys(names))
        if written and written != key:
            lines[0] += f"  # {written}"
        yield from lines


def _without_effect(out: Translated, where: str) -> Iterator[str]:
    """What the warnings say, keys of one reason together."""
    reasons: dict[str, list[str]] = {}
    for warning in out.warnings:
        key, between, why = warning.removeprefix(f"{where}: ").partition(_NO_EFFECT)
        reasons.setdefault(f"no effect: {why}" if between else "", []).append(key)
    for reason, keys in reasons.items():
        if reason:
            yield from _comment(f"{', '.join(keys)}: {reason}", "# - ")
        else:
            for line in keys:
                yield from _comment(line, "# - ")


def _shared_tier(out: Translated) -> Iterator[str]:
    """The tier that takes the place of an exchange between engines, for whoever had one and no storage that all reach."""
    peers = read_peers(out.peers, "config")
    if (peers.shares or peers.role) and "tiers" not in out.settings:
        yield "# The same on all of them, with `lmkv serve 0.0.0.0 65432 --insecure` (or a token) on one host that they reach:"
        yield "# tiers:"
        yield "# - url: lm://HOST:65432"


def migrated(out: Translated, where: str) -> str:
    """A YAML text in LMKV's keys, with a comment for what has another name or none.

    Args:
        out: as :func:`lmkv.adapters.lmcache.translate` returns it.
        where: what it was read from.

    Raises:
        ConfigError: the settings make no store's config.
    """
    config = StoreConfig.from_dict(out.settings, where=where)
    lines = _comment(f"LMKV's settings for {where}, by lmkv migrate. Use: LMKV_CONFIG_FILE=FILE, or --config FILE.")
    lines += list(_settings(out)) or ["{}"]
    if out.warnings:
        lines += ["", "# Without effect here, or with another one:"]
        lines += [*_without_effect(out, where), *_shared_tier(out)]
    text = "\n".join(lines) + "\n"
    again = parse_yaml(text, "migrated")
    if not isinstance(again, Mapping) or StoreConfig.from_dict(again) != config:
        raise ConfigError(f"{where}: expected to write what would be read; got other settings: please report it")
    return text


def main(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Print the migrated file; returns the exit status (0 done, 2 a wrong configuration or command line)."""
    parser = argparse.ArgumentParser(
        prog="lmkv migrate", description="Print the settings of LMCache's configuration as LMKV's, with comments."
    )
    parser.add_argument("file", nargs="?", help="YAML file with LMCache's keys")
    parser.add_argument("--environment", action="store_true", help="lay the LMCACHE_* variables over it")
    args = parser.parse_args(list(argv))
    if args.file is None and not args.environment:
        parser.error("expected a file, --environment or both; got none")
    try:
        written = dict(read_yaml(args.file)) if args.file is not None else {}
        where = args.file or "the environment"
        if args.environment:
            out = translate_environment(written, os.environ if environ is None else environ, where=where)
        else:
            out = translate(written, where=where)
        print(migrated(out, where), end="")
    except ConfigError as error:
        print(f"lmkv migrate: {error}", file=sys.stderr)
        return 2
    return 0
