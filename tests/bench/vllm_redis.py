"""Time to first token of ``vllm serve`` on a CPU with a Redis behind it that dies in the middle; run it in an environment with
vLLM and ``redis``: ``python tests/bench/vllm_redis.py [--fault killed|stalled]``.

Distinct prompts come one at a time: first cold, then all known, of which RAM holds only the last few; then the Redis is killed
(or stopped) between two of them; at last it is started again. One object a line: name, value (median), unit, failed requests,
tokens that were found and asked for, every time; ``ratio`` is to the first pass of the same call.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import servers
import vllm_serve

BREAKER_SECONDS = 10.0
#: How long a tier's answer is believed, and a bit.
BELIEVED = 1.1


def first_token(url: str, model: Path, prompt: list[int]) -> float:
    """Milliseconds until the first token of a streamed answer comes."""
    body = {"model": str(model), "prompt": prompt, "max_tokens": 4, "stream": True, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    begun = time.perf_counter()
    took = 0.0
    with urllib.request.urlopen(request, timeout=120) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                assert "error" not in json.loads(line[6:])
                took = took or time.perf_counter() - begun
    assert took
    return 1e3 * took


def hit_tokens(url: str) -> int:
    """Tokens that the connector was asked to load until now."""
    with urllib.request.urlopen(url + "/metrics", timeout=30) as reply:
        lines = [line.decode() for line in reply if line.startswith(b"lmkv:hit_tokens_total")]
    return round(sum(float(line.rpartition(" ")[2]) for line in lines))


class Load:
    """Prompts, and what their first tokens took."""

    def __init__(self, url: str, model: Path, count: int, tokens: int) -> None:
        self._url, self._model = url, model
        numbers = random.Random(5)
        self.prompts = [[numbers.randrange(1, 4000) for _ in range(tokens)] for _ in range(count)]
        self.cold = 0.0

    def ask(self, name: str, prompts: list[list[int]]) -> None:
        """One pass, told as a line."""
        times, failed = [], 0
        begun, known = time.monotonic(), hit_tokens(self._url)
        for prompt in prompts:
            try:
                times.append(first_token(self._url, self._model, prompt))
            except (OSError, AssertionError):
                failed += 1
        value = statistics.median(times)
        self.cold = self.cold or value
        row = {"name": f"vllm_redis/{name}", "value": round(value, 1), "unit": "ms", "reference": round(self.cold, 1)}
        row |= {"ratio": round(value / self.cold, 3), "failed": failed, "seconds": round(time.monotonic() - begun, 1)}
        row |= {"hit_tokens": hit_tokens(self._url) - known, "tokens": sum(map(len, prompts))}
        print(json.dumps(row | {"all": [round(each) for each in times]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object a line (the only form there is)")
    parser.add_argument("--port", type=int, default=0, help="a free one by default")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--fault", choices=("killed", "stalled"), default="killed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, servers.RedisServer(Path(scratch)) as redis:
        model = Path(scratch) / "model"
        vllm_serve.make_model(model)
        extra = {"lmcache.remote_url": redis.url, "lmkv.ram_capacity": "192MiB", "lmkv.breaker_seconds": BREAKER_SECONDS}
        transfer = {"kv_connector": "LMKVConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
        log = Path(scratch) / "vllm.log"
        with vllm_serve.Server(
            model, args.port or servers.free_ports(1)[0], log, "--kv-transfer-config", json.dumps(transfer)
        ) as server:
            load = Load(server.url, model, args.prompts, args.tokens)
            first_token(server.url, model, [7] * args.tokens)  # what a first request alone has to wait for
            load.ask("first", load.prompts)
            time.sleep(3)  # what waits to be written is written
            load.ask("again", load.prompts)
            half = args.prompts // 2
            load.ask("again_before_fault", load.prompts[:half])
            redis.kill() if args.fault == "killed" else redis.signal(signal.SIGSTOP)
            load.ask(f"again_{args.fault}", load.prompts[half:] + load.prompts)
            redis.start() if args.fault == "killed" else redis.signal(signal.SIGCONT)
            time.sleep(BREAKER_SECONDS + BELIEVED)
            load.ask("after_restart", load.prompts)
            time.sleep(3)
            load.ask("after_restart_again", load.prompts)


if __name__ == "__main__":
    main()
