"""What the scripts that time first tokens have in common: shapes, arguments, prompts, rounds, and a process for each mode."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine_processes import mode_results, print_beside_none

__all__ = ["SHAPES", "Bench", "parser", "run_modes", "say"]

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
_BEGUN = time.monotonic()


def say(name: str, value: float, unit: str, **more: object) -> None:
    """One result."""
    print("R " + json.dumps({"name": name, "value": round(value, 4), "unit": unit, **more}), flush=True)


def parser(doc: str | None, modes: Sequence[str], *, tests: str, gib: float) -> argparse.ArgumentParser:
    """Arguments that all these scripts take; ``tests`` and ``gib``: what is run, and how much memory is for KV, by default."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--modes", default="none,lmkv", help=f"out of {', '.join(modes)}")
    made.add_argument("--child", choices=modes, help=argparse.SUPPRESS)
    made.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    made.add_argument("--tests", default=tests)
    made.add_argument("--eager", action="store_true", help="without CUDA graphs")
    made.add_argument("--cpu-gib", type=float, default=gib)
    made.add_argument("--prompts", type=int, default=10)
    made.add_argument("--prompt-tokens", type=int, default=10000)
    made.add_argument("--batched-tokens", type=int, default=16384, help="how many tokens a step may compute")
    made.add_argument("--pause", type=float, default=2.0, help="seconds between rounds")
    made.add_argument("--extra", default="{}", help="more settings of LMKV's modes, JSON")
    made.add_argument("--limit", type=float, default=400, help="seconds a mode may take")
    made.add_argument("--total", type=float, default=86400, help="seconds for all modes; what has no time left is not begun")
    made.add_argument("--log", help="folder for the processes' output")
    return made


class Bench:
    """One engine on a model of dummy weights, and what is asked of it. Each engine's own script says how.

    Args:
        folder: takes the model's ``config.json``.
        repeats: how often all prompts at once are asked again.
    """

    repeats = 1

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.random = random.Random(int.from_bytes(os.urandom(4), "little"))
        self.config = {**_COMMON, **SHAPES[args.shape], "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
        (folder / "config.json").write_text(json.dumps(self.config))

    def ask(self, prompts: list[list[int]]) -> tuple[float, list[Any]]:
        """Milliseconds until all have their first token, and the outputs."""
        raise NotImplementedError

    def first_token(self, output: Any) -> int:
        """The token of an output."""
        raise NotImplementedError

    def found(self, outputs: list[Any]) -> dict[str, object]:
        """The fewest tokens of an output's prompt that were not computed (``cached``), and what else is told of them."""
        raise NotImplementedError

    def between(self) -> None:
        """Let stores end, and the engine forget."""
        raise NotImplementedError

    def name(self, what: str) -> str:
        """Name of a result."""
        return f"{self.args.child}/{what}"

    def prompt(self, tokens: int) -> list[int]:
        """A prompt that nobody has seen."""
        return [self.random.randrange(100, self.config["vocab_size"]) for _ in range(tokens)]

    def new_prompts(self) -> list[list[int]]:
        """As many and as long as the arguments say."""
        return [self.prompt(self.args.prompt_tokens) for _ in range(self.args.prompts)]

    def one_by_one(self, what: str, prompts: list[list[int]]) -> list[int]:
        """Ask each alone; returns the first tokens."""
        times, outputs = [], []
        for prompt in prompts:
            took, found = self.ask([prompt])
            times.append(took)
            outputs.append(found[0])
        all_ms, mean = [round(took, 1) for took in times], round(statistics.fmean(times), 2)
        say(self.name(what), statistics.median(times), "ms", mean=mean, all=all_ms, **self.found(outputs))
        return [self.first_token(output) for output in outputs]

    def warm_up(self) -> None:
        """Compile, allocate, load once."""
        for tokens in (64, min(3000, self.args.prompt_tokens), self.args.prompt_tokens, self.args.prompt_tokens):
            self.ask([self.prompt(tokens)])
        known = self.prompt(self.args.prompt_tokens)
        for _ in range(3):
            self.ask([known])
            self.between()

    def seq(self) -> None:
        """Prompts one by one, cold and twice again."""
        prompts = self.new_prompts()
        first = self.one_by_one("seq/cold", prompts)
        for again in ("seq/again", "seq/again2"):
            self.between()
            tokens = self.one_by_one(again, prompts)
            say(self.name(again + "/same_first_tokens"), sum(a == b for a, b in zip(first, tokens, strict=True)), "prompts")
        self.after_seq(prompts)

    def after_seq(self, prompts: list[list[int]]) -> None:
        """What follows prompts asked one by one."""

    def batch(self) -> None:
        """Prompts all at once, cold and again."""
        prompts = self.new_prompts()
        for number in range(1 + self.repeats):
            took, outputs = self.ask(prompts)
            what = f"batch/again{number if number > 1 else ''}" if number else "batch/cold"
            say(self.name(what), took, "ms", **self.found(outputs))
            self.between()


def run_modes(args: argparse.Namespace, modes: Sequence[str], make: Callable[[argparse.Namespace, Path], Bench]) -> int:
    """Run the mode that this process is for, or each mode in a process of its own; returns the exit status.

    Args:
        modes: all there are.
        make: starts the engine of ``args.child`` on a model in a folder.
    """
    if args.child:
        with tempfile.TemporaryDirectory() as folder:
            bench = make(args, Path(folder))
            bench.warm_up()
            for test in args.tests.split(","):
                getattr(bench, test)()
            say(bench.name("end"), 1, "")
        return 0
    unknown = set(args.modes.split(",")) - set(modes)
    if unknown:
        print(f"expected modes out of {', '.join(modes)}; got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    return print_beside_none(args.modes.split(","), lambda mode: _in_a_process(args, mode))


def _in_a_process(args: argparse.Namespace, mode: str) -> list[dict[str, Any]]:
    limit = min(args.limit, args.total - (time.monotonic() - _BEGUN))
    if limit < 30:
        return [{"name": f"{mode}/process", "value": 0, "unit": "s", "exit": 1, "told": ["not begun: no time was left"]}]
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), "--child", mode, *sys.argv[1:]]
    return mode_results(mode, command, Path(args.log or tempfile.mkdtemp()) / f"{mode}.log", limit)
