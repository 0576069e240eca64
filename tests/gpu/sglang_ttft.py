"""Time to first token under SGLang alone, with LMKV and with its own HiCache: ``python tests/gpu/sglang_ttft.py --modes …``.

Each mode runs in a process of its own, one after the other, on a model of the given shape with dummy weights and token-id
prompts; nothing is fetched. One JSON object a line: name, value, unit, reference, ratio. The reference is mode ``none`` of the
same call where it ran, ratio = value / reference. With ``--log FOLDER`` each process's output is kept there.

Modes: ``none``; ``lmkv`` behind ``--enable-lmcache``, ``lmkv-whole`` the same with ``use_layerwise`` off; ``hicache``, SGLang's
tier in host memory alone, on a device pool too small for all prompts, since a flush would empty that tier (its ``batch`` runs
two prompts at a time, which that of other modes does not); ``hicache-lmkv`` and ``hicache-file``, HiCache with LMKV or with
SGLang's files as its storage. Between rounds SGLang's tree (and its host memory) is flushed, but for ``hicache``.

Tests: ``seq`` (prompts one by one, cold, twice again, and, without a flush, once more from the device), ``batch`` (all at once,
cold and again).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import ttft
from sglang_environment import few_models
from ttft import say

MODES = ("none", "lmkv", "lmkv-whole", "hicache", "hicache-lmkv", "hicache-file")


def arguments() -> argparse.Namespace:
    parser = ttft.parser(__doc__, MODES, tests="seq,batch", gib=24)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--attention", default="triton", help="SGLang's attention backend")
    parser.add_argument("--page-size", type=int, default=1, help="HiCache's modes take 64 instead of 1")
    parser.add_argument("--mem-layout", default="page_first", help="of HiCache's host memory")
    parser.add_argument("--settle", type=float, default=8.0, help="seconds after the start, while memory is pinned")
    return parser.parse_args()


def cache(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The mode's arguments of the engine."""
    size = str(int(args.cpu_gib * (1 << 30)))
    if args.child == "none":
        return {}
    if args.child in ("lmkv", "lmkv-whole"):
        os.environ.update(LMKV_SGLANG="1", LMKV_RAM_CAPACITY=size, LMCACHE_USE_LAYERWISE=str(args.child == "lmkv"))
        os.environ.update({f"LMKV_{name.upper()}": str(value) for name, value in json.loads(args.extra).items()})
        return {"enable_lmcache": True}
    settings: dict[str, Any] = {
        "enable_hierarchical_cache": True,
        "hicache_size": max(1, int(args.cpu_gib)),
        "hicache_mem_layout": args.mem_layout,
        "hicache_io_backend": "kernel" if args.device == "cuda" else "direct",
        "hicache_write_policy": "write_through",
        "page_size": max(64, args.page_size),
    }
    if args.child == "hicache-lmkv":
        extra = {"backend_name": "lmkv", "module_path": "lmkv.adapters.sglang.hicache", "class_name": "LMKVHiCacheStorage"}
        extra |= {"interface_v1": 1, "ram_capacity": size}
        settings |= {"hicache_storage_backend": "dynamic", "hicache_storage_backend_extra_config": json.dumps(extra)}
    elif args.child == "hicache-file":
        os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(folder / "files")
        settings["hicache_storage_backend"] = "file"
    if "hicache_storage_backend" in settings:
        settings["hicache_storage_prefetch_policy"] = "wait_complete"
    return settings


class Bench(ttft.Bench):
    """One SGLang engine and what is asked of it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        model = folder / "model"
        model.mkdir()
        super().__init__(args, model)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if args.device == "cpu":
            os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        begun = time.time()
        import sglang

        imported = time.time() - begun
        roomy = 13 * args.prompt_tokens if args.prompts <= 10 else (args.prompts + 3) * args.prompt_tokens
        on_cpu = args.device == "cpu"
        settings: dict[str, Any] = {
            "model_path": str(model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "float32" if on_cpu else "bfloat16",
            "device": args.device,
            "attention_backend": "torch_native" if on_cpu else args.attention,
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "disable_custom_all_reduce": True,
            "disable_overlap_schedule": on_cpu,
            "page_size": args.page_size,
            "context_length": min(args.prompt_tokens + 1024, self.config["max_position_embeddings"]),
            "max_running_requests": 32,
            "max_total_tokens": int(2.4 * args.prompt_tokens) if args.child == "hicache" else roomy,
            "chunked_prefill_size": args.batched_tokens,
            "max_prefill_tokens": args.batched_tokens,
            "mem_fraction_static": 0.1 if on_cpu else 0.8,
            "random_seed": 0,
            "port": 33000 + 1000 * MODES.index(args.child),
            "log_level": "info",
            "disable_cuda_graph": on_cpu or args.eager,
            **cache(args, folder),
        }
        if not settings["disable_cuda_graph"]:
            settings |= {"cuda_graph_bs_decode": [1, 2, 4, 8, 16], "cuda_graph_bs_prefill": [4, 8, 16, 32, 64, 128, 256]}
        begun = time.time()
        self.engine = sglang.Engine(**settings)
        say(self.name("start"), time.time() - begun, "s", sglang=sglang.__version__, import_s=round(imported, 1))
        time.sleep(args.settle)

    def ask(self, prompts: list[list[int]]) -> tuple[float, list[Any]]:
        sampling = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        begun = time.perf_counter()
        outputs = self.engine.generate(input_ids=prompts, sampling_params=sampling)
        return (time.perf_counter() - begun) * 1e3, outputs

    def first_token(self, output: Any) -> int:
        return int(output["output_ids"][0])

    def found(self, outputs: list[Any]) -> dict[str, object]:
        told = [output["meta_info"] for output in outputs]
        total: dict[str, int] = {}
        for meta in told:
            for name, value in (meta.get("cached_tokens_details") or {}).items():
                if isinstance(value, int) and value:
                    total[name] = total.get(name, 0) + value
        return {"cached": min(meta["cached_tokens"] for meta in told), "sources": total}

    def between(self) -> None:
        time.sleep(self.args.pause)
        if self.args.child == "hicache":
            return
        deadline = time.monotonic() + 60
        while not self.engine.flush_cache().success:  # refused while a backup is not quite finished
            if time.monotonic() > deadline:
                raise RuntimeError("expected SGLang's cache to be flushed; it refuses")
            time.sleep(0.1)

    def after_seq(self, prompts: list[list[int]]) -> None:
        if self.args.child != "hicache":
            self.one_by_one("seq/device", prompts)  # the floor: all of it is in SGLang's tree
        self.between()


if __name__ == "__main__":
    os.environ.update(few_models())
    sys.exit(ttft.run_modes(arguments(), MODES, Bench))
