"""What one engine keeps on a disk is found by another one only if its KV means the same there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import Engine, assert_same, text

from lmkv.adapters.vllm.settings import read_settings, with_model


@pytest.mark.parametrize(
    ("kind", "first", "second", "shared"),
    [
        # vLLM groups the layers in another way: windows first, or all together
        ("hybrid", {}, {"disable_hybrid_kv_cache_manager": True}, True),
        ("longrope", {"max_model_len": 1024}, {"max_model_len": 512}, False),
        ("longrope", {"max_model_len": 512}, {"max_model_len": 512}, True),
    ],
    ids=["layers in other groups", "factors for longer texts", "the same factors"],
)
def test_another_engine_on_the_same_disk(
    kind: str,
    first: dict[str, Any],
    second: dict[str, Any],
    shared: bool,
    engine_of: Callable[..., Engine],
    tmp_path: Path,
) -> None:
    prompts = [text(400, seed=3), text(130, seed=4)]
    disk = {"lmkv.disk_path": str(tmp_path), "lmkv.disk_capacity": "1GiB"}
    engine = engine_of(kind, connector=disk, **first)
    engine.ask(prompts)
    assert engine.store.flush(30)
    engine.close()
    engine = engine_of(kind, connector=disk, **second)
    found = engine.one_by_one(prompts)
    assert [answer.cached for answer in found] == ([399, 129] if shared else [0, 0])
    assert_same(found, engine.computed(prompts))


def name(layers: tuple[tuple[str, ...], ...] = (("a.0", "a.1"),), **settings: Any) -> str:
    """What is named beside the model of an engine with such settings."""
    text = SimpleNamespace(model_type=settings.pop("model_type", "llama"), rope_parameters=settings.pop("rope", None))
    given: dict[str, Any] = {
        "model": "some/model",
        "revision": None,
        "dtype": "float32",
        "hf_overrides": {},
        "max_model_len": 1024,
        "multimodal_config": SimpleNamespace(mm_processor_kwargs=settings.pop("mm_processor_kwargs", None)),
        "override_generation_config": {},
        "try_get_generation_config": dict,
        "hf_config": SimpleNamespace(to_json_string=lambda **_: settings.get("described", "")),
        "hf_text_config": text,
    }
    config = SimpleNamespace(
        model_config=SimpleNamespace(**(given | settings)),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="auto", model_loader_extra_config=settings.get("loader", {})),
    )
    return with_model(read_settings({}, {}).store, config, layers=layers, shared=False)[1]


def test_settings_that_change_the_kv_are_named() -> None:
    override = lambda config: config  # noqa: E731
    told = [
        name(),
        name((("a.1", "a.0"),)),
        name((("a.0",), ("a.1",))),
        name(mm_processor_kwargs={"max_pixels": 100}),
        name(mm_processor_kwargs={"max_pixels": 200}),
        name(loader={"tensorizer_uri": "s3://bucket/weights"}),
        name(hf_overrides=override, described="a"),
        name(hf_overrides=override, described="b"),
        name(model_type="llama4_text"),
        name(model_type="llama4_text", max_model_len=65536),
        name(model_type="llama4_text", override_generation_config={"attn_temperature_tuning": False}),
        name(rope={"full_attention": {"rope_type": "longrope"}}, max_model_len=2048),
        name(rope={"full_attention": {"rope_type": "longrope"}}, max_model_len=4096),
    ]
    assert len(set(told)) == len(told)
    assert name(max_model_len=65536) == told[0]  # it changes nothing of others
