"""Models that share a name must not share KV, however little they differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import make_model, make_text  # noqa: E402

import lmkv  # noqa: E402
from lmkv.adapters.transformers import KVReuse  # noqa: E402 (what it needs is skipped first)

Opened = Callable[..., KVReuse]


def follows(reuse: KVReuse, ids: torch.Tensor) -> bool:
    """Whether a prefill gives the logits of the model itself."""
    with torch.no_grad():
        wanted = reuse.model(ids).logits[:, -1]
    return bool(torch.allclose(reuse.prefill(ids).logits, wanted, atol=1e-4, rtol=0))


def test_other_weights_under_the_same_name_find_nothing(opened: Opened) -> None:
    ids = make_text(50)
    first = opened(make_model("llama"))
    first.prefill(ids)
    assert first.store.flush(60)
    other = make_model("llama", seed=1)
    reuse = opened(other)
    assert follows(reuse, ids)
    assert reuse.last_use[0].hit_tokens == 0


@pytest.mark.parametrize("edited", ["one token's embedding", "a buffer"])
def test_a_small_change_of_the_model_finds_nothing(edited: str, opened: Opened) -> None:
    """Neither the config nor most of the weights say it."""
    ids = make_text(50)
    first = opened(make_model("llama"))
    first.prefill(ids)
    assert first.store.flush(60)
    other = make_model("llama")
    with torch.no_grad():
        if edited == "a buffer":
            other.model.rotary_emb.inv_freq.mul_(0.5)
        else:
            other.get_input_embeddings().weight[int(ids[0, 7])].neg_()
    reuse = opened(other)
    assert follows(reuse, ids)
    assert reuse.last_use[0].hit_tokens == 0


def test_other_rope_parameters_find_nothing(opened: Opened) -> None:
    ids = make_text(50)
    first = opened(make_model("llama"))
    first.prefill(ids)
    assert first.store.flush(60)
    other = make_model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    reuse = opened(other)
    assert follows(reuse, ids)
    assert reuse.last_use[0].hit_tokens == 0


@pytest.mark.parametrize("own", [True, False], ids=["PeftModel", "transformers"])
def test_adapters_that_are_switched_off_or_scaled_are_others(own: bool, opened: Opened) -> None:
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, settings).eval() if own else model
    if not own:
        model.add_adapter(settings)
        model.eval()
    ids = make_text(40)
    reuse = opened(tuned, lora="a@1")
    reuse.prefill(ids)

    def refused(got: str) -> None:
        with pytest.raises(lmkv.ConfigError, match=rf"\['default'\]; got {got}: make a KVReuse"):
            reuse.prefill(ids)

    tuner = next(module for module in model.modules() if hasattr(module, "lora_A"))
    if own:
        with tuned.disable_adapter():
            refused(r"\[\]")
            plain = opened(tuned)
            assert plain.prefill(ids).hit_tokens == (0,)
            assert follows(plain, ids)
    else:
        model.disable_adapters()
        refused(r"\[\]")
        model.enable_adapters()
    assert reuse.prefill(ids).hit_tokens == (39,)
    tuner.scaling["default"] *= 2
    refused("these with other scales or layers, or merged")
    scaled = opened(tuned, lora="a@1")
    assert scaled.prefill(ids).hit_tokens == (0,)
    assert follows(scaled, ids)
