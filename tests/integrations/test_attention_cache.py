"""Growing caches that write in place hold what transformers' own hold, in every operation that generation uses."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

import torchwrap as tw
from tests import torchvision_ops
from tests.integrations import tiny
from torchwrap.integrations.transformers.cache import ArenaLayer, ArenaSlidingLayer, into_arenas

torchvision_ops.ensure()

from transformers import DynamicCache, StaticCache  # noqa: E402
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache  # noqa: E402

OPTIONS: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def model_of(name: str) -> Any:
    return tiny.case(name).build()


def ids(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(5))


def states(count: int, batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, count, 4, generator=generator), torch.randn(batch, 2, count, 4, generator=generator)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [None, 2, 9])
def test_random_operations_leave_what_the_plain_layer_has(window: int | None, seed: int) -> None:
    chance, batch = random.Random(seed), 2
    plain = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    ours = (ArenaLayer if window is None else ArenaSlidingLayer).taking_over(copy.deepcopy(plain))
    for step in range(50):
        what = chance.choice(["token", "token", "token", "prompt", "crop", "reorder", "repeat", "select", "grad", "reset", "offload"])
        length = plain.get_seq_length()
        if what in ("token", "prompt", "grad") or not length:
            given = states(1 if what == "token" else chance.randint(1, 12), batch, step)
            with torch.set_grad_enabled(what == "grad"):
                got, expected = ours.update(*given), plain.update(*given)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        elif what == "crop" and (window is None or length < window):
            count = -chance.randint(0, length - 1)
            ours.crop(count), plain.crop(count)
        elif what == "reorder":
            rows = torch.tensor([chance.randrange(batch) for _ in range(batch)])
            with torch.no_grad():
                ours.reorder_cache(rows), plain.reorder_cache(rows)
        elif what == "repeat" and batch < 4:
            ours.batch_repeat_interleave(2), plain.batch_repeat_interleave(2)
            batch *= 2
        elif what == "select":
            rows = torch.tensor([chance.randrange(batch) for _ in range(2)])
            ours.batch_select_indices(rows), plain.batch_select_indices(rows)
            batch = 2
        elif what == "reset":
            ours.reset(), plain.reset()
        elif what == "offload":
            for layer in (ours, plain):
                layer.offload()
                layer.prefetch()
        assert ours.get_seq_length() == plain.get_seq_length()
        assert ours.get_mask_sizes(3) == plain.get_mask_sizes(3)
        if plain.get_seq_length():
            assert torch.equal(ours.keys, plain.keys)
            assert torch.equal(ours.values, plain.values)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM-tied", "T5ForConditionalGeneration-tied"])
def test_generation_returns_a_cache_of_arenas_that_goes_on(name: str) -> None:
    model, twin = tw.fast_attention(model_of(name)), model_of(name)
    ours, theirs = (each.generate(ids(), **OPTIONS, return_dict_in_generate=True) for each in (model, twin))
    assert torch.equal(ours.sequences, theirs.sequences)
    cache = ours.past_key_values
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    assert {type(layer) for layer in cache.layers} <= {ArenaLayer, ArenaSlidingLayer}
    for layer in cache.layers:
        assert layer.arena.growths <= 2


def test_a_cache_goes_on_after_undo_and_under_a_model_that_was_never_wrapped() -> None:
    model, twin = tw.fast_attention(model_of("LlamaForCausalLM")), model_of("LlamaForCausalLM")
    with torch.no_grad():
        cache = model(ids()).past_key_values
        cache = model(ids(length=1), past_key_values=cache).past_key_values
        tw.unwrap(model)
        got = [each(ids(length=2), past_key_values=copy.deepcopy(cache)).logits for each in (model, twin)]
        plain = twin(torch.cat([ids(), ids(length=1), ids(length=2)], 1)).logits[:, -2:]
    assert torch.equal(*got)
    torch.testing.assert_close(got[0], plain, rtol=1e-4, atol=1e-5)


def test_no_token_costs_a_copy_of_the_others() -> None:
    model = tw.fast_attention(model_of("LlamaForCausalLM"))
    with torch.no_grad():
        cache = model(ids(1, 40)).past_key_values
        cache = model(ids(1, 1), past_key_values=cache).past_key_values
        places = [(layer.keys.data_ptr(), layer.arena.copied_bytes) for layer in cache.layers]
        for _ in range(20):
            model(ids(1, 1), past_key_values=cache)
    assert [(layer.keys.data_ptr(), layer.arena.copied_bytes) for layer in cache.layers] == places
    assert cache.get_seq_length() == 61


def test_the_users_own_tensors_in_a_cache_are_never_written() -> None:
    model = tw.fast_attention(model_of("LlamaForCausalLM"))
    with torch.no_grad():
        prefix = model_of("LlamaForCausalLM")(ids()).past_key_values
        held = [(layer.keys, layer.keys.clone()) for layer in prefix.layers]
        for _ in range(3):
            model(ids(length=2), past_key_values=copy.copy(prefix))
            model(ids(length=2), past_key_values=prefix)
    assert all(torch.equal(now, before) for now, before in held)


def test_settings_can_leave_caches_alone() -> None:
    model = tw.fast_attention(model_of("LlamaForCausalLM"), cache="keep")
    result = model.generate(ids(), **OPTIONS, return_dict_in_generate=True)
    assert {type(layer) for layer in result.past_key_values.layers} == {DynamicLayer}


def test_other_caches_are_left_as_they_are() -> None:
    model = model_of("LlamaForCausalLM")
    static = StaticCache(config=model.config, max_cache_len=32)
    offloaded = DynamicCache(config=model.config, offloading=True)
    for cache in (static, offloaded, None, "nothing"):
        before = [type(layer) for layer in getattr(cache, "layers", ())]
        into_arenas(cache)
        assert [type(layer) for layer in getattr(cache, "layers", ())] == before


CACHES: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static", "disable_compile": True},
    "quantised": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "quantised-quanto": {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4},
    },
    "beams": {"num_beams": 3},
    "beams-static": {"num_beams": 2, "cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("how", CACHES)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_other_caches_keep_working(name: str, how: str) -> None:
    if how.startswith("quantised") and name.startswith("Mistral"):
        pytest.skip("transformers quantises caches of full attention only")
    if how.endswith("quanto"):
        pytest.importorskip("optimum.quanto")
    model, twin = tw.fast_attention(model_of(name)), model_of(name)
    assert torch.equal(model.generate(ids(), **OPTIONS, **CACHES[how]), twin.generate(ids(), **OPTIONS, **CACHES[how]))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_assisted_decoding_takes_tokens_back(name: str) -> None:
    expected = model_of(name).generate(ids(1), **OPTIONS)
    wrapped, plain = tw.fast_attention(model_of(name)), model_of("LlamaForCausalLM")
    assert torch.equal(wrapped.generate(ids(1), **OPTIONS, assistant_model=plain), expected)
    assert torch.equal(model_of(name).generate(ids(1), **OPTIONS, assistant_model=wrapped), expected)
    assert torch.equal(wrapped.generate(ids(1), **OPTIONS, prompt_lookup_num_tokens=3), expected)


def test_training_through_a_cache_gives_the_gradients_of_the_plain_one() -> None:
    gradients = []
    for model in (tw.fast_attention(model_of("LlamaForCausalLM")), model_of("LlamaForCausalLM")):
        with torch.no_grad():
            cache = model(ids()).past_key_values
        loss = 0.0
        for _ in range(3):
            loss = loss + model(ids(length=2), past_key_values=cache).logits.square().mean()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
