"""``lmkv inspect``, ``verify``, ``compact``, ``export`` and ``import`` on directories that stores filled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import disk_writer
import known_kv
import pytest
from disk_writer import LAYOUT
from safetensors import safe_open

import lmkv
from lmkv.cli import main

TEXTS = [list(range(100, 170)), list(range(100, 140)) + [7] * 30, [9] * 50]


def open_store(directory: Path, **settings: object) -> lmkv.Store:
    return lmkv.Store(disk_writer.config(str(directory), **settings), LAYOUT)


def fill(directory: Path, texts: list[list[int]] = TEXTS) -> None:
    with open_store(directory) as store:
        for tokens in texts:
            store.store(tokens, known_kv.source(LAYOUT, tokens))


def flip(directory: Path, tokens: list[int], chunk: int) -> None:
    payload = known_kv.payload(LAYOUT, tokens, chunk * 16, chunk * 16 + 16)
    for file in directory.glob("segment-*.kv"):
        data = bytearray(file.read_bytes())
        at = data.find(payload[:64])
        if at >= 0:
            data[at] ^= 1
            file.write_bytes(data)
            return
    raise AssertionError("expected the chunk in a segment file")


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == LAYOUT.describe
    assert found["capacity_bytes"] == disk_writer.DISK
    assert (found["chunks"], found["tokens"], found["texts"]) == (12, 158, 3)
    assert sum(found["chunks_by_namespace"].values()) == 12
    assert found["bytes_on_disk"] <= disk_writer.DISK
    assert main(["inspect", str(tmp_path)]) == 0
    assert "slot_bytes" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "verify", "compact", "export"])
def test_a_directory_of_something_else(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    more = [str(tmp_path / "bundle")] if command == "export" else []
    assert main([command, str(tmp_path), *more]) == 1
    assert "no data.mdb" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_verify_finds_and_deletes_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path)
    assert main(["verify", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"chunks": 12, "problems": [], "deleted": 0}
    flip(tmp_path, TEXTS[0], 3)
    assert main(["verify", str(tmp_path)]) == 1
    assert "checksum" in capsys.readouterr().out
    assert main(["verify", str(tmp_path), "--delete", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["deleted"] == 1
    assert main(["verify", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chunks"] == 11
    with open_store(tmp_path) as store:
        assert known_kv.fetch(store, TEXTS[0]) == 48
        store._check()


def test_compact_gives_room_back_and_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, [disk_writer.text(3, number) for number in range(200)])
    with open_store(tmp_path) as store:
        store.clear()
        for tokens in TEXTS:
            store.store(tokens, known_kv.source(LAYOUT, tokens))
    before = disk_writer.size_of(tmp_path)
    assert main(["compact", str(tmp_path)]) == 0
    assert disk_writer.size_of(tmp_path) < before / 2
    assert main(["verify", str(tmp_path)]) == 0
    with open_store(tmp_path) as store:
        assert [known_kv.fetch(store, tokens) for tokens in TEXTS] == [70, 70, 50]
        for number in range(200):  # and it grows again
            tokens = disk_writer.text(3, number)
            store.store(tokens, known_kv.source(LAYOUT, tokens))
            store.flush(60)
        store._check()
    assert disk_writer.size_of(tmp_path) <= disk_writer.DISK


def test_compact_leaves_a_directory_alone_that_is_in_use(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.store(TEXTS[0], known_kv.source(LAYOUT, TEXTS[0]))
        assert store.flush(60)
        command = [
            sys.executable,
            "-c",
            "import sys, lmkv.cli; sys.exit(lmkv.cli.main(sys.argv[1:]))",
            "compact",
            str(tmp_path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "a process has it open" in done.stderr
        assert main(["compact", str(tmp_path)]) == 1, "nor does this process, which has it open itself"
        assert known_kv.fetch(store, TEXTS[0]) == 70


def test_a_bundle_warms_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there, bundle = tmp_path / "here", tmp_path / "there", tmp_path / "warm.safetensors"
    fill(here)
    assert main(["export", str(here), str(bundle)]) == 0
    with safe_open(str(bundle), framework="numpy") as tensors:
        assert len(tensors.keys()) == 12
        assert tensors.metadata()["layout"] == LAYOUT.describe
    assert main(["import", str(bundle), str(there)]) == 1
    assert "--capacity" in capsys.readouterr().err
    assert main(["import", str(bundle), str(there), "--capacity", "4MiB"]) == 0
    assert "12 chunks new" in capsys.readouterr().out
    assert main(["import", str(bundle), str(there)]) == 0
    assert "0 chunks new, 12 were there" in capsys.readouterr().out
    with open_store(there) as store:
        assert [known_kv.fetch(store, tokens) for tokens in TEXTS] == [70, 70, 50]
        store._check()


def test_only_chosen_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there, bundle = tmp_path / "here", tmp_path / "there", tmp_path / "warm.safetensors"
    fill(here)
    chosen = tmp_path / "texts.json"
    chosen.write_text(json.dumps([TEXTS[1], [5, 5, 5]]))
    assert main(["export", str(here), str(bundle), "--texts", str(chosen)]) == 0
    assert main(["import", str(bundle), str(there), "--capacity", str(4 << 20)]) == 0
    with open_store(there) as store:
        assert known_kv.fetch(store, TEXTS[1]) == 70
        assert known_kv.fetch(store, TEXTS[2]) == 0
    chosen.write_text("{")
    assert main(["export", str(here), str(bundle), "--texts", str(chosen)]) == 1
    assert "JSON list" in capsys.readouterr().err


def test_a_damaged_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there, bundle = tmp_path / "here", tmp_path / "there", tmp_path / "warm.safetensors"
    fill(here, TEXTS[:1])
    assert main(["export", str(here), str(bundle)]) == 0
    data = bytearray(bundle.read_bytes())
    data[-100] ^= 1
    bundle.write_bytes(data)
    assert main(["import", str(bundle), str(there), "--capacity", "4MiB"]) == 1
    printed = capsys.readouterr()
    assert "left out" in printed.err
    assert "4 chunks new, 0 were there, 1 damaged" in printed.out
    bundle.write_bytes(b"no bundle")
    assert main(["import", str(bundle), str(there)]) == 1
    assert "expected a bundle" in capsys.readouterr().err
