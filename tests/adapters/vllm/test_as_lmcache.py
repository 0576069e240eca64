"""A program written for LMCache under vLLM, unchanged, by ``lmkv run --as-lmcache``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """
import os
os.environ["LMCACHE_CHUNK_SIZE"] = "48"
os.environ["LMCACHE_LOCAL_CPU"] = "True"
os.environ["LMCACHE_MAX_LOCAL_CPU_SIZE"] = "0.1"
import lmcache.c_ops
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.integration.vllm.utils import ENGINE_NAME
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

if __name__ == "__main__":
    llm = LLM(
        model=MODEL, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=4, block_size=32,
        enable_prefix_caching=False, skip_tokenizer_init=True,
        kv_transfer_config=KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both"),
    )
    sampling = SamplingParams(temperature=0, max_tokens=6, detokenize=False)
    prompt = {"prompt_token_ids": [(7 * i) % 90 + 3 for i in range(200)]}
    first, second = (llm.generate([prompt], sampling)[0] for _ in range(2))
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    print("extra", llm.llm_engine.vllm_config.kv_transfer_config.kv_connector_extra_config)
    print("cached", first.num_cached_tokens, second.num_cached_tokens, flush=True)
    LMCacheEngineBuilder.destroy(ENGINE_NAME)
"""

#: Two ways to ask for LMCache: its connector by name, and vLLM's own flags (a flag of the command line is an argument here).
BY_NAME = 'kv_transfer_config=KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both"),'
BY_FLAGS = 'kv_offloading_backend="lmcache", kv_offloading_size=0.1, disable_hybrid_kv_cache_manager=True,'


@pytest.mark.parametrize("asked", [BY_NAME, BY_FLAGS])
def test_a_program_for_lmcache_runs_unchanged(asked: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    text = PROGRAM.replace("MODEL", repr(str(models("llama")))).replace(BY_NAME, asked)
    if asked == BY_FLAGS:
        text = text.replace('os.environ["LMCACHE_MAX_LOCAL_CPU_SIZE"] = "0.1"', "")
    script.write_text(text)
    lmkv = [sys.executable, "-c", "import sys; from lmkv.cli import main; sys.exit(main())"]
    done = subprocess.run(
        [*lmkv, "run", "--as-lmcache", "--", sys.executable, str(script)],
        env={**os.environ}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert "cached 0 199" in done.stdout, (done.stdout + done.stderr)[-3000:]
    assert ("extra {'lmkv.ram_capacity': 107374182}" in done.stdout) == (asked == BY_FLAGS)
