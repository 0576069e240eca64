"""Settings that need processes of their own: several workers, and what vLLM can't set up again in one process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent

DRAFTS = """
from engines import CHUNK, Engine, text
engine = Engine(
    MODEL,
    speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    connector={"lmkv.save_decode_cache": True},
)
prompts = [text(100, seed=61), [1, 2, 3, 4, 5, 6, 7, 8] * 20]
wanted = engine.computed(prompts)
first = engine.one_by_one(prompts, tokens=40)
assert [answer.tokens[:6] for answer in first] == [answer.tokens for answer in wanted]
turns = [[*prompt, *answer.tokens, *text(5, seed=62)] for prompt, answer in zip(prompts, first)]
wanted = engine.computed(turns)
found = engine.one_by_one(turns)  # finds what was generated, too, as far as it fills chunks
assert [answer.tokens for answer in found] == [answer.tokens for answer in wanted]
cached = [answer.cached for answer in found]
assert cached == [100, (160 + 39) // CHUNK * CHUNK], cached  # 139 tokens fill no further chunk
engine.check_clean()
"""

TENSOR_PARALLEL = """
from engines import Engine, assert_same, text
if __name__ == "__main__":
    prompts = [text(length, seed=length) for length in (40, 150, 333)]
    engine = Engine(MODEL, tensor_parallel_size=2, max_num_batched_tokens=128)
    wanted = engine.one_by_one(prompts)
    found = engine.one_by_one(prompts)
    assert_same(found, wanted)
    assert [answer.cached for answer in found] == [39, 149, 332], found
    print("all well", flush=True)
"""

LATENT = """
from engines import Engine, assert_same, text
if __name__ == "__main__":
    prompts = [text(length, seed=length) for length in (40, 150, 333)]
    engine = Engine(MODEL, tensor_parallel_size=2)
    wanted = engine.one_by_one(prompts)
    found = engine.one_by_one(prompts)
    assert_same(found, wanted)
    assert [answer.cached for answer in found] == [39, 149, 332], found
    store = engine.store
    assert len(engine.half._shards) == 2
    assert store.layout.token_bytes == 3 * 576 * 4, "each rank holds all latents: one copy is kept"
    assert store.stats().stored_tokens == 40 + 150 + 333
    assert len(engine.half._pool.stores) == 1
    print("all well", flush=True)
"""

PIPELINE = """
from engines import Engine, assert_same, text
if __name__ == "__main__":
    prompts = [text(length, seed=length) for length in (40, 150, 333)]
    engine = Engine(MODEL, pipeline_parallel_size=2, max_num_batched_tokens=128, worker_extension_cls="stages.Extension")
    wanted = engine.one_by_one(prompts)
    found = engine.one_by_one(prompts)
    assert_same(found, wanted)
    assert_same(engine.ask(prompts), wanted)
    assert [answer.cached for answer in found] == [39, 149, 332], found
    assert sorted(engine.half._shards) == [(0, 0), (1, 0)]
    assert engine.store.layout.token_bytes == 4 * 2 * 2 * 32 * 4, "all stages' layers in one chunk"
    print("all well", flush=True)
"""

#: A later stage's buffers are made as vLLM warms up, which it leaves out for an eager engine with a given KV space on a CPU.
STAGES = """
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

CPUWorker._should_warm_up_model = lambda worker: True
CPUModelRunner.warming_up_model = lambda runner: runner.profile_run()


class Extension:
    pass
"""


def run(code: str, model: Path, tmp_path: Path, **environment: str) -> str:
    """Run a script beside the tests' modules; what it leaves behind is ended."""
    script = tmp_path / "script.py"
    script.write_text(code.replace("MODEL", repr(str(model))))
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONPATH": str(HERE), **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(600)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(errors="replace")


def test_drafts_that_are_rejected(models: Callable[[str], Path], tmp_path: Path) -> None:
    said = run(DRAFTS + "print('all well', flush=True)", models("llama"), tmp_path)
    assert "all well" in said, said[-3000:]


def test_two_tensor_parallel_workers_map_one_pool(models: Callable[[str], Path], tmp_path: Path) -> None:
    ending = "    import os\n    os._exit(0)\n"  # vLLM's own ending of its workers takes its time
    said = run(TENSOR_PARALLEL + ending, models("llama"), tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert "all well" in said, said[-3000:]


def test_latents_of_two_workers_are_kept_once(models: Callable[[str], Path], tmp_path: Path) -> None:
    ending = "    import os\n    os._exit(0)\n"
    said = run(LATENT + ending, models("mla"), tmp_path)
    assert "all well" in said, said[-3000:]


def test_two_stages_fill_parts_of_one_chunk(models: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "stages.py").write_text(STAGES)
    ending = "    import os\n    os._exit(0)\n"
    said = run(PIPELINE + ending, models("hybrid"), tmp_path)
    assert "all well" in said, said[-3000:]
