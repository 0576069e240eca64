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
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import ttft
from ttft import say

MODES = ("none", "lmkv", "layers", "offload", "lmcache")


def arguments() -> argparse.Namespace:
    parser = ttft.parser(__doc__, MODES, tests="seq,batch,long,misses,mixed", gib=64)
    parser.add_argument("--runner", choices=("v1", "v2"), default="v1", help="vLLM's model runner")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--document-tokens", type=int, default=20000)
    parser.add_argument("--question-tokens", type=int, default=32)
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


class Bench(ttft.Bench):
    """One vLLM engine and what is asked of it."""

    repeats = 3

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        super().__init__(args, folder)
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if args.runner == "v2" else "0"
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
            max_model_len=min(longest, self.config["max_position_embeddings"]),
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

    def ask(self, prompts: list[list[int]]) -> tuple[float, list[Any]]:
        begun = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], self.sampling, use_tqdm=False)
        return (time.perf_counter() - begun) * 1e3, outputs

    def first_token(self, output: Any) -> int:
        return int(output.outputs[0].token_ids[0])

    def found(self, outputs: list[Any]) -> dict[str, object]:
        return {"cached": min(output.num_cached_tokens or 0 for output in outputs)}

    def between(self) -> None:
        """Let stores end."""
        time.sleep(self.args.pause)

    def long(self) -> None:
        """Documents, then in another order with a new question behind each."""
        documents = [self.prompt(self.args.document_tokens) for _ in range(self.args.documents)]
        for what in ("long/cold", "long/again"):
            self.one_by_one(what, [document + self.prompt(self.args.question_tokens) for document in documents])
            self.random.shuffle(documents)
            self.between()

    def mixed(self) -> None:
        """Known prompts that arrive one after the other while eight requests are being answered."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        known = self.new_prompts()
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
        """Prompts that nobody has seen, all at once."""
        times = []
        for _ in range(3):
            took, _ = self.ask(self.new_prompts())
            times.append(took)
        tokens = self.args.prompts * self.args.prompt_tokens
        say(self.name("misses"), tokens / statistics.median(times) * 1e3, "tokens/s", all=[round(took, 1) for took in times])


if __name__ == "__main__":
    sys.exit(ttft.run_modes(arguments(), MODES, Bench))
