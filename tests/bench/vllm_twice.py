"""The same chats twice through ``vllm serve`` with LMKV: how much sooner the first token comes the second time.

Run it in an environment with vLLM. A 123M-parameter Qwen3 shape with dummy weights, served on the CPU; a prompt's tokens then
cost some milliseconds each to compute, and their KV (32 KiB) well below one to read. Requests are in ShareGPT's format, for
``vllm bench serve --dataset-name sharegpt``: passages of Python's own documentation, of lengths spread as the first turns of
ShareGPT are, about 200 tokens on average. Nothing is downloaded.

By default chunks are kept on a disk only, in the words of LMCache's users: ``LMCACHE_LOCAL_DISK``, ``LMCACHE_LOCAL_CPU=False``,
``use_odirect``. ``--config FILE`` serves with any other settings, LMKV's keys or LMCache's (``remote_url: redis://…``, say).

One object a line: name, value, unit, reference, ratio. The first pass is the reference of the second. With ``--expect 0.38``
the exit status is 1 unless both the mean and the median time to first token fell by at least so much.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import NormalDist
from typing import Any

from vllm_serve import SHAPE, TRANSFER, Server, run_bench

#: Median and spread of the logarithm of the prompts' lengths in tokens; vLLM leaves out what is longer than 1,024.
_MEDIAN, _SPREAD, _LONGEST = 130, 1.1, 1000


def documentation() -> str:
    """What Python says about itself."""
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items()))


def make_model(folder: Path) -> Any:
    """The shape's configuration and a tokenizer learnt from the texts; returns the tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator([documentation()], vocab_size=int(str(SHAPE["vocab_size"])), special_tokens=["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, eos_token="<end>", unk_token="<end>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_chats(path: Path, tokenizer: Any, count: int, seed: int) -> None:
    """So many chats of one turn each, in ShareGPT's format."""
    rng = random.Random(seed)
    ids = tokenizer.encode(documentation())
    lengths = NormalDist(math.log(_MEDIAN), _SPREAD)
    spread = [lengths.inv_cdf((i + 0.5) / count) for i in range(count)]  # all of the spread, however few they are
    rng.shuffle(spread)
    chats = []
    for exponent in spread:
        length = min(_LONGEST, max(8, int(math.exp(exponent))))
        begin = rng.randrange(len(ids) - length)
        turns = [tokenizer.decode(ids[begin : begin + length]), "It depends on what you would like to do with it next."]
        chats.append(
            {"conversations": [{"from": who, "value": text} for who, text in zip(("human", "gpt"), turns, strict=True)]}
        )
    path.write_text(json.dumps(chats))


def counters(server: Server) -> dict[str, float]:
    """The connector's counters."""
    found: dict[str, float] = {}
    for line in urllib.request.urlopen(server.url + "/metrics", timeout=10).read().decode().splitlines():
        if line.startswith("lmkv:") and "_total" in line:
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0].removeprefix("lmkv:").removesuffix("_total")
            found[name] = found.get(name, 0.0) + float(value)
    return found


def one_pass(server: Server, folder: Path, chats: str, args: argparse.Namespace) -> dict[str, Any]:
    """Send all chats; the result of ``vllm bench serve`` with the share of prompt tokens that was found."""
    more = ["--dataset-name", "sharegpt", "--dataset-path", str(folder / chats), "--sharegpt-output-len", str(args.output_len)]
    more += ["--num-prompts", str(args.warm_up if chats == "warm-up.json" else args.prompts), "--disable-shuffle"]
    more += ["--request-rate", str(args.rate)] if args.rate else ["--max-concurrency", "1"]
    before = counters(server)
    result = run_bench(server, folder / "model", folder, more)
    time.sleep(args.settle)  # what waits to be written is written
    after = counters(server)
    found = {name: after[name] - before.get(name, 0.0) for name in ("lookup_tokens", "hit_tokens")}
    result["found"] = round(found["hit_tokens"] / max(1.0, found["lookup_tokens"]), 3)
    return result


def settings(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Variables that say where chunks are kept."""
    if args.config is not None:
        return {"LMKV_CONFIG_FILE": str(args.config.resolve())}
    names = {"CHUNK_SIZE": "256", "LOCAL_DISK": f"file://{folder}/kv/", "MAX_LOCAL_DISK_SIZE": "8", "LOCAL_CPU": "False"}
    names |= {"EXTRA_CONFIG": "{use_odirect: True}", "USE_EXPERIMENTAL": "True"}
    return {f"LMCACHE_{name}": value for name, value in names.items()}


def main() -> int:
    """Print a line a pass and measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a YAML file of settings, LMKV's keys or LMCache's")
    parser.add_argument("--expect", type=float, help="share by which the time has to fall, such as 0.38")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--warm-up", type=int, default=6, help="other prompts that are sent before")
    parser.add_argument("--output-len", type=int, default=4, help="tokens of an answer")
    parser.add_argument("--rate", type=float, help="requests a second; one at a time by default")
    parser.add_argument("--settle", type=float, default=2.0, help="seconds between passes")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--directory", default=None, help="where to write; a temporary directory by default")
    parser.add_argument("--port", type=int, default=18766)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        folder = Path(scratch)
        tokenizer = make_model(folder / "model")
        make_chats(folder / "chats.json", tokenizer, args.prompts, args.seed)
        make_chats(folder / "warm-up.json", tokenizer, args.warm_up, args.seed + 1)
        variables = settings(args, folder)
        for name in list(os.environ):
            if name.startswith(("LMCACHE_", "LMKV_")):
                del os.environ[name]
        transfer = ["--kv-transfer-config", TRANSFER]
        with Server(folder / "model", args.port, folder / "serve.log", *transfer, variables=variables) as server:
            one_pass(server, folder, "warm-up.json", args)
            first, second = (one_pass(server, folder, "chats.json", args) for _ in range(2))
    worst = 1.0
    for measure in ("mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms"):
        for number, result in (("first", first), ("second", second)):
            row = {"name": f"vllm_twice/{number}_{measure[:-8]}_ttft", "value": round(result[measure], 1), "unit": "ms"}
            row |= {"completed": result["completed"], "found": result["found"], "input_tokens": result["total_input_tokens"]}
            if number == "second":
                ratio = result[measure] / first[measure]
                row |= {"reference": round(first[measure], 1), "ratio": round(ratio, 4)}
                worst = worst if measure.startswith("p99") else min(worst, 1 - ratio)
            print(json.dumps(row), flush=True)
    if args.expect is not None and worst < args.expect:
        print(f"expected the time to first token to fall by {args.expect:.0%}; it fell by {worst:.1%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
