"""``lmkv adopt``: texts of a JSON lines file, from LMCache's directory into that of a disk tier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import servers
from lmcache_values import write_chunks

import lmkv
from lmkv.adapters.lmcache.adopt_command import main

LAYOUT = lmkv.KVLayout.dense(layers=3, heads=2, head_size=4, dtype="float16", chunk_tokens=16)
SEEN, NEW = list(range(100, 140)), list(range(500, 550))


def computed(text: list[int]) -> Any:
    """KV as a model has it: [layers, kv, heads, tokens, head_size]."""
    return np.random.default_rng(text).normal(size=(3, 2, 2, len(text), 4)).astype(np.float16)


def config(folder: Path, **more: Any) -> lmkv.StoreConfig:
    given = {"model": "ours", "disk_path": str(folder), "disk_capacity": "16MiB", "ram_capacity": "4MiB", **more}
    return lmkv.StoreConfig.from_dict(given)


class Machine:
    """LMCache's directory with two texts, and LMKV's, in which an engine left the first one."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.old, self.disk, self.texts = folder / "old", folder / "disk", folder / "texts.jsonl"
        self.old.mkdir()
        for text in (SEEN, NEW):
            write_chunks(self.old, text, [computed(text)], "half")
        with lmkv.Store(config(self.disk, **more), LAYOUT) as store:
            store.store(SEEN, lmkv.DenseKV(computed(SEEN)))
        self.texts.write_text(json.dumps(SEEN) + "\n\n" + json.dumps({"prompt_token_ids": NEW}) + "\n")

    def run(self, *args: str, model: str = "org/model") -> int:
        return main([str(self.disk), str(self.texts), "--model", model, "--chunk-size", "16", *args], {})

    def loaded(self, text: list[int], **more: Any) -> int:
        """How much of a text a new process finds, the same bits throughout."""
        with lmkv.Store(config(self.disk, **more), LAYOUT) as store, store.lease(store.lookup(text)) as lease:
            found = np.zeros((3, 2, 2, len(text), 4), np.float16)
            held = store.retrieve(lease, lmkv.DenseKV(found))
        assert found[:, :, :, :held].tobytes() == computed(text)[:, :, :, :held].tobytes()
        return held


@pytest.mark.parametrize("key_hash", ["sha256", "xxh3"])
def test_an_engine_finds_what_was_adopted(key_hash: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(tmp_path, key_hash=key_hash)
    before = [(path.name, path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(machine.old.iterdir())]
    assert machine.loaded(NEW, key_hash=key_hash) == 0
    assert machine.run("--from", str(machine.old)) == 0
    out, err = capsys.readouterr()
    assert "text 1: 0 tokens new, 40 of 40 held" in out
    assert "text 2: 50 tokens new, 50 of 50 held" in out
    assert "16 tokens that LMKV has too differ by 0.0% at most" in err
    assert machine.loaded(NEW, key_hash=key_hash) == 50
    assert before == [(path.name, path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(machine.old.iterdir())]


def test_settings_of_lmcaches_file_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(tmp_path)
    file = tmp_path / "lmcache.yaml"
    file.write_text(f"chunk_size: 16\nlocal_disk: file://{machine.old}/\nmax_local_disk_size: 5\n")
    args = [str(machine.disk), str(machine.texts), "--model", "org/model", "--config", str(file), "--json"]
    assert main(args, {"PYTHONHASHSEED": "0"}) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["text"], line["length"], line["tokens"]) for line in said] == [(1, 40, 0), (2, 50, 50)]
    assert said[1]["versions"] == "0.3.13 to 0.3.15"


def test_texts_through_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tokenizers
    import transformers

    machine = Machine(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{token}": token for token in range(600)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tokenizer")
    machine.texts.write_text(json.dumps({"text": " ".join(f"w{token}" for token in NEW)}))
    assert machine.run("--from", str(machine.old), "--tokenizer", str(tmp_path / "tokenizer")) == 0
    assert "text 1: 50 tokens new, 50 of 50 held" in capsys.readouterr().out
    assert machine.loaded(NEW) == 50


def test_another_models_kv_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(tmp_path)
    for text in (SEEN, NEW):
        write_chunks(machine.old, text, [computed(text)[::-1]], "half")
    assert machine.run("--from", str(machine.old)) == 2
    assert "another model, or arranged otherwise; nothing was stored" in capsys.readouterr().err
    assert machine.loaded(NEW) == 0


def test_keys_of_others_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(tmp_path)
    machine.texts.write_text(json.dumps(NEW))
    assert machine.run("--from", str(machine.old), model="/another/model") == 1
    out, err = capsys.readouterr()
    assert "no chunk of it from token 0" in out
    assert "org-model@1@0@" in err
    (tmp_path / "empty").mkdir()
    assert machine.run("--from", str(tmp_path / "empty")) == 1
    assert "no chunks of LMCache's are there" in capsys.readouterr().err


def test_a_directory_of_several_namespaces_asks_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(tmp_path)
    with lmkv.Store(config(machine.disk, model="another"), LAYOUT) as store:
        store.store(SEEN, lmkv.DenseKV(computed(SEEN)))
    with lmkv.Store(config(machine.disk), LAYOUT) as store:
        root = store.namespace.root.hex()
    assert machine.run("--from", str(machine.old)) == 2
    assert root in capsys.readouterr().err
    assert machine.run("--from", str(machine.old), "--namespace", root) == 0
    assert machine.loaded(NEW) == 50
    assert machine.loaded(NEW, model="another") == 0


def test_a_directory_without_chunks_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(tmp_path)
    with lmkv.Store(config(machine.disk), LAYOUT) as store:
        store.clear()
    assert machine.run("--from", str(machine.old)) == 2
    assert "let the engine answer one request" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("[1, 2", "a line of JSON"), ("[]", "at least one token"), ("{}", "token ids"), ("[1.5]", "whole numbers"),
        ("[-1]", "token ids from 0"), ('{"text": "hello"}', "--tokenizer: expected a folder"), ("7", "token ids"),
    ],
)  # fmt: skip
def test_lines_that_are_no_texts(
    line: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    machine = Machine(tmp_path)
    machine.texts.write_text(f"{json.dumps(NEW)}\n{line}\n")
    assert machine.run("--from", str(machine.old), "--tokenizer", str(tmp_path / "none")) == 2
    assert wanted in capsys.readouterr().err
    assert machine.loaded(NEW) == 0


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ([], "where did LMCache keep"), (["--from", "/nowhere"], "a directory that LMCache wrote"),
        (["--from", "s3://bucket"], "can't be read"), (["--from", ".", "--workers", "a"], "whole numbers"),
        (["--from", ".", "--world-size", "2"], "layers of each of 2 workers"),
        (["--from", ".", "--hash-seed", "x"], "PYTHONHASHSEED"),
        (["--from", ".", "--namespace", "12"], "32 hexadecimal digits"), (["--from", ".", "--ram", "much"], "size"),
        (["--config", "/nowhere.yaml"], "YAML"),
    ],
)  # fmt: skip
def test_wrong_arguments(args: list[str], wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(tmp_path)
    assert machine.run(*args) in (1, 2)
    assert wanted in capsys.readouterr().err


def test_places_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(tmp_path)
    machine.disk = tmp_path / "nothing"
    assert machine.run("--from", str(machine.old)) == 2
    (tmp_path / "more").mkdir()
    machine = Machine(tmp_path / "more")
    machine.texts = tmp_path / "nothing.jsonl"
    assert machine.run("--from", str(machine.old)) == 2
    assert "nothing.jsonl: expected a readable file" in capsys.readouterr().err


def test_a_redis_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(tmp_path)
    (port,) = servers.free_ports(1)
    assert machine.run("--from", f"redis://:secret@127.0.0.1:{port}") == 1
    out, err = capsys.readouterr()
    assert "refused" in err
    assert "secret" not in out + err
    machine.texts.write_text(json.dumps(NEW))
    assert machine.run("--from", f"redis://:secret@127.0.0.1:{port}") == 1
    out, err = capsys.readouterr()
    assert "no connection" in out
    assert "secret" not in out + err
