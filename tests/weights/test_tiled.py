"""Linear layers computed in tiles: every column from the right rows, at the memory of a tile, and refused where it cannot be.

Weights and inputs are small whole numbers where results are compared bit for bit: their sums are exact in any order, so a difference
is a wrong byte and not a rounding.
"""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchwrap as tw
from tests.weights.budgets import smallest_budget, streamed
from tests.weights.training import at_rest
from torchwrap.offload.handle import OffloadHandle
from torchwrap.stream.tiles import ROWS
from torchwrap.weights.many import forward_many
from torchwrap.weights.tiled import TiledLayer

WIDTH, LABELS = 64, 4500
HEAD = WIDTH * LABELS * 4
TILE = 256 << 10


def whole_numbers(model: nn.Module) -> nn.Module:
    """The model with weights from -2 to 2 that are equal on every call."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    return model


class Classifier(nn.Module):
    """Blocks and a head that is several times as large as all of them."""

    def __init__(self, labels: int = LABELS, width: int = WIDTH, *, bias: bool = True, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width, bias=False), nn.Hardtanh(-3, 3)) for _ in range(blocks))
        self.head = nn.Linear(width, labels, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.head(x)
        return y


def make(**sizes: Any) -> Classifier:
    model = Classifier(**sizes).eval()
    whole_numbers(model)
    return model


def ask(*shape: int) -> torch.Tensor:
    return torch.randint(-2, 3, (*shape, WIDTH), generator=torch.Generator().manual_seed(sum(shape))).float()


def handle(model: nn.Module) -> OffloadHandle:
    found = tw.handle_of(model, "offload")
    assert isinstance(found, OffloadHandle)
    return found


def tiles_of(model: nn.Module) -> list[Any]:
    return [unit for unit in handle(model).units if unit.kind == "tile"]


def tiled(model: nn.Module, **fields: Any) -> nn.Module:
    return streamed(model, tile_above=TILE, **fields)


# -- what comes out ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 1), (2, 3), (70,), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_columns_come_from_their_rows(shape: tuple[int, ...], bias: bool) -> None:
    plain, x = make(bias=bias), ask(*shape)
    model = tiled(copy.deepcopy(plain))
    with torch.no_grad():
        expected = plain(x)
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert len(tiles_of(model)) == -(-HEAD // TILE)
    at_rest(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rounding_is_all_that_differs(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    plain = Classifier().eval().to(dtype)
    model = tiled(copy.deepcopy(plain))
    x = torch.randn(9, WIDTH, dtype=dtype)
    with torch.no_grad():
        expected, got = plain(x), model(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=2 * torch.finfo(dtype).eps * float(expected.abs().max()))


@settings(max_examples=30, deadline=None)
@given(labels=st.integers(2 * ROWS, 3000), width=st.integers(1, 90), rows=st.integers(1, 1500), batch=st.integers(1, 9), bias=st.booleans())
def test_any_shape_and_any_tile(labels: int, width: int, rows: int, batch: int, bias: bool) -> None:
    plain = whole_numbers(nn.Sequential(*(nn.Linear(width, width) for _ in range(2)), nn.Linear(width, labels, bias=bias)))
    x = torch.randint(-2, 3, (batch, width)).float()
    with torch.no_grad():
        expected = plain(x)
        model = tw.offload(copy.deepcopy(plain), params="disk", tile_above=rows * width * 4, units=("0", "1", "2"))
        assert torch.equal(model(x), expected)
        found = tiles_of(model)
        tw.unwrap(model)
        assert torch.equal(model(x), expected)
    if rows < labels:
        sizes = [unit.pieces[0].shape[0] for unit in found if unit.name.startswith("2")]
        assert sum(sizes) == labels and min(sizes) >= ROWS
        assert max(sizes) <= max(rows, 2 * ROWS - 1)


def test_under_autocast() -> None:
    plain, x = make(), ask(5)
    model = tiled(copy.deepcopy(plain))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, got = plain(x), model(x)
    assert expected.dtype == torch.bfloat16 and torch.equal(got, expected)


def test_in_inference_mode_and_outside_of_it() -> None:
    plain, x = make(), ask(2)
    model = tiled(copy.deepcopy(plain))
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), plain(x))


def test_the_layer_called_by_itself() -> None:
    plain, x = make(), ask(4)
    model = tiled(copy.deepcopy(plain))
    assert torch.equal(model.head(input=x), plain.head(x))
    with pytest.raises(TypeError):
        model.head()
    with pytest.raises(RuntimeError, match="shapes"):
        model.head(torch.ones(2, WIDTH + 1))
    at_rest(model)
    assert torch.equal(model(x), plain(x))


def test_several_batches_read_each_tile_once() -> None:
    plain, batches = make(), [ask(rows) for rows in (1, 4, 2)]
    model = tiled(copy.deepcopy(plain))
    with torch.no_grad():
        model(batches[0])
        handle(model).trim()
        before = handle(model).stats()["bytes_read"]
        outputs = forward_many(model, batches)
        assert handle(model).stats()["bytes_read"] - before <= handle(model).plan.streamed_bytes + (1 << 19)
        assert all(torch.equal(output, plain(batch)) for output, batch in zip(outputs, batches, strict=True))


# -- memory and reading ------------------------------------------------------------------------------------------------------------------


def test_a_weight_larger_than_the_budget() -> None:
    plain, x = make(), ask(3)
    model = tw.offload(copy.deepcopy(plain), device_memory=HEAD // 2, tile_above=TILE)
    with torch.no_grad():
        expected = plain(x)
        for _ in range(3):
            assert torch.equal(model(x), expected)
    stats = handle(model).stats()
    assert stats["held_bytes"] <= HEAD // 2
    engine = handle(model).engine
    assert engine is not None and 0 < sum(slot.host.nbytes for slot in engine._slots) <= stats["slot_bytes"] < HEAD // 2


def test_what_the_slots_leave_keeps_tiles() -> None:
    plain, x = make(), ask(3)
    model = tw.offload(copy.deepcopy(plain), device_memory=HEAD * 3 // 4, tile_above=TILE // 2)
    kept = sum(unit.nbytes for unit in tiles_of(model) if unit.pieces[0].resident)
    blocks = 3 * WIDTH * WIDTH * 4
    assert kept > HEAD // 8 and HEAD - kept <= handle(model).plan.streamed_bytes <= HEAD - kept + blocks
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x), plain(x))


def test_the_first_tiles_are_read_while_the_caller_does_something_else() -> None:
    model, x = tiled(make(), k=2), ask(1)
    with torch.no_grad():
        model(x)
        before = handle(model).stats()
        model(x)
    after = handle(model).stats()
    assert after["unit_hits"] - before["unit_hits"] == after["unit_uses"] - before["unit_uses"]
    assert after["bytes_read"] - before["bytes_read"] >= handle(model).plan.streamed_bytes


def test_a_weight_that_fits_after_all_is_one_piece_again() -> None:
    plain, x = make(), ask(3)
    model = tw.offload(copy.deepcopy(plain), device_memory=1 << 30, tile_above=TILE)
    assert not tiles_of(model) or all(not piece.tiles for piece in handle(model).pieces)
    assert not any(isinstance(layer, TiledLayer) for _, _, layer in places(model))
    assert "bit-identical" in str(tw.describe(model))
    assert torch.equal(model(x), plain(x)) and torch.equal(copy.deepcopy(model)(x), plain(x))


def places(model: nn.Module) -> list[Any]:
    from torchwrap.core.transaction import records_of

    return records_of(model)["offload"].places


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_tiles_are_no_advice_for_a_weight_that_is_to_be_trained(frozen: bool) -> None:
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.nbytes == HEAD:
            module.requires_grad_(not frozen)
    with pytest.raises(tw.BudgetError, match="tile_above=") as caught:
        tw.offload(model, device_memory=HEAD // 2, goal="train", reserve=0)
    assert ("Tiles do not help" in caught.value.fix) is not frozen and ("requires_grad_(False)" in caught.value.fix) is not frozen


def test_off_by_default_and_named_where_it_would_help() -> None:
    plain, x = make(), ask(2)
    with pytest.raises(tw.BudgetError, match="tile_above=") as caught:
        tw.offload(make(), device_memory=HEAD // 2)
    advised = int(caught.value.fix.partition("tile_above=")[2].rstrip("."))
    model = tw.offload(make(), device_memory=HEAD // 2, tile_above=advised)
    assert torch.equal(model(x), plain(x))
    with pytest.raises(tw.BudgetError) as caught:
        tw.offload(make(), device_memory=1 << 10)
    assert "tile_above" not in str(caught.value)


def test_described_as_equal_up_to_rounding() -> None:
    model = tiled(make())
    row = tw.describe(model).rows[1]
    assert row.exactness.startswith("allclose") and any("head is computed in" in note for note in row.notes)
    assert "tiles" in handle(model).explain()
    assert tw.describe(streamed(make())).rows[1].exactness == "bit-identical"


# -- what is cut and what is not ---------------------------------------------------------------------------------------------------------


class Other(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight * 2, self.bias)


@pytest.mark.parametrize("case", ["subclass", "shared", "parametrized", "pinned"])
def test_left_whole_where_others_may_look_at_the_weight(case: str) -> None:
    plain, fields = make(), {}
    if case == "subclass":
        plain.head = Other(WIDTH, LABELS)
    elif case == "shared":
        plain.add_module("twin", nn.Linear(WIDTH, LABELS))
        plain.twin.weight = plain.head.weight
    elif case == "parametrized":
        nn.utils.parametrizations.weight_norm(plain.head)
    else:
        fields = {"pin": ("head",)}
    model = tw.offload(plain, tile_above=TILE, device_memory=smallest_budget(plain, tile_above=TILE, **fields), **fields)
    assert not tiles_of(model)


def test_a_projection_inside_a_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 3000), nn.Linear(3000, WIDTH, bias=False)
            self.mix = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.mix(x) + self.down(self.up(x).clamp(-1, 1)).clamp(-3, 3)
            return y.clamp(-4, 4)

    plain, x = whole_numbers(nn.Sequential(*(Block() for _ in range(3)))).eval(), ask(3)
    expected = plain(x)
    model = tiled(copy.deepcopy(plain))
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert {unit.name.partition("[")[0] for unit in tiles_of(model)} == {f"{n}.up.weight" for n in range(3)}, "64 rows are one tile"
    assert all(unit.parent is not None for unit in tiles_of(model))
    at_rest(model)
    gradient = backward(model, x)
    assert torch.equal(gradient, backward(plain, x))
    with torch.no_grad():
        two, five = forward_many(model, [ask(2), ask(5)])
        assert torch.equal(two, plain(ask(2))) and torch.equal(five, plain(ask(5)))
    at_rest(model)


# -- a model of the usual kind -----------------------------------------------------------------------------------------------------------


def llama(*, tied: bool) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=6000, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=tied, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_generation_with_a_head_larger_than_the_budget(tied: bool) -> None:
    plain = llama(tied=tied)
    head = plain.lm_head.weight.nbytes
    prompt = torch.arange(1, 11).reshape(2, 5)
    wanted = plain.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    model = tw.offload(copy.deepcopy(plain), device_memory=head * 3 // 4, tile_above=head // 8)
    got = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    assert torch.equal(got, wanted)
    with torch.no_grad():
        expected = plain(prompt).logits
        torch.testing.assert_close(model(prompt).logits, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert handle(model).stats()["held_bytes"] < head
    assert tiles_of(model) and torch.equal(model.state_dict()["lm_head.weight"], plain.lm_head.weight)


def test_from_a_folder_and_saved_again(tmp_path: Path) -> None:
    plain = llama(tied=False)
    plain.save_pretrained(tmp_path / "one")
    model = tw.offload.from_pretrained(tmp_path / "one", params="disk", tile_above="256KiB")
    prompt = torch.arange(1, 6).reshape(1, 5)
    with torch.no_grad():
        expected = plain(prompt).logits
        torch.testing.assert_close(model(prompt).logits, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    piece = next(piece for piece in handle(model).pieces if piece.name == "lm_head.weight")
    assert all(tile.checksum is not None and tile.home.file is piece.home.file for tile in piece.tiles)
    model.save_pretrained(tmp_path / "two")
    again = type(plain).from_pretrained(tmp_path / "two")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in plain.state_dict().items())
    tw.unwrap(model)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


# -- the weight is still one weight --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [HEAD * 3 // 4, None], ids=["some tiles stay", "none stay"])
def test_states_copies_and_pickles(budget: int | None) -> None:
    plain, x = make(), ask(3)
    model = tiled(make()) if budget is None else tw.offload(make(), device_memory=budget, tile_above=TILE // 2)
    with torch.no_grad():
        expected = plain(x)
        twin = copy.deepcopy(model)
        for each in (model, twin, pickle.loads(pickle.dumps(model))):
            assert torch.equal(each(x), expected)
            state = each.state_dict()
            assert state.keys() == plain.state_dict().keys()
            assert all(torch.equal(value, plain.state_dict()[name]) for name, value in state.items())
        part = copy.deepcopy(model.head)
        assert torch.equal(part(x), plain.head(x))
        other = {name: -value for name, value in plain.state_dict().items()}
        model.load_state_dict(other)
        plain.load_state_dict(other)
        assert torch.equal(model(x), plain(x)) and torch.equal(twin(x), expected)
        with tw.core.tensors(model, "head.weight", write=True) as real:
            real["head.weight"].mul_(2)
        plain.head.weight.mul_(2)
        assert torch.equal(model(x), plain(x)) and torch.equal(copy.deepcopy(model)(x), plain(x))
        tw.unwrap(model)
        assert torch.equal(model.head.weight, plain.head.weight) and torch.equal(model(x), plain(x))
    at_rest(twin)


@pytest.mark.parametrize("budget", [HEAD * 3 // 4, None], ids=["some tiles stay", "none stay"])
def test_converted_to_a_narrower_type(budget: int | None) -> None:
    plain, x = make().bfloat16(), ask(3).bfloat16()
    model = tiled(make()) if budget is None else tw.offload(make(), device_memory=budget, tile_above=TILE // 2)
    with torch.no_grad():
        model(ask(3))
        assert torch.equal(model.bfloat16()(x), plain(x))
        assert torch.equal(model(x), plain(x))
    stats = handle(model).stats()
    assert stats["held_bytes"] <= HEAD * 3 // 4
    at_rest(model)


# -- backward ----------------------------------------------------------------------------------------------------------------------------


def backward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    (output * torch.arange(output.numel()).reshape(output.shape).remainder(3)).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("budget", [HEAD * 3 // 4, None], ids=["some tiles stay", "none stay"])
def test_gradients_of_input_weight_and_bias(budget: int | None) -> None:
    plain, x = make(), ask(2, 3)
    model = tiled(make()) if budget is None else tw.offload(make(), device_memory=budget, tile_above=TILE // 2)
    for _ in range(2):
        assert torch.equal(backward(model, x), backward(plain, x))
        for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert one.grad is not None and torch.equal(one.grad, other.grad), name
    at_rest(model)


def test_a_frozen_head_under_trained_blocks() -> None:
    plain, x = make(), ask(4)
    for each in (plain, model := copy.deepcopy(plain)):
        each.head.requires_grad_(False)
    tiled(model)
    assert torch.equal(backward(model, x), backward(plain, x))
    assert model.head.weight.grad is None
    reference = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.5)
    optimizer = tw.OffloadedOptimizer(model, torch.optim.SGD, lr=0.5)
    optimizer.step()
    reference.step()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_between_a_backward_that_updated_weights_and_the_step_it_is_refused() -> None:
    model = tiled(make())
    for parameter in model.head.parameters():
        parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = tw.OffloadedOptimizer(model, torch.optim.SGD, params=trained, lr=1.0, chunk=4096)
    model(ask(3)).square().mean().backward()
    for part, x in ((model, ask(3)), (model.head, torch.ones(1, WIDTH))):
        with pytest.raises(tw.ConflictError, match=r"step\(\) first"):
            part(x)
    optimizer.step()
    model.head(torch.ones(1, WIDTH))


def test_a_trained_weight_in_tiles_is_refused_by_the_optimizer() -> None:
    with pytest.raises(tw.UnsupportedModelError, match=r"head\.weight"):
        tw.OffloadedOptimizer(tiled(make()), torch.optim.SGD, lr=0.5)


def test_unwrapped_between_forward_and_backward() -> None:
    plain, x = make(), ask(2)
    model, one, other = tiled(make()), x.clone().requires_grad_(), x.clone().requires_grad_()
    plain(other).sum().backward()
    loss = model(one).sum()
    tw.unwrap(model)
    loss.backward()
    assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_a_weight_replaced_between_forward_and_backward() -> None:
    model, x = tiled(make()), ask(2).requires_grad_()
    loss = model(x).sum()
    with tw.core.tensors(model, "head.weight", write=True) as real:
        real["head.weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- faults ------------------------------------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    status = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 4]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("verify", ["first", "always"])
@pytest.mark.parametrize("passes", [0, 1], ids=["first read", "later read"])
def test_a_flipped_bit_in_a_tile_is_refused(passes: int, verify: Any) -> None:
    plain, x = make(), ask(2)
    model = tiled(make(), verify=verify)
    with torch.no_grad():
        for _ in range(passes):
            model(x)
        handle(model).trim()
        tile = tiles_of(model)[2].pieces[0]
        flip(Path(tile.home.file.path), tile.home.offset + tile.nbytes - 5)
        with pytest.raises(tw.CorruptDataError) as caught:
            model(x)
        assert tile.name in str(caught.value)
        with pytest.raises(tw.CorruptDataError):
            model.state_dict()
        flip(Path(tile.home.file.path), tile.home.offset + tile.nbytes - 5)
        assert torch.equal(model(x), plain(x))
    at_rest(model)


def test_a_flipped_bit_in_a_folder_is_refused_by_state_dict_too(tmp_path: Path) -> None:
    llama(tied=False).save_pretrained(tmp_path)
    model = tw.offload.from_pretrained(tmp_path, params="disk", tile_above="256KiB")
    with torch.no_grad():
        model(torch.ones(1, 2, dtype=torch.long))
    handle(model).trim()
    tile = tiles_of(model)[1].pieces[0]
    flip(tmp_path / "model.safetensors", tile.home.offset)
    with pytest.raises(tw.CorruptDataError, match=r"lm_head"):
        model.state_dict()


def test_an_interrupted_product_leaves_nothing_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = make(), ask(2)
    model = tiled(make())
    real, calls = torch.nn.functional.linear, []

    def interrupted(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with torch.no_grad():
        monkeypatch.setattr("torchwrap.weights.tiled.linear", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        monkeypatch.undo()
        at_rest(model)
        assert torch.equal(model(x), plain(x))
