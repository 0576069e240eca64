"""LoRA adapters under a real vLLM: each has its own KV, kept and found again under the same name only while it is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import assert_same, difference, text
from models import save_adapter
from vllm.lora.request import LoRARequest


def test_adapters_never_share_kv(engine_of: Callable[..., Any], tmp_path: Path) -> None:
    engine = engine_of(enable_lora=True, max_loras=2, max_lora_rank=8)
    prompt = text(200, seed=51)
    adapters = [
        None,
        *(LoRARequest(name, i, str(save_adapter(tmp_path / name, i))) for i, name in enumerate(("one", "two"), 1)),
    ]
    skip = {"lmkv.skip_load": True, "lmkv.skip_save": True}
    computed = [engine.ask([prompt], lora=adapter, params=skip)[0] for adapter in adapters]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert computed[a].tokens != computed[b].tokens or difference(computed[a], computed[b]) > 1e-2

    first = [engine.ask([prompt], lora=adapter)[0] for adapter in adapters]
    assert [answer.cached for answer in first] == [0, 0, 0]  # none of them takes another's
    again = [engine.ask([prompt], lora=adapter)[0] for adapter in adapters]
    assert [answer.cached for answer in again] == [199] * 3
    for found in (first, again):
        assert_same(found, computed)
    # without a request of the bare model: beside others, vLLM's CPU kernels give it the last adapter
    together = engine.ask([prompt] * 2, lora=adapters[1:])
    assert [answer.cached for answer in together] == [199] * 2
    assert_same(together, computed[1:])


def test_an_adapter_that_was_trained_on_is_another(engine_of: Callable[..., Any], tmp_path: Path) -> None:
    engine = engine_of(enable_lora=True, max_loras=1, max_lora_rank=8)
    prompt = text(150, seed=52)
    folder = save_adapter(tmp_path / "adapter", 1)
    engine.ask([prompt], lora=LoRARequest("mine", 1, str(folder)))
    assert engine.ask([prompt], lora=LoRARequest("mine", 1, str(folder)))[0].cached == 149
    shutil.rmtree(folder)
    save_adapter(folder, 2)
    later = engine.ask([prompt], lora=LoRARequest("mine", 2, str(folder)))[0]  # the same name, loaded anew
    assert later.cached == 0
    moved = LoRARequest("elsewhere", 3, str(shutil.copytree(folder, tmp_path / "copy")))
    assert_same(engine.ask([prompt], lora=moved), [later])
