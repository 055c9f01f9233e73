"""What blocks save for the backward: kept, recomputed, moved to disk and back. The numbers are those of the unwrapped model."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchwrap as tw
from tests.models import ModelFixture, by_name
from tests.pairs import every_two
from tests.weights.budgets import streamed
from tests.weights.training import at_rest, different_gradients, loss_of
from torchwrap.activations import modes, swap
from torchwrap.offload.handle import OffloadHandle
from torchwrap.storage import writing

FAMILIES = [by_name(name) for name in ("llama-tied", "gpt2", "t5", "vit", "albert", "mixtral")]
every_family = pytest.mark.parametrize("fixture", FAMILIES, ids=lambda fixture: fixture.name)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ["recompute", "disk", "auto", "mixed"]
every_mode = pytest.mark.parametrize("mode", MODES)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are small, so that everything they save would stay."""
    monkeypatch.setattr(swap, "SMALLEST", 64)


def _handle(model: nn.Module) -> OffloadHandle:
    handle = tw.handle_of(model, "offload")
    assert isinstance(handle, OffloadHandle)
    return handle


def _wrapped(model: nn.Module, mode: str, **fields: Any) -> nn.Module:
    """Streamed, in a mode; "mixed" is what "auto" may come to, whatever the time it takes here."""
    streamed(model, activations="auto" if mode == "mixed" else mode, **fields)
    if mode == "mixed":
        handle = _handle(model)
        handle.activations._costs = None
        kinds = ("swap", "keep", "recompute", "swap")
        handle.activations.choices = {unit.index: kinds[i % 4] for i, unit in enumerate(u for u in handle.units if u.kind == "block")}
    return model


def _inputs(fixture: ModelFixture, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fixture.inputs().items()}
    return {**inputs, "use_cache": False} if fixture.generates else inputs


def _pair(name: str = "llama-tied", mode: str = "disk", **fields: Any) -> tuple[nn.Module, nn.Module, OffloadHandle]:
    fixture = by_name(name)
    plain, model = fixture.build().train(), fixture.build().train()
    for each in (plain, model):
        if hasattr(each, "set_attn_implementation"):
            each.set_attn_implementation("eager")
    _wrapped(model, mode, **fields)
    return plain, model, _handle(model)


def _loss(model: nn.Module, seed: int = 0, name: str = "llama-tied") -> torch.Tensor:
    torch.manual_seed(seed)
    return loss_of(model, _inputs(by_name(name)))


def _nothing_left(handle: OffloadHandle) -> None:
    """No graph is alive, so nothing is stored, loaded or on its way."""
    gc.collect()
    moved = handle.activations.swap
    assert not list(moved._stored) and not any(use.living() for use in moved._loaded)
    assert not any(each() for _, records in moved._known.values() for each in records)


@every_two(fixture={fixture.name: fixture for fixture in FAMILIES}, dtype=DTYPES, mode={mode: mode for mode in MODES})
def test_steps(fixture: ModelFixture, dtype: torch.dtype, mode: str) -> None:
    plain, model = fixture.build().to(dtype).train(), fixture.build().to(dtype).train()
    _wrapped(model, mode)
    inputs = _inputs(fixture, dtype)
    for step in range(3 if mode == "auto" else 2):
        losses, states = [], []
        for each in (plain, model):
            torch.manual_seed(step)
            losses.append(loss_of(each, inputs))
            losses[-1].backward()
            states.append(torch.get_rng_state())
        assert torch.equal(*losses) and torch.equal(*states)
    assert different_gradients(model, plain) == []
    at_rest(model)
    if mode in ("disk", "mixed"):
        stats = _handle(model).stats()
        assert stats["activation_bytes_saved"] > 0
        if mode == "disk":
            assert 0 < stats["activation_bytes_read"] <= stats["activation_bytes_written"] < stats["activation_bytes_saved"]


@every_mode
def test_with_the_optimizer_on_disk(mode: str) -> None:
    plain, model, _ = _pair(mode=mode)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW(plain.parameters(), **options), tw.OffloadedOptimizer(model, torch.optim.AdamW, **options)]
    for step in range(3):
        losses = []
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            losses.append(_loss(each, step))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(*losses)
    with tw.core.tensors(model) as real:
        assert all(torch.equal(real[name], parameter) for name, parameter in plain.named_parameters())


@pytest.mark.parametrize("mode", ["recompute", "disk"])
def test_weights_that_all_stay(mode: str) -> None:
    fixture = by_name("gpt2")
    plain, model = fixture.build().train(), fixture.build().train()
    tw.offload(model, params="device", activations=mode, record=True)
    for each in (plain, model):
        for step in range(2):
            torch.manual_seed(step)
            loss_of(each, _inputs(fixture)).backward()
    assert different_gradients(model, plain) == []
    if mode == "disk":
        handle = _handle(model)
        assert handle.stats()["activation_bytes_written"] > 0
        assert {"save", "load"} <= {event.lane for event in handle.events}
        written = sum(event.nbytes for event in handle.events if event.lane == "save")
        assert written == handle.stats()["activation_bytes_written"]


# -- together with checkpointing and other hooks ---------------------------------------------------------------------------------------


def _forwards(model: nn.Module) -> list[nn.Module]:
    calls: list[nn.Module] = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda module, _: calls.append(module))
    return calls


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("mode", ["recompute", "disk", "auto"])
def test_a_model_that_checkpoints_itself_is_not_checkpointed_twice(mode: str, reentrant: bool) -> None:
    plain, model, handle = _pair(mode=mode)
    for each in (plain, model):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = _forwards(model)
    for each in (plain, model):
        _loss(each).backward()
    assert different_gradients(model, plain) == []
    assert len(calls) == 2 * len(model.model.layers)
    if mode == "disk":  # what the checkpoints keep, the blocks' inputs, moves
        width = model.config.hidden_size * by_name("llama-tied").inputs()["input_ids"].numel() * 4
        assert width * len(model.model.layers) <= handle.stats()["activation_bytes_saved"] < 4 * width * len(model.model.layers)


def test_recomputing_calls_every_block_once_more() -> None:
    plain, model, _ = _pair(mode="recompute")
    calls = _forwards(model)
    for each in (plain, model):
        _loss(each).backward()
    assert len(calls) == 2 * len(model.model.layers) and different_gradients(model, plain) == []


class _Checkpointed(nn.Module):
    def __init__(self, blocks: nn.Module, how: str) -> None:
        super().__init__()
        self.blocks, self.how = blocks, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if self.how == "hooks":
                with torch.autograd.graph.save_on_cpu():
                    x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return x


class Block(nn.Module):
    """x: (N, C) float."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.dropout(self.down(self.up(x).sigmoid()))
        return y


def _stack(depth: int = 4, width: int = 64) -> nn.Module:
    torch.manual_seed(5)
    return nn.ModuleList(Block(width) for _ in range(depth))


@pytest.mark.parametrize("how", ["hooks", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("mode", ["recompute", "disk"])
def test_who_takes_care_already_goes_on(mode: str, how: str) -> None:
    plain, model = (_Checkpointed(_stack(), how).train() for _ in range(2))
    streamed(model, units=("Block",), activations=mode)
    calls: list[Any] = []
    model.blocks[0].up.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(8, 64)
    for each in (plain, model):
        torch.manual_seed(1)
        each(x.clone().requires_grad_()).sum().backward()
    assert different_gradients(model, plain) == []
    assert len(calls) == (1 if how == "hooks" else 2)
    if mode == "disk":
        assert _handle(model).stats()["activation_bytes_saved"] == 0


def test_a_cache_is_not_written_to_twice() -> None:
    plain, model, _ = _pair(mode="recompute")
    inputs = by_name("llama-tied").inputs()
    calls = _forwards(model)
    with pytest.warns(tw.TorchwrapWarning, match=r"DynamicCache.*use_cache=False"):
        torch.manual_seed(0)
        output = model(**inputs, use_cache=True)
    output.logits.float().square().mean().backward()
    torch.manual_seed(0)
    loss_of(plain, inputs).backward()
    assert different_gradients(model, plain) == [] and len(calls) == len(model.model.layers)
    assert output.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]


class Handed(nn.Module):
    """Blocks that hand on what they computed inside what they were given: a list, a dictionary, both in a tuple; `scale` is written to."""

    def __init__(self, how: str, writes: str = "") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(_Handing(how, writes == "inside") for _ in range(4))
        self.writes = writes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state: Any = {"x": [x], "seen": []}
        scale = torch.ones(1)
        for block in self.blocks:
            block(state if block.how == "dict" else (state["x"], state), scale=scale)
        if self.writes == "after":
            scale.mul_(2)
        assert len(state["seen"]) == len(self.blocks)
        self.state = state
        return state["x"][0] + sum(state["seen"])


class _Handing(nn.Linear):
    def __init__(self, how: str, writes: bool) -> None:
        super().__init__(64, 64)
        self.how, self.writes = how, writes

    def forward(self, given: Any, *, scale: torch.Tensor) -> None:  # type: ignore[override]
        state = given if self.how == "dict" else given[1]
        if self.writes:
            scale.mul_(2)
        state["x"][0] = state["x"][0] + torch.tanh(super().forward(state["x"][0])) * scale
        state["seen"].append(state["x"][0].mean())


@pytest.mark.parametrize("how", ["dict", "tuple"])
def test_lists_and_dictionaries_are_found_as_they_were(how: str) -> None:
    plain, model = Handed(how), tw.offload(Handed(how), params="disk", activations="recompute")
    for step in range(2):
        for net in (plain, model):
            net((torch.ones(2, 64) + step).requires_grad_()).square().mean().backward()
        assert different_gradients(model, plain) == []
        assert len(model.state["seen"]) == 4  # nothing was added to what the caller has


@pytest.mark.parametrize("writes", ["inside", "after"])
def test_a_tensor_given_by_keyword_that_is_written_to_is_refused(writes: str) -> None:
    model = tw.offload(Handed("dict", writes), params="disk", activations="recompute")
    loss = model(torch.ones(2, 64).requires_grad_()).square().mean()
    with pytest.raises(tw.ConflictError, match=r"blocks\.3 is to be computed again.*written to.*activations="):
        loss.backward()
    model.writes = ""
    for block in model.blocks:
        block.writes = False
    model.zero_grad()
    model(torch.ones(2, 64).requires_grad_()).square().mean().backward()
    plain = Handed("dict")
    plain(torch.ones(2, 64).requires_grad_()).square().mean().backward()
    assert different_gradients(model, plain) == []


# -- graphs ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["recompute", "disk", "mixed"])
def test_a_kept_graph_twice(mode: str) -> None:
    plain, model, handle = _pair(mode=mode)
    for each in (plain, model):
        loss = _loss(each)
        loss.backward(retain_graph=True)
        loss.backward()
    assert different_gradients(model, plain) == []
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    del loss
    _nothing_left(handle)


@pytest.mark.parametrize("mode", ["recompute", "disk", "mixed"])
def test_gradients_of_gradients(mode: str) -> None:
    plain, model, _ = _pair(mode=mode)
    for each in (plain, model):
        gradients = torch.autograd.grad(_loss(each), list(each.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
    assert different_gradients(model, plain) == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("mode", ["recompute", "disk", "mixed"])
def test_several_graphs_at_once(mode: str, order: tuple[int, ...]) -> None:
    plain, model, handle = _pair(mode=mode)
    for each in (plain, model):
        losses = [_loss(each, seed) for seed in range(3)]
        with torch.no_grad():
            _loss(each)
        for index in order:
            losses[index].backward()
    del losses
    assert different_gradients(model, plain) == []
    _nothing_left(handle)


@pytest.mark.parametrize("mode", ["recompute", "disk", "mixed"])
def test_under_autocast(mode: str) -> None:
    plain, model, _ = _pair(mode=mode)
    for each in (plain, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = _loss(each)
        loss.backward()
    assert different_gradients(model, plain) == []


@pytest.mark.parametrize("mode", ["recompute", "disk", "auto"])
def test_a_copy_moves_its_own(mode: str) -> None:
    plain, model, _ = _pair(mode=mode)
    twin = copy.deepcopy(model)
    for each in (plain, model):
        _loss(each).backward()
    assert different_gradients(model, plain) == []
    _loss(twin).backward()
    assert different_gradients(twin, plain) == []


# -- faults ----------------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model, handle = _pair()
    with monkeypatch.context() as patch:
        patch.setattr(writing, "free_bytes", lambda _: 0)
        with pytest.raises(tw.DiskFullError) as caught:
            _loss(model)
        assert caught.value.available == 0 < caught.value.needed
    del caught
    at_rest(model)
    _nothing_left(handle)
    for each in (plain, model):
        _loss(each).backward()
    assert different_gradients(model, plain) == []


def test_a_disk_that_fails_while_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model, _ = _pair()
    _loss(model).backward()
    model.zero_grad()
    with monkeypatch.context() as patch:

        def broken(*_: Any) -> bool:
            raise OSError(5, "Input/output error")

        patch.setattr(writing, "write_from", broken)
        with pytest.raises(tw.StorageError, match="Input/output"):
            _loss(model)
    for each in (plain, model):
        _loss(each).backward()
    assert different_gradients(model, plain) == []


def _written(handle: OffloadHandle) -> None:
    moved = handle.activations.swap
    with moved._state:
        assert moved._state.wait_for(lambda: not moved._unwritten, 20)


def test_bytes_that_changed_on_the_disk_are_noticed() -> None:
    plain, model, handle = _pair()
    loss = _loss(model)
    _written(handle)
    file = handle.activations.swap._tier._store.file
    for segment in file.segments.values():
        with open(file.path, "r+b") as stream:
            stream.seek(segment.offset)
            first = stream.read(1)
            stream.seek(segment.offset)
            stream.write(bytes([first[0] ^ 255]))
    with pytest.raises(tw.CorruptDataError):
        loss.backward()
    del loss
    model.zero_grad()
    for each in (plain, model):
        _loss(each).backward()
    assert different_gradients(model, plain) == []


class Boom(Exception):
    pass


@pytest.mark.parametrize("mode", ["recompute", "disk", "mixed"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_leaves_nothing(where: str, mode: str, tmp_path: Path) -> None:
    plain, model, handle = _pair(mode=mode, path=str(tmp_path))

    def fail(*_: Any) -> None:
        raise Boom

    layer = model.model.layers[2].mlp.up_proj
    hook = layer.register_forward_pre_hook(fail) if where == "forward" else layer.weight.register_hook(fail)
    for _ in range(3):
        with pytest.raises(Boom):
            _loss(model).backward()
    hook.remove()
    model.zero_grad()
    for each in (plain, model):
        _loss(each).backward()
    assert different_gradients(model, plain) == []
    at_rest(model)
    _nothing_left(handle)
    del handle
    tw.unwrap(model)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_outlives_the_wrapper(tmp_path: Path) -> None:
    plain, model, handle = _pair(path=str(tmp_path))
    loss = _loss(model)
    tw.unwrap(model)
    loss.backward()
    _loss(plain).backward()
    assert different_gradients(model, plain) == []
    del loss, handle
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_refusals() -> None:
    for fields, where in (({"activations": "host"}, "activations"), ({"activations": "disk", "activation_memory": 1}, "activation_memory")):
        model = _stack()
        with pytest.raises(tw.ConfigError) as caught:
            tw.offload(model, **fields)
        assert caught.value.where == where
        assert type(model) is nn.ModuleList
    with pytest.raises(tw.ConfigError, match="disk"):
        tw.Offload(activations="dsk")


# -- "auto" ----------------------------------------------------------------------------------------------------------------------------


def test_auto_measures_one_step_and_then_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    plain_choose = modes.choose

    def choose(uses: Any, **limits: Any) -> Any:
        seen.append((uses, limits))
        return plain_choose(uses, **limits)

    monkeypatch.setattr(modes, "choose", choose)
    plain, model, handle = _pair(mode="auto", activation_memory="150KiB")
    calls = _forwards(model)
    assert "until a step was measured" in handle.explain()
    for step in range(3):
        for each in (plain, model):
            _loss(each, step).backward()
        if step == 0:
            assert len(calls) == 2 * len(model.model.layers)  # the first step is recomputed
    assert different_gradients(model, plain) == []
    ((uses, limits),) = seen
    assert [use.unit for use in uses] == [unit.index for unit in handle.units if unit.kind == "block"]
    assert limits["allowed"] == 150 << 10
    _, kept, moved = _pair(mode="disk")
    _loss(kept).backward()
    assert sum(use.nbytes for use in uses) == pytest.approx(moved.stats()["activation_bytes_saved"], rel=0.1)
    assert all(0 < use.input_bytes < use.nbytes and 0 < use.seconds < 10 for use in uses)
    assert "kept" in handle.explain()


def test_auto_leaves_the_disk_to_an_optimizer_that_updates_during_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked, promised, drivers = modes.idle_bytes, [], [], []

    def idle_bytes(*args: Any, update_read: int, update_written: int, **rates: Any) -> int:
        asked.append((update_read, update_written))
        promised.extend((needs.read, needs.written) for needs in (driver.footprint() for driver in drivers))  # as it is then
        return plain(*args, update_read=update_read, update_written=update_written, **rates)

    monkeypatch.setattr(modes, "idle_bytes", idle_bytes)
    _, model, _ = _pair(mode="auto", activation_memory="150KiB")

    def steps(optimizer: Any, count: int) -> None:
        for step in range(count):
            _loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()

    overlapping = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3)
    drivers.append(overlapping)
    steps(overlapping, 4)
    assert asked == promised and len(asked) == 1 and min(asked[0]) > 0
    drivers.clear()
    overlapping.close()
    _loss(model).backward()  # nobody updates any more: chosen again, once
    model.zero_grad()
    assert asked[1:] == [(0, 0)]
    behind = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-3, overlap=False)
    steps(behind, 2)
    assert asked[2:] == [(0, 0)]
    behind.close()
