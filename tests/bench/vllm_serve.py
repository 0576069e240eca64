"""Time to first token of ``vllm serve`` on a CPU with and without LMKV; run it in an environment with vLLM.

A 123M-parameter Qwen3 shape with dummy weights serves ``vllm bench serve --dataset-name prefix_repetition``, once without a
connector and once with LMKV, where the same prompts are sent twice: the second time all of their KV is known. One object a
line: name, value, unit, reference, ratio; the reference is the median without a connector of the same call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": 0,
}
TRANSFER = '{"kv_connector":"LMKVConnector","kv_role":"kv_both"}'


def make_model(folder: Path) -> None:
    """A configuration and a tokenizer that knows the words w0, w1, …, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(int(str(SHAPE["vocab_size"])))}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w0").save_pretrained(folder)


class Server:
    """``vllm serve`` on loopback, ended with the block."""

    def __init__(self, model: Path, port: int, log: Path, *more: str, variables: Mapping[str, str] | None = None) -> None:
        vllm = str(Path(sys.executable).with_name("vllm"))
        command = [vllm, "serve", str(model), "--port", str(port), "--host", "127.0.0.1", "--load-format", "dummy"]
        command += ["--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "4", "--no-enable-prefix-caching"]
        self.url = f"http://127.0.0.1:{port}"
        env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
        env |= variables or {}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "--enforce-eager", *more], stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        self.log = log

    def __enter__(self) -> Server:
        until = time.monotonic() + 300
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(self.url + "/health", timeout=2)
                return self
            time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"expected a server; it did not come up:\n{self.log.read_text()[-3000:]}")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def bench(server: Server, model: Path, folder: Path, prompts: int) -> dict[str, Any]:
    """One run of ``vllm bench serve``; its result."""
    dataset = ["--dataset-name", "prefix_repetition", "--prefix-repetition-prefix-len", "2048"]
    dataset += ["--prefix-repetition-suffix-len", "128", "--prefix-repetition-num-prefixes", "2"]
    dataset += ["--prefix-repetition-output-len", "8", "--num-prompts", str(prompts), "--max-concurrency", "1"]
    return run_bench(server, model, folder, dataset)


def run_bench(server: Server, model: Path, folder: Path, dataset: Sequence[str]) -> dict[str, Any]:
    """``vllm bench serve`` with the options that name its requests; its result."""
    vllm = str(Path(sys.executable).with_name("vllm"))
    command = [vllm, "bench", "serve", "--backend", "vllm", "--base-url", server.url, "--model", str(model), *dataset]
    command += ["--ignore-eos", "--seed", "7", "--save-result", "--save-detailed"]
    command += ["--result-dir", str(folder), "--result-filename", "result.json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=500)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object a line (the only form there is)")
    parser.add_argument("--port", type=int, default=18765)
    parser.add_argument("--prompts", type=int, default=8)
    args = parser.parse_args()

    def say(name: str, result: dict[str, Any], reference: float | None = None) -> float:
        value = float(result["median_ttft_ms"])
        row: dict[str, Any] = {"name": name, "value": round(value, 1), "unit": "ms", "completed": result["completed"]}
        row["all"] = [round(1e3 * seconds, 1) for seconds in result.get("ttfts", ())]
        if reference:
            row |= {"reference": round(reference, 1), "ratio": round(value / reference, 4)}
        print(json.dumps(row), flush=True)
        return value

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / "model"
        make_model(model)
        with Server(model, args.port, folder / "none.log") as server:
            none = say("vllm_serve/none", bench(server, model, folder, args.prompts))
        with Server(model, args.port, folder / "lmkv.log", "--kv-transfer-config", TRANSFER) as server:
            say("vllm_serve/lmkv_first", bench(server, model, folder, args.prompts), none)
            say("vllm_serve/lmkv_again", bench(server, model, folder, args.prompts), none)


if __name__ == "__main__":
    main()
