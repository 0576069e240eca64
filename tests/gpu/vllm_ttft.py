"""Time to first token under vLLM without a connector, with LMKV and with others: ``python tests/gpu/vllm_ttft.py --modes …``.

Each mode runs in a process of its own, one after the other, on a model of the given shape with dummy weights and token-id
prompts; nothing is fetched. One JSON object a line: name, value, unit, reference, ratio. The reference is mode ``none`` of the
same call where it ran, ratio = value / reference. Mode ``layers`` is LMKV with ``lmkv.layerwise``. With ``--log FOLDER`` each
process's output is kept there.

Tests: ``seq`` (prompts one by one, cold and then twice again), ``batch`` (all at once, cold and again), ``long`` (documents,
then in another order with a new question behind each), ``misses`` (a load without any reuse), ``mixed`` (known prompts arrive
one after the other while eight requests are being answered: what these wait between tokens, what the arrivals for their first).
"""

from __future__ import annotations

import argparse
import itertools
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
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
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
MODES = ("none", "lmkv", "layers", "offload", "lmcache")


def say(name: str, value: float, unit: str, **more: object) -> None:
    """One result."""
    print("R " + json.dumps({"name": name, "value": round(value, 4), "unit": unit, **more}), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="none,lmkv", help=f"out of {', '.join(MODES)}")
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--tests", default="seq,batch,long,misses,mixed")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v1", help="vLLM's model runner")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cpu-gib", type=float, default=64)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=10000)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--document-tokens", type=int, default=20000)
    parser.add_argument("--question-tokens", type=int, default=32)
    parser.add_argument("--batched-tokens", type=int, default=16384, help="max_num_batched_tokens")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between rounds")
    parser.add_argument("--extra", default="{}", help="kv_connector_extra_config of modes lmkv and layers, JSON")
    parser.add_argument("--limit", type=float, default=400, help="seconds a mode may take")
    parser.add_argument("--log", help="folder for the processes' output")
    return parser.parse_args()


def connector(args: argparse.Namespace) -> dict[str, Any] | None:
    """``kv_transfer_config`` of a mode."""
    size = int(args.cpu_gib * (1 << 30))
    if args.child in ("lmkv", "layers"):
        extra = {
            "lmkv.ram_capacity": size,
            "lmkv.pin": "start",
            "lmkv.log_requests": False,
            "lmkv.layerwise": args.child == "layers",
        }
        extra |= json.loads(args.extra)
        name, module = "LMKVConnector", "lmkv.adapters.vllm"
        return {
            "kv_connector": name,
            "kv_connector_module_path": module,
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
    if args.child == "offload":
        extra = {"cpu_bytes_to_use": size}
        return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    if args.child == "lmcache":
        os.environ.update(LMCACHE_CHUNK_SIZE="256", LMCACHE_LOCAL_CPU="True", LMCACHE_MAX_LOCAL_CPU_SIZE=str(args.cpu_gib))
        os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
        return {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    return None


class Bench:
    """One engine and what is asked of it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.random = random.Random(int.from_bytes(os.urandom(4), "little"))
        config = {**_COMMON, **SHAPES[args.shape], "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
        self.vocabulary = config["vocab_size"]
        (folder / "config.json").write_text(json.dumps(config))
        begun = time.time()
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig

        imported = time.time() - begun
        settings: dict[str, Any] = {}
        transfer = connector(args)
        if transfer is not None:
            settings["kv_transfer_config"] = KVTransferConfig(**transfer)
        if not args.eager:
            settings["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128]}
        import torch

        if torch.cuda.is_available():
            settings.update(gpu_memory_utilization=0.88, disable_cascade_attn=True)
            if args.dtype == "bfloat16":
                settings["attention_backend"] = "FLASH_ATTN"
        longest = max(args.prompt_tokens, args.document_tokens + args.question_tokens) + 1024
        begun = time.time()
        self.llm = LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=args.dtype,
            generation_config="vllm",
            max_model_len=min(longest, config["max_position_embeddings"]),
            enforce_eager=args.eager,
            enable_prefix_caching=False,
            max_num_batched_tokens=args.batched_tokens,
            max_num_seqs=32,
            disable_log_stats=False,
            seed=0,
            **settings,
        )
        self.sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True)
        import vllm

        say(self.name("start"), time.time() - begun, "s", vllm=vllm.__version__, import_s=round(imported, 1))

    def name(self, what: str) -> str:
        """Name of a result."""
        return f"{self.args.child}/{what}"

    def prompt(self, tokens: int) -> list[int]:
        """A prompt that nobody has seen."""
        return [self.random.randrange(100, self.vocabulary) for _ in range(tokens)]

    def ask(self, prompts: list[list[int]]) -> tuple[float, list[Any]]:
        """Milliseconds until all have their first token, and the outputs."""
        begun = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], self.sampling, use_tqdm=False)
        return (time.perf_counter() - begun) * 1e3, outputs

    def one_by_one(self, what: str, prompts: list[list[int]]) -> list[int]:
        """Ask each alone; returns the first tokens."""
        times, outputs = [], []
        for prompt in prompts:
            took, found = self.ask([prompt])
            times.append(took)
            outputs.append(found[0])
        cached = [output.num_cached_tokens or 0 for output in outputs]
        all_ms = [round(took, 1) for took in times]
        say(
            self.name(what),
            statistics.median(times),
            "ms",
            mean=round(statistics.fmean(times), 2),
            all=all_ms,
            cached=min(cached),
        )
        return [output.outputs[0].token_ids[0] for output in outputs]

    def between(self) -> None:
        """Let stores end."""
        time.sleep(self.args.pause)

    def warm_up(self) -> None:
        """Compile, allocate, load once."""
        for tokens in (64, min(3000, self.args.prompt_tokens), self.args.prompt_tokens, self.args.prompt_tokens):
            self.ask([self.prompt(tokens)])
        known = self.prompt(self.args.prompt_tokens)
        self.ask([known])
        self.between()
        self.ask([known])
        self.between()

    def seq(self) -> None:
        prompts = [self.prompt(self.args.prompt_tokens) for _ in range(self.args.prompts)]
        first = self.one_by_one("seq/cold", prompts)
        for again in ("seq/warm", "seq/warm2"):
            self.between()
            tokens = self.one_by_one(again, prompts)
            say(self.name(again + "/same_first_tokens"), sum(a == b for a, b in zip(first, tokens, strict=True)), "prompts")

    def batch(self) -> None:
        prompts = [self.prompt(self.args.prompt_tokens) for _ in range(self.args.prompts)]
        for what in ("batch/cold", "batch/warm", "batch/warm2", "batch/warm3"):
            took, outputs = self.ask(prompts)
            say(self.name(what), took, "ms", cached=min(output.num_cached_tokens or 0 for output in outputs))
            self.between()

    def long(self) -> None:
        documents = [self.prompt(self.args.document_tokens) for _ in range(self.args.documents)]
        for what in ("long/cold", "long/warm"):
            self.one_by_one(what, [document + self.prompt(self.args.question_tokens) for document in documents])
            self.random.shuffle(documents)
            self.between()

    def mixed(self) -> None:
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        known = [self.prompt(self.args.prompt_tokens) for _ in range(self.args.prompts)]
        for prompt in known:
            self.ask([prompt])
        self.between()
        answers = SamplingParams(max_tokens=1000, temperature=0.0, detokenize=False, ignore_eos=True)
        for number in range(8):
            engine.add_request(f"answered-{number}", {"prompt_token_ids": self.prompt(200)}, answers)
        seen: list[float] = []  # when the answered requests got a token
        arrived: dict[str, float] = {}
        waits: list[float] = []
        steps = 0
        while len(waits) < len(known):
            outputs = engine.step()
            now = time.perf_counter()
            if any(output.request_id.startswith("answered") for output in outputs):
                seen.append(now)
                steps += 1
            waits += [(now - arrived.pop(output.request_id)) * 1e3 for output in outputs if output.request_id in arrived]
            if not arrived and len(waits) < len(known) and steps >= 30:
                steps = 0
                prompt = known[len(waits)]
                arrived[str(len(waits))] = time.perf_counter()
                engine.add_request(str(len(waits)), {"prompt_token_ids": prompt}, self.sampling)
        engine.abort_request([f"answered-{number}" for number in range(8)])
        while engine.has_unfinished_requests():
            engine.step()
        gaps = sorted((b - a) * 1e3 for a, b in itertools.pairwise(seen))
        say(self.name("mixed/first_token"), statistics.median(waits), "ms", all=[round(wait, 1) for wait in waits])
        longest = [round(gap, 1) for gap in gaps[-len(known) :]]
        say(self.name("mixed/between_tokens"), statistics.median(gaps), "ms", longest=longest)
        say(self.name("mixed/between_tokens_longest"), statistics.median(longest), "ms")

    def misses(self) -> None:
        times = []
        for _ in range(3):
            took, _ = self.ask([self.prompt(self.args.prompt_tokens) for _ in range(self.args.prompts)])
            times.append(took)
        tokens = self.args.prompts * self.args.prompt_tokens
        say(self.name("misses"), tokens / statistics.median(times) * 1e3, "tokens/s", all=[round(took, 1) for took in times])


def child(args: argparse.Namespace) -> None:
    """Run one mode in this process."""
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if args.runner == "v2" else "0"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        bench.warm_up()
        for test in args.tests.split(","):
            getattr(bench, test)()
        say(bench.name("end"), 1, "")


def run_mode(args: argparse.Namespace, mode: str) -> list[dict[str, Any]]:
    """One mode in a process of its own; its results."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", mode, *sys.argv[1:]]
    return mode_results(mode, command, Path(args.log or tempfile.mkdtemp()) / f"{mode}.log", args.limit)


def main() -> int:
    args = arguments()
    if args.child:
        child(args)
        return 0
    unknown = set(args.modes.split(",")) - set(MODES)
    if unknown:
        print(f"expected modes out of {', '.join(MODES)}; got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    return print_beside_none(args.modes.split(","), lambda mode: run_mode(args, mode))


if __name__ == "__main__":
    sys.exit(main())
