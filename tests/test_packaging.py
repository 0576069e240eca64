"""What people install: a wheel, with and without a C compiler, and the README's own words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the repository tracks or would track, without build leftovers."""
    copy = tmp_path_factory.mktemp("source") / "lmkv"
    ignored = shutil.ignore_patterns(".git", ".venv", "*.so", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def build(source: Path, folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(command, check=True, env=os.environ | environment, timeout=300)
    return next(folder.glob("lmkv-*.whl"))


def imported(wheel: Path, folder: Path) -> str:
    """What an isolated interpreter finds in the unpacked wheel; -S leaves out this tree's own, editable install."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    code = (
        f"import sys; sys.path[:0] = [{str(folder)!r}, {sysconfig.get_path('purelib')!r}]; "
        "import lmkv, lmkv._native, lmkv.adapters; print(lmkv.__file__, lmkv._native.lib is not None)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    path, built = done.stdout.split()
    assert path.startswith(str(folder))
    return built


def test_wheel_carries_the_mapped_packages_and_one_abi3_extension(source: Path, tmp_path: Path) -> None:
    wheel = build(source, tmp_path / "wheels")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("lmkv/store.py", "lmkv/_native/lmkv.h", "lmkv/adapters/transformers/reuse.py", "lmkv/py.typed"):
        assert name in names
    assert [name for name in names if name.endswith(".so")] == ["lmkv/_native/_ffi.abi3.so"]
    assert any(name.endswith("licenses/docs/LICENSE") for name in names)
    assert imported(wheel, tmp_path / "unpacked") == "True"


def test_without_a_compiler_it_installs_and_copies_with_numpy(source: Path, tmp_path: Path) -> None:
    wheel = build(source, tmp_path / "wheels", CC="/nonexistent/cc")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert imported(wheel, tmp_path / "unpacked") == "False"


def test_every_package_of_the_tree_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^    "(lmkv[\w.]*)",$', text, re.MULTILINE))
    homes = {"lmkv": "lmkv", "native": "lmkv._native", "adapters": "lmkv.adapters"}
    found = set()
    for folder, package in homes.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *parts)))
    assert found == listed


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=tmp_path, check=True)
        assert done.stdout == "700 tokens need no prefill\n"


def test_the_top_level_is_what_the_design_says() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {name.split("/")[0] for name in tracked if name and not name.startswith(".")}
    assert top <= {"pyproject.toml", "lmkv", "native", "adapters", "tests", "notebooks", "docs", "README.md"}
