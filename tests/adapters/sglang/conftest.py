"""Tests on a real SGLang, in an environment of their own (``python tests/run.py sglang``); elsewhere they are not collected."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[2] / "support"
_sglang = importlib.util.find_spec("sglang")
if _sglang is None:
    collect_ignore_glob = ["test_real_*.py"]
else:
    if importlib.util.find_spec("sglang.srt.mem_cache.storage.lmcache.lmc_radix_cache") is None:
        # the stage runs them under the version that they are for
        collect_ignore_glob = ["test_real_radix*.py"]
    # SGLang imports all the models it knows, which takes longer than all the rest of its start
    _models = Path(_sglang.submodule_search_locations[0]) / "srt" / "models"
    _others = sorted(path.stem for path in _models.glob("*.py") if path.stem not in ("llama", "__init__"))
    os.environ.update(SGLANG_DISABLED_MODEL_ARCHS=",".join(_others))
    os.environ.update(SGLANG_USE_CPU_ENGINE="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    sys.path.insert(0, str(SUPPORT))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers, float32, whose answers depend on all of the text."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=None, pad_token_id=0, dtype="float32",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(folder)
    return folder
