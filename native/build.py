"""How the extension is built: with the GPU kernels inside where there is an nvcc, without them where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

__all__ = ["BuildExtension"]

_HERE = Path(__file__).parent
#: Machine code for Ampere, Hopper and Blackwell, and PTX that newer and older drivers compile for what they run on.
_TARGETS = (("80", "sm_80"), ("90", "sm_90"), ("100", "sm_100"), ("75", "compute_75"))


class BuildExtension(build_ext):
    """``build_ext`` that compiles ``kernels.cu`` first and hands it to the C compiler as an array of bytes."""

    def build_extension(self, ext: Extension) -> None:
        """Build, with kernels if that is possible; a package without them compiles the same source on first use."""
        image = self._kernels()
        if image is not None:
            header = Path(self.build_temp).resolve() / "lmkv_fatbin.h"
            header.parent.mkdir(parents=True, exist_ok=True)
            numbers = ",".join(map(str, image))
            header.write_text(
                f"static const unsigned char lmkv_image[] = {{{numbers}}};\n"
                "static const size_t lmkv_image_bytes = sizeof lmkv_image;\n",
                encoding="ascii",
            )
            ext.define_macros.append(("LMKV_FATBIN", f'"{header}"'))
        super().build_extension(ext)

    def _kernels(self) -> bytes | None:
        compiler = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if not compiler:
            print("lmkv: no nvcc: GPU kernels will be compiled on first use, by NVRTC", file=sys.stderr)
            return None
        target = Path(self.build_temp).resolve() / "kernels.fatbin"
        target.parent.mkdir(parents=True, exist_ok=True)
        wanted = [f"-gencode=arch=compute_{virtual},code={real}" for virtual, real in _TARGETS]
        command = [compiler, "-std=c++14", "-fatbin", *wanted, "-Xfatbin", "-compress-all", "-o", str(target)]
        done = subprocess.run([*command, str(_HERE / "kernels.cu")], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"lmkv: nvcc failed, GPU kernels will be compiled on first use:\n{done.stderr}", file=sys.stderr)
            return None
        return target.read_bytes()
