"""What SGLang sees under the scripts here: plug-ins of the tests, and few of its models, which take long to import."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

__all__ = ["few_models", "with_plugins"]

HERE = Path(__file__).resolve().parent
_USED = ("__init__", "llama", "qwen2", "qwen3", "utils")


def few_models() -> dict[str, str]:
    """Variables that keep SGLang from importing models that no script here runs; none where SGLang is not found."""
    sglang = importlib.util.find_spec("sglang")
    if sglang is None or not sglang.submodule_search_locations:
        return {}
    models = (Path(sglang.submodule_search_locations[0]) / "srt" / "models").glob("*.py")
    return {"SGLANG_DISABLED_MODEL_ARCHS": ",".join(sorted(path.stem for path in models if path.stem not in _USED))}


def with_plugins(site: Path, *, cpu: bool, hosted: bool) -> dict[str, str]:
    """Variables under which SGLang runs the plug-ins of the tests.

    Args:
        site: a folder for what tells SGLang of them.
        cpu: with what SGLang's CPU engine lacks.
        hosted: behind HiCache.
    """
    plugins = {"probe": "sglang_probe:register"}
    paths = [str(site), str(HERE)]
    if cpu:
        plugins["pages"] = "sglang_page_kernels:register"
        paths.append(str(HERE.parent / "support"))
        if hosted:
            plugins["hostcopies"] = "sglang_host_copies:register"
    for name, target in plugins.items():
        info = site / f"lmkv_test_{name}-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lmkv-test-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {target}\n")
    return {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}
