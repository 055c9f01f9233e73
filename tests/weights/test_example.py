"""What a model is called with may be said by an example: plans and predictions then go by its shapes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchwrap as tw
from torchwrap.activations.rehearsal import Rehearsal
from torchwrap.core.example import described
from torchwrap.core.integration import integration_for
from torchwrap.stream.units import find_units

CPU = torch.device("cpu")
MIB = 1 << 20


class Net(nn.Module):
    """Strided, plain, grouped and transposed convolutions, blocks with normalisation, and a pool before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, stride=2, padding=3)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(4)))
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        y: torch.Tensor = self.head(self.up(self.blocks(self.stem(x * scale))).mean((2, 3)))
        return y


class Alive(TorchDispatchMode):
    """Bytes of real tensors alive at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive and storage.data_ptr() not in self._known:
                    self._alive.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, nbytes: int) -> None:
        self._alive.discard(key)
        self.now -= nbytes


def rehearsed(model: nn.Module, example: str) -> Rehearsal:
    integration = integration_for(model)
    units = find_units(model, [(block.fqn, block.module) for block in integration.blocks(model) or ()]).units
    found = Rehearsal.of(model, units, CPU, integration, example)
    assert found is not None
    return found


def test_bytes_alive_are_those_of_a_real_forward_and_what_convolutions_take() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 128, 128)
    alive = Alive(model)
    with torch.no_grad(), alive:
        model(x.clone())
    counted = rehearsed(model, described(x)).forward_bytes(described(x))
    assert alive.peak <= counted <= alive.peak + 2 * max(2 * 32 * 64 * 64, 2 * 16 * 128 * 128) * 4


def test_a_step_holds_what_blocks_save_unless_they_are_computed_again_or_moved() -> None:
    model, example = Net(), described(torch.empty(4, 3, 256, 256))
    rehearsal = rehearsed(model, example)
    units = range(4)
    kept, again, moved = (rehearsal.step_bytes(example, dict.fromkeys(units, mode)) for mode in ("keep", "recompute", "swap"))
    output = 4 * 32 * 128 * 128 * 4
    assert kept - again >= 4 * output  # of four blocks the convolution's output and the normalised one, less what one backward needs
    assert kept - moved >= 4 * output
    assert rehearsal.forward_bytes(example) < again


def test_gradients_of_weights_do_not_count() -> None:
    wide = nn.Sequential(nn.Linear(512, 4096), nn.Linear(4096, 512))
    example = described(torch.empty(1, 512))
    assert rehearsed(wide, example).step_bytes(example, {}) < 1 * MIB


@pytest.mark.parametrize("technique", [tw.offload, tw.superpipeline], ids=["offload", "superpipeline"])
def test_predictions_go_by_the_size_of_images(technique: Any) -> None:
    small, large = torch.empty(2, 3, 64, 64), torch.empty(2, 3, 512, 512, device="meta")
    options: dict[str, Any] = {"params": "disk"} if technique is tw.offload else {"k": 2}
    model = technique(Net(), example=small, **options)
    handle = tw.handle_of(model, technique.name)

    def peak(**given: Any) -> int:
        found = handle.predict(**given)
        return int(found.peak_process if technique is tw.offload else found.peak_bytes)

    output = 2 * 32 * 256 * 256 * 4
    assert peak(example=large) - peak() > 2 * output
    assert peak(example=large, batch=4) - peak(example=large) > 2 * output
    assert peak() == peak(example="float32[2, 3, 64, 64]") == peak(example=[small], batch=2)
    step = [handle.predict_training(example=each).working_bytes for each in (small, large)]
    assert step[1] - step[0] > 4 * output
    tw.unwrap(model)


@pytest.mark.parametrize("goal", ["infer", "train"])
def test_the_room_left_to_activations_is_that_of_the_example(goal: Any) -> None:
    model = Net()
    reserves = [
        tw.offload.prepare(model, tw.Offload(example=f"float32[2,3,{side},{side}]", goal=goal), integration_for(model)).data.budget.reserve
        for side in (64, 512)
    ]
    assert reserves[1] - reserves[0] > 2 * 2 * 32 * 256 * 256 * 4


def test_examples_are_values() -> None:
    x = torch.randn(2, 3, 8, 8)
    config = tw.Offload(example={"x": x, "scale": 2.0})
    assert config.example == '{"x": "float32[2,3,8,8]", "scale": 2.0}'
    assert tw.Offload.from_dict(config.to_dict()) == config == tw.Offload(example={"x": torch.empty_like(x, device="meta"), "scale": 2.0})
    assert hash(config) == hash(tw.Offload(example=config.example))
    assert described((x.to(memory_format=torch.channels_last), [torch.zeros(2, dtype=torch.long)]), batch=5) == (
        '["float32[5,3,8,8]@channels_last", ["int64[5]"]]'
    )
    assert described(torch.tensor(1)) == "int64[]"


@pytest.mark.parametrize("wrong", ["images", {"x": object()}, 3, (), "float33[2,3]", ""])
def test_what_is_no_example_is_refused(wrong: Any) -> None:
    with pytest.raises(tw.ConfigError, match=r"\(at example\)"):
        tw.Offload(example=wrong)


def test_an_example_that_the_model_cannot_be_called_with_is_refused_before_anything_is_touched() -> None:
    model = Net()
    before = dict(model.named_parameters())
    for wrong in (torch.empty(2, 4, 64, 64), {"image": torch.empty(2, 3, 64, 64)}):
        with pytest.raises(tw.ConfigError, match=r"cannot be tried.*\(at example\)"):
            tw.offload(model, example=wrong, params="disk")
    assert all(parameter is before[name] and parameter.numel() for name, parameter in model.named_parameters())
    assert not tw.wrappers_of(model)


def test_tokens_say_nothing_beside_an_example_and_an_example_needs_one_to_begin_with() -> None:
    model = tw.offload(Net(), example=torch.empty(2, 3, 64, 64), params="disk")
    with pytest.raises(tw.ConfigError, match=r"\(at tokens\)"):
        tw.handle_of(model, "offload").predict(tokens=4)
    tw.unwrap(model)
    tw.offload(model, params="disk")
    with pytest.raises(tw.ConfigError, match=r"without an example.*\(at example\)"):
        tw.handle_of(model, "offload").predict(example=torch.empty(2, 3, 64, 64))
    tw.unwrap(model)


def test_parametrized_modules_are_tried_and_those_of_another_technique_refused() -> None:
    model = Net()
    torch.nn.utils.parametrizations.weight_norm(model.stem)
    example = torch.empty(2, 3, 64, 64)
    assert rehearsed(model, described(example)).forward_bytes(described(example)) > 2 * 32 * 32 * 32 * 4
    with pytest.raises(tw.ConfigError, match=r"another technique.*\(at example\)"):
        tw.offload(tw.superpipeline(Net(), k=2), example=example, params="disk")
