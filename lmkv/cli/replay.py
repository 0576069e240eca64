"""``lmkv replay``: the hit ratios of eviction policies on a trace of real requests.

A trace is JSON lines with ``hash_ids``: the ids of one request's blocks, prefix-chained (an id names everything up to and
with its block), as in the traces that Mooncake publishes. Requests run one at a time, in file order, from an empty cache:

1. hits are the longest leading run of the request's blocks that are all held;
2. every held block of the request, also one behind a hole, is touched, last block to first (first to last for a policy that
   evicts the newest first);
3. room is made for all missing blocks, never by evicting a block of this request;
4. every missing block is admitted, in the order of touching. Of a request longer than the cache only the first blocks are.

With ``--admission second`` only those missing blocks are admitted that an earlier request had, and the missing ones before
them; the cache remembers as many others as a tier of its size would.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..chunks import ChunkKey
from ..errors import ConfigError
from ..eviction import make_policy, policy_names
from ..eviction.base import EvictionPolicy
from ..eviction.chain import ChainAware, ChainTable
from ..tiers.admission import ADMISSIONS, SeenOnce, seen_size

__all__ = ["Trace", "belady_hits", "main", "read_trace", "replay_hits"]

BELADY = "belady"
_DEFAULT_PLOT = "hit_ratio.png"
_PLOT_FORMATS = (".png", ".svg", ".pdf")
_NEVER = sys.maxsize


@dataclass(frozen=True)
class Trace:
    """The blocks of all requests.

    Args:
        requests: per request its blocks, first to last.
        parents: every block and the one that it extends, ``None`` for the first of a text.
    """

    requests: Sequence[Sequence[ChunkKey]]
    parents: dict[ChunkKey, ChunkKey | None]

    @cached_property
    def blocks(self) -> int:
        """Blocks of all requests together."""
        return sum(map(len, self.requests))

    @property
    def unique(self) -> int:
        """Different blocks; each misses once even in an infinite cache."""
        return len(self.parents)


class Replayed(NamedTuple):
    """Blocks that a cache found, and that it took."""

    hits: int
    admitted: int


def _block_ids(line: str, where: str) -> list[int]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: expected one JSON object a line; got a syntax error: {error}") from None
    if not isinstance(record, dict) or "hash_ids" not in record:
        raise ConfigError(f"{where}: expected a JSON object with hash_ids; got {line.strip()[:60]!r}")
    ids = record["hash_ids"]
    if not isinstance(ids, list):
        raise ConfigError(f"{where}: expected hash_ids as a list of block ids; got {type(ids).__name__}")
    for block in ids:
        if type(block) is not int:
            raise ConfigError(f"{where}: expected whole numbers in hash_ids; got {block!r}")
    return ids


def read_trace(path: str | Path, limit: int | None = None) -> Trace:
    """A trace from a file of JSON lines; empty lines are skipped.

    Args:
        path: the file.
        limit: how many requests to read; ``None`` reads all.

    Raises:
        ConfigError: the file can't be read, a line is malformed, ids are not prefix-chained, or there are no blocks.
    """
    requests: list[list[ChunkKey]] = []
    parents: dict[ChunkKey, ChunkKey | None] = {}
    keys: dict[int, ChunkKey] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(requests) == limit:
                    break
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                request: list[ChunkKey] = []
                parent: ChunkKey | None = None
                for block in _block_ids(line, where):
                    key = keys.get(block)
                    if key is None:
                        key = keys[block] = ChunkKey(len(keys).to_bytes(16, "big"))
                        parents[key] = parent
                    elif parents[key] != parent:
                        raise ConfigError(
                            f"{where}: expected prefix-chained hash_ids; got block {block} behind another one than before"
                        )
                    request.append(key)
                    parent = key
                requests.append(request)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a readable trace of JSON lines; got: {error}") from None
    if not parents:
        raise ConfigError(f"{path}: expected at least one request with blocks; got none in {len(requests)} requests")
    return Trace(requests, parents)


def replay_hits(
    trace: Trace, policy: EvictionPolicy, capacity: int, links: ChainTable, seen: SeenOnce | None = None
) -> Replayed:
    """How many blocks of a trace a cache finds and takes, by the rule at the head of this module.

    Args:
        trace: the requests.
        policy: an empty policy of that capacity.
        capacity: blocks the cache holds.
        links: an empty table; it is kept up to date with what is held.
        seen: an empty memory of what was seen once; ``None`` admits everything.

    Raises:
        ConfigError: the policy finds no victims although there are enough, which breaks its contract.
    """
    hits = admitted = 0
    for request in trace.requests:
        missing: list[ChunkKey] = []
        for key in request:
            if key not in policy:
                missing.append(key)
            elif not missing:
                hits += 1
        held = len(request) - len(missing)
        if seen is not None:
            del missing[seen.admit(missing) :]
        for key in request if policy.newest_first else reversed(request):
            if key in policy:
                policy.touch(key)
        del missing[capacity - held :]  # only of a request longer than the cache: later blocks are no use without earlier
        wanted = len(policy) + len(missing) - capacity
        if wanted > 0:
            victims = policy.victims(wanted, set(request))
            if victims is None:
                raise ConfigError(f"expected {wanted} victims among {len(policy) - held} blocks; got None: test the policy")
            for key in victims:
                policy.remove(key)
                links.discard(key)
        for key in missing if policy.newest_first else reversed(missing):
            policy.insert(key)
            links.add(key, trace.parents[key])
        admitted += len(missing)
    return Replayed(hits, admitted)


def _next_uses(trace: Trace) -> list[list[int]]:
    """Per request and block the number of the next request with that block, ``_NEVER`` if there is none."""
    later: dict[ChunkKey, int] = {}
    uses: list[list[int]] = []
    for number in range(len(trace.requests) - 1, -1, -1):
        request = trace.requests[number]
        uses.append([later.get(key, _NEVER) for key in request])
        later.update(dict.fromkeys(request, number))
    uses.reverse()
    return uses


def belady_hits(trace: Trace, capacity: int) -> int:
    """As :func:`replay_hits` for a cache that knows the future: what is used again the soonest is kept, even if that means
    not to admit a block (Belady, IBM Systems Journal 5(2), 1966); among equals later blocks of a text go first.
    """
    held: dict[ChunkKey, int] = {}  # block -> request of its next use
    heap: list[tuple[int, int, ChunkKey]] = []  # -next use, -position in its text; stale where held disagrees
    hits = 0
    for request, uses in zip(trace.requests, _next_uses(trace), strict=True):
        missing: list[tuple[int, int, ChunkKey]] = []
        for position, (key, use) in enumerate(zip(request, uses, strict=True)):
            if key not in held:
                missing.append((use, position, key))
                continue
            hits += not missing
            if use == _NEVER:
                del held[key]
            else:
                held[key] = use
                heapq.heappush(heap, (-use, -position, key))
        for use, position, key in sorted(missing):
            if use == _NEVER:
                break
            if len(held) >= capacity:
                while held.get(heap[0][2]) != -heap[0][0]:
                    heapq.heappop(heap)
                if heap[0] >= (-use, -position, key):
                    break
                del held[heapq.heappop(heap)[2]]
            held[key] = use
            heapq.heappush(heap, (-use, -position, key))
    return hits


def _capacity_blocks(text: str, unique: int) -> int:
    """``5%`` of the unique blocks, rounded down, or a number of blocks."""
    complaint = f"--capacity: expected a share such as 5% (more than 0, at most 100) or a number of blocks; got {text!r}"
    try:
        if not text.endswith("%"):
            blocks = int(text)
            if blocks < 1:
                raise ConfigError(complaint)
            return blocks
        share = Decimal(text[:-1])
    except (ValueError, InvalidOperation):
        raise ConfigError(complaint) from None
    if not (share.is_finite() and 0 < share <= 100):
        raise ConfigError(complaint)
    blocks = int(share * unique / 100)
    if blocks < 1:
        raise ConfigError(f"--capacity: expected at least one block; got {text} of {unique} unique blocks")
    return blocks


def _replayed(trace: Trace, name: str, capacity: int, plain: bool, admission: str) -> Replayed:
    if name.lower() == BELADY:
        return Replayed(belady_hits(trace, capacity), -1)
    policy, links = make_policy(name, capacity), ChainTable()
    seen = SeenOnce(seen_size(capacity)) if admission == "second" else None
    return replay_hits(trace, policy if plain else ChainAware(policy, links), capacity, links, seen)


def _plot(path: Path, title: str, capacities: Sequence[int], ratios: dict[str, list[float]], infinite: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    order = sorted(range(len(capacities)), key=capacities.__getitem__)
    for name, values in ratios.items():
        axes.plot([capacities[i] for i in order], [100 * values[i] for i in order], marker="o", label=name)
    axes.axhline(100 * infinite, color="gray", linestyle="--", label="infinite")
    axes.set(xscale="log", xlabel="capacity [blocks]", ylabel="blocks found [%]", ylim=(0, None), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot: expected a file that can be written; got: {error}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (lmkv replay --help says more)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lmkv replay",
        description="Hit ratios of eviction policies on a trace: JSON lines with hash_ids, the prefix-chained ids of a "
        "request's blocks. Each request finds the longest leading run of its blocks that are all in the cache.",
        epilog="With --json each line has policy, capacity (as given), capacity_blocks, hit_ratio (blocks found / blocks, a "
        "fraction from 0 to 1; the table shows percent), hits, blocks, plain (true without protection of parents; always for "
        "belady), admission and admitted (blocks taken; not of belady), and "
        "infinite_hit_ratio (of a cache that never evicts). Exit status: 0 done, 1 a package for the plot is "
        "missing, 2 wrong arguments or trace.",
    )
    parser.add_argument("trace", metavar="TRACE", help="a file of JSON lines")
    parser.add_argument(
        "--policy",
        default="lru,lfu,fifo,mru,s3fifo",
        help=f"names, separated by commas: {', '.join(policy_names())}, or {BELADY}, which knows the future "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--capacity",
        default="1%,5%,10%,25%",
        help="shares of the trace's unique blocks, rounded down, or numbers of blocks, separated by commas "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--admission",
        choices=ADMISSIONS,
        default="all",
        help="second: only blocks that an earlier request had are admitted (not for belady; default: %(default)s)",
    )
    parser.add_argument("--plain", action="store_true", help="the policies alone: a block may go before those that extend it")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table, and no plot")
    parser.add_argument("--plot", metavar="FILE", help=f"where to draw the curves: PNG, SVG or PDF (default: {_DEFAULT_PLOT})")
    parser.add_argument("--no-plot", action="store_true", help="draw nothing")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N requests")
    return parser


def _names(option: str, text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(names):
        raise ConfigError(f"{option}: expected values separated by commas; got {text!r}")
    return names


def _plot_path(args: argparse.Namespace) -> Path | None:
    """Where the plot goes, if anywhere; complains before the work rather than after it."""
    if args.plot is None and (args.json or args.no_plot):
        return None
    path = Path(args.plot or _DEFAULT_PLOT)
    if path.suffix.lower() not in _PLOT_FORMATS:
        raise ConfigError(f"--plot: expected a name that ends in {', '.join(_PLOT_FORMATS)}; got {str(path)!r}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot: expected a file in a directory that exists; got {str(path)!r}")
    return path


class _Table:
    """Prints results as they come, in columns of capacities."""

    def __init__(self, first_column: Sequence[str], shares: Sequence[str]) -> None:
        self._first = max(map(len, first_column))
        self._cells = [max(9, len(share) + 2) for share in shares]

    def row(self, name: str, values: Sequence[str]) -> None:
        cells = "".join(f"{value:>{width}}" for value, width in zip(values, self._cells, strict=True))
        print(f"{name:<{self._first}}{cells}", flush=True)

    def percent(self, name: str, ratios: Sequence[float]) -> None:
        self.row(name, [f"{100 * ratio:.2f}" for ratio in ratios])


def _run(args: argparse.Namespace, plot: Path | None) -> None:
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit: expected at least 1 request; got {args.limit}")
    policies, shares = _names("--policy", args.policy), _names("--capacity", args.capacity)
    for name in policies:  # what is wrong is told before a long trace is read
        if name.lower() != BELADY:
            make_policy(name, 1)
    for share in shares:
        _capacity_blocks(share, _NEVER)
    trace = read_trace(args.trace, args.limit)
    capacities = [_capacity_blocks(share, trace.unique) for share in shares]
    infinite = (trace.blocks - trace.unique) / trace.blocks
    kind = ("plain" if args.plain else "chain-aware") + (", admitted at second use" if args.admission == "second" else "")
    table = _Table([*policies, "infinite"], shares)
    if not args.json:
        print(f"{len(trace.requests):,} requests, {trace.blocks:,} blocks, {trace.unique:,} unique; percent found, {kind}")
        table.row("policy", shares)
        table.row("blocks", [f"{blocks:,}" for blocks in capacities])
    ratios: dict[str, list[float]] = {}
    for name in policies:
        ratios[name] = []
        for share, blocks in zip(shares, capacities, strict=True):
            hits, admitted = _replayed(trace, name, blocks, args.plain, args.admission)
            ratios[name].append(hits / trace.blocks)
            if args.json:
                result = {"policy": name, "capacity": share, "capacity_blocks": blocks, "hit_ratio": hits / trace.blocks}
                result |= {"hits": hits, "blocks": trace.blocks, "plain": args.plain or name.lower() == BELADY}
                if name.lower() != BELADY:
                    result |= {"admission": args.admission, "admitted": admitted}
                print(json.dumps(result | {"infinite_hit_ratio": infinite}), flush=True)
        if not args.json:
            table.percent(name, ratios[name])
    if not args.json:
        table.percent("infinite", [infinite] * len(shares))
    if plot is not None:
        _plot(plot, f"{Path(args.trace).name}, {kind}", capacities, ratios, infinite)
        print(f"plot: {plot}", file=sys.stderr if args.json else sys.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lmkv replay``; returns the exit status (0 done, 1 no matplotlib for a wanted plot, 2 wrong arguments or trace)."""
    try:
        args = _parser().parse_args(argv)
        plot = _plot_path(args)
        if plot is not None and find_spec("matplotlib") is None:
            print("lmkv replay: no plot without matplotlib: pip install 'lmkv[replay]'", file=sys.stderr)
            if args.plot is not None:
                return 1
            plot = None
        _run(args, plot)
    except ConfigError as error:
        print(f"lmkv replay: {error}", file=sys.stderr)
        return 2
    return 0
