"""An environment of its own for SGLang on a CPU: SGLang's requirements are for GPUs, and not LMKV's.

It sees the packages of the interpreter that makes it, LMKV and torch included, and has beside them SGLang without its
requirements, what its text models need of these, and stand-ins for two packages that exist for GPUs only (``sglang_stubs``).
"""

from __future__ import annotations

import site
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["OLDER", "SGLANG", "make"]

SGLANG = "sglang==0.5.23"
#: The last one whose prefix tree knows no external store.
OLDER = "sglang==0.5.17"
#: What each version pins.
_PINNED = {
    SGLANG: ("transformers==5.19.0", "openai==2.8.0", "xgrammar==0.2.7"),
    OLDER: ("transformers==5.12.1", "openai==2.6.1", "xgrammar==0.2.1", "tokenizers==0.22.2", "huggingface_hub<2.0"),
}
#: Of SGLang's requirements, those that serving a text model on a CPU imports; none brings others along.
_NEEDED = (
    *("apache-tvm-ffi==0.1.11", "compressed-tensors==0.18.0", "sentencepiece==0.2.1"),
    *("openai-harmony==0.0.4", "triton==3.6.0", "gguf", "orjson", "msgspec", "dill", "loguru", "jiter"),
    *("fastapi", "starlette", "uvicorn", "uvloop", "sniffio", "distro", "setproctitle", "partial_json_parser"),
    *("python-multipart", "prometheus_client", "pybase64", "interegular", "einops", "tiktoken", "soundfile", "zstandard"),
    *("anthropic", "docstring_parser", "opentelemetry-api"),
)


def make(folder: str | Path, sglang: str = SGLANG) -> str:
    """Make the environment and return its interpreter. What is never imported need not be compiled."""
    venv.create(folder, with_pip=False, symlinks=True, clear=True)
    python = Path(folder) / "bin" / "python"
    own = subprocess.run(
        [str(python), "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", own]
    subprocess.run([*pip, sglang, *_PINNED[sglang], *_NEEDED], check=True)
    lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (Path(own) / "around.pth").write_text("".join([f"{Path(__file__).parent / 'sglang_stubs'}\n", *lines]))
    return str(python)
