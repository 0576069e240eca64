"""The GPU half without a GPU: its C and its kernels on an emulated driver that interleaves streams at random.

The real thing runs in ``test_copy.py`` where there is a GPU; what this shows is order, bounds and what becomes of faults.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native"
CHECKED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def build(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def build_driver(target: Path, *flags: str) -> Path:
    options = ("-std=c++17", *flags, "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", "-w")
    build("g++", *options, "-o", str(target), str(HERE / "emulated_driver.cpp"))
    return target


def compile_part(source: Path, folder: Path) -> None:
    build("gcc", "-std=gnu11", *CHECKED, f"-I{NATIVE}", "-c", str(source), "-o", str(folder / f"{source.stem}.o"))


def link(folder: Path, program: Path) -> Path:
    build("g++", *CHECKED, *map(str, sorted(folder.glob("*.o"))), str(folder / "libcuda.so.1"), f"-Wl,-rpath,{folder}", "-ldl",
          "-lpthread", "-o", str(program))  # fmt: skip
    return program


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C part, the emulated driver and the random cases, compiled to check their own memory."""
    folder = tmp_path_factory.mktemp("emulated")
    build_driver(folder / "libcuda.so.1", *CHECKED)
    for name in ("plan", "driver", "gpu", "gpu_submit"):
        compile_part(NATIVE / f"{name}.c", folder)
    cases = str(HERE / "gpu_cases.cpp")
    build("g++", "-std=c++17", *CHECKED, f"-I{NATIVE}", "-c", cases, "-o", str(folder / "cases.o"))
    return folder


def run_cases(program: Path, first: int, cases: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [str(program), str(first), str(cases)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def test_random_copies_are_right_whatever_the_streams_do(parts: Path) -> None:
    done = run_cases(link(parts, parts / "right"), 1, 600)
    assert done.stdout == "right: 600\n", done.stderr


FREE = "status = driver->stream_wait(ring->wire, ring->worked[entry], 0);\n        if (!status) status = transfer_piece(s, p, "


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("s->into_payloads && made->staged ? ring->wire : ring->work", "ring->work"),
        ("return status ? status : driver->stream_wait(stream, copy->start, 0);", "return status;"),
        (FREE + "1,", "status = transfer_piece(s, p, 1,"),
        ("status = driver->stream_wait(ring->work, ring->moved[entry], 0);", "status = 0;"),
        (FREE + "0,", "status = transfer_piece(s, p, 0,"),
        ("if (p->bytes) entry = (entry + 1) % ring->entries;", ";"),
    ],
    ids=[
        "a store's last transfer",
        "the caller's stream",
        "an entry in use",
        "an entry on its way",
        "a store's kernels",
        "an entry at a time",
    ],
)
def test_a_missing_wait_is_found(parts: Path, tmp_path: Path, right: str, wrong: str) -> None:
    for path in (*parts.glob("*.o"), parts / "libcuda.so.1"):
        shutil.copy(path, tmp_path)
    text = (NATIVE / "gpu_submit.c").read_text(encoding="utf-8")
    assert right in text
    source = tmp_path / "gpu_submit.c"
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    compile_part(source, tmp_path)
    done = run_cases(link(tmp_path, tmp_path / "wrong"), 1, 300)
    assert done.returncode == 1
    assert "wrong bytes" in done.stderr


def test_from_python(tmp_path: Path) -> None:
    driver = build_driver(tmp_path / "libcuda.so.1", "-O1")
    done = subprocess.run(
        [sys.executable, str(HERE / "gpu_scenario.py"), str(driver)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "well\n", done.stderr
