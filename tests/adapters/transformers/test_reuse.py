"""Answers with loaded KV are those without it, for several architectures and dtypes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import CHUNK, make_model, make_store_config, make_text  # noqa: E402

import lmkv  # noqa: E402
from lmkv.adapters.transformers import KVReuse, layout_of  # noqa: E402 (what it needs is skipped first)
from lmkv.adapters.transformers.model import cache_argument, generate_cache_argument  # noqa: E402

Opened = Callable[..., KVReuse]
EVERY_MODEL = pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt_neox", "gpt2", "opt"])
NEW = 10


def plain(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": NEW, "do_sample": False, **settings})


def hits(reuse: KVReuse) -> list[int]:
    return [use.hit_tokens for use in reuse.last_use]


def split_logits(model: Any, ids: torch.Tensor, at: int) -> torch.Tensor:
    """Logits of the last position, computed in two steps as a reuse with ``at`` loaded tokens does, but without LMKV."""
    with torch.no_grad():
        cache = transformers.DynamicCache()
        model(ids[:, :at], use_cache=True, **{cache_argument(model): cache})
        return model(ids[:, at:], **{cache_argument(model): cache}).logits[:, -1]


@EVERY_MODEL
def test_float32_answers_and_logits_are_those_without_the_cache(name: str, opened: Opened) -> None:
    model = make_model(name)
    ids = make_text(70)
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
    reuse = opened(model)
    for expected_hit in (0, 69):
        prefill = reuse.prefill(ids)
        assert prefill.hit_tokens == (expected_hit,)
        assert prefill.past_key_values.get_seq_length() == 70
        torch.testing.assert_close(prefill.logits, wanted, atol=1e-4, rtol=0)
    assert torch.equal(reuse.generate(ids, max_new_tokens=NEW, do_sample=False), plain(model, ids))
    other = torch.cat([ids[:, :41], make_text(20, seed=5)], dim=1)
    assert torch.equal(reuse.generate(other, max_new_tokens=NEW, do_sample=False), plain(model, other))
    assert hits(reuse) == [41]  # in the middle of the third chunk


@EVERY_MODEL
def test_bfloat16_kv_comes_back_bit_for_bit(name: str, opened: Opened) -> None:
    model = make_model(name, "bfloat16")
    ids = torch.cat([make_text(55), make_text(15, seed=1)], dim=1)
    reuse = opened(model)
    computed = reuse.prefill(ids[:, :55]).past_key_values
    prefill = reuse.prefill(ids)
    assert prefill.hit_tokens == (55,)
    for mine, theirs in zip(prefill.past_key_values.layers, computed.layers, strict=True):
        assert torch.equal(mine.keys[:, :, :55], theirs.keys)
        assert torch.equal(mine.values[:, :, :55], theirs.values)
    assert torch.equal(prefill.logits, split_logits(model, ids, 55))
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
    torch.testing.assert_close(prefill.logits, wanted, atol=0.05 * wanted.abs().max().item(), rtol=0)


@pytest.mark.parametrize("shared", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 50])
@pytest.mark.parametrize("block", [1, 5, 512])
def test_a_hit_ends_where_the_texts_part(shared: int, block: int, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmkv.adapters.transformers.reuse._BLOCK", block)
    model = make_model("llama")
    first = make_text(60)
    reuse = opened(model)
    reuse.prefill(first)
    second = torch.cat([first[:, :shared], (first[:, shared : shared + 1] + 1) % 200 + 3, make_text(9, seed=3)], dim=1)
    out = reuse.generate(second, max_new_tokens=NEW, do_sample=False)
    assert hits(reuse) == [shared]
    assert torch.equal(out, plain(model, second))
    third = torch.cat([second[:, :-5], make_text(7, seed=4)], dim=1)
    prefill = reuse.prefill(third)
    assert prefill.hit_tokens == (second.shape[1] - 5,)
    with torch.no_grad():
        torch.testing.assert_close(prefill.logits, model(third).logits[:, -1], atol=1e-4, rtol=0)


def test_one_token_is_always_computed(opened: Opened) -> None:
    model = make_model("llama")
    ids = make_text(3 * CHUNK)
    reuse = opened(model)
    reuse.prefill(ids)
    again = reuse.prefill(ids)
    assert again.hit_tokens == (3 * CHUNK - 1,)
    single = make_text(1, seed=9)
    for _ in range(2):
        assert reuse.prefill(single).hit_tokens == (0,)
        assert torch.equal(reuse.generate(single, max_new_tokens=3, do_sample=False), plain(model, single, max_new_tokens=3))


def test_a_new_store_finds_the_disk(opened: Opened) -> None:
    model = make_model("llama")
    ids = make_text(70)
    opened(model).prefill(ids)
    reuse = opened(model)  # the first one is still open: two stores of a process may share a directory
    reuse.close()
    first = opened(model)
    first.close()
    later = opened(model)
    out = later.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, plain(model, ids))


def test_what_a_call_did(opened: Opened) -> None:
    model = make_model("llama")
    ids = make_text(70)
    reuse = opened(model)
    reuse.prefill(ids)
    use = reuse.last_use[0]
    assert (use.tokens, use.hit_tokens, use.new_tokens, dict(use.tiers)) == (70, 0, 70, {})
    assert reuse.store.flush()
    reuse.close()
    reuse = opened(model)
    prefill = reuse.prefill(torch.cat([ids, make_text(5, seed=2)], dim=1))
    use = prefill.rows[0]
    assert (use.tokens, use.hit_tokens, dict(use.tiers)) == (75, 70, {"disk": 70})
    assert use.new_tokens == 75 - 64  # the last chunk, which grew
    assert reuse.last_use == prefill.rows


def test_where_ram_keeps_nothing_hits_come_from_the_disk(opened: Opened) -> None:
    model = make_model("llama")
    texts = torch.cat([make_text(70), torch.cat([make_text(70)[:, :50], make_text(20, seed=3)], dim=1)])
    reuse = opened(model, ram_cache=False)
    reuse.prefill(texts)
    assert reuse.store.flush()
    for _ in range(2):
        out = reuse.generate(texts, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, plain(model, texts))
        assert [(use.hit_tokens, use.new_tokens, dict(use.tiers)) for use in reuse.last_use] == [(69, 0, {"disk": 69})] * 2
        assert reuse.store.stats().tiers[0].chunks == 0


# Batches


def padded(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A left-padded batch of different texts; under the padding lie arbitrary tokens."""
    width = max(lengths)
    ids = torch.cat([make_text(width, seed=seed + i) for i in range(len(lengths))])
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    return ids, mask


@EVERY_MODEL
def test_padded_batch(name: str, opened: Opened) -> None:
    model = make_model(name)
    ids, mask = padded([70, 33, 5, 1])
    wanted = plain(model, ids, mask)
    reuse = opened(model)
    assert torch.equal(reuse.generate(ids, mask, max_new_tokens=NEW, do_sample=False), wanted)
    assert hits(reuse) == [0, 0, 0, 0]
    assert torch.equal(reuse.generate(ids, mask, max_new_tokens=NEW, do_sample=False), wanted)
    assert hits(reuse) == [69, 32, 4, 0]
    prefill = reuse.prefill(ids, mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = {} if name == "opt" else {"position_ids": positions}  # OPT reads them from the mask
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, **arguments).logits[:, -1]
    torch.testing.assert_close(prefill.logits, logits, atol=1e-4, rtol=0)


@EVERY_MODEL
def test_rows_are_kept_without_their_padding(name: str, opened: Opened) -> None:
    model = make_model(name)
    ids, mask = padded([70, 33])
    reuse = opened(model)
    reuse.prefill(ids, mask)
    alone = ids[1:, 70 - 33 :]
    assert torch.equal(reuse.generate(alone, max_new_tokens=NEW, do_sample=False), plain(model, alone))
    assert hits(reuse) == [32]


@EVERY_MODEL
@pytest.mark.parametrize("known", [0, 1, 2])
@pytest.mark.parametrize("block", [7, 512])
def test_rows_that_lag_behind_are_caught_up(
    name: str, known: int, block: int, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmkv.adapters.transformers.reuse._BLOCK", block)
    model = make_model(name)
    ids, mask = padded([70, 52, 20])
    reuse = opened(model)
    reuse.prefill(ids[known : known + 1, int((mask[known] == 0).sum()) :])
    out = reuse.generate(ids, mask, max_new_tokens=NEW, do_sample=False)
    assert [hit > 0 for hit in hits(reuse)] == [row == known for row in range(3)]
    assert torch.equal(out, plain(model, ids, mask))
    assert [use.new_tokens for use in reuse.last_use] == [0 if row == known else [70, 52, 20][row] for row in range(3)]
    reuse.generate(ids, mask, max_new_tokens=1, do_sample=False)
    assert hits(reuse) == [69, 51, 19]


def test_unpadded_batch_with_one_text_twice(opened: Opened) -> None:
    model = make_model("llama")
    ids = torch.cat([make_text(40), make_text(40, seed=1), make_text(40)])
    reuse = opened(model)
    for _ in range(2):
        assert torch.equal(reuse.generate(ids, max_new_tokens=NEW, do_sample=False), plain(model, ids))
    assert hits(reuse) == [39, 39, 39]


def test_padding_is_inferred_as_generate_does(opened: Opened) -> None:
    model = make_model("llama", eos_token_id=2)
    ids, mask = padded([30, 17])
    ids = ids * mask  # the pad token is 0
    reuse = opened(model)
    for _ in range(2):
        out = reuse.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, model.generate(ids, max_new_tokens=NEW, do_sample=False))
    assert [use.tokens for use in reuse.last_use] == [30, 17]


# Generated tokens


@EVERY_MODEL
def test_the_next_turn_hits_what_was_generated(name: str, opened: Opened) -> None:
    model = make_model(name)
    reuse = opened(model)
    talk = make_text(37)
    expected = 0
    for turn in range(3):
        out = reuse.generate(talk, max_new_tokens=12, do_sample=False, keep_generated=True)
        assert hits(reuse) == [expected]
        assert torch.equal(out, plain(model, talk, max_new_tokens=12))
        expected = out.shape[1] - 1  # the last token was sampled, not read
        talk = torch.cat([out, make_text(8, seed=10 + turn)], dim=1)


def test_generated_tokens_are_not_kept_unasked(opened: Opened) -> None:
    model = make_model("llama")
    reuse = opened(model)
    ids = make_text(37)
    out = reuse.generate(ids, max_new_tokens=12, do_sample=False)
    reuse.prefill(out)
    assert hits(reuse) == [37]


def test_rows_that_end_early_are_kept_up_to_their_end(opened: Opened) -> None:
    model = make_model("llama")
    ids, mask = padded([40, 25])
    free = plain(model, ids, mask, max_new_tokens=16)
    end = int(free[0, 45])  # what the first row says sixth ends it from now on
    assert end not in free[0, 40:45]
    model.generation_config.eos_token_id = [end]
    reuse = opened(model)
    out = reuse.generate(ids, mask, max_new_tokens=16, do_sample=False, keep_generated=True)
    assert torch.equal(out, plain(model, ids, mask, max_new_tokens=16))
    assert (out[0, 46:] == 0).all()
    first = torch.cat([out[:1, :46], make_text(6, seed=4)], dim=1)
    assert torch.equal(reuse.generate(first, max_new_tokens=4, do_sample=False), plain(model, first, max_new_tokens=4))
    assert hits(reuse) == [46]
    second = torch.cat([out[1:, 15:], make_text(6, seed=4)], dim=1)
    assert torch.equal(reuse.generate(second, max_new_tokens=4, do_sample=False), plain(model, second, max_new_tokens=4))
    ended = (out[1, 40:] == end).nonzero()
    assert hits(reuse) == [25 + int(ended[0]) + 1 if len(ended) else out.shape[1] - 15 - 1]


# Ways to generate


def test_sampling(opened: Opened) -> None:
    model = make_model("llama")
    ids, mask = padded([40, 25])
    reuse = opened(model)
    reuse.prefill(ids, mask)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": 3, "max_new_tokens": NEW}
    torch.manual_seed(3)
    wanted = plain(model, ids, mask, **settings)
    torch.manual_seed(3)
    out = reuse.generate(ids, mask, keep_generated=True, **settings)
    assert torch.equal(out, wanted)
    for row in range(6):
        talk = torch.cat([out[row : row + 1, 15 if row > 2 else 0 :], make_text(3)], dim=1)
        assert reuse.prefill(talk).hit_tokens[0] == talk.shape[1] - 4


@pytest.mark.parametrize("returned", [1, 2])
@pytest.mark.parametrize("warm", [False, True])
def test_beam_search(returned: int, warm: bool, opened: Opened) -> None:
    model = make_model("llama", eos_token_id=2)
    ids, mask = padded([40, 25])
    reuse = opened(model)
    if warm:
        reuse.prefill(ids, mask)
    settings = {"num_beams": 3, "num_return_sequences": returned, "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(reuse.generate(ids, mask, **settings), plain(model, ids, mask, **settings))
    assert hits(reuse) == ([39, 24] if warm else [0, 0])
    prefill = reuse.prefill(ids, mask)  # the prompts were kept before the beams went their ways
    assert prefill.hit_tokens == (39, 24)
    with torch.no_grad():
        alone = model(ids[1:, 15:]).logits[:, -1]
    torch.testing.assert_close(prefill.logits[1:], alone, atol=1e-4, rtol=0)


def test_what_generate_is_given_reaches_it(opened: Opened) -> None:
    model = make_model("llama")
    ids = make_text(40)
    free = plain(model, ids)[0, 40:].tolist()
    reuse = opened(model)
    reuse.prefill(ids)

    class Ban(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, free[0]] = -torch.inf
            return scores

    class Collect(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    streamer = Collect()
    settings = transformers.GenerationConfig(
        max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
    )
    out = reuse.generate(ids, generation_config=settings, logits_processor=[Ban()], streamer=streamer)
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, logits_processor=[Ban()])
    assert hits(reuse) == [39]
    assert torch.equal(out.sequences, wanted.sequences)
    assert free[0] not in out.sequences[0, 40:]
    assert streamer.seen == [*out.sequences[0].tolist(), -1]
    torch.testing.assert_close(out.logits, wanted.logits, atol=1e-4, rtol=0)
    assert out.past_key_values.get_seq_length() == 43


def test_a_prefill_can_be_continued_by_hand_and_copied(opened: Opened) -> None:
    model = make_model("gpt_neox")
    ids, mask = padded([40, 25])
    wanted = plain(model, ids, mask, max_new_tokens=6)
    reuse = opened(model)
    reuse.prefill(ids, mask)
    prefill = reuse.prefill(ids, mask)
    for cache in (copy.deepcopy(prefill.past_key_values), prefill.past_key_values):
        tokens, seen, logits = ids, mask, prefill.logits
        for _ in range(6):
            step = logits.argmax(-1, keepdim=True)
            tokens, seen = torch.cat([tokens, step], dim=1), torch.cat([seen, torch.ones_like(step)], dim=1)
            with torch.no_grad():
                positions = seen.sum(1, keepdim=True) - 1
                logits = model(step, attention_mask=seen, position_ids=positions, **{cache_argument(model): cache}).logits[
                    :, -1
                ]
        assert torch.equal(tokens, wanted)


# What transformers calls a cache

NAMES = {"cache", "past_key_values"}


def renamed(function: Callable[..., Any], name: str) -> inspect.Signature:
    """The signature of a function in a transformers that calls a cache so."""
    before = inspect.signature(function)
    return before.replace(parameters=[p.replace(name=name) if p.name in NAMES else p for p in before.parameters.values()])


def strict(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function as it would be there: it takes a cache by this name only."""
    theirs = generate_cache_argument()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        assert not (NAMES - {name}) & set(kwargs)
        return function(*args, **{theirs if key == name else key: value for key, value in kwargs.items()})

    call.__signature__ = renamed(function, name)  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_model_gets_the_cache_by_the_name_that_it_gives_it(name: str, opened: Opened) -> None:
    model = make_model("llama")
    ids = make_text(40)
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
    model.forward = strict(model.forward, name)
    reuse = opened(model)
    for expected_hit in (0, 39):
        prefill = reuse.prefill(ids)
        assert prefill.hit_tokens == (expected_hit,)
        torch.testing.assert_close(prefill.logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_generate_gets_the_cache_by_the_name_that_transformers_gives_it(
    name: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    ids = make_text(40)
    wanted = plain(model, ids)
    reuse = opened(model)
    model.generate = strict(model.generate, name)
    prepare = transformers.GenerationMixin.prepare_inputs_for_generation
    monkeypatch.setattr(prepare, "__signature__", renamed(prepare, name), raising=False)
    for expected_hit in (0, 39):
        assert torch.equal(reuse.generate(ids, max_new_tokens=NEW, do_sample=False), wanted)
        assert hits(reuse) == [expected_hit]


def test_transformers_warns_of_nothing(opened: Opened) -> None:
    reuse = opened(make_model("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            reuse.prefill(make_text(30))
            reuse.generate(make_text(40), max_new_tokens=NEW, do_sample=False)


# What must not be mixed up


def test_tenants_do_not_share(opened: Opened) -> None:
    model = make_model("llama")
    ids = make_text(50)
    reuse = opened(model)
    tenant = reuse.namespace.replace(salt="tenant-7")
    reuse.prefill(ids, namespace=tenant)
    assert reuse.prefill(ids).hit_tokens == (0,)
    assert reuse.prefill(ids, namespace=tenant).hit_tokens == (49,)
    out = reuse.generate(ids, namespace=tenant, max_new_tokens=NEW, do_sample=False, keep_generated=True)
    assert torch.equal(out, plain(model, ids))
    assert reuse.prefill(out, namespace=tenant).hit_tokens == (59,)
    assert reuse.prefill(out).hit_tokens == (50,)


def test_corrupt_records_are_misses(tmp_path: Path) -> None:
    model = make_model("llama")
    ids = make_text(5 * CHUNK + 3)
    config = make_store_config(tmp_path / "kv")
    with KVReuse.open(model, config) as reuse:
        keys = reuse.prefill(ids).past_key_values.layers[1].keys
    third = keys[0, 0, 2 * CHUNK].numpy().tobytes()  # some KV of the third chunk as it lies in the file
    damaged = 0
    for file in (tmp_path / "kv").glob("segment-*.kv"):
        data = bytearray(file.read_bytes())
        place = data.find(third)
        while place >= 0:
            data[place + 5] ^= 1
            damaged += 1
            place = data.find(third)
        file.write_bytes(data)
    assert damaged
    events: list[str] = []
    with KVReuse.open(model, config, on_event=lambda event: events.append(event.kind)) as reuse:
        out = reuse.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert hits(reuse) == [2 * CHUNK]
        assert "corrupt" in events
        assert torch.equal(out, plain(model, ids))
        assert reuse.prefill(ids).hit_tokens == (5 * CHUNK + 2,)  # stored anew
    with KVReuse.open(model, config) as reuse:
        assert reuse.prefill(ids).hit_tokens == (5 * CHUNK + 2,)


def test_texts_larger_than_the_ram(opened: Opened) -> None:
    model = make_model("llama")
    chunk = layout_of(model, CHUNK).chunk_bytes
    reuse = opened(model, ram_capacity=str(4 * chunk), disk_capacity="0")
    ids = make_text(10 * CHUNK)
    for _ in range(2):
        assert torch.equal(reuse.generate(ids, max_new_tokens=NEW, do_sample=False), plain(model, ids))
    assert 0 < hits(reuse)[0] < 10 * CHUNK


# Stores


def test_open_fills_in_what_the_model_says(tmp_path: Path) -> None:
    model = make_model("llama")
    model.config.name_or_path = "someone/tiny"
    model.config._commit_hash = "abc"
    config = dataclasses.replace(make_store_config(tmp_path), model="", chunk_size=None)
    with KVReuse.open(model, config) as reuse:
        space = reuse.store.namespace
        assert (space.model, space.revision) == ("someone/tiny", "abc")
        assert '"rope_theta"' in space.rope
        assert reuse.store.layout == layout_of(model) == lmkv.KVLayout.dense(layers=3, heads=2, head_size=16, dtype="float32")
    with pytest.raises(lmkv.StoreClosedError):
        reuse.prefill(make_text(5))


def test_a_given_store_stays_open(tmp_path: Path) -> None:
    model = make_model("qwen3", "bfloat16")
    layout = layout_of(model, CHUNK)
    assert layout == lmkv.KVLayout.dense(layers=3, heads=2, head_size=24, dtype="bfloat16", chunk_tokens=CHUNK)
    with lmkv.Store(make_store_config(tmp_path), layout) as store:
        with KVReuse(model, store) as reuse:
            reuse.prefill(make_text(20))
        assert store.lookup(make_text(20)[0], namespace=reuse.namespace).hit_tokens == 20
        assert store.lookup(make_text(20)[0]).hit_tokens == 0  # keys of this model alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_on_a_gpu(dtype: str, opened: Opened) -> None:
    model = make_model("llama", dtype).to("cuda")
    ids, mask = (part.to("cuda") for part in padded([70, 33, 20]))
    reuse = opened(model)
    computed = reuse.prefill(ids[:1]).past_key_values
    prefill = reuse.prefill(ids, mask)
    assert prefill.hit_tokens == (69, 0, 0)
    for mine, theirs in zip(prefill.past_key_values.layers, computed.layers, strict=True):
        assert mine.keys.is_cuda
        assert torch.equal(mine.keys[:1, :, :69], theirs.keys[:, :, :69])
        assert torch.equal(mine.values[:1, :, :69], theirs.values[:, :, :69])
    out = reuse.generate(ids, mask, max_new_tokens=NEW, do_sample=False)
    assert hits(reuse) == [69, 32, 19]
    assert out.is_cuda
    if dtype == "float32":
        assert torch.equal(out, plain(model, ids, mask))
    with pytest.raises(lmkv.ArgumentError, match=r"expected input_ids on cuda"):
        reuse.prefill(ids.cpu())
