"""The generated class: identity, undo, dormancy, copies, pickles, and what it asks of whoever places weights."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.parts import Block, Instead, Journal, Net, Times
from torchwrap.core.errors import ConflictError, NotAppliedError, UnsupportedModelError
from torchwrap.core.layer import Layer
from torchwrap.core.swap import attach, detach, is_dormant, layers_of, original_class

X = torch.ones(2, 4)
WHERE = pytest.mark.parametrize("where", ["inside", "outside"])


@WHERE
def test_class_keeps_name_qualname_module_doc_and_signature(where: Any) -> None:
    module = Block()
    attach(module, Times(1.0, where))
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(module), name) == getattr(Block, name)
    assert str(type(module)) == str(Block)
    assert inspect.signature(module.forward) == inspect.signature(Block().forward)
    assert isinstance(module, Block) and type(module) is not Block and original_class(module) is Block


@WHERE
def test_detach_restores_class_and_dict_with_the_order_of_keys(where: Any) -> None:
    module, layers = Block(), [Times(1.0, where), Times(1.0, where)]
    keys = list(module.__dict__)
    for layer in layers:
        attach(module, layer)
    for layer in layers:
        detach(module, layer)
    assert type(module) is Block and list(module.__dict__) == keys and not is_dormant(module)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_layers_come_off_in_any_order(order: tuple[int, ...]) -> None:
    module = Block()
    plain = module(X)
    layers = [Times(2.0), Times(3.0, "outside"), Times(5.0)]
    for layer in layers:
        attach(module, layer)
    for count, index in enumerate(order, 1):
        detach(module, layers[index])
        factor = 1.0
        for rest in order[count:]:
            factor *= layers[rest].factor
        assert torch.allclose(module(X), plain * factor)
    assert type(module) is Block


def test_one_class_is_generated_per_class_and_slot() -> None:
    first, second = Block(), Block()
    attach(first, Times(1.0))
    attach(second, Times(1.0))
    assert type(first) is type(second)


def test_instances_are_collected() -> None:
    module = Block()
    attach(module, Times(1.0))
    module(X)
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None


def test_layer_twice_is_a_conflict_and_unknown_layer_is_not_applied() -> None:
    module, layer = Block(), Times(1.0)
    attach(module, layer)
    with pytest.raises(ConflictError, match="already"):
        attach(module, layer)
    with pytest.raises(NotAppliedError):
        detach(module, Times(1.0))


def test_second_replacement_is_a_conflict() -> None:
    module = Block()
    attach(module, Instead())
    with pytest.raises(ConflictError, match="both replace"):
        attach(module, Instead())
    assert len(layers_of(module)) == 1


def test_script_module_is_refused() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    scripted = torch.jit.trace(Plain(), X)
    before = type(scripted)
    with pytest.raises(UnsupportedModelError, match="ScriptModule"):
        attach(scripted, Times(1.0))
    assert type(scripted) is before


def test_class_that_refuses_subclasses_is_refused_with_its_reason() -> None:
    class Final(nn.Module):
        def __init_subclass__(cls) -> None:
            raise RuntimeError("no subclass of Final")

    module = Final()
    with pytest.raises(UnsupportedModelError, match="no subclass of Final"):
        attach(module, Times(1.0))
    assert type(module) is Final and "_torchwrap" not in module.__dict__


def test_graph_module_takes_layers() -> None:
    module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    plain = module(X)
    attach(module, Times(2.0))
    attach(module, Times(3.0, "outside"))
    assert torch.allclose(module(X), plain * 6)
    assert torch.allclose(pickle.loads(pickle.dumps(module))(X), plain * 6)
    assert torch.allclose(copy.deepcopy(module)(X), plain * 6)


def test_fx_traces_a_wrapped_model_with_outside_layers_and_sees_leaf_modules() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    attach(net[0], Times(1.0, "outside"))
    graph = torch.fx.symbolic_trace(net)
    assert "call_module" in {node.op for node in graph.graph.nodes}


# --- something built on top -------------------------------------------------------------------------------------------


def _subclass_on_top(module: nn.Module) -> None:
    module.__class__ = type(type(module).__name__, (type(module),), {})


def test_class_on_top_leaves_the_module_dormant_and_right() -> None:
    module, layer = Block(), Times(2.0)
    plain = module(X)
    attach(module, layer)
    _subclass_on_top(module)
    on_top = type(module)
    detach(module, layer)
    assert type(module) is on_top and is_dormant(module)
    assert torch.equal(module(X), plain)
    attach(module, layer)
    assert type(module) is on_top and not is_dormant(module)
    assert torch.equal(module(X), plain * 2)


def test_instance_forward_on_top_leaves_the_captured_method_valid() -> None:
    module, layer = Block(), Times(2.0)
    plain = module(X)
    attach(module, layer)
    captured = module.forward
    module.forward = lambda x: captured(x)
    detach(module, layer)
    assert is_dormant(module) and torch.equal(module(X), plain)
    del module.forward
    attach(module, layer)
    detach(module, layer)
    assert type(module) is Block and not is_dormant(module)


def test_outside_layer_has_no_place_under_a_class_on_top_of_the_inside_form() -> None:
    module = Block()
    attach(module, Times(1.0))
    _subclass_on_top(module)
    on_top = type(module)
    with pytest.raises(ConflictError, match="built on top"):
        attach(module, Times(1.0, "outside"))
    assert type(module) is on_top and len(layers_of(module)) == 1


def test_instance_forward_before_refuses_inside_and_lets_outside_come_and_go() -> None:
    module = Block()
    original = module.forward
    module.forward = lambda x: original(x)
    before = dict(module.__dict__)
    with pytest.raises(ConflictError, match="instance attribute `forward`"):
        attach(module, Times(1.0))
    assert type(module) is Block and module.__dict__ == before
    outside = Times(2.0, "outside")
    attach(module, outside)
    with pytest.raises(ConflictError, match="instance attribute `forward`"):
        attach(module, Times(1.0))
    detach(module, outside)
    assert type(module) is Block and module.__dict__ == before


# --- copies -----------------------------------------------------------------------------------------------------------


@WHERE
def test_deepcopy_is_wrapped_and_independent(where: Any) -> None:
    notes: list[str] = []
    module = Net()
    for block in module.blocks:
        attach(block, Journal(notes, "own", where))
    twin = copy.deepcopy(module)
    expected = module(X)
    assert len(notes) == 6
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(twin(X), expected)
    assert len(notes) == 6, "the copy has its own layers"
    assert layers_of(twin.blocks[0])[0] is not layers_of(module.blocks[0])[0]
    detach(twin.blocks[0], layers_of(twin.blocks[0])[0])
    assert type(twin.blocks[0]) is Block


def test_shared_layer_stays_shared_in_a_copy() -> None:
    module, layer = Net(), Times(1.0)
    for block in module.blocks:
        attach(block, layer)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert len({id(layers_of(block)[0]) for block in twin.blocks}) == 1


def test_deepcopy_of_a_parametrized_wrapped_module_works() -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    module = nn.Linear(4, 4)
    attach(module, Times(2.0))
    nn.utils.parametrize.register_parametrization(module, "weight", Double())
    assert torch.equal(copy.deepcopy(module)(X), module(X))


class Lean(Block):
    """A class with a say in what is copied."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": "dropped"}


def test_getstate_of_the_class_is_respected() -> None:
    module = Lean()
    module.cache = "large"
    attach(module, Times(1.0))
    assert copy.deepcopy(module).cache == pickle.loads(pickle.dumps(module)).cache == "dropped"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@WHERE
def test_pickle_in_every_protocol(protocol: int, where: Any) -> None:
    module = Net()
    attach(module, Times(2.0, where))
    attach(module.blocks[1], Times(3.0, where))
    twin = pickle.loads(pickle.dumps(module, protocol))
    assert torch.equal(twin(X), module(X)) and type(twin) is type(module)


def test_pickle_works_in_a_fresh_process(tmp_path: Path) -> None:
    module = Net()
    attach(module, Times(2.0))
    attach(module.blocks[0], Times(3.0, "outside"))
    torch.save(module, tmp_path / "model.pt")
    torch.save(module(X), tmp_path / "expected.pt")
    code = (
        "import torch\n"
        f"model = torch.load(r'{tmp_path}/model.pt', weights_only=False)\n"
        f"print(torch.equal(model(torch.ones(2, 4)), torch.load(r'{tmp_path}/expected.pt')), type(model).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert done.stdout.split() == ["True", "Net"]


def test_dormant_module_is_pickled_as_its_own_class() -> None:
    module, layer = Block(), Times(1.0)
    attach(module, layer)
    module.forward = module.forward
    detach(module, layer)
    assert is_dormant(module)
    module.__dict__.pop("forward")
    assert type(pickle.loads(pickle.dumps(module))) is Block


# --- who places the weights -------------------------------------------------------------------------------------------


class Owner:
    """Writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def convert(self, module: nn.Module, fn: Any, recurse: bool, original: Any) -> nn.Module:
        self.asked.append("convert")
        return original(fn, recurse)

    def refuse(self, module: nn.Module, verb: str) -> None:
        self.asked.append(verb)
        raise UnsupportedModelError(f"{verb} cannot be done here")

    def before_deepcopy(self, module: nn.Module, memo: dict[int, Any]) -> None:
        self.asked.append("before_deepcopy")
        memo[id(module.linear.weight)] = nn.Parameter(torch.zeros(4, 4))

    def reduce(self, module: nn.Module) -> tuple[Any, ...] | None:
        self.asked.append("reduce")
        return (Block, (4,))


def _owned(owner: object) -> nn.Module:
    module, layer = Block(), Layer()
    layer.owner = owner  # type: ignore[assignment]
    attach(module, layer)
    attach(module, Times(1.0))
    return module


@pytest.mark.parametrize("verb", ["to", "half", "double", "cpu"])
def test_conversions_go_through_the_owner(verb: str) -> None:
    owner = Owner()
    module = nn.Sequential(_owned(owner))
    getattr(module, verb)(*((torch.float64,) if verb == "to" else ()))
    assert owner.asked == ["convert"]


@pytest.mark.parametrize("verb", ["to_empty", "share_memory"])
def test_refused_verbs_leave_the_module_alone(verb: str) -> None:
    owner = Owner()
    module = _owned(owner)
    before = module.linear.weight.clone()
    with pytest.raises(UnsupportedModelError, match=verb):
        getattr(module, verb)(**({"device": "cpu"} if verb == "to_empty" else {}))
    assert owner.asked == [verb] and torch.equal(module.linear.weight, before)


def test_deepcopy_asks_the_owner_for_stand_ins() -> None:
    owner = Owner()
    twin = copy.deepcopy(_owned(owner))
    assert owner.asked == ["before_deepcopy"] and not twin.linear.weight.any()


def test_pickle_asks_the_owner_for_its_own_way() -> None:
    owner = Owner()
    twin = pickle.loads(pickle.dumps(_owned(owner)))
    assert owner.asked == ["reduce"] and type(twin) is Block


def test_owner_without_methods_changes_nothing() -> None:
    module = _owned(object())
    file = io.BytesIO()
    module.double().share_memory().to_empty(device="cpu")
    layers_of(module)[0].owner = None
    torch.save(copy.deepcopy(module), file)


def test_lazy_module_is_refused_until_it_has_run() -> None:
    module = nn.LazyLinear(4)
    with pytest.raises(UnsupportedModelError, match="Call the model once"):
        attach(module, Times(1.0))
    plain = module(X)
    attach(module, Times(2.0))
    assert torch.equal(module(X), plain * 2)
