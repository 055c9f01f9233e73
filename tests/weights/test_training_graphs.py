"""Graphs that training scripts make of a streamed model: kept, twice differentiated, cut short, run in other threads, hooked into."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchwrap as tw
from tests.models import by_name
from tests.weights.budgets import streamed
from tests.weights.training import Blocks, at_rest, different_gradients, loss_of
from torchwrap.core import tensors
from torchwrap.offload.handle import OffloadHandle
from torchwrap.stream.units import Unit

FIXTURE = by_name("llama")
both_slots = pytest.mark.parametrize("k", [1, 2])


class Heard:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.units: list[int] = []
        self.ends: list[BaseException | None] = []
        self.tables: list[tuple[int, bool]] = []
        self.begun = 0

    def backward_begun(self) -> None:
        self.begun += 1

    def unit_done(self, unit: Unit) -> None:
        self.units.append(unit.index)

    def table_reached(self, nbytes: int) -> None:
        self.tables.append((nbytes, bool(self.ends)))

    def backward_done(self, error: BaseException | None) -> None:
        self.ends.append(error)


def _pair(k: int = 1, **fields: Any) -> tuple[nn.Module, nn.Module, OffloadHandle]:
    plain, model = FIXTURE.build().train(), FIXTURE.build().train()
    for each in (plain, model):
        each.set_attn_implementation("eager")  # the fused attention of torch 2.13 cannot be differentiated twice on the CPU
    streamed(model, k=k, **fields)
    handle = tw.handle_of(model, "offload")
    assert isinstance(handle, OffloadHandle)
    return plain, model, handle


def _loss(model: nn.Module) -> torch.Tensor:
    return loss_of(model, FIXTURE.inputs())


@both_slots
def test_backward_twice_through_a_kept_graph(k: int) -> None:
    plain, model, _ = _pair(k)
    for each in (plain, model):
        loss = _loss(each)
        loss.backward(retain_graph=True)
        loss.backward()
    assert different_gradients(model, plain) == []
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss_of(model, FIXTURE.inputs()).backward()
    at_rest(model)


@both_slots
def test_gradients_of_gradients(k: int) -> None:
    plain, model, _ = _pair(k)
    for each in (plain, model):
        gradients = torch.autograd.grad(_loss(each), list(each.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
    assert different_gradients(model, plain) == []
    at_rest(model)


def test_gradients_of_inputs_only() -> None:
    plain, model, _ = _pair()
    found = []
    for each in (plain, model):
        x = each.get_input_embeddings()(FIXTURE.inputs()["input_ids"]).detach().requires_grad_()
        found += torch.autograd.grad(each(inputs_embeds=x).logits.square().mean(), [x])
    assert torch.equal(*found)
    at_rest(model)


@both_slots
def test_backward_in_another_thread(k: int) -> None:
    plain, model, _ = _pair(k)
    for each in (plain, model):
        loss = _loss(each)
        _in_threads(loss.backward)
    assert different_gradients(model, plain) == []
    at_rest(model)


@both_slots
def test_two_backwards_at_once(k: int) -> None:
    plain, model, handle = _pair(k)
    for each in (plain, model):
        losses = [_loss(each) * 2**n for n in range(2)]  # powers of two: the sum does not depend on the order
        _in_threads(*(loss.backward for loss in losses))
    assert different_gradients(model, plain) == []
    at_rest(model)
    assert len(handle.engine._slots) <= k


@both_slots
def test_a_forward_while_a_backward_runs_in_another_thread(k: int) -> None:
    plain, model, _ = _pair(k)
    expected = _loss(plain).detach()
    loss, got = _loss(model), []
    inside, done = threading.Event(), threading.Event()

    def pause(_: torch.Tensor) -> None:
        inside.set()
        assert done.wait(20)

    hook = model.model.layers[1].self_attn.q_proj.weight.register_hook(pause)

    def forward() -> None:
        assert inside.wait(20)
        with torch.no_grad():
            got.append(_loss(model))
        done.set()

    _in_threads(loss.backward, forward)
    hook.remove()
    _loss(plain).backward()
    assert torch.equal(got[0], expected) and different_gradients(model, plain) == []
    at_rest(model)


def _in_threads(*calls: Any) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


class Boom(Exception):
    pass


@both_slots
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_an_exception_inside_backward_leaves_nothing_behind(name: str, k: int) -> None:
    plain, model, handle = _pair(k)
    heard = Heard()
    handle.backward.listeners.append(heard)

    def fail(_: torch.Tensor) -> None:
        raise Boom

    hook = model.get_parameter(name).register_hook(fail)
    for _ in range(3):
        with pytest.raises(Boom):
            _loss(model).backward()
    hook.remove()
    model.zero_grad()
    for each in (plain, model):
        _loss(each).backward()
    assert different_gradients(model, plain) == []
    at_rest(model)
    assert [type(end) for end in heard.ends] == [RuntimeError] * 3 + [type(None)]


def test_saving_after_an_exception_inside_backward() -> None:
    plain, model, _ = _pair()

    def fail(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    model.model.layers[1].mlp.up_proj.weight.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        _loss(model).backward()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    tw.unwrap(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_listeners_hear_of_a_table_before_its_gradient_is_made(tied: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.block, self.head = nn.Embedding(2048, 256), nn.Linear(256, 256), nn.Linear(256, 2048, bias=False)
            self.head.weight = self.table.weight if tied else self.head.weight

        def forward(self, ids: torch.Tensor) -> Any:
            return self.head(self.block(self.table(ids)))

    model = tw.offload(Model(), params="disk", units=("block",))
    handle = tw.handle_of(model, "offload")
    heard = Heard()
    handle.backward.listeners.append(heard)
    gradients: list[int] = []
    model.table.weight.register_post_accumulate_grad_hook(lambda _: gradients.append(len(heard.tables)))  # type: ignore[union-attr]
    model(torch.tensor([[3, 5]])).square().mean().backward()
    nbytes = 2048 * 256 * 4
    assert heard.tables == [(2 * nbytes if tied else nbytes, False)]
    assert gradients == [1]


def test_listeners_hear_every_unit_once_and_the_end_last() -> None:
    _, model, handle = _pair(2)
    heard = Heard()
    handle.backward.listeners.append(heard)
    complete: dict[int, bool] = {}

    def unit_done(unit: Unit) -> None:
        heard.units.append(unit.index)
        complete[unit.index] = all(piece.parameter.grad is not None for piece in unit.pieces)

    heard.unit_done = unit_done  # type: ignore[method-assign]
    _loss(model).backward()
    assert heard.units == [3, 2, 1, 0] and heard.ends == [None] and all(complete.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_only_the_outermost_backward_ends(reentrant: bool) -> None:
    _, model = Blocks.pair()
    model.around = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    streamed(model, units=("_Routed",))
    handle, heard = tw.handle_of(model, "offload"), Heard()
    handle.backward.listeners.append(heard)
    for count in (1, 2):
        loss_of(model, {"ids": torch.arange(24)}).backward()
        assert heard.ends == [None] * count and heard.begun == count


def test_units_are_read_once_for_each_pass_and_ahead_of_their_use() -> None:
    _, model, handle = _pair(2)
    for _ in range(3):
        _loss(model).backward()
    before = handle.stats()
    _loss(model).backward()
    after = handle.stats()
    units = len(handle.units)
    assert after["unit_uses"] - before["unit_uses"] == 2 * units
    assert after["unit_hits"] - before["unit_hits"] == 2 * units  # each was being read when it was asked for
    assert after["schedule_miss"] == before["schedule_miss"]
    assert after["bytes_read"] - before["bytes_read"] <= 2 * handle.engine.layout(handle.units[0]).read_bytes * units


def test_writing_between_forward_and_backward_is_torchs_error() -> None:
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        _, model, _ = _pair()
        loss = _loss(model)
        with tensors(model, name, write=True) as real:
            real[name].mul_(1.0)
        if name.startswith("model.layers"):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()  # an embedding's gradient does not depend on its values
        _loss(model).backward()
        at_rest(model)


def test_an_activation_written_to_is_torchs_error() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x).sigmoid()
            y.mul_(2)  # sigmoid's gradient needs what it returned
            return y

    model = nn.Sequential(*(Doubling() for _ in range(3)))
    streamed(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(torch.ones(2, 64)).sum().backward()


def test_views_that_outlive_the_unit_are_not_overwritten() -> None:
    _, model, handle = _pair(2)
    plain = dict(FIXTURE.build().named_parameters())
    kept: list[torch.Tensor] = []
    take = handle.engine.held_view

    def keep(piece: Any) -> tuple[torch.Tensor, int] | None:
        held = take(piece)
        if held is not None and len(kept) < 3:
            kept.append(held[0])
            names.append(piece.name)
        return held

    names: list[str] = []
    handle.engine.held_view = keep
    for _ in range(2):
        _loss(model).backward()
    assert len(kept) == 3
    assert all(torch.equal(view, plain[name]) for view, name in zip(kept, names, strict=True))
    del handle.engine.held_view
    at_rest(model)


def test_hooks_outside_get_the_activations_and_no_weight() -> None:
    plain, model, handle = _pair()
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        assert handle.engine.piece_at(tensor) is None
        sizes.append(tensor.numel())
        return tensor.detach().clone()

    for each in (plain, model):
        if each is plain:
            _loss(each).backward()
        else:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = _loss(each)
            loss.backward()
    assert sizes and different_gradients(model, plain) == []
    at_rest(model)


def test_activation_checkpointing_frees_activations() -> None:
    def kept(model: nn.Module) -> int:
        """Bytes of tensors that live only because of the graph."""
        before = {id(t) for t in _tensors()}
        loss = _loss(model)
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors() if id(t) not in before}
        loss.backward()
        return sum(found.values())

    _, model, _ = _pair()
    kept(model)
    whole = kept(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert kept(model) < whole / 2


def test_autocast_keeps_no_copies_of_weights() -> None:
    _, model, _ = _pair()
    model.model.layers[1].requires_grad_(False)
    weights = {parameter.numel() for name, parameter in model.named_parameters() if "layers" in name and parameter.dim() == 2}
    for _ in range(2):
        before = {id(t) for t in _tensors()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = _loss(model)
            copies = [t for t in _tensors() if id(t) not in before and t.dtype == torch.bfloat16 and t.numel() in weights and t.dim() == 2]
            assert copies == []
        loss.backward()


def _tensors() -> Iterator[torch.Tensor]:
    gc.collect()
    return (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))


def test_graphs_die_with_their_loss() -> None:
    _, model, _ = _pair()
    alive = []
    for _ in range(4):
        loss = _loss(model)
        del loss
        alive.append(len(list(_tensors())))
    assert alive[1] == alive[3]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["single", "foreach", "fused"])
def test_an_ordinary_optimizer_is_refused_before_it_writes(options: dict[str, bool]) -> None:
    plain, model, _ = _pair()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    optimizer.step()  # no gradients, so nothing to write
    _loss(model).backward()
    with pytest.raises(tw.ConflictError, match="OffloadedOptimizer"):
        optimizer.step()
    assert torch.equal(_loss(model), _loss(plain))
    tw.unwrap(model)
    optimizer.step()
    assert not torch.equal(_loss(model), _loss(plain))
