"""transformers models with part of their cache on the host: the tokens of a plain cache, in every way of generating."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import warnings
from typing import Any

import pytest
import torch

import torchwrap as tw
from tests import torchvision_ops
from torchwrap.attention.cooperative.planner import Rates
from torchwrap.attention.cooperative.tensors import TieredTensor
from torchwrap.core import errors
from torchwrap.demo import weights

torchvision_ops.ensure()

from torchwrap.integrations.transformers import cooperative  # noqa: E402  # transformers needs the above
from torchwrap.integrations.transformers.cooperative import CooperativeCache, CooperativeLayer  # noqa: E402  # transformers needs the above

RATES = Rates(device=700e9, host=60e9, link=12e9, wake_s=0.0)  # a host that is woken for nothing works even for tiny models


def tiny(**changed: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    kind = changed.pop("kind", "Llama")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=changed.pop("heads", 2), max_position_embeddings=512, **changed,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def served() -> Any:
    return tw.fast_attention(tiny())


@pytest.fixture
def prompt() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    seen = torch.ones_like(ids)
    seen[1, :13] = 0
    return {"input_ids": ids, "attention_mask": seen}


def cache_for(model: Any, tokens: int, share: float, batch: int, **options: Any) -> CooperativeCache:
    """A cache with this share of it on the device, and a staging buffer of few tokens."""
    config = model.config
    token = 2 * batch * config.num_key_value_heads * config.head_dim * 4
    whole = config.num_hidden_layers * tokens * token
    options = {"rates": RATES, "kv_recent": 8, "stream_chunk_mib": 4 * token / (1 << 20), "host_threads": 1, **options}
    options.setdefault("host_memory", 4 * whole)
    return CooperativeCache(model, tokens=tokens, device_memory=int(share * whole) + 8 * token, batch=batch, **options)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "prompt in chunks": {"prefill_chunk_size": 16},
    "beams": {"num_beams": 3},
    "several answers": {"num_beams": 2, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("split", ["token", "layer", "upload"])
def test_generated_tokens_are_those_of_a_plain_cache(model: Any, served: Any, prompt: Any, way: str, split: Any) -> None:
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **WAYS[way]}
    expected = model.generate(**prompt, **options)
    cache = cache_for(served, 64, 0.4, 2 * WAYS[way].get("num_beams", 1), kv_split=split)
    before = TieredTensor.materialisations
    assert (cache.plan.streamed == 1.0) == (split == "upload")
    found = served.generate(**prompt, **options, past_key_values=cache)
    assert torch.equal(found, expected)
    assert TieredTensor.materialisations == before
    assert cache.store.host_bytes > 0 and any(layer.host_tokens for layer in cache.store.layers)


@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize("form", ["heads", "disk", "heads and disk"])
def test_other_divisions_generate_the_same_tokens(model: Any, served: Any, prompt: Any, way: str, form: str, tmp_path: Any) -> None:
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **WAYS[way]}
    expected = model.generate(**prompt, **options)
    given: dict[str, Any] = {"kv_split": "head" if "heads" in form else "token"}
    batch = 2 * WAYS[way].get("num_beams", 1)
    if "disk" in form:  # the host has memory for a third of what should go there
        given.update(kv_disk="1 MiB", kv_disk_path=str(tmp_path), host_memory=3 * 64 * batch * 128 // 3)
        monkey = pytest.MonkeyPatch()
        monkey.setattr(cooperative, "plan_cache", functools.partial(cooperative.plan_cache, block_bytes=3 * batch * 128))
    cache = cache_for(served, 64, 0.4, batch, **given)
    if "disk" in form:
        monkey.undo()
    before = TieredTensor.materialisations
    found = served.generate(**prompt, **options, past_key_values=cache)
    assert torch.equal(found, expected) and TieredTensor.materialisations == before
    assert any(layer.host_tokens for layer in cache.store.layers)
    assert any(layer.disk_tokens for layer in cache.store.layers) == ("disk" in form)
    cache.store.release()
    assert list(tmp_path.iterdir()) == []


def test_a_setting_puts_the_rest_on_a_disk_and_nothing_stays_there(
    model: Any, prompt: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cooperative, "measure_rates", lambda *_, **__: RATES)
    monkeypatch.setattr(cooperative, "memory_available", lambda: 24_000)
    monkeypatch.setattr(cooperative, "plan_cache", functools.partial(cooperative.plan_cache, block_bytes=2000))
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wrapped = tw.fast_attention(
        tiny(), cache="cooperative", kv_host=0.8, kv_split="token", kv_recent=8, stream_chunk_mib=1 / 1024, kv_disk="1 MiB",
        kv_disk_path=str(tmp_path),
    )  # fmt: skip
    found = wrapped.generate(**prompt, **options, return_dict_in_generate=True)
    cache = found.past_key_values
    assert torch.equal(found.sequences, model.generate(**prompt, **options))
    assert any(layer.disk_tokens for layer in cache.store.layers) and len(list(tmp_path.iterdir())) == 1
    del cache, found
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_belongs_to_one_process_and_is_not_copied(served: Any) -> None:
    with pytest.raises(TypeError, match="belongs to one process"):
        copy.deepcopy(cache_for(served, 64, 0.4, 1))


def test_a_narrower_host_says_what_it_lost(model: Any, prompt: Any) -> None:
    wrapped = tw.fast_attention(tiny())
    cache = cache_for(wrapped, 64, 0.4, 2, kv_host_dtype=torch.bfloat16)
    with torch.no_grad():
        first = {"input_ids": prompt["input_ids"][:, :-1], "attention_mask": prompt["attention_mask"][:, :-1]}
        wrapped(**first, past_key_values=cache)
        found = wrapped(input_ids=prompt["input_ids"][:, -1:], attention_mask=prompt["attention_mask"], past_key_values=cache).logits[:, -1]
        expected = model(**prompt).logits[:, -1]
    assert 1e-6 < (found - expected).abs().max() < 1e-2
    handle = tw.handle_of(wrapped, "fast_attention")
    assert "stored as bfloat16" in cache.describe() and "stored as bfloat16: keys off by at most" in handle.explain()
    assert 0 < handle.stats()["lost"]["bfloat16"] < 0.5
    assert "lost" not in tw.handle_of(copy.deepcopy(wrapped), "fast_attention").stats()


@pytest.mark.parametrize("split", ["token", "head"])
def test_a_proposed_continuation_that_is_wrong_is_taken_back(model: Any, served: Any, split: Any) -> None:
    """Assisted decoding crops the cache after every step."""
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10, 5, 6, 7]])}
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "prompt_lookup_num_tokens": 4}
    expected = model.generate(**prompt, **options)
    found = served.generate(**prompt, **options, past_key_values=cache_for(served, 64, 0.3, 1, kv_split=split))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("split", ["token", "layer", "head"])
def test_tokens_beyond_the_plan_find_memory(model: Any, served: Any, prompt: Any, split: Any) -> None:
    """As proposed tokens of assisted decoding may be, or the next question to the same cache."""
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = cache_for(served, 50, 0.4, 2, kv_split=split)
    assert torch.equal(served.generate(**prompt, **options, past_key_values=cache), model.generate(**prompt, **options))
    assert cache.get_seq_length() == 63


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.5])
def test_any_number_of_heads_can_be_divided(heads: int, share: float, prompt: Any) -> None:
    model = tiny(heads=heads)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**prompt, **options)
    wrapped = tw.fast_attention(model)
    cache = cache_for(wrapped, 64, share, 2, kv_split="head")
    assert torch.equal(wrapped.generate(**prompt, **options, past_key_values=cache), expected)
    assert bool(cache.store.host_bytes) == (share < 1)


def test_prompt_chunks_leave_memory_for_what_else_they_need(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for free in (1 << 40, 4 << 20, 1 << 20):
        monkeypatch.setattr(cooperative, "free_on", lambda device, free=free: free)
        chosen.append(cache_for(served, 64, 0.4, 2).plan.prefill_tokens)
    assert chosen[0] == 2048 and chosen[0] > chosen[1] > chosen[2] > 0
    assert cache_for(served, 64, 0.4, 2, prefill_chunk=99).plan.prefill_tokens == 99


def test_a_cache_is_used_again_after_reset(served: Any, prompt: Any) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = cache_for(served, 64, 0.4, 2)
    first = served.generate(**prompt, **options, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(served.generate(**prompt, **options, past_key_values=cache), first)


def test_a_model_with_other_attention_gathers_with_a_warning(model: Any, prompt: Any) -> None:
    expected = model(**prompt).logits
    before = TieredTensor.materialisations
    with torch.no_grad(), pytest.warns(errors.TorchwrapWarning, match="gathers .* bytes"):
        found = model(**prompt, past_key_values=cache_for(model, 64, 0.4, 2)).logits
    assert torch.allclose(found, expected, atol=1e-5) and TieredTensor.materialisations > before


def test_sliding_layers_keep_their_own_cache(prompt: Any) -> None:
    options: dict[str, Any] = {
        "kind": "Qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"], "head_dim": 8,
    }  # fmt: skip
    model = tiny(**options)
    generate = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**prompt, **generate)
    cache = cache_for(tw.fast_attention(model), 64, 0.3, 2)
    assert [isinstance(layer, CooperativeLayer) for layer in cache.layers] == [True, False, True] and cache.plan.shape.layers == 2
    assert torch.equal(model.generate(**prompt, **generate, past_key_values=cache), expected)


def test_another_batch_than_planned_is_refused_with_the_numbers(served: Any, prompt: Any) -> None:
    with pytest.raises(errors.ConfigError, match=r"\(2, 2, 8, 8\), the cache \(1, 2, 8, 8\).*layer 0"):
        served.generate(**prompt, max_new_tokens=2, past_key_values=cache_for(served, 64, 0.4, 1))


@pytest.mark.parametrize(("kv_host", "least"), [(0.75, 0.75), (40_000, 40_000 / 49_152), ("30 KiB", 30 / 48), (0.0, 0.0), (None, 0.0)])
def test_so_much_goes_to_the_host_as_is_asked_for(served: Any, kv_host: Any, least: float) -> None:
    """64 tokens of two sequences take 48 KiB; the device would have room for all."""
    cache = cache_for(served, 64, 2.0, 2, kv_host=kv_host, kv_split="token", rates=Rates(device=700e9, host=60e9, link=12e9))
    share = 1 - sum(cache.plan.device_tokens) / (3 * 64)
    assert least <= share <= least + 0.06


@pytest.mark.parametrize(
    ("given", "where"),
    [({"kv_host": 1.5}, "kv_host"), ({"kv_host": "much"}, "kv_host"), ({"stream_chunk_mib": 0}, "stream_chunk_mib"),
     ({"host_threads": 0}, "host_threads"), ({"prefill_chunk": 0}, "prefill_chunk"), ({"kv_host_dtype": torch.int8}, "kv_host_dtype"),
     ({"kv_host_dtype": torch.float64}, "kv_host_dtype"), ({"kv_disk": "much"}, "kv_disk")],
)  # fmt: skip
def test_values_out_of_range_are_refused(served: Any, given: dict[str, Any], where: str) -> None:
    with pytest.raises(errors.ConfigError, match=where):
        cache_for(served, 64, 0.4, 2, **given)


def test_a_cache_that_may_not_use_the_host_is_refused_where_the_device_is_too_small(served: Any) -> None:
    with pytest.raises(errors.PlanError, match="64 tokens"):
        cache_for(served, 64, 0.4, 2, kv_host=None)


def test_too_little_memory_is_refused_before_generation(served: Any) -> None:
    with pytest.raises(errors.PlanError, match="1000000 tokens"):
        CooperativeCache(served, tokens=1_000_000, device_memory="1 MiB", host_memory="1 MiB", stream_chunk_mib=1 / 16, rates=RATES)


def test_a_processor_without_memory_for_its_device_s_part_is_a_plan_error_with_the_numbers(served: Any) -> None:
    with pytest.raises(errors.PlanError, match=r"no memory for keys and values of \d+ tokens: \d+ bytes were planned on the device"):
        CooperativeCache(served, tokens=1 << 42, device_memory=1 << 60, host_memory=1 << 60, kv_host=None, rates=RATES)


def test_a_pass_that_failed_can_be_repeated(model: Any, served: Any, prompt: Any) -> None:
    """A worker dies in the second layer of the second pass: the cache is as before that pass, and the pass works when it is tried again."""
    cache = cache_for(served, 64, 0.4, 2, kv_split="token")
    work, calls = cache.store._partial, []

    def fails(q: torch.Tensor, k: torch.Tensor, *others: Any) -> Any:
        if threading.current_thread().name.startswith("torchwrap-host-attention"):
            calls.append(k.shape[2])
            if len(calls) == 2:
                raise RuntimeError("this worker is gone")
        return work(q, k, *others)

    expected = model(**prompt).logits[:, -1]
    first = {"input_ids": prompt["input_ids"][:, :-1], "attention_mask": prompt["attention_mask"][:, :-1]}
    second = {"input_ids": prompt["input_ids"][:, -1:], "attention_mask": prompt["attention_mask"]}
    with torch.no_grad():
        served(**first, past_key_values=cache)
        cache.store._partial_host = fails
        with pytest.raises(errors.WorkError, match=r"this worker is gone.*layer 1"):
            served(**second, past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [39, 39, 39]
        found = served(**second, past_key_values=cache).logits[:, -1]
    assert torch.allclose(found, expected, atol=1e-5) and len(calls) > 2


def test_a_model_without_full_attention_is_refused() -> None:
    model = tiny(kind="Mistral", sliding_window=8, head_dim=8)
    with pytest.raises(errors.UnsupportedModelError, match="MistralForCausalLM has no layer of full attention"):
        CooperativeCache(model, tokens=64, device_memory="1 MiB", host_memory="1 MiB", rates=RATES)


@pytest.mark.slow
def test_smollm2_says_the_same_with_most_of_its_cache_on_the_host() -> None:
    import transformers

    try:
        folder = weights.smollm2()
    except errors.StorageError as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = dict(tokenizer("The lighthouse keeper wrote in his log that the storm had", return_tensors="pt"))
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**prompt, **options)
    cache = CooperativeCache(
        tw.fast_attention(model),
        tokens=40,
        device_memory="700 KiB",
        host_memory="64 MiB",
        kv_recent=8,
        stream_chunk_mib=1 / 16,
        rates=RATES,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.TorchwrapWarning)
        found = model.generate(**prompt, **options, past_key_values=cache)
    assert torch.equal(found, expected)
    assert cache.store.device_bytes < cache.store.host_bytes
