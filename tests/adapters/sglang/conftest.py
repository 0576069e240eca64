"""Tests on a real SGLang, in an environment of their own (``python tests/run.py sglang``); elsewhere they are not collected."""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_real_*.py"]
else:
    os.environ.update(SGLANG_USE_CPU_ENGINE="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
