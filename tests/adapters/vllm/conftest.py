"""Tests on a real vLLM, in an environment of their own (``python tests/run.py vllm``); elsewhere they are not collected."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
    )
    sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a saved tiny model, by its kind."""
    from models import save_model

    folder = tmp_path_factory.mktemp("models")
    saved: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in saved:
            saved[kind] = save_model(kind, folder)
        return saved[kind]

    return of


@pytest.fixture(scope="session")
def references(models: Callable[[str], Path]) -> Callable[..., Any]:
    """What vLLM says without a connector: ``references(kind, prompts)``, remembered for the session."""
    from engines import Engine

    known: dict[Any, Any] = {}

    def of(kind: str, prompts: list[list[int]]) -> list[Any]:
        missing = [prompt for prompt in prompts if (kind, tuple(prompt)) not in known]
        if missing:
            with Engine(models(kind), connector=None, max_num_seqs=1) as engine:
                for prompt, answer in zip(missing, engine.ask(missing), strict=True):
                    known[kind, tuple(prompt)] = answer
        return [known[kind, tuple(prompt)] for prompt in prompts]

    return of


@pytest.fixture
def engine_of(models: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """``engine_of(kind, **settings)``: an engine that the test's end closes, after which nothing may be left behind."""
    from engines import Engine

    opened = []

    def make(kind: str = "llama", **settings: Any) -> Engine:
        engine = Engine(models(kind), **settings)
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.close()
