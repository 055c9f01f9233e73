"""fast_attention under transformers' continuous batching: the tokens of the model's own attention, and everything as it was afterwards."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import torchwrap as tw
from tests.integrations.attending import built, settings
from tests.integrations.test_attention_memory import Largest
from torchwrap import native
from torchwrap.attention.service import Service
from torchwrap.core.errors import ConflictError, UnsupportedModelError
from torchwrap.integrations.transformers import attention, batching

PREFIX = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
PROMPTS = [[3, 4, 5], [*PREFIX, 17, 18, 19, 20, 21, 22, 23], [*PREFIX, 30], list(range(20, 51)), [9], [*PREFIX, *PREFIX, 40]]
NEW = 6
PAGES = {"num_blocks": 16, "page_size": 4, "max_batch_tokens": 16}
"""Pages for some of the requests at a time, and steps in which the longer prompts are read in parts."""


@pytest.fixture(scope="module", autouse=True)
def collections_are_short() -> Iterator[None]:
    """Every manager that stops collects garbage, twice; what the test session holds is none."""
    built("llama")
    gc.freeze()
    yield
    gc.unfreeze()


def configs(**pages: Any) -> dict[str, Any]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return {"generation_config": generation, "continuous_batching_config": ContinuousBatchingConfig(**PAGES | pages)}


def batched(model: Any, prompts: Any = PROMPTS, persistent: bool = False, **pages: Any) -> list[list[int]]:
    results = model.generate_batch(prompts, **configs(**pages), persistent_manager=persistent)
    assert all(result.error is None for result in results.values())
    return [result.generated_tokens for result in results.values()]


def alone(model: Any, prompts: Any = PROMPTS) -> list[list[int]]:
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **how)[0, len(ids) :].tolist() for ids in prompts]


def served(model: Any) -> int:
    return sum(tw.handle_of(model, "fast_attention").stats()["served"].values())


@contextmanager
def running(model: Any) -> Iterator[Any]:
    manager = model.init_continuous_batching(**configs())
    manager.start()
    try:
        yield manager
    finally:
        manager.stop()


def next_result(manager: Any) -> Any:
    return next(result for _ in range(100) if (result := manager.get_result(timeout=0.2)) is not None)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt_oss"])
def test_tokens_are_those_of_the_models_own_attention(name: str) -> None:
    model, twin = built(name), built(name)
    if name == "gpt_oss":
        twin.set_attn_implementation("eager")  # it has no sdpa
    before = settings(model)
    expected = batched(twin)
    tw.fast_attention(model)
    assert batched(model) == expected
    calls, stats = served(model), tw.handle_of(model, "fast_attention").stats()
    assert calls > 0 and not stats["left"]
    # Several sequences are one call. A window is read before it is written over, so its keys are gathered.
    several = "decode, pages" if name != "mistral" and native.available() else "decode, composed mask"
    assert any(several in kind for kind in stats["served"])
    assert set(settings(model)) == {attention.NAME}
    assert batched(twin) == expected and served(model) == calls
    tw.unwrap(model)
    assert settings(model) == before and batched(model) == expected


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_keys_are_gathered_where_pages_cannot_be_read(backend: str) -> None:
    model = tw.fast_attention(built("qwen2"), backend=backend)
    assert batched(model) == alone(built("qwen2"))
    assert {key.split()[1] for key in tw.handle_of(model, "fast_attention").stats()["served"]} == {backend}


def test_soft_caps_are_applied_which_the_models_own_paged_attention_leaves_out() -> None:
    model = built("gemma2")
    model.config.attn_logit_softcapping = 0.05
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.05
    expected = alone(model)
    assert batched(tw.fast_attention(model)) == expected


def test_prefixes_are_shared() -> None:
    model = tw.fast_attention(built("llama"))
    with running(model) as manager:
        found = []
        for prompt in (PROMPTS[1], PROMPTS[2]):
            manager.add_request(prompt)
            found.append(next_result(manager).generated_tokens)
        cache = manager.batch_processor.cache
        assert cache.use_prefix_sharing and cache.search_prefix_match("another", PROMPTS[2]) == 8  # two full pages
    assert found == alone(built("llama"), PROMPTS[1:3])


class LargestNumbers(Largest):
    """Of floating tensors: the pages are one tensor of bytes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if type(result) is torch.Tensor and result.is_floating_point() and result.numel() > self.elements:
            self.elements, self.operation = result.numel(), f"{func} {list(result.shape)}"
        return result


@pytest.mark.parametrize("wrapped", [True, False], ids=["ours", "the-models-own-so-the-test-can-fail"])
def test_nothing_of_queries_times_keys_is_made(wrapped: bool) -> None:
    model, seen, tokens, keys = built("llama"), LargestNumbers(), 256, 1024
    # A mode is of one thread: this is the one that makes the manager's tensors, and in hooks it is the one that runs the model.
    model.register_forward_pre_hook(lambda *_: seen.__enter__() and None)
    model.register_forward_hook(lambda *_: seen.__exit__(None, None, None), always_call=True)
    if wrapped:
        tw.fast_attention(model)
    with seen:
        batched(model, [list(range(3, 90)) * 2, list(range(10, 80))], num_blocks=keys // 4, max_batch_tokens=tokens)
    assert (seen.elements < tokens * keys) is wrapped, seen.operation


def test_ordinary_generation_goes_on_beside_it() -> None:
    model, twin = tw.fast_attention(built("llama")), built("llama")
    found: list[Any] = []
    with running(model) as manager:
        manager.add_requests(PROMPTS)
        thread = threading.Thread(target=lambda: found.extend(alone(model)))
        thread.start()
        assert set(settings(model)) == {attention.NAME}
        results = {result.request_id: result.generated_tokens for result in (next_result(manager) for _ in PROMPTS)}
        thread.join()
    expected = alone(twin)
    assert found == expected
    assert [results[f"req_{index}"] for index in range(len(PROMPTS))] == expected


def test_undoing_is_refused_while_a_manager_runs() -> None:
    model = tw.fast_attention(built("llama"))
    with running(model):
        with pytest.raises(ConflictError, match=r"manager\.stop"):
            tw.unwrap(model)
        assert set(settings(model)) == {attention.NAME}
        assert list(tw.wrappers_of(model)) == ["fast_attention"]
    assert batched(model) == batched(tw.unwrap(model))


def test_a_manager_outlives_its_use_but_not_the_wrapping() -> None:
    model = tw.fast_attention(built("llama"))
    manager = model.init_continuous_batching(**configs())
    tw.unwrap(model)
    manager.start()
    manager.add_request(PROMPTS[0])
    assert "has been undone" in next_result(manager).error
    manager.stop()
    tw.fast_attention(model)
    assert len(batched(model)) == len(PROMPTS)


def test_another_attention_that_is_set_meanwhile_is_used() -> None:
    model = tw.fast_attention(built("llama"))
    manager = model.init_continuous_batching(**configs())
    manager.start()
    model.set_attn_implementation("sdpa")
    manager.add_request(PROMPTS[0])
    assert "replaced by another attention" in next_result(manager).error
    manager.stop()
    assert batched(model) == batched(built("llama")) and served(model) == 0


def test_each_keeps_managers_of_its_own() -> None:
    model = built("llama")
    expected = batched(model, persistent=True)
    plain = model._cached_continuous_batching_manager
    tw.fast_attention(model)
    assert batched(model, persistent=True) == expected
    calls, ours = served(model), model.init_continuous_batching()
    assert ours is not plain and ours is model.init_continuous_batching()
    assert batched(model) == expected and served(model) == 2 * calls
    model.destroy_cached_continuous_batching_manager()
    assert model.init_continuous_batching(**configs()) is not ours
    batched(model, persistent=True)
    tw.unwrap(model)
    assert model._cached_continuous_batching_manager is plain is model.init_continuous_batching()
    assert batched(model) == expected
    model.destroy_cached_continuous_batching_manager()


def test_undo_leaves_nothing_on_the_model() -> None:
    model = built("llama")
    before = set(model.__dict__)
    batched(tw.fast_attention(model), persistent=True)
    assert set(tw.unwrap(model).__dict__) == before


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_batch_by_themselves(again: Any) -> None:
    model = tw.fast_attention(built("llama"))
    expected = batched(model, persistent=True)
    other, calls = again(model), served(model)
    already = served(other)
    assert batched(other) == expected
    assert served(model) == calls and served(other) > already
    tw.unwrap(model)
    assert batched(other) == expected == batched(tw.unwrap(other))


def test_disabling_is_refused_for_it() -> None:
    model = tw.fast_attention(built("llama"))
    with tw.disabled(model, "fast_attention"), pytest.raises(ConflictError, match="unwrap"):
        batched(model)
    assert batched(model) == batched(built("llama"))


@pytest.mark.parametrize(
    "asked", [{"use_cuda_graph": True}, {"default_compile_level": 1}, {"varlen_compile_config": "any"}], ids=lambda asked: next(iter(asked))
)
def test_graphs_are_refused(asked: dict[str, Any]) -> None:
    model = tw.fast_attention(built("llama"))
    with pytest.raises(UnsupportedModelError, match=next(iter(asked))):
        batched(model, **asked)
    assert list(tw.unwrap(model).__dict__) == list(built("llama").__dict__)


def test_divided_sequences_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tw.fast_attention(built("llama"))
    monkeypatch.setattr(tw.handle_of(model, "fast_attention").service, "sequence", object())
    with pytest.raises(UnsupportedModelError, match="sp_group"):
        batched(model)


def test_transformers_still_decides_by_the_name() -> None:
    """What the stand-in is for: a name without "flash" is refused, one with it gets neither masks nor block tables."""
    from transformers.generation.continuous_batching.initialization import resolve_continuous_batching_config
    from transformers.generation.continuous_batching.utils import attn_mask_is_needed

    model = built("llama")
    service = Service()
    stand_in = batching.StandIn("", model, attention.ModelLayer("", service, attention.TransformersRoute()), service, attention.NAME)
    assert stand_in.config._attn_implementation == batching.PACKED and model.config._attn_implementation == "sdpa"
    assert stand_in.config.to_dict() == model.config.to_dict()
    assert not attn_mask_is_needed(stand_in.config)
    given = configs()["continuous_batching_config"]
    given.max_blocks_per_request = 8
    resolved = resolve_continuous_batching_config(stand_in.config, given, None, False, torch.device("cpu"))
    assert resolved.max_blocks_per_request == 0
    tw.fast_attention(model)
    with pytest.raises(ValueError, match=attention.NAME):
        type(model).init_continuous_batching(model, **configs())
