"""Time to first token under SGLang alone, with LMKV and with its own HiCache: ``python tests/gpu/sglang_ttft.py --modes …``.

Each mode runs in a process of its own, one after the other, on a model of the given shape with dummy weights and token-id
prompts; nothing is fetched. One JSON object a line: name, value, unit, reference, ratio. The reference is mode ``none`` of the
same call where it ran, ratio = value / reference. With ``--log FOLDER`` each process's output is kept there.

Modes: ``none``; ``lmkv`` behind ``--enable-lmcache``, ``lmkv-whole`` the same with ``use_layerwise`` off; ``hicache``, SGLang's
tier in host memory alone, on a device pool too small for all prompts, since a flush would empty that tier; ``hicache-lmkv`` and
``hicache-file``, HiCache with LMKV or with SGLang's files as its storage. Between rounds SGLang's tree (and its host memory) is
flushed, but for ``hicache``.

Tests: ``seq`` (prompts one by one, cold, twice again, and, without a flush, once more from the device), ``batch`` (all at once,
cold and again).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine_processes import mode_results, print_beside_none
from sglang_environment import few_models

_COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-06, "torch_dtype": "bfloat16", "use_cache": True}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000,
    },
    "tiny": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 8192,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000,
    },
}
BEGUN = time.monotonic()
MODES = ("none", "lmkv", "lmkv-whole", "hicache", "hicache-lmkv", "hicache-file")


def say(name: str, value: float, unit: str, **more: object) -> None:
    """One result."""
    print("R " + json.dumps({"name": name, "value": round(value, 4), "unit": unit, **more}), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="none,lmkv", help=f"out of {', '.join(MODES)}")
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--tests", default="seq,batch")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--attention", default="triton", help="SGLang's attention backend")
    parser.add_argument("--page-size", type=int, default=1, help="HiCache's modes take 64 instead of 1")
    parser.add_argument("--mem-layout", default="page_first", help="of HiCache's host memory")
    parser.add_argument("--cpu-gib", type=float, default=24)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=10000)
    parser.add_argument("--batched-tokens", type=int, default=16384, help="chunked_prefill_size")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between rounds")
    parser.add_argument("--settle", type=float, default=8.0, help="seconds after the start, while memory is pinned")
    parser.add_argument("--extra", default="{}", help="more settings of mode lmkv, JSON: LMKV_ variables without LMKV_")
    parser.add_argument("--limit", type=float, default=400, help="seconds a mode may take")
    parser.add_argument("--total", type=float, default=86400, help="seconds for all modes; what has no time left is not begun")
    parser.add_argument("--log", help="folder for the processes' output")
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


class Bench:
    """One engine and what is asked of it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.random = random.Random(int.from_bytes(os.urandom(4), "little"))
        config = {**_COMMON, **SHAPES[args.shape], "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
        self.vocabulary = config["vocab_size"]
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config))
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
            "context_length": min(args.prompt_tokens + 1024, config["max_position_embeddings"]),
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

    def name(self, what: str) -> str:
        """Name of a result."""
        return f"{self.args.child}/{what}"

    def prompt(self, tokens: int) -> list[int]:
        """A prompt that nobody has seen."""
        return [self.random.randrange(100, self.vocabulary) for _ in range(tokens)]

    def ask(self, prompts: list[list[int]]) -> tuple[float, list[Any]]:
        """Milliseconds until all have their first token, and the outputs."""
        sampling = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        begun = time.perf_counter()
        outputs = self.engine.generate(input_ids=prompts, sampling_params=sampling)
        return (time.perf_counter() - begun) * 1e3, outputs

    def one_by_one(self, what: str, prompts: list[list[int]]) -> list[int]:
        """Ask each alone; returns the first tokens."""
        times, outputs = [], []
        for prompt in prompts:
            took, found = self.ask([prompt])
            times.append(took)
            outputs.append(found[0])
        all_ms = [round(took, 1) for took in times]
        mean = round(statistics.fmean(times), 2)
        say(self.name(what), statistics.median(times), "ms", mean=mean, all=all_ms, **sources(outputs))
        return [output["output_ids"][0] for output in outputs]

    def between(self) -> None:
        """Let stores end, and empty SGLang's own cache."""
        time.sleep(self.args.pause)
        if self.args.child == "hicache":
            return
        deadline = time.monotonic() + 60
        while not self.engine.flush_cache().success:  # refused while a backup is not quite finished
            if time.monotonic() > deadline:
                raise RuntimeError("expected SGLang's cache to be flushed; it refuses")
            time.sleep(0.1)

    def warm_up(self) -> None:
        """Compile, allocate, load once."""
        for tokens in (64, min(3000, self.args.prompt_tokens), self.args.prompt_tokens, self.args.prompt_tokens):
            self.ask([self.prompt(tokens)])
        known = self.prompt(self.args.prompt_tokens)
        for _ in range(2):
            self.ask([known])
            self.between()
        self.ask([known])
        self.between()

    def seq(self) -> None:
        prompts = [self.prompt(self.args.prompt_tokens) for _ in range(self.args.prompts)]
        first = self.one_by_one("seq/cold", prompts)
        for again in ("seq/again", "seq/again2"):
            self.between()
            tokens = self.one_by_one(again, prompts)
            say(self.name(again + "/same_first_tokens"), sum(a == b for a, b in zip(first, tokens, strict=True)), "prompts")
        if self.args.child != "hicache":
            self.one_by_one("seq/device", prompts)  # the floor: all of it is in SGLang's tree
        self.between()

    def batch(self) -> None:
        prompts = [self.prompt(self.args.prompt_tokens) for _ in range(self.args.prompts)]
        for what in ("batch/cold", "batch/again"):
            took, outputs = self.ask(prompts)
            say(self.name(what), took, "ms", **sources(outputs))
            self.between()


def sources(outputs: list[Any]) -> dict[str, Any]:
    """The fewest cached tokens of an answer, and where those of all came from."""
    told = [output["meta_info"] for output in outputs]
    total: dict[str, int] = {}
    for meta in told:
        for name, value in (meta.get("cached_tokens_details") or {}).items():
            if isinstance(value, int) and value:
                total[name] = total.get(name, 0) + value
    return {"cached": min(meta["cached_tokens"] for meta in told), "sources": total}


def child(args: argparse.Namespace) -> None:
    """Run one mode in this process."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.device == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        bench.warm_up()
        for test in args.tests.split(","):
            getattr(bench, test)()
        say(bench.name("end"), 1, "")


def run_mode(args: argparse.Namespace, mode: str) -> list[dict[str, Any]]:
    """One mode in a process of its own; its results."""
    limit = min(args.limit, args.total - (time.monotonic() - BEGUN))
    if limit < 30:
        return [{"name": f"{mode}/process", "value": 0, "unit": "s", "exit": 1, "told": ["not begun: no time was left"]}]
    command = [sys.executable, str(Path(__file__).resolve()), "--child", mode, *sys.argv[1:]]
    return mode_results(mode, command, Path(args.log or tempfile.mkdtemp()) / f"{mode}.log", limit)


def main() -> int:
    args = arguments()
    if args.child:
        child(args)
        return 0
    unknown = set(args.modes.split(",")) - set(MODES)
    if unknown:
        print(f"expected modes out of {', '.join(MODES)}; got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    os.environ.update(few_models())
    return print_beside_none(args.modes.split(","), lambda mode: run_mode(args, mode))


if __name__ == "__main__":
    sys.exit(main())
