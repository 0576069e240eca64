"""The backend that ``docs/writing-a-backend.md`` shows keeps the contract."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import uuid
from typing import Any

import lmkv
from lmkv.backends import BackendSettings
from lmkv.testing import BackendSuite

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "writing-a-backend.md"


def documented_backend() -> Any:
    found = re.search(r"```python\n(class FolderBackend:.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found, "the page shows a FolderBackend"
    names: dict[str, Any] = {"lmkv": lmkv, "pathlib": pathlib, "uuid": uuid}
    exec(compile(found[1], str(PAGE), "exec"), names)
    return names["FolderBackend"]


class TestFolderBackend(BackendSuite):
    persistent = True
    refuses_when_full = False
    examples = 8

    def make(self, settings: BackendSettings) -> Any:
        options = {**settings.options, "path": str(self.directory / settings.name)}
        return documented_backend()(dataclasses.replace(settings, options=options))
