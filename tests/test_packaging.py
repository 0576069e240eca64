"""What people install: a wheel, with and without a C compiler, and the README's own words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the repository tracks or would track, without build leftovers."""
    copy = tmp_path_factory.mktemp("source") / "lmkv"
    ignored = shutil.ignore_patterns(".git", ".venv*", "*.so", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def build(source: Path, folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(command, check=True, env=os.environ | environment, timeout=300)
    return next(folder.glob("lmkv-*.whl"))


AT_WORK = """
import numpy as np, lmkv, lmkv._native, lmkv.adapters
layout = lmkv.KVLayout.dense(layers=2, heads=2, head_size=64, dtype="float16", chunk_tokens=16)
kv, out = np.random.rand(2, 2, 2, 40, 64).astype("float16"), np.zeros((2, 2, 2, 40, 64), "float16")
with lmkv.Store(lmkv.StoreConfig(model="m", ram_capacity="4MiB", disk_capacity=0), layout) as store:
    assert store.store(range(40), kv) == 40
    with store.lease(store.lookup(range(40))) as lease:
        assert store.retrieve(lease, out) == 40
assert (kv == out).all()
print(lmkv.__file__, lmkv._native.lib is not None)
"""


def at_work(wheel: Path, folder: Path) -> str:
    """Whether the compiled part is there, once a store has worked in a fresh environment with nothing on ``PATH``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, timeout=300)
    packages = next(folder.glob("lib/python*/site-packages"))
    dependencies = [
        path for path in sys.path if path.endswith("-packages")
    ]  # their own .pth files are not read: no editable lmkv
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    done = subprocess.run(
        [str(python), "-I", "-c", AT_WORK], capture_output=True, text=True, check=True, cwd=folder, env={"PATH": str(folder)}
    )
    path, built = done.stdout.split()
    assert path.startswith(str(packages))
    return built


def test_wheel_carries_the_mapped_packages_and_one_abi3_extension(source: Path, tmp_path: Path) -> None:
    wheel = build(source, tmp_path / "wheels")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("lmkv/store.py", "lmkv/_native/lmkv.h", "lmkv/adapters/transformers/reuse.py", "lmkv/py.typed"):
        assert name in names
    assert [name for name in names if name.endswith(".so")] == ["lmkv/_native/_ffi.abi3.so"]
    assert any(name.endswith("licenses/docs/LICENSE") for name in names)
    assert at_work(wheel, tmp_path / "fresh") == "True"


def test_without_a_compiler_it_installs_and_copies_with_numpy(source: Path, tmp_path: Path) -> None:
    wheel = build(source, tmp_path / "wheels", CC="/nonexistent/cc")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert at_work(wheel, tmp_path / "fresh") == "False"


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
