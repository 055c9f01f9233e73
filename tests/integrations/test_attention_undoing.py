"""fast_attention on transformers models: the way there and back, calls it does not serve, copies, threads and other techniques."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.integrations import tiny
from tests.integrations.attending import (
    HOW,
    LENGTH,
    TEXT,
    built,
    eager,
    every_family,
    inputs,
    no_materialisation,
    prompt,
    settings,
    tensors,
)
from torchwrap.integrations.transformers import attention, sites


@every_family
def test_every_config_is_set_and_restored(name: str) -> None:
    model = built(name)
    before = settings(model)
    tw.fast_attention(model)
    assert set(settings(model)) == {attention.NAME}
    tw.unwrap(model)
    assert settings(model) == before


def test_implementations_that_differ_between_nested_models_are_restored_each() -> None:
    model = built("llava")
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    before = settings(model)
    assert len(set(before)) == 2
    with tw.applied(model, tw.FastAttention()):
        assert set(settings(model)) == {attention.NAME}
    assert settings(model) == before


def test_one_tower_alone_can_be_wrapped() -> None:
    model, twin, given = built("llava"), built("llava"), inputs("llava")
    tw.fast_attention(model.model.language_model)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == attention.NAME
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, twin(**given).logits, rtol=1e-4, atol=1e-5)


def test_what_the_user_set_meanwhile_stays() -> None:
    model = tw.fast_attention(built("llama"))
    model.set_attn_implementation("eager")
    tw.unwrap(model)
    assert model.config._attn_implementation == "eager"


def test_saved_config_and_weights_say_nothing_of_it(tmp_path: Any) -> None:
    model, twin = tw.fast_attention(built("llava")), built("llava")
    model.save_pretrained(tmp_path / "ours")
    twin.save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes(), file.name
    assert list(model.state_dict()) == list(twin.state_dict())


def test_a_failure_while_applying_leaves_every_config_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llava")
    before, whole = settings(model), attention.TransformersRoute.set

    def fail(self: attention.TransformersRoute) -> None:
        half, self.originals = self.originals, self.originals[:1]
        whole(self)
        self.originals = half
        raise OSError("half-way")

    monkeypatch.setattr(attention.TransformersRoute, "set", fail)
    with pytest.raises(OSError, match="half-way"):
        tw.fast_attention(model)
    assert settings(model) == before
    assert tw.wrappers_of(model) == {}


def test_wrapping_twice_is_refused_and_changes_nothing() -> None:
    model = tw.fast_attention(built("llama"))
    with pytest.raises(tw.ConflictError, match="fast_attention"):
        tw.fast_attention(model, backend="eager")
    with pytest.raises(tw.ConflictError, match="fast_attention"):
        tw.fast_attention(model.model)
    tw.unwrap(model)
    assert set(settings(model)) == {"sdpa"}


@pytest.mark.parametrize("name", ["BloomForCausalLM-tied", "FalconForCausalLM-tied"])
def test_attention_that_cannot_be_set_is_refused_by_name(name: str) -> None:
    model = tiny.case(name).build()
    before = settings(model)
    with pytest.raises(tw.UnsupportedModelError, match=name.split("For")[0]) as caught:
        tw.fast_attention(model)
    assert "strict=False" in caught.value.fix
    assert settings(model) == before
    assert tw.apply(model, tw.FastAttention(), strict=False) is model
    assert "fast_attention" in str(tw.describe(model))


def test_the_question_whether_attention_can_be_set_is_answered_as_transformers_does() -> None:
    for case in tiny.CASES:
        kind = type(case.build())
        known = dict(vars(kind))
        assert sites.can_be_set(kind) == kind._can_set_attn_implementation(), kind
        if "_can_set_attn_implementation_cached_value" not in known:
            del kind._can_set_attn_implementation_cached_value


@pytest.mark.parametrize("part", ["layers.0", "layers.0.self_attn"])
def test_a_part_taken_out_of_a_model_is_refused_with_the_way_out(part: str) -> None:
    model = built("llama")
    with pytest.raises(tw.UnsupportedModelError, match="no attention that can be led elsewhere") as caught:
        tw.fast_attention(model.model.get_submodule(part))
    assert "LlamaAttention" in caught.value.fix and "give the whole model" in caught.value.fix
    assert set(settings(model)) == {"sdpa"}


def test_a_model_configured_to_return_weights_is_refused() -> None:
    import transformers

    config = transformers.LlamaConfig(**TEXT, output_attentions=True, attn_implementation="eager")
    with pytest.raises(tw.UnsupportedModelError, match="weights of attention"):
        tw.fast_attention(transformers.LlamaForCausalLM(config))


def test_the_name_is_in_both_registries_and_no_flash_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.utils.generic import is_flash_attention_requested

    assert AttentionInterface()[attention.NAME] is attention.attention_forward
    assert AttentionMaskInterface()[attention.NAME] is attention.attention_mask
    assert attention.NAME.startswith("torchwrap_")
    assert not is_flash_attention_requested(requested_attention_implementation=attention.NAME)


def test_model_inside_a_users_module_is_found() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = built("bert")
            self.head = nn.Linear(32, 2)

        def forward(self, **given: Any) -> torch.Tensor:
            return self.head(self.tower(**given).last_hidden_state)

    torch.manual_seed(0)
    model, given = Outer().eval(), inputs("bert")
    expected = model(**given)
    tw.fast_attention(model)
    torch.testing.assert_close(model(**given), expected, rtol=1e-4, atol=1e-5)
    assert all(key.startswith("tower.") for key in tw.handle_of(model, "fast_attention").stats()["served"])


# What no fast way returns


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "whisper"])
def test_a_call_that_asks_for_weights_gets_them_from_the_models_own_function(name: str) -> None:
    given, model, twin = inputs(name), tw.fast_attention(built(name)), eager(name)
    with torch.no_grad():
        with pytest.warns(tw.TorchwrapWarning, match="output_attentions"):
            ours = model(**given, output_attentions=True)
        theirs = twin(**given, output_attentions=True)
    keys = [key for key in theirs if key.endswith("attentions")]
    assert keys
    for key in keys:
        for got, expected in zip(ours[key], theirs[key], strict=True):
            assert torch.equal(got, expected)
    assert tw.handle_of(model, "fast_attention").stats()["left"]
    with torch.no_grad():
        model(**given)
    assert tw.handle_of(model, "fast_attention").stats()["served"]


def test_a_call_that_asks_for_weights_can_be_an_error() -> None:
    model, given = tw.fast_attention(built("llama"), fallback="error"), inputs("llama")
    with pytest.raises(tw.UnsupportedModelError, match="output_attentions"):
        model(**given, output_attentions=True)
    with torch.no_grad():
        torch.testing.assert_close(
            tensors("llama", model(**given), given), tensors("llama", built("llama")(**given), given), rtol=1e-4, atol=1e-5
        )


def test_disabled_runs_the_models_own_attention_in_this_thread_only() -> None:
    model, twin, given = tw.fast_attention(built("llama")), built("llama"), inputs("llama")
    handle, results = tw.handle_of(model, "fast_attention"), []
    with torch.no_grad(), tw.disabled(model, "fast_attention"):
        assert torch.equal(model(**given).logits, twin(**given).logits)
        assert torch.equal(model.model(**given).last_hidden_state, twin.model(**given).last_hidden_state)
        assert handle.stats()["served"] == {}

        def elsewhere() -> None:
            with torch.no_grad():
                results.append(model(**given).logits)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert sum(handle.stats()["served"].values()) == 3
    assert len(results) == 1
    tokens = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True, "pad_token_id": 0}
    with tw.disabled(model):
        assert torch.equal(model.generate(**given, **tokens), twin.generate(**given, **tokens))


# Masks of the user's own


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_dense_mask_of_the_user_is_honoured(kind: str) -> None:
    given = {"input_ids": inputs("llama")["input_ids"]}
    visible = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.6
    visible |= torch.eye(LENGTH, dtype=torch.bool)
    mask = visible if kind == "bool" else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        ours = tw.fast_attention(built("llama"))(**given, attention_mask=mask).logits
        theirs = eager("llama")(**given, attention_mask=additive).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_packed_sequences_see_only_themselves() -> None:
    ids = inputs("llama")["input_ids"][1:]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
    model = tw.fast_attention(built("llama"))
    with torch.no_grad(), no_materialisation():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([built("llama")(input_ids=part).logits for part in ids.split([5, 4, 3], 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


# Copies, threads, other techniques


def test_copies_and_pickles_are_wrapped_and_independent() -> None:
    model, given = tw.fast_attention(built("llama")), inputs("llama")
    expected = model(**given).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**given).logits, expected)
        counted = sum(tw.handle_of(model, "fast_attention").stats()["served"].values())
        other(**given)
        assert sum(tw.handle_of(model, "fast_attention").stats()["served"].values()) == counted
        tw.unwrap(other)
        assert set(settings(other)) == {"sdpa"}
        assert set(settings(model)) == {attention.NAME}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "from_config"])
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_a_model_made_from_a_copied_config_computes_its_own_attention(name: str, how: str) -> None:
    model = tw.fast_attention(built(name))
    if how == "from_config":
        import transformers

        auto = transformers.AutoModelForCausalLM if name == "llama" else transformers.AutoModelForImageTextToText
        made = auto.from_config(model.config)
    else:
        config = copy.deepcopy(model.config) if how == "deepcopy" else pickle.loads(pickle.dumps(model.config))
        made = type(model)(config)
    if how != "from_config":  # which hands on the very object
        assert set(settings(made)) == {"sdpa"} and set(settings(model)) == {attention.NAME}
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain = built(name)
        assert torch.equal(made.eval()(**inputs(name)).logits, plain(**inputs(name)).logits)
    tw.fast_attention(made)
    assert set(settings(made)) == {attention.NAME}


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_model_keeps_what_its_user_set_meanwhile(how: str) -> None:
    model = tw.fast_attention(built("llava"))
    model.config.vision_config._attn_implementation = "sdpa"
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert twin.config.vision_config._attn_implementation == "sdpa" and twin.config.text_config._attn_implementation == attention.NAME
    tw.unwrap(twin)
    assert set(settings(twin)) == {"sdpa"} and model.config.text_config._attn_implementation == attention.NAME


def test_two_threads_generate_on_one_wrapped_model() -> None:
    model, twin = tw.fast_attention(built("llama")), eager("llama")
    prompts = [inputs("llama")["input_ids"][:1, : 5 + 3 * index] for index in range(2)]
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [twin.generate(ids, **options) for ids in prompts]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(index: int) -> None:
        for _ in range(3):
            results[index].append(model.generate(prompts[index], **options))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(results[index]) == 3
        assert all(torch.equal(tokens, expected[index]) for tokens in results[index])


def test_undo_in_the_middle_of_generation() -> None:
    from transformers import LogitsProcessor, LogitsProcessorList

    class Undo(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 4:
                tw.unwrap(model)
            return scores

    for how in ({}, HOW["static"]):
        model, twin = tw.fast_attention(built("llama")), eager("llama")
        options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
        ours = model.generate(**prompt("llama"), **options, logits_processor=LogitsProcessorList([Undo()]))
        assert tw.wrappers_of(model) == {}
        assert torch.equal(ours, twin.generate(**prompt("llama"), **options))


@pytest.mark.parametrize("first", ["fast_attention", "other"])
@pytest.mark.parametrize("undone", ["fast_attention", "other"])
@pytest.mark.parametrize("technique", ["offload", "superpipeline"])
def test_placement_techniques_in_any_order(technique: str, first: str, undone: str) -> None:
    model, given = built("llama"), inputs("llama")
    expected = tw.fast_attention(built("llama"))(**given).logits.detach()
    plain = built("llama")(**given).logits.detach()
    other = tw.Offload(device_memory="130KiB", reserve=0) if technique == "offload" else tw.Superpipeline(k=2, k_prime=1)
    for config in (tw.FastAttention(), other) if first == "fast_attention" else (other, tw.FastAttention()):
        tw.apply(model, config)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected)
        tw.unwrap(model, "fast_attention" if undone == "fast_attention" else technique)
        assert torch.equal(model(**given).logits, plain if undone == "fast_attention" else expected)
        tw.unwrap(model)
        assert torch.equal(model(**given).logits, plain)
    assert set(settings(model)) == {"sdpa"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tw.fast_attention(built("llama")).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**inputs("llama"), use_cache=False).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)


def test_an_error_in_a_call_that_asks_for_weights_leaves_the_next_call_served() -> None:
    model, given = tw.fast_attention(built("llama"), fallback="silent"), inputs("llama")
    with pytest.raises(IndexError):
        model(input_ids=given["input_ids"] + 1000, output_attentions=True)
    handle = tw.handle_of(model, "fast_attention")
    assert handle.stats()["served"] == {}
    model(**given)
    assert sum(handle.stats()["served"].values()) == 3


def test_adapters_of_peft_around_the_model() -> None:
    peft = pytest.importorskip("peft")
    outputs, gradients, given = [], [], inputs("llama")
    for wrap in (True, False):
        torch.manual_seed(3)
        model = peft.get_peft_model(built("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        if wrap:
            tw.fast_attention(model)
            assert set(settings(model.base_model.model)) == {attention.NAME}
        logits = model(**given).logits
        logits[given["attention_mask"].bool()].square().mean().backward()
        outputs.append(logits.detach()[given["attention_mask"].bool()])
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert len(gradients[0]) == 12
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_model_loaded_by_from_pretrained_under_a_decorated_class(tmp_path: Any) -> None:
    import transformers

    built("llama").save_pretrained(tmp_path)

    @tw.fast_attention
    class Decorated(transformers.LlamaForCausalLM):
        pass

    model, given = Decorated.from_pretrained(tmp_path), inputs("llama")
    assert list(tw.wrappers_of(model)) == ["fast_attention"]
    seen = given["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits[seen], eager("llama")(**given).logits[seen], rtol=1e-4, atol=1e-5)


def test_two_models_of_one_config_are_each_what_they_are() -> None:
    """The implementation is a field of the config, which they share; the layers are not."""
    import transformers

    config = transformers.LlamaConfig(**TEXT)
    first, second, given = transformers.LlamaForCausalLM(config).eval(), transformers.LlamaForCausalLM(config).eval(), inputs("llama")
    with torch.no_grad():
        expected, weights = second(**given).logits, second(**given, output_attentions=True).attentions
        tw.fast_attention(first)
        assert torch.equal(second(**given).logits, expected)
        assert all(torch.equal(*pair) for pair in zip(second(**given, output_attentions=True).attentions, weights, strict=True))
        tw.fast_attention(second)
        tw.unwrap(first)
        second(**given)
        assert sum(tw.handle_of(second, "fast_attention").stats()["served"].values()) == config.num_hidden_layers
        tw.unwrap(second)
        assert torch.equal(second(**given).logits, expected) and set(settings(second)) == {"sdpa"}


def test_a_model_that_was_given_our_name_by_hand_is_served_and_returns_weights() -> None:
    model, twin, given = built("llama"), built("llama"), inputs("llama")
    model.set_attn_implementation(attention.NAME)
    seen = given["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits[seen], twin(**given).logits[seen], rtol=1e-4, atol=1e-5)
        found = model(**given, output_attentions=True).attentions
    assert all(isinstance(weights, torch.Tensor) for weights in found)
