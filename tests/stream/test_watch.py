"""A parameter read while it is away is an error that names it, before anything is computed from the placeholder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.stream.parts import build
from torchwrap.core.swap import layers_of
from torchwrap.stream.units import Unit
from torchwrap.stream.watch import AbsentUseGuard


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    return build(tmp_path / "weights.safetensors", [[6, 12]]).units[0]


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "arithmetic": lambda w: w + 1,
    "in a list": lambda w: torch.cat([torch.zeros(2), w]),
    "a view of it": lambda w: w[2:5].sum(),
    "detached": lambda w: w.detach() * 2,
    "as a keyword": lambda w: torch.add(torch.zeros(12), other=w),
    "copied": lambda w: w.clone(),
    "item": lambda w: w[3].item(),
    "moved": lambda w: w.to(torch.float64),
    "compared": lambda w: w == torch.zeros(12),
    "reflected": lambda w: torch.ones(12) + w,
    "written": lambda w: torch.zeros(12).copy_(w),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_is_an_error_that_names_the_parameter(unit: Unit, read: Callable[[torch.Tensor], object]) -> None:
    with AbsentUseGuard(unit.pieces), pytest.raises(tw.TorchwrapError, match=r'piece\.1 is read .*pin=\("piece\.1",\)'):
        read(unit.pieces[1].parameter)


def test_other_tensors_and_shapes_are_free(unit: Unit) -> None:
    weight = unit.pieces[0].parameter
    with AbsentUseGuard(unit.pieces):
        assert weight.shape == (6,) and weight.numel() == 6 and weight.dtype is torch.float32 and weight.device.type == "cpu"
        assert weight.detach().stride() == (0,)
        assert torch.equal(torch.ones(3) + 1, torch.full((3,), 2.0))
        assert torch.empty(3, device="meta").add(1).shape == (3,)


def test_a_present_parameter_is_free(unit: Unit) -> None:
    piece = unit.pieces[0]
    piece.parameter.data = torch.arange(6.0)
    with AbsentUseGuard(unit.pieces):
        assert float(piece.parameter.sum()) == 15.0


class Peeking(nn.Module):
    """A model that uses the weight of its second layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        x = nn.functional.linear(x, self.layers[1].weight, self.layers[1].bias)
        return self.layers[3](self.layers[2](x))


@pytest.mark.parametrize("how", [lambda w: float((w == 0) is False), lambda w: _or_one(lambda: w.sum())], ids=["compared", "caught"])
def test_a_model_that_swallows_the_error_gets_it_at_the_end(how: Callable[[torch.Tensor], float]) -> None:
    class Swallowing(Peeking):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x + how(self.layers[0].weight)

    model = tw.offload(Swallowing().eval(), params="disk", units=("Linear",), device_memory=64_000)
    with torch.no_grad(), pytest.raises(tw.TorchwrapError, match=r"layers\.0\.weight"):
        model(torch.randn(2, 16))


def _or_one(compute: Callable[[], torch.Tensor]) -> float:
    try:
        return float(compute())
    except Exception:
        return 1.0


def test_the_first_pass_of_a_model_is_watched() -> None:
    torch.manual_seed(0)
    model, x = Peeking().eval(), torch.randn(2, 16)
    with torch.no_grad():
        expected = model(x)
        tw.offload(model, params="disk", units=("Linear",), device_memory=64_000)
        for _ in range(2):
            with pytest.raises(tw.TorchwrapError, match=r"layers\.1\.weight"):
                model(x)
        tw.unwrap(model)
        tw.offload(model, params="disk", units=("Linear",), pin=("layers.1",), device_memory=64_000)
        for _ in range(2):
            assert torch.equal(model(x), expected)


def test_blocks_whose_methods_are_called_are_refused_once_with_ways_out_that_work() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(128, 512), nn.Linear(512, 128)

        def run(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x).relu())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.run(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number, block in enumerate(self.blocks):
                x = block.run(x) if number == 2 else block(x)
            return x

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 128)
    expected = model(x)
    tw.offload(model, params="disk")
    with pytest.raises(tw.ConflictError) as error:
        model(x)
    text = str(error.value)
    assert "Call blocks.2 itself" in text and 'units=("Linear",)' in text and 'pin=("blocks.2",)' in text
    for way in ({"units": ("Linear",)}, {"pin": ("blocks.2",)}):
        tw.unwrap(model)
        tw.offload(model, params="disk", **way)
        assert torch.equal(model(x), expected)


def test_a_read_that_only_training_makes_is_refused_after_passes_in_evaluation_mode() -> None:
    class PeekingInTraining(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x + self.layers[1].weight.sum() if self.training else x

    model, x = PeekingInTraining().eval(), torch.randn(2, 16)
    tw.offload(model, params="disk", units=("Linear",), device_memory=64_000)
    for _ in range(2):
        model(x)
    with pytest.raises(tw.ConflictError, match=r"layers\.1\.weight"):
        model.train()(x)
    assert not model.eval()(x).isnan().any()


def test_many_passes_leave_nothing_behind() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))).eval()
    tw.offload(model, params="disk", units=("Linear",), device_memory=64_000)
    with torch.no_grad():
        for _ in range(5):
            model(torch.zeros(1, 16))
    layers = [layer for module in model.modules() for layer in layers_of(module)]
    assert len(layers) >= 5
    assert [layer._calls._stack.values for layer in layers] == [()] * len(layers)  # type: ignore[attr-defined]
