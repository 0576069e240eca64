"""An environment of its own for LMCache, whose requirements are not LMKV's; it sees the packages of the one that makes it."""

from __future__ import annotations

import site
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["PACKAGES", "make"]

#: LMCache without its requirements, and what its lm:// connector and server import.
PACKAGES = ("lmcache==0.3.15", "prometheus_client", "py-cpuinfo", "aiofile", "caio", "msgspec")


def make(folder: str | Path, packages: tuple[str, ...] = PACKAGES) -> str:
    """Make the environment and return its interpreter; this one's packages, LMKV included, are seen in it too."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = Path(folder) / "bin" / "python"
    own = subprocess.run(
        [str(python), "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages())
    (Path(own) / "around.pth").write_text(lines)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", own, *packages]
    subprocess.run(pip, check=True)
    return str(python)
