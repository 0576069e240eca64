"""Loaded KV against computed KV under SGLang on whatever device there is: ``python tests/gpu/sglang_correct.py``.

Each case (way in, page size, CUDA graphs or none, overlap schedule or none, loads by layers or not) is an engine in a process
of its own, on a small saved model with random weights whose outputs react to the KV of every position. Ways in: ``radix`` is
``--enable-lmcache`` of SGLang 0.5.17, ``layer_first`` and ``page_first`` are HiCache with those host pools and LMKV as its
storage. Prompts are computed (cold), read from SGLang's own tree (local), twice, and, once that is flushed, from LMKV (loaded),
then from the tree again, flushed and loaded again. The same is asked of generated tokens, the last of which are computed while
their request ends. Then single positions are corrupted in the slots, which must be seen. Last, more known prompts than SGLang
has room for come at once, again and again, and end at different times, so that pages are given from one to the next while steps
run. A case with a restart starts a second engine on the first one's disk directory. One JSON object a line: the case, what was
found, ``ok``. Exit status 1 if a case failed.

Bytes decide (radix). Before each flush the pool, at the slots where SGLang's tree has a text, is compared with what LMKV keeps
of it, position by position. Without a load in between they are equal. After a load they are equal at every position loaded;
behind it they may differ (``anew``), because those tokens were computed once more, in batches of another shape, and LMKV keeps
what it had. Answers must differ by no more than the engine's noise, which two equal requests show, where the same work is done
on the same bits. That is not so for all steps of local and loaded. SGLang takes from a tree at most all tokens of a prompt but
one, in whole pages; it computes the others, and once their prefill is done it has the request go on with the tree's slots
where the tree has these tokens, too. So a request whose whole text is in the tree reads, from its second step on, KV that
another request computed for the tokens behind the hit; one that was loaded reads its own. Where ``tail_differs`` says that
these bytes differ, only the first step must agree within the noise, and the others as cold and loaded must: in greedy tokens,
and in log-probabilities within a tolerance. (A CPU's sums depend on where a tensor begins in memory: it is given a little
noise.)
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

from engine_processes import case_outcome, print_cases
from sglang_environment import few_models, with_plugins

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "adapters" / "vllm"))

#: Largest difference of log-probabilities between computed and loaded: the last step has another shape and order of sums.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
#: The same where the same work is done on the same bits, at least; more if the engine differs from itself by more.
NOISE = {"cpu": 1e-5, "cuda": 0.0}
LENGTHS = (129, 257, 1025, 2000, 3001)
HOSTED = ("layer_first", "page_first")
BEGUN = time.monotonic()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--doors", default="radix,layer_first,page_first")
    parser.add_argument("--pages", default="1,16,64")
    parser.add_argument("--graphs", default="off,on")
    parser.add_argument("--overlaps", default="off,on")
    parser.add_argument("--layers", default="off,on", help="radix: whether forward passes wait for loads layer by layer")
    parser.add_argument("--kind", default="qwen3", help="llama or qwen3")
    parser.add_argument("--all", action="store_true", help="every combination instead of a choice that covers each value")
    parser.add_argument("--tokens", type=int, default=16384, help="of SGLang's KV memory")
    parser.add_argument("--short", action="store_true", help="few and short prompts")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--plant", default="", choices=("", "byte", "stale", "load"), help="an error that must be found")
    parser.add_argument("--limit", type=float, default=240, help="seconds a case may take")
    parser.add_argument("--total", type=float, default=86400, help="seconds for all cases; what has no time left is not begun")
    parser.add_argument("--log", help="folder for the processes' output")
    return parser.parse_args()


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases of a call."""
    named = ("page", "overlap", "graph", "layers")
    found: list[dict[str, Any]] = []
    for door in args.doors.split(","):
        pages = [page for page in args.pages.split(",") if door not in HOSTED or page != "1"] or ["1"]
        ways = list(itertools.product(args.graphs.split(","), args.layers.split(",") if door not in HOSTED else ["off"]))
        basic = list(itertools.product(pages, args.overlaps.split(",")))
        # each page size with each schedule, the others in turn, and what SGLang does by default
        mine = [(*one, *ways[(k + k // 2 + (door in HOSTED)) % len(ways)]) for k, one in enumerate(basic)]
        mine = mine[-2:] if door in HOSTED else [*mine, (*basic[0][:1], *basic[-1][1:], *ways[-1])]
        if args.all:
            mine = [(*one, *way) for one in basic for way in ways]
        found += [
            {"door": door, **dict(zip(named, values, strict=True)), "restart": values[:2] == basic[-1]}
            for values in dict.fromkeys(mine)
        ]
    return found


# -- in the process of a case --------------------------------------------------------------------------------------------------


def settings_of(case: dict[str, Any], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Arguments of the engine."""
    store = {"ram_capacity": "1GiB", "ram_extent": "256MiB", "disk_path": str(folder / "disk"), "disk_capacity": "4GiB"}
    settings: dict[str, Any] = {
        "model_path": args.model,
        "dtype": "float32" if args.device == "cpu" else "bfloat16",
        "device": args.device,
        "attention_backend": "torch_native" if args.device == "cpu" else "triton",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_custom_all_reduce": True,
        "skip_tokenizer_init": True,
        "page_size": int(case["page"]),
        "context_length": 4096,
        "max_running_requests": 8,
        "max_total_tokens": args.tokens,
        "chunked_prefill_size": 2048,
        "mem_fraction_static": 0.1 if args.device == "cpu" else 0.5,  # an upper bound; the tokens decide
        "disable_overlap_schedule": case["overlap"] == "off",
        "disable_cuda_graph": case["graph"] == "off",
        "random_seed": 0,
        "port": 31000 + 1000 * args.number,
        "log_level": "info",
    }
    if case["graph"] == "on":
        settings |= {"cuda_graph_bs_decode": [1, 2, 4, 8], "cuda_graph_bs_prefill": [4, 16, 64, 256]}
    if case["door"] == "radix":
        os.environ.update(LMKV_SGLANG="1", LMCACHE_USE_LAYERWISE=str(case["layers"] == "on"))
        os.environ.update({f"LMKV_{name.upper()}": value for name, value in store.items()})
        return settings | {"enable_lmcache": True}
    extra = {"backend_name": "lmkv", "module_path": "lmkv.adapters.sglang.hicache", "class_name": "LMKVHiCacheStorage"}
    return settings | {
        "enable_hierarchical_cache": True,
        "hicache_ratio": 2.0,
        "hicache_mem_layout": case["door"],
        "hicache_io_backend": "kernel" if args.device == "cuda" else "direct",
        "hicache_write_policy": "write_through",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": json.dumps({**extra, "interface_v1": 1, "prefetch_threshold": 16, **store}),
    }


class Case:
    """One engine."""

    def __init__(self, case: dict[str, Any], args: argparse.Namespace, folder: Path) -> None:
        self.settings = settings_of(case, args, folder)
        self.probe = Path(os.environ["PROBE_FILE"])
        self.hosted = case["door"] in HOSTED
        self.start()
        page = int(case["page"])
        numbers = self.random = random.Random(7)
        lengths = LENGTHS[:3] if args.short else LENGTHS
        # one token behind whole pages: SGLang's own tree and LMKV then leave the same single token to compute
        self.aligned = [[numbers.randrange(512) for _ in range(length // page * page + 1)] for length in lengths]
        self.odd = [[numbers.randrange(512) for _ in range(length + 7)] for length in lengths]
        many, longest = (6, 600) if args.short else (24, 3000)
        self.many = [[numbers.randrange(512) for _ in range(numbers.randrange(200, longest))] for _ in range(many)]
        self.tolerance = TOLERANCE[self.settings["dtype"]]
        self.noise = NOISE[args.device]

    def start(self) -> None:
        """A new engine."""
        import sglang

        self.engine = sglang.Engine(**self.settings)

    def ask(self, prompts: list[list[int]], *, together: bool = False, tokens: list[int] | None = None) -> list[Any]:
        """For each prompt its greedy tokens, the likeliest tokens' log-probabilities at each step, and its cached tokens."""
        wanted = tokens or [6] * len(prompts)
        groups = [list(range(len(prompts)))] if together else [[number] for number in range(len(prompts))]
        found: list[Any] = []
        for group in groups:
            outputs = self.engine.generate(
                input_ids=[prompts[number] for number in group],
                sampling_params=[{"max_new_tokens": wanted[number], "temperature": 0, "ignore_eos": True} for number in group],
                return_logprob=True,
                top_logprobs_num=5,
            )
            found += map(self.answer, outputs)
        return found

    @staticmethod
    def answer(output: dict[str, Any]) -> Any:
        told = output["meta_info"]
        steps = [{token: value for value, token, *_ in step} for step in told["output_top_logprobs"]]
        details = told.get("cached_tokens_details") or {}
        beyond = (details.get("host") or 0) + (details.get("storage") or 0)
        return list(output["output_ids"]), steps, told["cached_tokens"], beyond

    def flush(self) -> None:
        """Empty SGLang's own tree (and host memory)."""
        deadline = time.monotonic() + 60
        while not self.engine.flush_cache().success:  # refused while a request or a backup is not quite finished
            if time.monotonic() > deadline:
                raise RuntimeError("expected SGLang's cache to be flushed; it refuses")
            time.sleep(0.1)

    def look(self, prompts: list[list[int]], answers: list[Any]) -> list[dict[str, Any]]:
        """Flush, and what the tree had and LMKV keeps just before of prompts with their answers; empty behind HiCache."""
        if self.hosted:
            self.flush()
            return []
        texts, found = Path(f"{self.probe}.texts"), Path(f"{self.probe}.found")
        found.unlink(missing_ok=True)
        # another file until it is whole
        part = texts.with_suffix(".writing")
        part.write_text(json.dumps([prompt + answer[0] for prompt, answer in zip(prompts, answers, strict=True)]))
        part.rename(texts)
        self.flush()
        return json.loads(found.read_text())

    def apart(self, a: list[Any], b: list[Any]) -> float:
        """Largest difference of log-probabilities up to where greedy tokens part, infinite if they part at more than a tie."""
        worst = 0.0
        for (tokens_a, steps_a, *_), (tokens_b, steps_b, *_) in zip(a, b, strict=True):
            for token_a, token_b, one, other in zip(tokens_a, tokens_b, steps_a, steps_b, strict=False):
                worst = max(worst, *(abs(one[token] - other[token]) for token in one.keys() & other.keys()), 0.0)
                if token_a != token_b:
                    gap = one[token_a] - one.get(token_b, float("-inf"))
                    worst = worst if gap <= 2 * self.tolerance else float("inf")
                    break
        return worst

    def first_steps(self, a: list[Any], b: list[Any]) -> float:
        """As :meth:`apart`, of the first step alone."""
        return self.apart(*([(tokens[:1], steps[:1]) for tokens, steps, *_ in answers] for answers in (a, b)))

    def reread(self, prompts: list[list[int]]) -> tuple[dict[str, Any], list[Any], list[Any]]:
        """Texts that the tree has are asked for from it, loaded, asked for from it again and loaded again.

        Returns:
            What was seen, the tree's answers and those from loaded KV.
        """
        local, local2 = self.ask(prompts), self.ask(prompts)
        bytes_local = self.look(prompts, local)
        loaded, again = self.ask(prompts), self.ask(prompts)
        bytes_loaded = self.look(prompts, loaded)
        loaded2 = self.ask(prompts)
        bytes_loaded2 = self.look(prompts, loaded2)
        noise = {"local": self.apart(local, local2), "loaded": self.apart(loaded, loaded2)}
        self.noise = max(self.noise, *noise.values())
        same = [number for number, (one, other) in enumerate(zip(local, loaded, strict=True)) if one[2] == other[2]]
        ours, theirs = ([answers[number] for number in same] for answers in (local, loaded))
        found: dict[str, Any] = {"noise": noise, "same_work": len(same)}
        found["first_step"] = self.first_steps(ours, theirs)
        found["local_and_loaded"] = self.apart(ours, theirs)
        found["loaded_and_again"] = self.apart(loaded, again)
        exact = same  # texts all of whose steps are the same work
        if not self.hosted:
            found["kv_local"] = self.bytes_of(bytes_local, [0] * len(prompts))
            found["kv_loaded"] = self.bytes_of(bytes_loaded, [answer[2] for answer in loaded], loads=True)
            found["kv_loaded2"] = self.bytes_of(bytes_loaded2, [answer[2] for answer in loaded2], loads=True)
            found |= self.tails(prompts, bytes_local, bytes_loaded, local, loaded)
            exact = [number for number in same if not found["tail_differs"][number]]
        found["exact"] = self.apart([local[number] for number in exact], [loaded[number] for number in exact])
        kv = [found[name]["right"] for name in ("kv_local", "kv_loaded", "kv_loaded2") if name in found]
        found["right"] = (
            len(same) > 0
            and all(kv)
            and not any(found.get("hit_differs", []))
            and self.noise <= self.tolerance
            and found["first_step"] <= self.noise
            and found["exact"] <= self.noise
            and found["local_and_loaded"] <= self.tolerance
            and found["loaded_and_again"] <= self.noise
        )
        return found, local, loaded

    @staticmethod
    def tails(prompts: Any, a: list[Any], b: list[Any], local: list[Any], loaded: list[Any]) -> dict[str, Any]:
        """Where the tree had other bytes for local than for loaded: within the hit (never right), in the prompt behind it."""
        hit, tail = [], []
        for prompt, one, other, answer, reply in zip(prompts, a, b, local, loaded, strict=True):
            both = zip(one["digests"], other["digests"], strict=False)
            apart = [at for at, (x, y) in enumerate(both) if x != y and at < len(prompt)]
            cached = min(answer[2], reply[2])
            hit.append([at for at in apart if at < cached])
            tail.append([at for at in apart if at >= cached])
        return {"hit_differs": hit, "tail_differs": tail}

    @staticmethod
    def bytes_of(texts: list[dict[str, Any]], cached: list[int], *, loads: bool = False) -> dict[str, Any]:
        """Whether what the tree has of texts and what LMKV keeps are the same bytes.

        Args:
            cached: tokens that were loaded, where texts were ``loads``; what lies behind them was computed anew.
        """
        wrong = [[at for at in text["differ"] if not loads or at < n] for text, n in zip(texts, cached, strict=True)]
        anew = [[at for at in text["differ"] if loads and at >= n] for text, n in zip(texts, cached, strict=True)]
        found: dict[str, Any] = {"tree": [text["tree"] for text in texts], "kept": [text["kept"] for text in texts]}
        found |= {"kv_differs": wrong, "anew": anew, "same_slots": all(text["same_slots"] for text in texts)}
        whole = all(text["kept"] >= text["tree"] > 0 for text in texts)
        if loads:
            found["loaded"] = [text["loaded"] for text in texts]
            whole = whole and all([0, n] in text["loaded"] for text, n in zip(texts, cached, strict=True))
        found["right"] = whole and not any(wrong) and found["same_slots"]
        return found

    def run(self, restart: bool) -> dict[str, Any]:
        """All comparisons."""
        found: dict[str, Any] = {}
        cold = self.ask(self.aligned)
        found["aligned"], local, loaded = self.reread(self.aligned)
        found["cached"] = {"cold": [c[2] for c in cold], "local": [c[2] for c in local], "loaded": [c[2:] for c in loaded]}
        found["local_and_loaded"] = found["aligned"]["local_and_loaded"]
        found["cold_and_loaded"] = self.apart(cold, loaded)
        found["cold_and_local"] = self.apart(cold, local)
        odd_cold = self.ask(self.odd, together=True)
        kept = self.look(self.odd, odd_cold)
        odd_loaded = self.ask(self.odd, together=True)
        found["odd_cold_and_loaded"] = self.apart(odd_cold, odd_loaded)
        found["odd_cached"] = [c[2] for c in odd_loaded]
        reread = self.look(self.odd, odd_loaded)
        found["odd_kv"] = [self.bytes_of(kept, [0] * len(kept))] if kept else []
        found["odd_kv"] += [self.bytes_of(reread, found["odd_cached"], loads=True)] if reread else []
        found["generated"] = self.generated()
        found["corruption_seen"] = "not tried" if self.hosted else self.corruption()
        found |= self.churn()
        limit = max(self.tolerance, 2 * found["cold_and_local"])
        page = self.settings["page_size"]
        full = all(c[3] >= (len(p) - 1) // page * page for p, c in zip(self.aligned, loaded, strict=True))
        found["full_hits"] = full
        good = [
            full,
            found["aligned"]["right"],
            all(one["right"] for one in found["odd_kv"]),
            found["cold_and_loaded"] <= limit,
            found["odd_cold_and_loaded"] <= limit,
            found["generated"]["right"],
            found["corruption_seen"] in ("all", "not tried"),
            found["churn"] <= limit,
            not found["churn_kv_differs"],
        ]
        if restart:
            time.sleep(3)  # SGLang kills its processes when it ends; what is kept is written behind
            self.engine.shutdown()
            self.start()
            again = self.ask(self.aligned)
            found["restart_cached"] = [c[2:] for c in again]
            found["restart"] = self.apart(loaded, again)
            good += [found["restart"] <= limit, sum(c[3] for c in again) > 0.9 * sum(c[3] for c in loaded)]
        found["ok"] = all(good)
        return found

    def generated(self) -> dict[str, Any]:
        """Whether generated tokens' KV is kept as it is: a request's last token is computed while the request ends.

        Asked for is one token more, so that the last one generated is among what is loaded.
        """
        self.flush()
        lengths = [9 + 8 * number for number in range(len(self.odd))]
        others = [[*prompt[:190], 100 + number] for number, prompt in enumerate(self.odd)]
        # what was kept while they ended one after the other, before later requests keep these tokens again
        ended = self.look(others, self.ask(others, together=True, tokens=lengths))
        prompts = [[*prompt[:190], number] for number, prompt in enumerate(self.odd)]
        answers = self.ask(prompts, together=True, tokens=lengths)
        longer = [[*prompt, *answer[0], number] for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))]
        self.ask(longer)  # the tree has all of them now, and each request finds as much
        found, local, loaded = self.reread(longer)
        found["cached"] = [(len(text), a[2], b[2]) for text, a, b in zip(longer, local, loaded, strict=True)]
        page = self.settings["page_size"]  # generated tokens are among what was loaded
        beyond = all(b[3] > len(p) // page * page for p, b in zip(prompts[-2:], loaded[-2:], strict=True))
        found["right"] = found["right"] and beyond
        if ended:
            found["kv_ended"] = self.bytes_of(ended, [0] * len(ended))
            found["right"] = found["right"] and found["kv_ended"]["right"]
        return found

    def churn(self) -> dict[str, Any]:
        """How far answers are from computed ones while pages change hands all the time; share of tokens that was loaded.

        Positions that a request read are never other bytes than LMKV's: those in the tree at the end of a round are compared.
        """
        computed = []
        for prompt in self.many:
            self.flush()
            computed += self.ask([prompt])
        self.flush()
        worst, cached, asked, seen, differ = 0.0, 0, 0, 0, []
        for _ in range(4):
            order = self.random.sample(range(len(self.many)), len(self.many))
            tokens = [self.random.randrange(1, 40) for _ in order]
            prompts = [self.many[i] for i in order]
            found = self.ask(prompts, together=True, tokens=tokens)
            worst = max(worst, self.apart([computed[i] for i in order], found))
            cached += sum(answer[2] for answer in found)
            asked += sum(map(len, self.many))
            for number, text, answer in zip(order, self.look(prompts, found), found, strict=False):
                seen += text["tree"]
                differ += [(number, at) for at in text["differ"] if at < answer[2]]
        shares = {"churn_cached": round(cached / asked, 4), "churn_compared": seen}
        return {"churn": worst, **shares, "churn_kv_differs": differ[:20]}

    def corruption(self) -> str:
        """Whether a change of single positions in the slots is seen."""
        prompt = self.aligned[1]
        self.flush()
        right = self.ask([prompt])
        missed = []
        seen = Path(f"{self.probe}.seen")
        for position in (0, 3, 40, len(prompt) // 2, len(prompt) - 2):
            self.flush()
            self.probe.write_text(str(position))
            wrong = self.ask([prompt])
            self.probe.write_text("")
            if not seen.exists():
                return "the probe was not run"
            seen.unlink()
            if wrong[0][0] == right[0][0] and self.apart(right, wrong) <= self.noise:
                missed.append(position)
        self.flush()
        if self.apart(right, self.ask([prompt])) > self.noise:
            return "mending failed"
        return f"not at {missed}" if missed else "all"


def run_case(args: argparse.Namespace) -> None:
    """Run one case in this process."""
    case = json.loads(args.case)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.device == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        import torch

        if args.device == "cpu":
            torch.set_num_threads(1)
        begun = time.time()
        one = Case(case, args, Path(folder))
        found = {"start_s": round(time.time() - begun, 1), **one.run(case["restart"])}
        print("R " + json.dumps(found), flush=True)


# -- in the process that runs them all -----------------------------------------------------------------------------------------


def start_case(args: argparse.Namespace, number: int, case: dict[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    """One case in a process of its own; what it found."""
    limit = min(args.limit, args.total - (time.monotonic() - BEGUN))
    if limit < 10:
        return {**case, "ok": False, "error": "not begun: no time was left"}
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(case), "--model", str(model)]
    command += ["--number", str(number), "--device", args.device, "--tokens", str(args.tokens)]
    command += ["--short"] * args.short
    name = "-".join(str(value) for value in case.values())
    log, probe = folder / f"{name}.log", folder / f"{name}.probe"
    probe.write_text("")
    site = model.parent / "site" / case["door"]
    plugins = with_plugins(site, cpu=args.device == "cpu", hosted=case["door"] in HOSTED)
    environ = {**os.environ, **few_models(), **plugins, "PROBE_FILE": str(probe), "PROBE_PLANT": args.plant}
    outcome, ended = case_outcome(name, command, log, limit=limit, environ=environ)
    lines = ended.lines
    active = any("LMKV: active" in line for line in lines)
    troubles = sorted({line[line.index("LMKV: ") :][:200] for line in lines if "LMKV: " in line and "LMKV: active" not in line})
    ok = bool(outcome["ok"]) and active
    return {**case, **outcome, "active": active, "told": troubles, "ok": ok, "seconds": ended.seconds}


def main() -> int:
    args = arguments()
    if args.case:
        run_case(args)
        return 0
    from models import save_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.log or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        model = save_model(args.kind, Path(scratch), head_dim=64)  # which SGLang's kernels are made for
        every = list(enumerate(cases(args)))
        return print_cases(every, lambda one: start_case(args, one[0], one[1], model, folder), args.jobs)


if __name__ == "__main__":
    sys.exit(main())
