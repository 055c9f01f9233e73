"""Masks for transformers: the same as its own `sdpa_mask`, known by their closures or not, and lazy all through a model."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, masking_utils
from transformers.masking_utils import AttentionMaskInterface

import torchwrap as tw
from tests.attention.masks import whole
from torchwrap.attention.masks.fields import TENSOR_FIELDS
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core.errors import ConfigError
from torchwrap.integrations.transformers import masks as subject
from torchwrap.integrations.transformers.masks import tile_mask, user_mask

Tensor = torch.Tensor
Request = dict[str, Any]


def causal_or_band(draw: random.Random, batch: int) -> Callable[..., Tensor]:
    return draw.choice((
        lambda: masking_utils.causal_mask_function,
        lambda: masking_utils.bidirectional_mask_function,
        lambda: masking_utils.sliding_window_causal_mask_function(draw.randint(1, 8)),
        lambda: masking_utils.sliding_window_bidirectional_mask_function(draw.randint(0, 5)),
        lambda: masking_utils.chunked_causal_mask_function(draw.randint(1, 6), torch.randint(0, 6, (batch,))),
    ))()  # fmt: skip


def random_request(draw: random.Random, vmap: bool = False) -> Request:
    """Arguments as transformers gives them to a mask function, every kind that its `create_*_mask` functions can make."""
    batch, q_length, kv_length = draw.randint(1, 3), draw.randint(1, 10), draw.randint(1, 16)
    q_offset, kv_offset, attention_mask = draw.randint(0, 12), draw.choice((0, 0, draw.randint(0, 5))), None
    function = causal_or_band(draw, batch)
    if vmap:
        edge = draw.randint(0, 12)
        combine = draw.choice((masking_utils.or_masks, masking_utils.and_masks))
        function = combine(function, lambda b, h, q, k: torch.where(k < edge, b >= 0, q == k))
    kind = draw.random()
    if kind < 0.15:  # packed rows, which transformers makes without a cache and without a 2-D mask
        kv_length, q_offset, kv_offset = q_length, 0, 0
        positions = torch.stack([torch.cat([torch.arange(n) for n in parts(draw, q_length)]) for _ in range(batch)])
        numbers = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        function = masking_utils.packed_sequence_compatibility_function(function, positions, numbers)
    elif kind < 0.85:
        columns = kv_offset + kv_length + draw.choice((0, 0, -2, 3))
        attention_mask = draw.choice((left_padding, right_padding, holes, everything))(draw, batch, max(columns, 1))
    if draw.random() < 0.08:
        function = masking_utils.or_masks(function, masking_utils.blockwise_overlay(torch.randint(-1, 2, (batch, 40))))
    return {
        "batch_size": batch, "q_length": q_length, "kv_length": kv_length, "mask_function": function, "attention_mask": attention_mask,
        "q_offset": torch.tensor(q_offset) if draw.random() < 0.3 else q_offset, "kv_offset": kv_offset, "use_vmap": vmap,
        "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "dtype": torch.float32, "config": None, "device": "cpu",
    }  # fmt: skip


def parts(draw: random.Random, total: int) -> list[int]:
    found = []
    while total:
        found.append(draw.randint(1, total))
        total -= found[-1]
    return found


def left_padding(draw: random.Random, batch: int, columns: int) -> Tensor:
    return torch.arange(columns) >= torch.randint(0, columns + 1, (batch, 1))


def right_padding(draw: random.Random, batch: int, columns: int) -> Tensor:
    return torch.arange(columns) < torch.randint(0, columns + 1, (batch, 1))


def holes(draw: random.Random, batch: int, columns: int) -> Tensor:
    return torch.rand(batch, columns) < 0.7


def everything(draw: random.Random, batch: int, columns: int) -> Tensor:
    return torch.ones(batch, columns, dtype=torch.bool)


def frameworks(request: Request) -> Tensor:
    made = masking_utils.sdpa_mask(**request)
    assert made is not None
    return made.expand(request["batch_size"], 1, request["q_length"], request["kv_length"])


@pytest.mark.parametrize("seed", range(5))
def test_ten_thousand_masks_are_those_of_the_framework(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    known = 0
    for _ in range(2000):
        request = random_request(draw)
        mask = tile_mask(**request)
        assert torch.equal(whole(mask), frameworks(request)), (mask, request)
        known += mask.dictionary is None
    assert known > 1700  # of 2000: all but masks of blocks, which have no closed form


def test_functions_that_do_not_broadcast_are_those_of_the_framework() -> None:
    draw = random.Random(1)
    for _ in range(60):
        request = random_request(draw, vmap=True)
        mask = tile_mask(**request)
        assert torch.equal(whole(mask), frameworks(request)), (mask, request)


NAMED: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "causal": (masking_utils.causal_mask_function, {"right"}),
    "bidirectional": (masking_utils.bidirectional_mask_function, set()),
    "window": (masking_utils.sliding_window_causal_mask_function(4), {"right", "left"}),
    "window of both sides": (masking_utils.sliding_window_bidirectional_mask_function(4), {"right", "left"}),
    "chunks": (masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)), {"right", "chunk", "shift"}),
    "padding": (
        masking_utils.and_masks(
            masking_utils.causal_mask_function, masking_utils.padding_mask_function(torch.arange(8).expand(2, -1) % 7 > 0)
        ),
        {"right", "kv_start", "kv_end"},
    ),
    "packed": (
        masking_utils.packed_sequence_compatibility_function(
            masking_utils.sliding_window_causal_mask_function(3), torch.arange(8).expand(2, -1) % 4, torch.arange(8).expand(2, -1) // 4
        ),
        {"right", "left", "q_segments", "k_segments"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "conditions"), NAMED.values(), ids=NAMED.keys())
def test_the_closures_of_this_version_are_known(function: Callable[..., Any], conditions: set[str]) -> None:
    """Fails when transformers renames or rebuilds one: masks stay right, but are evaluated instead of read. Then mend `_READERS`."""
    mask = tile_mask(batch_size=2, q_length=8, kv_length=8, mask_function=function)
    given = {name for name in ("right", "left", "chunk", *TENSOR_FIELDS) if getattr(mask, name) is not None}
    assert mask.dictionary is None and given == conditions


@pytest.mark.parametrize("function", [function for function, _ in NAMED.values()], ids=NAMED.keys())
def test_without_known_closures_masks_are_the_same(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    known = whole(tile_mask(batch_size=2, q_length=8, kv_length=8, mask_function=function))
    monkeypatch.setattr(subject, "_READERS", {})
    mask = tile_mask(batch_size=2, q_length=8, kv_length=8, mask_function=function)
    assert mask.dictionary is not None and torch.equal(whole(mask), known)


def test_a_function_of_the_same_name_elsewhere_is_not_taken_for_it() -> None:
    def causal_mask_function(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k >= q

    causal_mask_function.__qualname__ = "causal_mask_function"
    mask = tile_mask(batch_size=1, q_length=4, kv_length=4, mask_function=causal_mask_function)
    assert torch.equal(whole(mask)[0, 0], torch.ones(4, 4).bool().triu())


@pytest.mark.parametrize("positions", [[0, 1, 0, 1, 2, 4], [3, 2, 1, 0, 1, 2]], ids=["positions are skipped", "segments come back"])
def test_packed_rows_that_are_no_runs_are_evaluated(positions: list[int]) -> None:
    numbers = torch.tensor([[0, 0, 1, 1, 1, 1]] if positions[0] == 0 else [[0, 1, 0, 0, 1, 1]])
    function = masking_utils.packed_sequence_compatibility_function(masking_utils.causal_mask_function, torch.tensor([positions]), numbers)
    request = {"batch_size": 1, "q_length": 6, "kv_length": 6, "mask_function": function, "allow_is_causal_skip": False}
    mask = tile_mask(**request)
    assert mask.dictionary is not None and torch.equal(whole(mask), frameworks(request))


def test_masks_stay_small_whatever_the_length() -> None:
    batch, length = 2, 65536
    for function in (masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function(4096)):
        padding = torch.arange(length) >= torch.tensor([[100], [0]])
        padding[:, 500] = False
        mask = tile_mask(batch_size=batch, q_length=length, kv_length=length, mask_function=function, attention_mask=padding)
        classes, live = mask.tiles(128, 128), mask.live_rows()
        held = [part for name in TENSOR_FIELDS if (part := getattr(mask, name)) is not None]
        assert len(held) == 2  # where rows begin, and holes
        held += [mask.spans().first, mask.spans().end, live, classes.lo, classes.hi, classes.full_lo, classes.full_hi]
        assert sum(tensor.untyped_storage().nbytes() for tensor in held) <= 64 * 1024 + 16 * batch * 2 * length + 16 * length // 128


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[2, 1, 4, 4\]"):
        tile_mask(batch_size=2, q_length=4, kv_length=4, attention_mask=torch.ones(2, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"\[3\]"):
        tile_mask(batch_size=2, q_length=4, kv_length=4, attention_mask=torch.eye(3, 4).bool())


def test_masks_of_users_are_read_once_and_again_when_written_to() -> None:
    dense = torch.rand(2, 1, 6, 6) < 0.5
    first = user_mask(dense, dense.shape[2])
    assert isinstance(first, TileMask) and user_mask(dense, dense.shape[2]) is first and torch.equal(whole(first), dense)
    dense[0, 0, 0] = True
    second = user_mask(dense, dense.shape[2])
    assert isinstance(second, TileMask) and torch.equal(whole(second), dense)
    bias = torch.randn(2, 1, 6, 6)
    assert user_mask(bias, bias.shape[2]) is bias and user_mask(second, second.shape[2]) is second


def test_a_bias_that_is_learned_from_zero_has_gradients() -> None:
    config = transformers.SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[2], num_heads=[2], window_size=2)
    model = tw.fast_attention(transformers.SwinModel(config))
    tables = [parameter for name, parameter in model.named_parameters() if name.endswith("bias_table")]
    assert tables and not any(table.any() for table in tables)
    model(torch.randn(1, 3, 16, 16)).last_hidden_state.square().sum().backward()
    assert all(table.grad is not None and bool(table.grad.any()) for table in tables)


def test_masks_of_inference_mode_are_served_too() -> None:
    with torch.inference_mode():
        dense = torch.rand(2, 1, 6, 6) < 0.5
        mask = user_mask(dense, dense.shape[2])
        assert isinstance(mask, TileMask) and torch.equal(whole(mask), dense)
        dense[0] = False
        again = user_mask(dense, dense.shape[2])
        assert isinstance(again, TileMask) and torch.equal(whole(again), dense)
        assert isinstance(again.detach(), TileMask) and isinstance(again.to("cpu", copy=True), TileMask)


def test_using_them_registers_and_changes_nothing() -> None:
    before = dict(AttentionMaskInterface._global_mapping), dict(AttentionInterface._global_mapping)
    padding = torch.tensor([[False, True, True, False]])
    mask = tile_mask(batch_size=1, q_length=4, kv_length=4, attention_mask=padding)
    assert (dict(AttentionMaskInterface._global_mapping), dict(AttentionInterface._global_mapping)) == before
    assert mask.key_range(0) == (1, 3) and padding.tolist() == [[False, True, True, False]]


# Through whole models


@pytest.fixture
def lazily() -> Iterator[str]:
    """A name under which models get masks that are rules, with an attention function that reads them as rectangles."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None, **_: Any) -> Any:
        assert isinstance(mask, TileMask)
        mask = mask.sub(columns=(0, key.shape[2]))
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=whole(mask), scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    name = "masks_as_rules"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, tile_mask)
    yield name
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop(name)


_SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=None, max_position_embeddings=128,
)  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 5}),
    "chunks": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        {
            "attention_chunk_size": 4, "layer_types": ["chunked_attention", "full_attention"], "intermediate_size_mlp": 48,
            "num_local_experts": 2,
        },
    ),
    "two kinds of layers": (
        "Qwen2ForCausalLM", "Qwen2Config",
        {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}  # fmt: skip


def built(kind: str) -> Any:
    model, config, more = MODELS[kind]
    torch.manual_seed(3)
    made = getattr(transformers, model)(getattr(transformers, config)(**_SIZES, **more)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


GENERATED: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beam": {"num_beams": 3},
}


@pytest.mark.parametrize("options", GENERATED.values(), ids=GENERATED.keys())
@pytest.mark.parametrize("kind", MODELS)
def test_generation_never_makes_a_mask(kind: str, options: dict[str, Any], lazily: str) -> None:
    model = built(kind)
    ids = torch.randint(2, 64, (2, 7))
    padding = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    asked = dict(attention_mask=padding, max_new_tokens=8, do_sample=False, **options)
    expected = model.generate(ids, **asked)
    model.set_attn_implementation(lazily)
    before = TileMask.materialisations
    assert torch.equal(model.generate(ids, **asked), expected)
    assert TileMask.materialisations == before


def test_packed_rows_are_recognised_in_training(lazily: str) -> None:
    model = built("llama")
    ids, positions = torch.randint(2, 64, (1, 9)), torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    expected = model(ids, position_ids=positions, use_cache=False).logits
    model.set_attn_implementation(lazily)
    before = TileMask.materialisations
    out = model(ids, position_ids=positions, use_cache=False).logits
    assert TileMask.materialisations == before and torch.allclose(out, expected, atol=1e-5)


def test_encoders_get_masks_of_both_sides(lazily: str) -> None:
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.BertModel(config).eval()
    ids, padding = torch.randint(2, 64, (2, 7)), torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7])
    expected = model(ids, attention_mask=padding).last_hidden_state[padding.bool()]
    model.set_attn_implementation(lazily)
    before = TileMask.materialisations
    out = model(ids, attention_mask=padding).last_hidden_state[padding.bool()]
    assert TileMask.materialisations == before and torch.allclose(out, expected, atol=1e-5)


# Through accelerate, which moves, concatenates and walks over what models take


def test_accelerate_passes_masks_on() -> None:
    from accelerate.utils import find_batch_size, recursively_apply, send_to_device

    mask, before = TileMask.padded([2, 5], 5, 5), TileMask.materialisations
    inputs = {"masks": {"full_attention": mask}, "other": (torch.ones(2), 3)}
    sent = send_to_device(inputs, "cpu")["masks"]["full_attention"]
    walked = recursively_apply(lambda tensor: tensor.detach(), inputs)["masks"]["full_attention"]
    moved = send_to_device(inputs, "meta", non_blocking=True)["masks"]["full_attention"]
    copied = copy.deepcopy(inputs)["masks"]["full_attention"]
    assert TileMask.materialisations == before and find_batch_size(inputs) == 2
    assert all(isinstance(passed, TileMask) for passed in (sent, walked, moved, copied)) and moved.device.type == "meta"
    assert all(torch.equal(whole(passed), whole(mask)) for passed in (sent, walked, copied))


def test_masks_are_made_under_the_compiler(lazily: str) -> None:
    config = transformers.MistralConfig(sliding_window=3, **_SIZES)
    config._attn_implementation = lazily

    def seen(x: Tensor, padding: Tensor | None) -> Tensor:
        mask = masking_utils.create_sliding_window_causal_mask(config, x, padding, None)
        return (x * 2).sum() + mask.rectangles((0, 6), (0, 6)).sum()  # type: ignore[union-attr]

    torch._dynamo.reset()
    compiled, x = torch.compile(seen, backend="eager"), torch.ones(2, 6, 32)
    for padding in (None, torch.ones(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), torch.tensor([[0, 1, 0, 1, 1, 0], [1] * 6])):
        assert torch.equal(compiled(x, padding), seen(x, padding))
