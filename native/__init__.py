"""The compiled part, through cffi: ``lmkv.h`` is both its C header and its binding.

Built with the package where there is a C compiler. :data:`lib` is ``None`` where there was none; then numpy copies.
"""

from __future__ import annotations

from typing import Any

__all__ = ["INTERFACE", "ffi", "lib"]

#: The version of ``lmkv.h`` that this package was written for.
INTERFACE = 3

ffi: Any = None
lib: Any = None
try:
    from . import _ffi
except ImportError:
    pass
else:
    if _ffi.lib.lmkv_version() == INTERFACE:  # else: a left-over of another version in an editable install
        ffi, lib = _ffi.ffi, _ffi.lib
