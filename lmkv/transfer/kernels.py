"""The GPU kernels as an image that the driver loads: built in, or compiled once by NVRTC where there was no nvcc."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..config import cache_home
from ..errors import NativeError
from .plan import native

__all__ = ["built_in", "compiled", "nvrtc_path"]


def built_in() -> bytes | None:
    """The image for several architectures that nvcc made when the package was built."""
    size = native.ffi.new("size_t *")
    image = native.lib.lmkv_gpu_image(size)
    return None if image == native.ffi.NULL else bytes(native.ffi.buffer(image, size[0]))


def compiled(arch: str, *, cache: Path | None = None, anew: bool = False) -> bytes:
    """Machine code for one architecture, from NVRTC or from what it made before.

    Args:
        arch: such as ``90``.
        cache: folder of earlier results; in the user's cache directory by default.
        anew: don't believe the cache.

    Raises:
        NativeError: NVRTC is not to be had, or refuses the source; the message says what to do.
    """
    source = Path(native.__file__).with_name("kernels.cu").read_bytes()
    folder = cache_home() / "lmkv" / "kernels" if cache is None else cache
    path = folder / f"{hashlib.sha256(source).hexdigest()[:24]}-sm_{arch}.cubin"
    if not anew:
        try:
            return path.read_bytes()
        except OSError:
            pass
    image = _compile(source, arch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(image)
        os.replace(name, path)
    except OSError:
        pass  # a cache that can't be written costs a second at the next start
    return image


def _libraries() -> Iterator[str]:
    """Names and paths of NVRTC, the likeliest first."""
    for version in ("13", "12"):
        yield f"libnvrtc.so.{version}"
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield from sorted(glob.glob(os.path.join(place, "*", "lib", "libnvrtc.so.1[0-9]")), reverse=True)
    yield from ("/usr/local/cuda/lib64/libnvrtc.so", "libnvrtc.so")


def nvrtc_path() -> str | None:
    """Name or path of the NVRTC that :func:`compiled` would use; ``None`` if there is none."""
    for name in _libraries():
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
            return name
    return None


def _library() -> ctypes.CDLL:
    name = nvrtc_path()
    if name is None:
        raise NativeError(
            "expected nvcc when lmkv was built, or NVRTC now; got neither: install the CUDA toolkit and reinstall lmkv, or "
            "pip install nvidia-cuda-nvrtc"
        )
    return ctypes.CDLL(name)


def _compile(source: bytes, arch: str) -> bytes:
    nvrtc = _library()
    program = ctypes.c_void_p()

    def call(name: str, *arguments: object) -> None:
        status = getattr(nvrtc, name)(*arguments)
        if status and name != "nvrtcCompileProgram":
            raise NativeError(f"expected NVRTC to work; {name} returned {status}: reinstall it")
        if status:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value + 1)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise NativeError(f"expected kernels for sm_{arch}; NVRTC says: {log.value.decode(errors='replace')[:500]}")

    call("nvrtcCreateProgram", ctypes.byref(program), source, b"kernels.cu", 0, None, None)
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture=sm_{arch}".encode(), b"--std=c++14")
    call("nvrtcCompileProgram", program, len(options), options)
    size = ctypes.c_size_t()
    call("nvrtcGetCUBINSize", program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    call("nvrtcGetCUBIN", program, image)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw
