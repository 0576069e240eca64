"""The ``lmkv`` command and ``lmkv doctor``."""

from __future__ import annotations

import json

import pytest

import lmkv
from lmkv.cli import COMMANDS, main


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in COMMANDS)
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lmkv {lmkv.__version__}\n"


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reply"]) == 2
    assert "did you mean 'replay'" in capsys.readouterr().err


def test_doctor_tells_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lmkv"]["version"] == lmkv.__version__
    assert found["needed"]["numpy"] != "MISSING"
    assert main(["doctor"]) == 0
    assert "cache directory" in capsys.readouterr().out


def test_doctor_reports_a_wrong_configuration(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LMKV_RAM_CAPACITI", "1GiB")
    assert main(["doctor"]) == 1
    assert "did you mean LMKV_RAM_CAPACITY" in capsys.readouterr().out
