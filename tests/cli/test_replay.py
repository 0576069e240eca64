from __future__ import annotations

import json
import random
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from lmkv.cli import main as lmkv
from lmkv.cli.replay import belady_hits, main, read_trace, replay_hits
from lmkv.errors import ConfigError
from lmkv.eviction import make_policy
from lmkv.eviction.chain import ChainAware, ChainTable

POLICIES = ["lru", "lfu", "fifo", "mru", "s3fifo"]


def write(path: Path, requests: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"timestamp": i, "hash_ids": ids}) + "\n" for i, ids in enumerate(requests)))
    return path


def chats(seed: int, requests: int) -> list[list[int]]:
    """Conversations that grow by a few blocks a turn behind one of three system prompts, and one-off texts between them."""
    rng = random.Random(seed)
    fresh = iter(range(100, 10**9))
    prompts = [[0], [1, 2], [3, 4, 5, 6]]
    talks = [list(rng.choice(prompts)) for _ in range(12)]
    trace = []
    for _ in range(requests):
        i = min(int(rng.expovariate(0.35)), len(talks) - 1)
        if rng.random() < 0.15:
            talks[i] = list(rng.choice(prompts))
        if rng.random() < 0.8:
            talks[i].extend(next(fresh) for _ in range(rng.randint(0, 3)))
        trace.append(list(talks[i]))
        if rng.random() < 0.3:
            trace.append([next(fresh) for _ in range(rng.randint(1, 8))])
        talks.append(talks.pop(i))
    return trace


class Slow:
    """The rule and the five orders spelled out on lists, one eviction at a time; quadratic, and nothing shared with the code.

    ``order`` is the queue of LRU, LFU, FIFO and MRU, and the small and main queues of S3-FIFO one after the other.
    """

    def __init__(self, name: str, capacity: int) -> None:
        self.name, self.capacity = name, capacity
        self.order: list[int] = []
        self.uses: Counter[int] = Counter()
        self.main: list[int] = []
        self.ghost: list[int] = []

    def held(self) -> list[int]:
        return self.order + self.main

    def touch(self, block: int) -> None:
        self.uses[block] += 1
        if self.name in ("lru", "mru", "lfu"):
            self.order.remove(block)
            self.order.append(block)

    def admit(self, block: int) -> None:
        self.uses[block] = 0
        if block in self.ghost:
            self.ghost.remove(block)
            self.main.append(block)
        else:
            self.order.append(block)

    def evict(self, pinned: list[int]) -> None:
        if self.name == "s3fifo":
            self.evict_s3(pinned)
            return
        free = [block for block in self.order if block not in pinned]
        if self.name == "mru":
            victim = free[-1]
        elif self.name == "lfu":
            victim = min(free, key=lambda block: self.uses[block])  # the first of equals is the least recently used
        else:
            victim = free[0]
        self.order.remove(victim)

    def evict_s3(self, pinned: list[int]) -> None:
        small = max(1, self.capacity // 10)
        skipped = {id(self.order): 0, id(self.main): 0}
        while True:
            left = len(self.order) - skipped[id(self.order)], len(self.main) - skipped[id(self.main)]
            queue = self.order if left[0] > small or not left[1] else self.main
            block = queue[skipped[id(queue)]]
            if self.uses[block]:
                queue.remove(block)
                self.main.append(block)
                self.uses[block] = 0 if queue is self.order else min(3, self.uses[block]) - 1
            elif block in pinned:
                skipped[id(queue)] += 1
            else:
                queue.remove(block)
                if queue is self.order:
                    self.ghost = [*self.ghost, block][-(self.capacity - small) :]
                return

    def hits(self, trace: list[list[int]]) -> int:
        hits = 0
        for request in trace:
            held = self.held()
            hits += next((i for i, block in enumerate(request) if block not in held), len(request))
            order = request if self.name == "mru" else request[::-1]
            for block in order:
                if block in held:
                    self.touch(block)
            missing = [block for block in order if block not in held]
            while len(self.held()) + len(missing) > self.capacity:
                self.evict(request)
            for block in missing:
                self.admit(block)
        return hits


def hits(path: Path, name: str, capacity: int, plain: bool = True) -> int:
    policy, links = make_policy(name, capacity), ChainTable()
    found = replay_hits(read_trace(path), policy if plain else ChainAware(policy, links), capacity, links).hits
    policy._check()
    links._check()
    assert set(links._parents) == set(policy)
    assert len(policy) <= capacity
    return found


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("capacity", [40, 60, 90])
def test_same_hits_as_the_rule_spelled_out(tmp_path: Path, name: str, capacity: int) -> None:
    trace = chats(seed=3, requests=400)
    assert max(map(len, trace)) <= capacity
    assert hits(write(tmp_path / "t.jsonl", trace), name, capacity) == Slow(name, capacity).hits(trace)


@pytest.mark.parametrize("name", POLICIES)
def test_protecting_parents_costs_no_hits(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "t.jsonl", chats(seed=4, requests=1500))
    blocks = read_trace(path).blocks
    for capacity in (40, 80, 160):
        assert hits(path, name, capacity, plain=False) >= hits(path, name, capacity) - 0.005 * blocks


# Two chats behind block 1 and a stranger; a cache of four blocks.
SMALL = [[1, 2, 3], [1, 4], [9], [1, 2, 3], [1, 4]]


@pytest.mark.parametrize(
    ("name", "plain", "expected"),
    [
        # 1 2 3 | 1 hit, 4 in | 3 out for 9 | 1 2 hit, 4 (least recent) out for 3 | 1 hit, 9 out for 4
        ("lru", True, 1 + 0 + 2 + 1),
        ("lru", False, 1 + 0 + 2 + 1),
        # queue 3 2 1 4 | 3 out for 9 | 1 2 hit, 4 out (1 and 2 belong to the request) for 3 | 1 hit; 2 out for 4
        ("fifo", True, 1 + 0 + 2 + 1),
        # 1 2 3 | 1 hit, 4 in | 4 out for 9 | 1 2 3 hit | 1 hit, 3 out for 4
        ("mru", True, 1 + 0 + 3 + 1),
        ("mru", False, 1 + 0 + 3 + 1),
    ],
)
def test_small_trace_by_hand(tmp_path: Path, name: str, plain: bool, expected: int) -> None:
    assert hits(write(tmp_path / "t.jsonl", SMALL), name, 4, plain) == expected


def test_a_protected_parent_by_hand(tmp_path: Path) -> None:
    # A text of one block is extended, so the first block stands in front of the queue. Plain FIFO evicts it for 8 and finds
    # nothing of the longer text again; with parents kept, 3 goes instead and two blocks are found.
    path = write(tmp_path / "t.jsonl", [[1], [1, 2, 3], [8], [1, 2, 3]])
    assert hits(path, "fifo", 3, plain=True) == 1
    assert hits(path, "fifo", 3, plain=False) == 1 + 2


def test_a_request_longer_than_the_cache_leaves_its_first_blocks(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    for name in POLICIES:
        for plain in (True, False):
            assert hits(path, name, 3, plain) == 3


def test_belady_by_hand(tmp_path: Path) -> None:
    # Room for two: 1 and 2 are used again, the strangers never are and are not admitted.
    path = write(tmp_path / "t.jsonl", [[1, 2], [7], [8], [1, 2], [9], [1]])
    assert belady_hits(read_trace(path), 2) == 3
    # Room for one block of a text: its first one is the one to keep.
    path = write(tmp_path / "u.jsonl", [[1, 2], [1, 2], [1, 2]])
    assert belady_hits(read_trace(path), 1) == 2
    # 1 is needed sooner than 5.
    path = write(tmp_path / "v.jsonl", [[5], [1], [1], [5]])
    assert belady_hits(read_trace(path), 1) == 1


def test_belady_is_at_least_as_good_as_any_policy(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", chats(seed=5, requests=400))
    trace = read_trace(path)
    for capacity in (30, 60, trace.unique):
        best = belady_hits(trace, capacity)
        assert all(hits(path, name, capacity, plain) <= best for name in POLICIES for plain in (True, False))
        assert best <= trace.blocks - trace.unique
    assert best == trace.blocks - trace.unique


def test_json_has_one_object_a_policy_and_capacity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.jsonl", chats(seed=6, requests=100))
    trace = read_trace(path)
    assert lmkv(["replay", str(path), "--policy", "LRU,s3fifo,belady", "--capacity", "12.5%,40", "--json", "--plain"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["policy"], row["capacity"]) for row in rows] == [
        (name, share) for name in ("LRU", "s3fifo", "belady") for share in ("12.5%", "40")
    ]
    for row in rows:
        assert row["capacity_blocks"] == (40 if row["capacity"] == "40" else trace.unique // 8)
        expected = (
            belady_hits(trace, row["capacity_blocks"])
            if row["policy"] == "belady"
            else hits(path, row["policy"], row["capacity_blocks"])
        )
        assert row["hits"] == expected
        assert row["blocks"] == trace.blocks
        assert row["hit_ratio"] == expected / trace.blocks
        assert row["plain"] is True
        assert row["infinite_hit_ratio"] == 1 - trace.unique / trace.blocks
    assert list(tmp_path.iterdir()) == [path]


def test_chain_aware_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.jsonl", [[1], [1, 2, 3], [8], [1, 2, 3]])
    for option, found in (([], 3), (["--plain"], 1)):
        assert main([str(path), "--policy", "fifo", "--capacity", "3", "--json", *option]) == 0
        row = json.loads(capsys.readouterr().out)
        assert (row["hits"], row["plain"]) == (found, bool(option))


def test_admission_at_second_use_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.jsonl", [[1, 2], [8], [1, 2], [9], [1, 2], [1, 2, 3], [7], [1, 2, 3]])
    for option, counts in (("all", (5, 8)), ("second", (6, 2))):
        assert main([str(path), "--policy", "lru", "--capacity", "2", "--json", "--admission", option]) == 0
        row = json.loads(capsys.readouterr().out)
        assert (row["admission"], row["hits"], row["admitted"]) == (option, *counts)


def test_admission_at_second_use_keeps_one_off_texts_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.jsonl", chats(seed=11, requests=600))
    rows = {}
    for option in ("all", "second"):
        assert main([str(path), "--policy", "lru", "--capacity", "40,100%", "--json", "--admission", option]) == 0
        rows[option] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for everything, second in zip(rows["all"], rows["second"], strict=True):
        assert 0 < second["admitted"] < everything["admitted"] / 2
        assert second["hits"] > everything["hits"] / 3
    trace = read_trace(path)
    uses = Counter(block for request in trace.requests for block in request)
    assert rows["all"][1]["admitted"] == trace.unique
    assert rows["second"][1]["admitted"] == sum(count > 1 for count in uses.values()), "room for all, and memory of all"
    assert rows["second"][1]["hits"] == rows["all"][1]["hits"] - rows["second"][1]["admitted"], "each misses once more"


def test_table_and_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.jsonl", [[1, 2], [1, 2], [7], [1, 2, 3]])
    assert main([str(path), "--no-plot", "--limit", "2", "--policy", "lru,mru", "--capacity", "50%,2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2 requests, 4 blocks, 2 unique; percent found, chain-aware",
        "policy        50%        2",
        "blocks          1        2",
        "lru         25.00    50.00",
        "mru         25.00    50.00",
        "infinite    50.00    50.00",
    ]


def test_empty_lines_and_requests_without_blocks_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"hash_ids": [4, 5]}\n\n{"hash_ids": []}\n  \n{"hash_ids": [4, 5]}\n')
    assert hits(path, "lru", 2) == 2
    assert len(read_trace(path).requests) == 3


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the replay extra")
class TestPlot:
    def test_drawn_by_default_in_the_current_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        path = write(tmp_path / "t.jsonl", SMALL)
        assert main([str(path), "--capacity", "2,4"]) == 0
        assert (tmp_path / "hit_ratio.png").read_bytes().startswith(b"\x89PNG")

    def test_drawn_where_told_also_with_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write(tmp_path / "t.jsonl", SMALL)
        assert main([str(path), "--capacity", "4,2", "--policy", "lru", "--json", "--plot", str(tmp_path / "a.svg")]) == 0
        assert "<svg" in (tmp_path / "a.svg").read_text()
        assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 2


def test_without_matplotlib_there_is_still_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lmkv.cli.replay.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "t.jsonl", SMALL)
    assert main([str(path), "--capacity", "4"]) == 0
    shown = capsys.readouterr()
    assert "infinite" in shown.out
    assert "pip install 'lmkv[replay]'" in shown.err
    assert main([str(path), "--capacity", "4", "--plot", "a.png"]) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "lruu"], "did you mean 'lru'?"),
        (["--policy", "lru,"], "--policy: expected values separated by commas; got 'lru,'"),
        (["--capacity", "0"], "--capacity: expected a share"),
        (["--capacity", "-3"], "--capacity: expected a share"),
        (["--capacity", "0%"], "got '0%'"),
        (["--capacity", "101%"], "got '101%'"),
        (["--capacity", "nan%"], "got 'nan%'"),
        (["--capacity", "1e999999999%"], "got '1e999999999%'"),
        (["--capacity", "many"], "got 'many'"),
        (["--capacity", "1.5"], "got '1.5'"),
        (["--capacity", "1%"], "expected at least one block; got 1% of 5 unique blocks"),
        (["--limit", "0"], "--limit: expected at least 1 request; got 0"),
        (["--limit", "x"], "--limit: invalid int value: 'x'"),
        (["--plot", "a.doc"], "expected a name that ends in .png, .svg, .pdf; got 'a.doc'"),
        (["--plot", "no/such/a.png"], "expected a file in a directory that exists"),
        (["--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = write(tmp_path / "t.jsonl", SMALL)
    assert main([str(path), "--json", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("lmkv replay: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected at least one request with blocks"),
        (b'{"hash_ids": []}\n', "got none in 1 requests"),
        (b'{"hash_ids": [1]}\n{"hash_ids": [1, 2\n', "line 2: expected one JSON object a line"),
        (b'{"hash_ids": [1]}\n\n[1]\n', "line 3: expected a JSON object with hash_ids; got '[1]'"),
        (b'{"ids": [1]}\n', "line 1: expected a JSON object with hash_ids"),
        (b'{"hash_ids": {"history": [1]}}\n', "expected hash_ids as a list of block ids; got dict"),
        (b'{"hash_ids": [1, "2"]}\n', "expected whole numbers in hash_ids; got '2'"),
        (b'{"hash_ids": [true]}\n', "got True"),
        (b'{"hash_ids": [1, 2]}\n{"hash_ids": [2]}\n', "line 2: expected prefix-chained hash_ids; got block 2"),
        (b'{"hash_ids": [5, 5]}\n', "expected prefix-chained hash_ids; got block 5"),
        (b"\xff\xfe\n", "expected a readable trace of JSON lines"),
        (b"[" * 100_000 + b"\n", "line 1: expected one JSON object a line"),
    ],
)
def test_wrong_traces_are_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    assert main([str(path), "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_a_missing_trace_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.jsonl"), "--json"]) == 2
    assert main([str(tmp_path), "--json"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_policy_that_breaks_its_contract_is_told(tmp_path: Path) -> None:
    from lmkv.eviction.lru import LRU

    class Stubborn(LRU):
        def victims(self, n: int, pinned: object) -> None:
            return None

    trace = read_trace(write(tmp_path / "t.jsonl", SMALL))
    with pytest.raises(ConfigError, match="expected 1 victims among 4 blocks; got None"):
        replay_hits(trace, Stubborn(4), 4, ChainTable())
