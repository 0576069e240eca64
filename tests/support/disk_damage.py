"""Damages disk directories and says what a store makes of them: ``python disk_damage.py KIND FOLDER SEED COUNT``.

Each try is a process of its own, since what is looked for may end it. Prints a JSON object: outcome -> how often. Outcomes:

    whole       everything was found, as if nothing had happened
    misses      some texts were not found; what was found was right
    disabled    the tier was switched off, with an event
    refused     opening said what is wrong
    wrong …     other bytes, a broken promise, or a process that died: never to be seen
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import disk_writer
import known_kv

import lmkv
from lmkv.store import Store

_PAGE = 4096
_OLD, _TEXTS, _MORE = 12, 22, 50  # the first two fit, all do not
_CAPACITY = 2 << 20
_OUTCOMES = ("whole", "misses", "disabled", "refused")

Damage = Callable[[Path, random.Random], None]


def _segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("segment-*.kv"))


def _change(path: Path, work: Callable[[bytearray], None]) -> None:
    """Change a file in place, as a device would: whoever has it open sees it."""
    data = bytearray(path.read_bytes())
    work(data)
    with path.open("r+b") as file:
        file.write(data)


def slot_bits(directory: Path, rng: random.Random) -> None:
    def flip(data: bytearray) -> None:
        for _ in range(rng.randint(1, 40)):
            data[rng.randrange(_PAGE, len(data))] ^= 1 << rng.randrange(8)

    _change(rng.choice(_segments(directory)), flip)


def slot_zeros(directory: Path, rng: random.Random) -> None:
    def zero(data: bytearray) -> None:
        at, size = rng.randrange(_PAGE, len(data)), rng.choice((512, 4096, 20000, 10**6))
        data[at : at + size] = bytes(len(data[at : at + size]))

    _change(rng.choice(_segments(directory)), zero)


def slot_torn(directory: Path, rng: random.Random) -> None:
    """The first part of one record, the rest of another."""

    def tear(data: bytearray) -> None:
        pages = len(data) // _PAGE - 1
        for _ in range(8):
            to, come = (_PAGE + rng.randrange(pages) * _PAGE for _ in range(2))
            cut = rng.randrange(0, _PAGE, 512)
            data[to + cut : to + _PAGE] = data[come + cut : come + _PAGE]

    _change(rng.choice(_segments(directory)), tear)


def first_page(directory: Path, rng: random.Random) -> None:
    """Of a segment: what says whose it is."""

    def flip(data: bytearray) -> None:
        data[rng.randrange(56)] ^= 1 << rng.randrange(8)

    _change(rng.choice(_segments(directory)), flip)


def truncated(directory: Path, rng: random.Random) -> None:
    file = rng.choice(_segments(directory))
    os.truncate(file, rng.randrange(file.stat().st_size))


def deleted(directory: Path, rng: random.Random) -> None:
    for file in rng.sample(_segments(directory), rng.randint(1, 3)):
        file.unlink()


def swapped(directory: Path, rng: random.Random) -> None:
    one, two = rng.sample(_segments(directory), 2)
    one.rename(directory / "between")
    two.rename(one)
    (directory / "between").rename(two)


def linked(directory: Path, rng: random.Random) -> None:
    """A link to a file elsewhere in place of a segment; that file has to stay as it is."""
    file = rng.choice(_segments(directory))
    outside = directory.parent / "outside"
    outside.write_bytes(b"years of work")
    file.unlink()
    (os.symlink if rng.random() < 0.5 else os.link)(outside, file)


def foreign_segment(directory: Path, rng: random.Random) -> None:
    """Another directory's segment of the same number, with records of the same keys."""
    file = rng.choice(_segments(directory))
    shutil.copyfile(directory.parent / "other" / file.name, file)


def older_index(directory: Path, rng: random.Random) -> None:
    del rng
    shutil.copyfile(directory.parent / "old" / "data.mdb", directory / "data.mdb")


def older_data(directory: Path, rng: random.Random) -> None:
    old = directory.parent / "old"
    for file in rng.sample(_segments(old), rng.randint(1, len(_segments(old)))):
        shutil.copyfile(file, directory / file.name)


def no_index(directory: Path, rng: random.Random) -> None:
    del rng
    (directory / "data.mdb").unlink()


def index_bits(directory: Path, rng: random.Random) -> None:
    """In what LMDB follows: heads of pages, pointers to nodes, heads of nodes."""

    def flip(data: bytearray) -> None:
        for _ in range(rng.choice((1, 1, 1, 5))):
            page = rng.choice([at for at in range(0, len(data), _PAGE) if any(data[at : at + _PAGE])])
            (lower,) = struct.unpack_from("<H", data, page + 12)
            what = rng.choice(("head", "pointer", "node", "anywhere"))
            at = page + rng.randrange(_PAGE if what == "anywhere" else 160 if page < 2 * _PAGE else 16)
            if what in ("pointer", "node") and 18 <= lower <= _PAGE and page >= 2 * _PAGE:
                at = page + rng.randrange(16, lower)
                if what == "node":
                    (place,) = struct.unpack_from("<H", data, page + 16 + 2 * rng.randrange((lower - 16) // 2))
                    at = page + min(_PAGE - 1, place + rng.randrange(8))
            data[at] ^= 1 << rng.randrange(8)

    _change(directory / "data.mdb", flip)


def index_zeros(directory: Path, rng: random.Random) -> None:
    def zero(data: bytearray) -> None:
        at, size = rng.randrange(0, len(data), 512), rng.choice((512, 4096, 20000))
        data[at : at + size] = bytes(len(data[at : at + size]))

    _change(directory / "data.mdb", zero)


KINDS: dict[str, Damage] = {
    work.__name__: work
    for work in (
        *(slot_bits, slot_zeros, slot_torn, first_page, truncated, deleted, swapped, linked, foreign_segment),
        *(older_index, older_data, no_index, index_bits, index_zeros),
    )
}
#: Damages that may happen to files that are in use. LMDB's map is not among them: what is mapped and changes is beyond help.
LIVE = ("slot_bits", "slot_zeros", "slot_torn", "first_page", "truncated", "deleted", "swapped", "linked", "foreign_segment")


def _open(directory: Path, events: list[lmkv.Event]) -> lmkv.Store:
    config = disk_writer.config(str(directory), disk_capacity=_CAPACITY, breaker_failures=2, breaker_seconds=0.05)
    return Store(config, disk_writer.LAYOUT, on_event=events.append)


def _keep(store: lmkv.Store, numbers: range) -> None:
    for number in numbers:
        tokens = disk_writer.text(1, number)
        store.store(tokens, known_kv.source(disk_writer.LAYOUT, tokens))
        store.flush(60)


def make(folder: Path) -> None:
    """A directory, one as it was earlier, and another one of the same texts."""
    for name in ("disk", "other"):
        with _open(folder / name, []) as store:
            _keep(store, range(_OLD))
        if name == "disk":
            shutil.copytree(folder / name, folder / "old")
        with _open(folder / name, []) as store:
            _keep(store, range(_OLD, _TEXTS))


def _use(directory: Path, before: Callable[[], None]) -> str:
    """Read, write and read a directory; ``before`` is called when it is open."""
    events: list[lmkv.Event] = []
    with _open(directory, events) as store:
        before()
        missing = 0
        for number in range(_TEXTS):
            tokens = disk_writer.text(1, number)
            missing += known_kv.fetch(store, tokens) < len(tokens)  # asserts every byte
        _keep(store, range(_TEXTS, _MORE))
        for number in range(_MORE):
            known_kv.fetch(store, disk_writer.text(1, number))
    assert disk_writer.size_of(directory) <= _CAPACITY, "the quota is not kept"
    if any(event.kind == "tier_disabled" for event in events):
        return "disabled"
    with _open(directory, []) as store:
        tokens = disk_writer.text(1, _MORE - 1)
        assert known_kv.fetch(store, tokens) == len(tokens), "the tier does not work any more"
    return "misses" if missing else "whole"


def one_try(folder: Path, damage: Damage, rng: random.Random, live: bool) -> str:
    """Copy the directory, damage the copy, use it in a process of its own."""
    directory = folder / "copy"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(folder / "disk", directory)
    if not live:
        damage(directory, rng)
    child = os.fork()
    if not child:
        signal.alarm(60)
        code = len(_OUTCOMES)
        try:
            code = _OUTCOMES.index(_use(directory, (lambda: damage(directory, rng)) if live else lambda: None))
        except lmkv.ConfigError:  # damage that was not there yet, or not yet seen, when it was opened first
            code = _OUTCOMES.index("refused")
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(code)
    _, status = os.waitpid(child, 0)
    outside = folder / "outside"
    if outside.exists():
        assert outside.read_bytes() == b"years of work", "a file outside of the directory was changed"
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return _OUTCOMES[code] if 0 <= code < len(_OUTCOMES) else f"wrong {code}"


def main(kind: str, folder: Path, seed: int, count: int) -> None:
    """Several tries of one kind."""
    rng = random.Random(seed)
    make(folder)
    found: collections.Counter[str] = collections.Counter()
    for number in range(count):
        found[one_try(folder, KINDS[kind], rng, kind in LIVE and number % 2 == 1)] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
