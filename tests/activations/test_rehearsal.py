"""What blocks save is known before they run: a forward on shapes counts what autograd keeps of a real one."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.models import by_name
from torchwrap.activations.rehearsal import Rehearsal
from torchwrap.core.integration import integration_for
from torchwrap.stream.units import find_units

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MLP = {"intermediate_size": 192}


def llama(attention: str, **changes: Any) -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, **MLP, attn_implementation=attention, **{"use_cache": False, **changes})
    return transformers.LlamaForCausalLM(config).train()


def gpt2(attention: str) -> nn.Module:
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=3, n_head=4, attn_implementation=attention, **ends)
    return transformers.GPT2LMHeadModel(config).train()


def bert(attention: str) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **MLP, attn_implementation=attention)).train()


def t5(attention: str) -> nn.Module:
    config = transformers.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, attn_implementation=attention)
    return transformers.T5ForConditionalGeneration(config).train()


def whisper(attention: str) -> nn.Module:
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "use_cache": False}
    config = transformers.WhisperConfig(**sizes, **ids, **heads, max_source_positions=40, attn_implementation=attention)
    return transformers.WhisperForConditionalGeneration(config).train()


def vit(attention: str) -> nn.Module:
    config = transformers.ViTConfig(**{**SIZES, **MLP, "image_size": 32, "patch_size": 8}, attn_implementation=attention)
    return transformers.ViTModel(config).train()


def rehearsed(model: nn.Module) -> Rehearsal:
    integration = integration_for(model)
    division = find_units(model, [(block.fqn, block.module) for block in integration.blocks(model) or ()])
    found = Rehearsal.of(model, division.units, CPU, integration)
    assert found is not None
    return found


def saved_by_blocks(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[int]:
    """Of a real forward: bytes by call of a block, each piece of memory once, without parameters and buffers."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.UntypedStorage] = {}
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held.setdefault(storage.data_ptr(), storage)
        return tensor

    def called(forward: Any, *args: Any, **kwargs: Any) -> Any:
        before = len(held)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward(*args, **kwargs)
        sizes.append(sum(storage.nbytes() for storage in list(held.values())[before:]))
        return output

    for block in integration_for(model).blocks(model) or ():
        block.module.forward = functools.partial(called, block.module.forward)
    model(**inputs)
    return sizes


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [llama, gpt2, bert, t5, whisper, vit])
def test_the_bytes_are_those_that_autograd_saves(build: Any, attention: str) -> None:
    model = build(attention)
    batch, tokens = 2, 130
    costs = rehearsed(model).costs(batch, tokens)
    inputs = integration_for(model).inputs(model, batch=batch, tokens=tokens)
    assert costs is not None and inputs is not None
    if build is llama:  # on shapes transformers makes the mask that it makes for a batch with padding
        inputs["attention_mask"] = torch.ones(batch, tokens, dtype=torch.long)
        inputs["attention_mask"][0, :3] = 0
    if build is whisper:
        inputs["decoder_attention_mask"] = torch.ones(batch, tokens, dtype=torch.long)
        inputs["decoder_attention_mask"][0, -3:] = 0
    assert [cost.nbytes for cost in costs] == saved_by_blocks(model, inputs)


def test_half_precision_counts_what_norms_compute_in_float32() -> None:
    model = llama("eager").bfloat16()
    costs = rehearsed(model).costs(2, 48)
    inputs = integration_for(model).inputs(model, batch=2, tokens=48)
    assert costs is not None and inputs is not None
    assert [cost.nbytes for cost in costs] == saved_by_blocks(model, inputs)


def test_attention_that_is_chosen_later_counts() -> None:
    model = llama("sdpa")
    rehearsal, expected = rehearsed(model), rehearsed(llama("eager")).costs(2, 64)
    assert rehearsal.costs(2, 64) != expected
    model.set_attn_implementation("eager")
    assert rehearsal.costs(2, 64) == expected


def test_nothing_of_the_model_is_touched() -> None:
    model = gpt2("eager").eval()
    seen: list[object] = []
    model.transformer.h[0].register_forward_hook(lambda *given: seen.append(given))
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    assert rehearsed(model).costs(2, 32)
    assert not seen and not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in module.__dict__ for module in model.modules())


class LooksAtValues(nn.Module):
    """A block whose shapes depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.linear(x) if x.sum().item() > 0 else x


def test_where_values_decide_the_weights_have_to_tell() -> None:
    model = llama("sdpa")
    model.model.layers[1] = LooksAtValues()
    integration = integration_for(model)
    division = find_units(model, [(f"model.layers.{i}", layer) for i, layer in enumerate(model.model.layers)])
    found = Rehearsal.of(model, division.units, CPU, integration)
    assert found is not None and found.costs(1, 16) is None
    tw.offload(model, goal="train", params="disk", activations="keep")
    assert tw.handle_of(model, "offload").predict_training(batch=2, tokens=64).working_bytes > 0


def test_a_model_of_unknown_inputs_and_a_wrapped_one_have_none() -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert Rehearsal.of(plain, [], CPU, integration_for(plain)) is None
    model = tw.fast_attention(llama("sdpa"))
    assert Rehearsal.of(model, [], CPU, integration_for(model)) is None


@pytest.mark.parametrize("build", [gpt2, bert])
def test_the_forecast_of_kept_activations_has_the_scores_in_it(build: Any) -> None:
    model = tw.offload(build("eager"), goal="train", params="disk", activations="keep")
    handle = tw.handle_of(model, "offload")
    short, long = (handle.predict_training(batch=2, tokens=tokens).working_bytes for tokens in (256, 512))
    scores = 3 * 2 * 4 * (512**2 - 256**2) * 4  # three blocks, two sequences, four heads, float32
    assert long - short > 3 * scores  # probabilities, the mask of dropout and their product


def test_swapped_bytes_are_those_that_were_counted() -> None:
    model = tw.offload(bert("eager"), goal="train", params="disk", activations="disk")
    handle = tw.handle_of(model, "offload")
    ids = torch.arange(2 * 400).view(2, 400) % 64
    model(input_ids=ids, labels=ids).loss.backward()
    written = handle.stats()["activation_bytes_saved"]
    assert handle.predict_training(batch=2, tokens=400).swapped_bytes == pytest.approx(written, rel=0.1)


def test_a_forward_that_cannot_be_tried_is_no_error_of_the_program() -> None:
    """Grouped products of float32 have no rule for shapes in torch 2.13, which logs a traceback."""
    heard: list[logging.LogRecord] = []
    log = logging.getLogger("torch._subclasses.fake_tensor")
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        model = by_name("mixtral").build()
        model.config._experts_implementation = "grouped_mm"
        assert rehearsed(model).costs(1, 8) is None
        log.error("of others")
    finally:
        log.removeHandler(handler)
    assert [record.getMessage() for record in heard] == ["of others"]
