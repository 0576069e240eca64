"""Prompts with images, and ways to ask for answers that need a tokenizer, on one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import Engine, assert_same, text
from models import IMAGE
from PIL import Image
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

#: Tokens that stand for an image: 16 of it, 3 around them.
WIDTH = 19
UNUSED = {"lmkv.skip_load": True, "lmkv.skip_save": True}


@pytest.fixture(scope="module")
def engine(models: Callable[[str], Path]) -> Iterator[Engine]:
    with Engine(models("images"), skip_tokenizer_init=False, limit_mm_per_prompt={"image": 4}) as opened:
        yield opened


def words(length: int, seed: int) -> list[int]:
    """Random tokens that stand for nothing else."""
    return [token % (IMAGE - 1) for token in text(length, seed)]


def image(seed: int, width: int = 56, height: int = 56) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def seen(before: int, images: list[Image.Image], after: int, seed: int, names: list[str] | None = None) -> dict[str, Any]:
    """A prompt with images between two texts."""
    tokens = [*words(before, seed), *[IMAGE] * len(images), *words(after, seed + 1000)]
    prompt: dict[str, Any] = {"prompt_token_ids": tokens, "multi_modal_data": {"image": images}}
    return prompt | ({"multi_modal_uuids": {"image": names}} if names else {})


def check(engine: Engine, prompts: list[dict[str, Any]], cached: list[int]) -> None:
    """Each prompt is answered as if computed, with so many tokens loaded."""
    wanted = [engine.ask([prompt], params=UNUSED)[0] for prompt in prompts]
    found = engine.one_by_one(prompts)  # type: ignore[arg-type]
    assert_same(found, wanted)
    assert [answer.cached for answer in found] == cached
    engine.check_clean()


def test_the_same_text_with_another_image_is_another(engine: Engine) -> None:
    cat, dog = seen(20, [image(1)], 60, seed=1), seen(20, [image(2)], 60, seed=1)
    computed = [engine.ask([prompt], params=UNUSED)[0] for prompt in (cat, dog)]
    assert computed[0].tokens != computed[1].tokens
    whole = 20 + WIDTH + 60 - 1
    check(engine, [cat, cat, dog, dog, cat], [0, whole, 20, whole, whole])
    together = engine.ask([cat, dog, cat])  # type: ignore[list-item]
    assert_same(together, [computed[0], computed[1], computed[0]])
    assert [answer.cached for answer in together] == [whole] * 3


def test_several_images_are_told_apart_by_their_places(engine: Engine) -> None:
    one, other = image(3), image(4)
    whole = 20 + 2 * WIDTH + 30 - 1
    twice, mixed, turned = (seen(20, images, 30, seed=2) for images in ([one, one], [one, other], [other, one]))
    check(engine, [twice, twice, mixed, mixed, turned, turned], [0, whole, 20 + WIDTH, whole, 20, whole])
    larger = seen(20, [image(5, 112, 84)], 30, seed=2)
    check(engine, [larger, larger], [20, whole - WIDTH])


def test_an_image_behind_a_known_text_is_looked_at(engine: Engine) -> None:
    prompts = [seen(120, [image(seed)], 30, seed=3) for seed in (6, 7)]
    whole = 120 + WIDTH + 30 - 1
    check(engine, prompts * 2, [0, 120, whole, whole])
    ending = [seen(100, [image(seed)], 0, seed=4) for seed in (6, 7)]  # the last token is an image's
    check(engine, ending * 2, [0, 100, 100 + WIDTH - 1, 100 + WIDTH - 1])


def test_names_that_users_give_to_images_count(engine: Engine) -> None:
    prompts = [seen(20, [image(8)], 30, seed=5, names=[name]) for name in ("one", "two")]
    whole = 20 + WIDTH + 30 - 1
    check(engine, [*prompts, *prompts], [0, 20, whole, whole])


def test_samples_beams_and_prescribed_answers(engine: Engine) -> None:
    prompt = {"prompt_token_ids": words(150, seed=6)}

    def samples(**more: Any) -> Any:
        sampling = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=6, ignore_eos=True, **more)
        output = engine.llm.generate([prompt], sampling, use_tqdm=False)[0]
        return [tuple(one.token_ids) for one in output.outputs], output.num_cached_tokens

    wanted, _ = samples(extra_args={"kv_transfer_params": UNUSED})
    assert len(set(wanted)) > 1
    assert samples()[0] == wanted
    assert samples() == (wanted, 149)

    beams = BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True)
    first = engine.llm.beam_search([prompt], beams)[0]
    engine.llm.reset_prefix_cache(reset_connector=True)
    assert [one.tokens for one in engine.llm.beam_search([prompt], beams)[0].sequences] == [
        one.tokens for one in first.sequences
    ]

    choice = SamplingParams(max_tokens=3, temperature=0, structured_outputs=StructuredOutputsParams(choice=["w7 w8", "w9 w1"]))
    prescribed = [engine.llm.generate([prompt], choice, use_tqdm=False)[0] for _ in range(2)]
    assert [one.num_cached_tokens for one in prescribed] == [149, 149]
    assert prescribed[0].outputs[0].token_ids == prescribed[1].outputs[0].token_ids
    assert prescribed[0].outputs[0].text.split()[0] in ("w7", "w9")
    engine.check_clean()
