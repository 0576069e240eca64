"""Names of models: two that give different KV must not have one name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmkv.adapters.engine_config import folder_fingerprint


@pytest.mark.parametrize("alone", [False, True], ids=["folder", "file"])
def test_weights_that_differ_in_one_layer_have_another_name(tmp_path: Path, alone: bool) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(300 << 20)  # takes no room
    model = weights if alone else folder
    before = folder_fingerprint(model)
    assert before
    assert folder_fingerprint(model) == before
    for place in (40, 97, 201):  # MiB: one matrix of 32 MiB is another
        with weights.open("r+b") as file:
            file.seek(place << 20)
            file.write(bytes([place]) * (32 << 20))
        after = folder_fingerprint(model)
        assert after != before
        before = after


def test_what_is_no_folder_of_weights_has_no_name(tmp_path: Path) -> None:
    assert folder_fingerprint("Qwen/Qwen3-8B") == folder_fingerprint(tmp_path / "missing") == ""
    text = tmp_path / "notes.txt"
    text.write_text("no weights")
    assert folder_fingerprint(text) == ""
    (tmp_path / "config.json").write_text("{}")
    before = folder_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert before != folder_fingerprint(tmp_path) != ""
