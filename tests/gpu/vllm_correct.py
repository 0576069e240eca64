"""Loaded KV against computed KV under vLLM on whatever device there is: ``python tests/gpu/vllm_correct.py``.

Each case (dtype, model runner, CUDA graphs or none, chunked prefill, kind of load) is an engine in a process of its own, on a
small saved model with random weights whose outputs react to the KV of every position. Prompts are computed (cold), read from
vLLM's own prefix cache (local) and, once that is emptied, from LMKV (loaded). Where the number of tokens to compute behind the
hit is the same, the model runs in the same shape on the same bits, so local and loaded must agree exactly, in any dtype; cold
and loaded must have equal greedy tokens and log-probabilities within a tolerance. KV memory is overwritten before each load;
blocks that were loaded must hold the bytes that were computed, on each rank. Then single positions are corrupted in the
slots, which must be seen. Last, more known prompts than vLLM has blocks for come at once, again and again, and end at different
times, so that blocks are given from one to the next while steps run. One JSON object a line: the case, what was found, ``ok``.
Exit status 1 if a case failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kv_memory
from engine_processes import case_outcome, print_cases

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "adapters" / "vllm"))

#: Largest difference of log-probabilities between computed and loaded: the last step has another shape and order of sums.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
#: No kernel of vLLM's for a GPU takes latents of this type.
NOT_BUILT = {("mla", "float32")}
LENGTHS = (129, 257, 1025, 2000, 3001)
WINDOW = 64  # of the model of that kind, in all layers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--runners", default="v1,v2")
    parser.add_argument("--graphs", default="off,on")
    parser.add_argument("--budgets", default="8192,512", help="max_num_batched_tokens; a small one cuts prompts into pieces")
    parser.add_argument("--loads", default="sync,async,layerwise")
    parser.add_argument("--kinds", default="qwen3", help="llama, qwen3, window, hybrid or mla (in bfloat16 only)")
    parser.add_argument("--all", action="store_true", help="every combination instead of a choice that covers each value")
    parser.add_argument("--extra", default="{}", help="more of kv_connector_extra_config, JSON")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=2048, help="of vLLM's KV memory")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time, each on a part of the device's memory")
    parser.add_argument("--limit", type=float, default=240, help="seconds a case may take")
    parser.add_argument("--log", help="folder for the processes' output")
    return parser.parse_args()


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases of a call."""
    named = {name: getattr(args, name + "s").split(",") for name in ("kind", "dtype", "runner", "graph", "budget", "load")}
    every = [dict(zip(named, values, strict=True)) for values in itertools.product(*named.values())]
    if args.all:
        return [case for case in every if (case["kind"], case["dtype"]) not in NOT_BUILT]
    # a value of each kind with each runner and dtype, the others in turn
    chosen = []
    for number, (kind, dtype, runner) in enumerate(itertools.product(named["kind"], named["dtype"], named["runner"])):
        if (kind, dtype) in NOT_BUILT:
            continue
        for turn in range(max(len(named["graph"]), len(named["load"]))):
            pick = {name: named[name][(turn + number) % len(named[name])] for name in ("graph", "budget", "load")}
            chosen.append({"kind": kind, "dtype": dtype, "runner": runner, **pick})
    return chosen


# -- in the process of a case --------------------------------------------------------------------------------------------------


class Case:
    """One engine."""

    def __init__(self, case: dict[str, Any], args: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig

        extra = {"lmkv.ram_capacity": "1GiB", "lmkv.ram_extent": "256MiB", "lmkv.log_requests": False}
        extra["lmkv.layerwise"] = case["load"] == "layerwise"
        extra["lmkv.load"] = "async" if case["load"] == "async" else "sync"
        extra |= json.loads(args.extra)
        settings: dict[str, Any] = {}
        if case["graph"] == "on":
            settings["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
        self.llm = LLM(
            model=args.model,
            dtype=case["dtype"],
            skip_tokenizer_init=True,
            enforce_eager=case["graph"] == "off",
            enable_prefix_caching=True,
            max_model_len=4096,
            max_num_seqs=8,
            max_num_batched_tokens=int(case["budget"]),
            num_gpu_blocks_override=args.blocks,
            kv_cache_memory_bytes=2 << 30,  # what is free is not measured, which several at a time would disturb
            gpu_memory_utilization=min(0.8, 0.6 / args.jobs),
            tensor_parallel_size=args.tensor_parallel,
            seed=0,
            kv_transfer_config=KVTransferConfig(
                kv_connector="LMKVConnector",
                kv_connector_module_path="lmkv.adapters.vllm",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config=extra,
            ),
            **settings,
        )
        self.sampling_of = lambda tokens: SamplingParams(
            max_tokens=tokens, temperature=0, logprobs=5, detokenize=False, ignore_eos=True
        )
        self.sampling = self.sampling_of(6)
        self.block = block = self.llm.llm_engine.vllm_config.cache_config.block_size
        numbers = random.Random(7)
        # one token behind whole blocks: vLLM's own cache and LMKV then leave the same single token to compute
        self.aligned = [[numbers.randrange(512) for _ in range(length // block * block + 1)] for length in LENGTHS]
        self.odd = [[numbers.randrange(512) for _ in range(length + 7)] for length in LENGTHS]
        self.many = [[numbers.randrange(512) for _ in range(numbers.randrange(200, 3000))] for _ in range(24)]
        self.random = numbers
        self.tolerance = TOLERANCE[case["dtype"]]
        self.latent, self.windows = case["kind"] == "mla", case["kind"] == "window"
        self.reach = WINDOW if self.windows else max(LENGTHS)

    def ask(self, prompts: list[list[int]], *, together: bool = False) -> list[Any]:
        groups = [prompts] if together else [[prompt] for prompt in prompts]
        found: list[Any] = []
        for group in groups:
            outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in group], self.sampling, use_tqdm=False)
            found += map(self.answer, outputs)
        return found

    @staticmethod
    def answer(output: Any) -> Any:
        first = output.outputs[0]
        logprobs = [{token: entry.logprob for token, entry in step.items()} for step in first.logprobs]
        return list(first.token_ids), logprobs, output.num_cached_tokens or 0

    def forget_local(self) -> None:
        client = self.llm.llm_engine.engine_core
        core = getattr(client, "engine_core", None)
        for _ in range(100):  # stores of the last request may still hold its blocks
            if core is not None and core.scheduler.has_requests():
                client.get_output()  # nobody else steps an engine of this process
            elif self.llm.reset_prefix_cache():
                self.llm.collective_rpc(kv_memory.wipe)
                return
            time.sleep(0.05)
        raise RuntimeError("expected vLLM's prefix cache to be emptied; blocks are still in use")

    def apart(self, a: list[Any], b: list[Any]) -> float:
        """Largest difference of log-probabilities up to where greedy tokens part, infinite if they part at more than a tie."""
        worst = 0.0
        for (tokens_a, steps_a, _), (tokens_b, steps_b, _) in zip(a, b, strict=True):
            for token_a, token_b, one, other in zip(tokens_a, tokens_b, steps_a, steps_b, strict=False):
                worst = max(worst, *(abs(one[token] - other[token]) for token in one.keys() & other.keys()), 0.0)
                if token_a != token_b:
                    gap = one[token_a] - one.get(token_b, float("-inf"))
                    worst = worst if gap <= 2 * self.tolerance else float("inf")
                    break
        return worst

    def run(self) -> dict[str, Any]:
        """All comparisons."""
        found: dict[str, Any] = {}
        self.forget_local()
        cold, computed = self.ask_each(self.aligned)
        local, again = self.ask_each(self.aligned)
        found["repeatable"] = self.ask(self.aligned) == local
        loaded, held = self.ask_each(self.aligned, forget=True)
        found |= self.bytes_of(computed, again, held)
        found["cached_local"] = [cached for *_, cached in local]
        found["cached_loaded"] = [cached for *_, cached in loaded]
        same_work = [i for i, (a, b) in enumerate(zip(local, loaded, strict=True)) if a[2] == b[2]]
        found["same_work"] = len(same_work)
        found["local_and_loaded_equal"] = all(local[i][:2] == loaded[i][:2] for i in same_work)
        found["cold_and_loaded"] = self.apart(cold, loaded)
        found["cold_and_local"] = self.apart(cold, local)
        self.forget_local()
        odd_cold = self.ask(self.odd, together=True)
        self.forget_local()
        odd_loaded = self.ask(self.odd, together=True)
        found["odd_cold_and_loaded"] = self.apart(odd_cold, odd_loaded)
        found["odd_cached"] = [cached for *_, cached in odd_loaded]
        found["failed_loads"] = self.failed_loads(odd_cold)
        found["corruption_seen"] = self.corruption()
        found["churn"], found["churn_cached"] = self.churn()
        limit = max(self.tolerance, 2 * found["cold_and_local"])
        # latents come from one rank: where another computed other last bits, answers may part, and only bytes must be equal
        inexact = self.latent and found["ranks_differ"]
        full = all(cached >= len(prompt) - 1 for prompt, cached in zip(self.aligned, found["cached_loaded"], strict=True))
        found["full_hits"] = full
        found["ok"] = (
            (found["local_and_loaded_equal"] or inexact)
            and found["strays"] == 0
            and found["blocks_equal"] >= (1 if self.windows else sum(len(prompt) // self.block for prompt in self.aligned))
            and found["cold_and_loaded"] <= limit
            and found["odd_cold_and_loaded"] <= limit
            and found["failed_loads"] <= limit
            and found["corruption_seen"] in ("all", "not tried")
            and found["churn"] <= limit
        )
        return found

    def ask_each(self, prompts: list[list[int]], *, forget: bool = False) -> tuple[list[Any], list[list[set[str]]]]:
        """Answers to prompts one by one, and for each rank and layer what whole blocks held meanwhile."""
        found: list[Any] = []
        held: list[list[set[str]]] = []
        for prompt in prompts:
            if forget:
                self.forget_local()
            found += self.ask([prompt])
            for rank, layers in enumerate(self.llm.collective_rpc(kv_memory.block_hashes)):
                if rank == len(held):
                    held.append([set() for _ in layers])
                for hashes, more in zip(held[rank], layers, strict=True):
                    hashes |= set(more)
        return found, held

    def bytes_of(self, cold: list[list[set[str]]], local: list[list[set[str]]], loaded: list[list[set[str]]]) -> dict[str, Any]:
        """How many whole blocks of a layer hold, once loaded, what a rank (of latents: the first) had computed, at least, and
        how many anything else, at most."""
        equal, strays = [], []
        for rank, layers in enumerate(loaded):
            source = 0 if self.latent else rank
            for layer, own in enumerate(layers):
                computed = cold[source][layer] | local[source][layer]
                equal.append(len(own & computed))
                strays.append(len(own - computed))
        return {"blocks_equal": min(equal), "strays": max(strays), "ranks_differ": any(layers != cold[0] for layers in cold)}

    def failed_loads(self, computed: list[Any]) -> float:
        """How far answers are from computed ones if the first two of their loads fail; infinite if none was begun."""
        from lmkv.adapters.vllm.copies import Copier, Running

        if getattr(self.llm.llm_engine.engine_core, "engine_core", None) is None:
            return 0.0  # workers are out of reach
        real, begun = Copier.load, []

        def load(copier: Copier, order: Any, **more: Any) -> Running:
            begun.append(order)
            return Running(order, error="injected") if len(begun) <= 2 else real(copier, order, **more)

        self.forget_local()
        Copier.load = load  # type: ignore[method-assign]
        try:
            found = self.ask(self.odd, together=True)
        finally:
            Copier.load = real  # type: ignore[method-assign]
        self.forget_local()
        again = self.ask(self.odd, together=True)  # nothing that was computed on unfilled blocks was kept
        return max(self.apart(computed, found), self.apart(computed, again)) if begun else float("inf")

    def churn(self) -> tuple[float, float]:
        """How far answers are from computed ones while blocks change hands all the time; share of tokens that was loaded."""
        computed = []
        for prompt in self.many:
            self.forget_local()
            computed += self.ask([prompt])
        worst, cached, asked = 0.0, 0, 0
        for _ in range(4):
            self.forget_local()
            order = self.random.sample(range(len(self.many)), len(self.many))
            prompts = [{"prompt_token_ids": self.many[i]} for i in order]
            sampling = [self.sampling_of(self.random.randrange(1, 40)) for _ in order]
            found = [self.answer(output) for output in self.llm.generate(prompts, sampling, use_tqdm=False)]
            worst = max(worst, self.apart([computed[i] for i in order], found))
            cached += sum(answer[2] for answer in found)
            asked += sum(map(len, self.many))
        return worst, round(cached / asked, 4)

    def corruption(self) -> str:
        """Whether a change of single positions in the slots is seen; ``not tried`` where the store is out of reach."""
        core = getattr(self.llm.llm_engine.engine_core, "engine_core", None)
        if core is None:
            return "not tried"
        import numpy as np

        store = core.scheduler.connector._scheduler.store
        prompt = self.aligned[1]
        self.forget_local()
        right = self.ask([prompt])
        missed = []
        first = max(0, len(prompt) - self.reach + 1)  # before it nothing is read
        for position in (first, first + 3, first + 40, (first + len(prompt)) // 2, len(prompt) - 2):
            with store.lease(store.lookup(prompt)) as lease:
                slot = next(slot for slot in lease.slots if slot.start <= position < slot.start + slot.tokens)
            group = store.layout.groups[0]
            data = np.frombuffer(store._ram.payload(slot.id, slot.tokens), np.uint8)
            rows = data[: group.token_bytes * slot.tokens].reshape(group.layers, group.kv, group.heads, slot.tokens, -1)
            kept = rows[:, :, :, position - slot.start].copy()
            # numbers of the right size in wrong places: heads swapped, or the halves of the only one
            wrong_places = kept[:, :, ::-1] if group.heads > 1 else np.roll(kept, kept.shape[-1] // 2, axis=-1)
            rows[:, :, :, position - slot.start] = wrong_places
            self.forget_local()
            wrong = self.ask([prompt])
            rows[:, :, :, position - slot.start] = kept
            if wrong[0][:2] == right[0][:2]:
                missed.append(position)
        self.forget_local()
        if self.ask([prompt])[0][:2] != right[0][:2]:
            return "mending failed"
        return f"not at {missed}" if missed else "all"


def run_case(args: argparse.Namespace) -> None:
    """Run one case in this process."""
    case = json.loads(args.case)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if args.tensor_parallel == 1 else "1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions for workers
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])  # where they are
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if case["runner"] == "v2" else "0"
    print("R " + json.dumps(Case(case, args).run()), flush=True)


# -- in the process that runs them all -----------------------------------------------------------------------------------------


def start_case(args: argparse.Namespace, case: dict[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    """One case in a process of its own; what it found."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(case), "--model", str(model)]
    command += ["--tensor-parallel", str(args.tensor_parallel), "--blocks", str(args.blocks), "--jobs", str(args.jobs)]
    command += ["--extra", args.extra]
    name = "-".join(str(value) for value in case.values())
    outcome, ended = case_outcome(name, command, folder / f"{name}.log", limit=args.limit)
    return {**case, **outcome, "seconds": ended.seconds}


def main() -> int:
    args = arguments()
    if args.case:
        run_case(args)
        return 0
    from models import save_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.log or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        models = {kind: save_model(kind, Path(scratch)) for kind in args.kinds.split(",")}
        return print_cases(cases(args), lambda case: start_case(args, case, models[case["kind"]], folder), args.jobs)


if __name__ == "__main__":
    sys.exit(main())
