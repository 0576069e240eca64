"""What all tests share: one thread for torch, settings of hypothesis, no writing outside temporary directories."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

with contextlib.suppress(ImportError):  # the extra may be missing: what needs torch is skipped then
    import torch

    torch.set_num_threads(1)

#: Modules that tests and the processes they start have in common.
SUPPORT = Path(__file__).parent / "support"
sys.path.insert(0, str(SUPPORT))

hypothesis.settings.register_profile("dev", deadline=None, max_examples=60)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches go to a temporary directory, and settings of whoever runs the tests are not seen."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("LMKV_")]:
            patch.delenv(name)
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("HOME", str(home))
        yield


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """``register(group, name, "module:attribute")``: install a distribution with that entry point, for this test."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(group: str, name: str, target: str) -> None:
        info = site / f"lmkv_test_{group.split('.')[-1]}_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lmkv-test-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
        importlib.invalidate_caches()

    return install
