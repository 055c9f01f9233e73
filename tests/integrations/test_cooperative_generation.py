"""`generate` of a model wrapped with cache="cooperative": its tokens, its cache, what the caller chose, and what is refused beforehand."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import torchwrap as tw
from tests import torchvision_ops
from tests.integrations import attending, tiny
from tests.integrations.test_cooperative_cache import RATES
from torchwrap.attention.cooperative.machine import OneMemory
from torchwrap.attention.cooperative.tensors import TieredTensor

torchvision_ops.ensure()

from transformers import DynamicCache, StaticCache  # noqa: E402  # transformers needs the above

from torchwrap.integrations.transformers import cooperative  # noqa: E402
from torchwrap.integrations.transformers.cooperative import CooperativeCache, CooperativeLayer  # noqa: E402

OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
HALF = {"cache": "cooperative", "kv_host": 0.5, "kv_recent": 4, "stream_chunk_mib": 1 / 1024}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The machine is not measured; how often it would have been."""
    asked: list[Any] = []

    def rates(*args: Any, **options: Any) -> Any:
        asked.append(args[1])
        return RATES

    monkeypatch.setattr(cooperative, "measure_rates", rates)
    return asked


def built(name: str = "LlamaForCausalLM") -> Any:
    return tiny.case(name).build()


def prompt(batch: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(5))
    seen = torch.ones_like(ids)
    seen[0, :3] = 0
    return {"input_ids": ids, "attention_mask": seen}


@pytest.fixture
def no_gathering() -> Iterator[None]:
    before = TieredTensor.materialisations
    yield
    assert TieredTensor.materialisations == before


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "answers": {"num_beams": 2, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "dynamic by name": {"cache_implementation": "dynamic"},
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_plain_model_and_the_cache_is_returned(way: str, no_gathering: None) -> None:
    given = prompt(1 if way == "prompt lookup" else 2)
    expected = built().generate(**given, **OPTIONS, **WAYS[way])
    model = tw.fast_attention(built(), **HALF)
    found = model.generate(**given, **OPTIONS, **WAYS[way], return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    cache = found.past_key_values
    assert isinstance(cache, CooperativeCache) and cache.store.host_bytes > 0
    assert cache.plan.tokens == 12 + 10 - 1 and cache.plan.shape.batch == len(given["input_ids"]) * WAYS[way].get("num_beams", 1)
    assert cache.get_seq_length() >= 12 + 9


def test_a_returned_cache_goes_on_beyond_its_plan(no_gathering: None) -> None:
    model, twin = tw.fast_attention(built(), **HALF), built()
    first = model.generate(**prompt(), **OPTIONS, return_dict_in_generate=True)
    mask = torch.cat([prompt()["attention_mask"], torch.ones(2, 10, dtype=torch.long)], 1)
    options = {**OPTIONS, "max_new_tokens": 20}
    again = model.generate(first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **options)
    assert torch.equal(again, twin.generate(**prompt(), **{**OPTIONS, "max_new_tokens": 30}))


def test_long_prompts_are_processed_in_chunks(monkeypatch: pytest.MonkeyPatch, no_gathering: None) -> None:
    model, lengths = tw.fast_attention(built(), **HALF, prefill_chunk=5), []
    expected = built().generate(**prompt(), **OPTIONS)
    append = CooperativeLayer.update
    monkeypatch.setattr(CooperativeLayer, "update", lambda self, k, *rest: lengths.append(k.shape[2]) or append(self, k, *rest))
    assert torch.equal(model.generate(**prompt(), **OPTIONS), expected)
    layers = model.config.num_hidden_layers
    assert lengths[::layers] == [5, 5, 2] + [1] * 9
    lengths.clear()
    model.generate(**prompt(), **OPTIONS, prefill_chunk_size=6)  # the caller's own
    assert lengths[::layers] == [6, 6] + [1] * 9


def test_pictures_are_not_cut_into_chunks(no_gathering: None) -> None:
    given = {key: value for key, value in attending.prompt("llava").items()}
    expected = attending.built("llava").generate(**given, **OPTIONS)
    model = tw.fast_attention(attending.built("llava"), **HALF, prefill_chunk=4)
    found = model.generate(**given, **OPTIONS, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected) and found.past_key_values.store.host_bytes > 0


def test_the_machine_is_measured_once_for_each_batch(measured: list[Any]) -> None:
    model = tw.fast_attention(built(), **HALF)
    for batch in (2, 2, 1, 2):
        model.generate(**prompt(batch), **OPTIONS)
    assert [shape.batch for shape in measured] == [2, 1]


CHOSEN: dict[str, Any] = {
    "a cache": lambda model: {"past_key_values": DynamicCache(config=model.config)},
    "a kind of cache": lambda model: {"cache_implementation": "static", "disable_compile": True},
    "no cache": lambda model: {"use_cache": False},
}


@pytest.mark.parametrize("what", CHOSEN)
def test_what_the_caller_chose_stays(what: str) -> None:
    model = tw.fast_attention(built(), **HALF)
    found = model.generate(**prompt(), **OPTIONS, **CHOSEN[what](model), return_dict_in_generate=True)
    assert type(found.past_key_values) in (DynamicCache, StaticCache, type(None))
    assert torch.equal(found.sequences, built().generate(**prompt(), **OPTIONS))


def test_a_direct_call_has_a_cache_that_grows_in_place() -> None:
    model = tw.fast_attention(built(), **HALF)
    with torch.no_grad():
        cache = model(**prompt()).past_key_values
        model(prompt()["input_ids"][:, :1], past_key_values=cache)
    assert [type(layer).__name__ for layer in cache.layers] == ["ArenaLayer"] * len(cache.layers)


def test_disabled_and_unwrapped_models_make_their_own(no_gathering: None) -> None:
    model = built()
    before = set(model.__dict__)
    tw.fast_attention(model, **HALF)
    with tw.disabled(model, "fast_attention"):
        found = model.generate(**prompt(), **OPTIONS, return_dict_in_generate=True)
    assert type(found.past_key_values) is DynamicCache
    tw.unwrap(model)
    assert set(model.__dict__) == before
    assert type(model.generate(**prompt(), **OPTIONS, return_dict_in_generate=True).past_key_values) is DynamicCache


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_make_caches_for_themselves(how: str, no_gathering: None) -> None:
    model = tw.fast_attention(built(), **HALF)
    model.generate(**prompt(), **OPTIONS)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    tw.unwrap(model)
    found = twin.generate(**prompt(), **OPTIONS, return_dict_in_generate=True)
    assert isinstance(found.past_key_values, CooperativeCache)
    assert torch.equal(found.sequences, model.generate(**prompt(), **OPTIONS))


def test_an_assistant_keeps_the_cache_it_can_roll_back(no_gathering: None) -> None:
    assistant = tw.fast_attention(built(), **HALF)
    expected = built().generate(**prompt(1), **OPTIONS)
    assert torch.equal(built().generate(**prompt(1), **OPTIONS, assistant_model=assistant), expected)
    model = tw.fast_attention(built(), **HALF)
    assert torch.equal(model.generate(**prompt(1), **OPTIONS, assistant_model=built()), expected)


def test_too_little_memory_is_refused_before_anything_is_generated() -> None:
    model = tw.fast_attention(built(), cache="cooperative", kv_host=1.0)
    model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(tw.PlanError, match=r"keys and values of \d+ tokens take .*TiB.*on the host"):
        model.generate(**prompt(), **{**OPTIONS, "max_new_tokens": 1 << 34})


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration-tied", "BertModel", "ViTModel"])
def test_models_without_such_a_cache_are_refused_when_wrapped(name: str) -> None:
    model = built(name)
    before = set(model.__dict__)
    with pytest.raises(tw.UnsupportedModelError, match="generates with a growing cache"):
        tw.fast_attention(model, cache="cooperative")
    assert set(model.__dict__) == before and not tw.wrappers_of(model)


GEMMA4 = tiny.Case(
    "Gemma4ForCausalLM", "Gemma4TextConfig",
    dict(
        attending.TEXT, num_hidden_layers=4, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True,
        sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=0, hidden_size_per_layer_input=0,
    ),
)  # fmt: skip
DEEPSEEK = tiny.Case(
    "DeepseekV3ForCausalLM", "DeepseekV3Config",
    dict(
        attending.TEXT, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
        first_k_dense_replace=3,
    ),
)  # fmt: skip


@pytest.mark.parametrize("split", ["token", "head"])
def test_layers_with_heads_of_their_own_are_planned_each_as_it_is(split: str, no_gathering: None) -> None:
    plain, model = GEMMA4.build(), tw.fast_attention(GEMMA4.build(), **HALF, kv_split=split)
    found = model.generate(**prompt(), **OPTIONS, return_dict_in_generate=True)
    assert torch.equal(found.sequences, plain.generate(**prompt(), **OPTIONS))
    shape = found.past_key_values.plan.shape
    assert (shape.layers, shape.kv_heads, shape.width) == (2, 1, 16) and found.past_key_values.plan.host_bytes
    grown = tw.fast_attention(GEMMA4.build())
    plan, cache = tw.fast_attention.plan(grown, tokens=12, batch=2), grown(**prompt()).past_key_values
    assert plan.token_bytes == tuple(2 * layer.keys[0, :, 0].nbytes + 2 * layer.values[0, :, 0].nbytes for layer in cache.layers)


def test_latents_are_no_keys_that_could_be_attended_on_the_host() -> None:
    model = DEEPSEEK.build()
    with pytest.raises(tw.UnsupportedModelError, match="generates with a growing cache of the keys"):
        tw.fast_attention(model, cache="cooperative")
    with pytest.raises(tw.UnsupportedModelError, match="DeepseekV3ForCausalLM keeps latents"):
        CooperativeCache(model, tokens=20)
    tw.fast_attention(model)
    plan, cache = tw.fast_attention.plan(model, tokens=12, batch=2), model(**prompt()).past_key_values
    assert plan.token_bytes == tuple(2 * layer.keys[0, :, 0].nbytes + 2 * layer.values[0, :, 0].nbytes for layer in cache.layers)


def test_a_model_on_several_devices_is_refused() -> None:
    model = tw.fast_attention(built(), **HALF)
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 1}
    with pytest.raises(tw.UnsupportedModelError, match="lies on 0, 1"):
        model.generate(**prompt(), **OPTIONS)
    del model.hf_device_map
    model._tp_size = 2
    with pytest.raises(tw.UnsupportedModelError, match="divided over 2 processes"):
        model.generate(**prompt(), **OPTIONS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_host": 0.5}, "kv_host=0.5 would have no effect"),
        ({"cache": "keep", "host_threads": 2}, "host_threads=2 would have no effect"),
        ({"cache": "cooperative", "kv_host": 1.5}, "kv_host is 1.5"),
        ({"cache": "cooperative", "kv_host": -1}, "-1 is not a size"),
        ({"cache": "cooperative", "kv_host": "much"}, "'much' is not a size"),
        ({"cache": "cooperative", "sp_group": "some"}, "part of every sequence"),
        ({"cache": "cooperative", "kv_split": "half"}, "'half' is not accepted"),
        ({"cache": "cooperative", "kv_recent": -1}, "out of range"),
        ({"cache": "cooperative", "prefill_chunk": 0}, "out of range"),
        ({"cache": "cooperative", "stream_chunk_mib": 0}, "out of range"),
        ({"cache": "cooperative", "host_threads": 0}, "out of range"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(tw.ConfigError, match=words):
        tw.FastAttention(**options)


def test_sizes_are_kept_as_bytes_and_stored() -> None:
    config = tw.FastAttention(cache="cooperative", kv_host="2 GiB", host_threads=3)
    assert config.kv_host == 2 << 30 and tw.FastAttention.from_dict(config.to_dict(machine=True)) == config
    assert "host_threads" not in config.to_dict()


def test_threads_and_buffers_are_those_asked_for() -> None:
    model = tw.fast_attention(built(), **{**HALF, "host_threads": 3, "kv_split": "layer"})
    cache = model.generate(**prompt(), **OPTIONS, return_dict_in_generate=True).past_key_values
    assert cache.store._workers.count == 3 and cache.plan.split == "layer"
    assert cache.plan.chunk_tokens == 1024 // cache.plan.shape.token_bytes


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", tw.TorchwrapWarning)
        tw.fast_attention(built(), **HALF).generate(**prompt(), **OPTIONS)
    assert "torchwrap.integrations.transformers.generating" in sys.modules


def test_a_plan_is_what_generation_then_takes(measured: list[Any]) -> None:
    model = tw.fast_attention(built(), **HALF)
    plan = tw.fast_attention.plan(model, tokens=21, batch=2)
    cache = model.generate(**prompt(), **OPTIONS, return_dict_in_generate=True).past_key_values
    assert cache.plan == plan and cache.store.host_bytes == plan.host_bytes and len(measured) == 1
    with pytest.raises(tw.PlanError, match="TiB"):
        tw.handle_of(model, "fast_attention").plan(tokens=1 << 40)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
@pytest.mark.parametrize("tokens", [1, 9, 30, 200])
def test_a_plan_of_arenas_bounds_what_they_take(name: str, tokens: int) -> None:
    model = tw.fast_attention(built(name))
    plan = tw.fast_attention.plan(model, tokens=tokens, batch=2)
    with torch.no_grad():
        cache = model(torch.ones(2, 1, dtype=torch.long)).past_key_values
        for _ in range(tokens - 1):
            model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    # A window of W tokens keeps the W - 1 that the next one sees.
    assert plan.held_bytes - sum(plan.token_bytes) <= held <= plan.held_bytes
    assert sum(layer.arena.nbytes for layer in cache.layers if hasattr(layer, "arena")) <= plan.device_bytes
    assert str(tokens) in plan.explain() and plan.host_bytes == 0


def test_models_without_a_cache_have_no_plan() -> None:
    with pytest.raises(tw.UnsupportedModelError, match="growing cache"):
        tw.fast_attention.plan(tw.fast_attention(built("ViTModel")), tokens=5)
    with pytest.raises(tw.ConfigError, match="0 tokens"):
        tw.fast_attention.plan(tw.fast_attention(built()), tokens=0)


def test_page_locked_memory_is_given_back_with_a_cache_that_nobody_released(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: dict[int, int] = {}

    class Locking(OneMemory):
        def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            memory = super().host_memory(shape, dtype)
            locked[memory.data_ptr()] = memory.nbytes
            return memory

        def release_host(self, memory: torch.Tensor) -> None:
            locked.pop(memory.data_ptr(), None)

    monkeypatch.setattr(cooperative, "machine_for", lambda device: Locking())
    model = tw.fast_attention(built(), **HALF)
    found = model.generate(**prompt(), **OPTIONS, return_dict_in_generate=True)
    assert sum(locked.values()) >= found.past_key_values.store.host_bytes > 0
    del found
    gc.collect()
    assert not locked


def test_a_share_on_the_host_is_there_however_small_the_cache() -> None:
    model = tw.fast_attention(built(), cache="cooperative", kv_host=0.5)  # staging buffers alone could hold all of it
    found = tw.fast_attention.plan(model, tokens=20)
    assert found.host_bytes * 2 >= 20 * found.shape.layers * found.shape.token_bytes


@pytest.mark.parametrize("sizes", [{"tokens": "20"}, {"tokens": 0}, {"tokens": 20, "batch": 1.5}])
def test_a_plan_of_no_number_is_refused(sizes: dict[str, Any]) -> None:
    model = tw.fast_attention(built())
    with pytest.raises(tw.ConfigError, match="a cache of"):
        tw.fast_attention.plan(model, **sizes)


def test_weights_of_attention_are_those_of_the_plain_model_and_one_warning_says_what_they_cost() -> None:
    given = {"output_attentions": True, "return_dict_in_generate": True, **OPTIONS}
    model = built()
    model.set_attn_implementation("eager")
    expected = model.generate(**prompt(), **given)
    model = tw.fast_attention(built(), fallback="silent", **HALF)
    with pytest.warns(tw.TorchwrapWarning) as told:
        found = model.generate(**prompt(), **given)
    assert ["gathers" in str(one.message) for one in told] == [True]
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.attentions, expected.attentions, atol=1e-5, rtol=1e-4)


def test_no_rows_are_what_they_are_to_the_plain_model() -> None:
    nothing = {name: value[:0] for name, value in prompt().items()}
    with pytest.raises(RuntimeError) as expected:  # transformers 5.23 reshapes by -1
        built().generate(**nothing, **OPTIONS)
    model = tw.fast_attention(built(), **HALF)
    with pytest.raises(RuntimeError) as found:
        model.generate(**nothing, **OPTIONS)
    assert str(found.value) == str(expected.value)
    for wrong in ({"tokens": 8, "batch": 0}, {"tokens": 0}):
        with pytest.raises(tw.ConfigError, match=r"0 (rows|tokens)"):
            CooperativeCache(model, **wrong)
