"""Every refusal names who, where, why and the way out, and leaves the model as it was.

The rows come from the tables of `torchwrap.core.order`; a row without a model that shows it fails `test_every_foreign_row_is_tested`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.contract.cases import Case, every_technique
from tests.contract.compare import equal, model_difference
from tests.contract.distributed import one_process_group
from tests.contract.neutral import NoteLayer, Outer, Scaled
from tests.models import ConvNet, by_name, run
from torchwrap.core import technique as registry
from torchwrap.core.integration import Integration
from torchwrap.core.order import FOREIGN, PAIRS, PLACEMENT, Foreign, Pair
from torchwrap.core.technique import Prepared, Technique, technique_named

LLAMA = by_name("llama")


# --- pairs of techniques -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _First(tw.Config):
    """Stands for the first technique of a row."""

    technique: ClassVar[str] = ""


@dataclass(frozen=True, kw_only=True)
class _Second(tw.Config):
    """Stands for the second technique of a row."""

    technique: ClassVar[str] = ""


class _StandIn(Technique[Any]):
    exactness, trains, version, phase = "bit-identical", True, 1, PLACEMENT

    def __init__(self, name: str, config_class: type[tw.Config]) -> None:
        self.name, self.config_class = name, config_class

    def prepare(self, model: nn.Module, config: tw.Config, integration: Integration) -> Prepared[Any]:
        blocks = integration.blocks(model) or []
        places = [(block.fqn, block.module) for block in blocks] or [("", model)]
        return Prepared(config=config, layers=[(fqn, module, NoteLayer(self.name, "inside")) for fqn, module in places])


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair.first}+{pair.second}")
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A row of the conflict table, with stand-ins for both techniques in the registry."""
    for name, config in ((request.param.first, _First), (request.param.second, _Second)):
        monkeypatch.setattr(config, "technique", name)
        monkeypatch.setitem(registry._registry, name, _StandIn(name, config))
    return request.param


@pytest.mark.parametrize("configs", [(_First, _Second), (_Second, _First)], ids=["first-second", "second-first"])
def test_conflicting_techniques_in_one_list_are_refused(pair: Pair, configs: tuple[type[tw.Config], type[tw.Config]]) -> None:
    model, twin = LLAMA.build(), LLAMA.build()
    with pytest.raises(tw.ConflictError) as caught:
        tw.apply(model, [Outer(), *(config() for config in configs)])
    _explains(str(caught.value), pair)
    assert model_difference(model, twin) is None


@pytest.mark.parametrize("configs", [(_First, _Second), (_Second, _First)], ids=["first-second", "second-first"])
def test_conflicting_techniques_one_after_the_other_are_refused(pair: Pair, configs: tuple[type[tw.Config], type[tw.Config]]) -> None:
    model = tw.apply(LLAMA.build(), configs[0]())
    before = _places(model)
    with pytest.raises(tw.ConflictError) as caught:
        tw.apply(model, configs[1]())
    _explains(str(caught.value), pair)
    assert list(tw.wrappers_of(model)) == [configs[0].technique]
    assert _places(model) == before
    equal(run(model, LLAMA.inputs()), run(LLAMA.build(), LLAMA.inputs()))
    tw.unwrap(model)
    tw.apply(model, configs[1]())


def test_conflict_is_found_below_and_above_the_module(pair: Pair) -> None:
    model = LLAMA.build()
    tw.apply(model.get_submodule(LLAMA.block), _First())
    with pytest.raises(tw.ConflictError):
        tw.apply(model, _Second())
    assert tw.wrappers_of(model) == {}
    assert list(tw.wrappers_of(model.get_submodule(LLAMA.block))) == [pair.first]


def test_module_scoped_conflicts_may_meet_on_disjoint_parts(pair: Pair) -> None:
    model = LLAMA.build()
    tw.apply(model.get_submodule("model.layers.0"), _First())
    tw.apply(model.get_submodule("model.layers.1"), _Second())
    equal(run(model, LLAMA.inputs()), run(LLAMA.build(), LLAMA.inputs()))


def _explains(message: str, pair: Pair) -> None:
    for part in (pair.first, pair.second, pair.reason, "unwrap"):
        assert part in message
    if pair.scope == "module":
        assert "model.layers.0" in message


def _places(model: nn.Module) -> list[list[int]]:
    from torchwrap.core.swap import layers_of

    return [[id(layer) for layer in layers_of(module)] for module in model.modules()]


# --- mechanisms of other libraries -----------------------------------------------------------------------------------------------------


def _with_accelerate_hook() -> nn.Module:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = LLAMA.build()
    add_hook_to_module(model.get_submodule(LLAMA.block), ModelHook())
    return model


def _with_device_map() -> nn.Module:
    model = LLAMA.build()
    model.hf_device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    return model


def _with_group_offloading() -> nn.Module:
    hooks = pytest.importorskip("diffusers.hooks")
    model = ConvNet().eval()
    hooks.apply_group_offloading(model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level")
    return model


def _parameter_of_package(module: str) -> nn.Module:
    kind = type("Packed", (nn.Parameter,), {"__module__": module})
    model = LLAMA.build()
    layer = model.get_submodule(LLAMA.block).mlp.up_proj
    layer._parameters["weight"] = kind(layer.weight.detach())
    return model


def _with_adapters() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(LLAMA.build(), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()


def _with_zero3() -> nn.Module:
    model = LLAMA.build()
    model.lm_head.weight.ds_id = 1
    return model


def _with_fsdp2() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = LLAMA.build()
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def _with_fsdp1() -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(LLAMA.build(), device_id=torch.device("cpu"), use_orig_params=True)


@contextmanager
def _group() -> Iterator[None]:
    with one_process_group():
        yield


SIGHTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], AbstractContextManager[None]]]] = {
    "accelerate hook": (_with_accelerate_hook, nullcontext),
    "device_map with cpu or disk": (_with_device_map, nullcontext),
    "diffusers group offloading": (_with_group_offloading, nullcontext),
    "bitsandbytes weights": (lambda: _parameter_of_package("bitsandbytes.nn.modules"), nullcontext),
    "torchao tensors": (lambda: _parameter_of_package("torchao.quantization.linear"), nullcontext),
    "peft tuner": (_with_adapters, nullcontext),
    "DeepSpeed ZeRO-3": (_with_zero3, nullcontext),
    "FSDP2 parameters (DTensor)": (_with_fsdp2, _group),
    "FSDP1": (_with_fsdp1, _group),
}


def test_every_foreign_row_is_tested() -> None:
    assert {row.name for row in FOREIGN} == set(SIGHTS)


@every_technique
@pytest.mark.parametrize("row", FOREIGN, ids=lambda row: row.name.replace(" ", "-"))
def test_foreign_mechanism_is_treated_as_its_row_says(case: Case, row: Foreign) -> None:
    build, environment = SIGHTS[row.name]
    with environment():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = build()
            torch.manual_seed(1)
            twin = build()
        name = case.technique
        verdict = row.placement if technique_named(name).phase == PLACEMENT else row.others
        if verdict == "refused":
            with pytest.raises(tw.ConflictError) as caught:
                case.apply(model)
            message = str(caught.value)
            for part in (name, row.name, row.reason, row.removal):
                assert part in message
            assert tw.wrappers_of(model) == {}
        else:
            case.apply(model)
            assert list(tw.wrappers_of(model)) == [name]
            assert (row.name in str(tw.describe(model))) or verdict == "allowed"
            inputs = {"x": torch.zeros(1, 3, 8, 8)} if isinstance(twin, ConvNet) else LLAMA.inputs()
            equal(run(model, inputs), run(twin, inputs))
            tw.unwrap(model)
        assert model_difference(model, twin) is None


# --- models and arguments that cannot be served ------------------------------------------------------------------------------------------


class _Scriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@every_technique
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_module_is_refused_and_still_runs(case: Case) -> None:
    plain = _Scriptable()
    script = torch.jit.script(plain)
    with pytest.raises(tw.UnsupportedModelError, match="Script"):
        case.apply(script)
    assert tw.wrappers_of(script) == {}
    x = torch.ones(1, 4)
    assert torch.equal(script(x), plain(x))


@every_technique
def test_factory_that_returns_no_module_is_a_type_error_naming_what_came_back(case: Case) -> None:
    technique = case.callable
    with pytest.raises(TypeError, match="int"):
        technique(lambda: 3)()
    with pytest.raises(TypeError, match="tuple"):
        technique(lambda: (nn.Linear(1, 1), nn.Linear(1, 1)))()


@every_technique
def test_factory_may_return_its_module_in_a_tuple_or_a_dict(case: Case) -> None:
    technique = case.callable
    model, extra = technique(lambda: (LLAMA.build(), "tokenizer"))()
    assert (list(tw.wrappers_of(model)), extra) == ([case.technique], "tokenizer")
    made = technique(lambda: {"model": LLAMA.build(), "step": 3})()
    assert list(tw.wrappers_of(made["model"])) == [case.technique]


@every_technique
def test_what_is_neither_module_nor_class_nor_callable_is_a_type_error(case: Case) -> None:
    technique = case.callable
    for wrong in (3, "model", [LLAMA.build()]):
        with pytest.raises(TypeError):
            technique(wrong)
    with pytest.raises(TypeError):
        technique(int)


@every_technique
def test_fields_and_a_config_together_or_unknown_fields_are_refused(case: Case) -> None:
    model, twin = LLAMA.build(), LLAMA.build()
    technique, config = case.callable, case.config(model)
    with pytest.raises(tw.ConfigError, match="no_such_field"):
        technique(model, no_such_field=1)
    with pytest.raises(tw.ConfigError):
        technique(model, config, no_such_field=1)
    with pytest.raises(tw.ConfigError):
        technique(model, Scaled())
    with pytest.raises((tw.ConfigError, TypeError)):
        tw.apply(model, [config, "trace"])
    assert model_difference(model, twin) is None


@every_technique
def test_wrapping_a_class_twice_is_refused_and_subclasses_stay_plain_after_undo(case: Case) -> None:
    class Net(ConvNet):
        pass

    case.config(ConvNet())
    technique = case.callable
    assert technique(Net) is Net
    with pytest.raises(tw.ConflictError, match="Net"):
        technique(Net)

    class Derived(Net):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)  # the technique comes after the outermost __init__ and sees this

    derived = Derived()
    assert list(tw.wrappers_of(derived)) == [case.technique]
    tw.unwrap(Net)
    assert tw.wrappers_of(Net()) == tw.wrappers_of(Derived()) == {}
    assert type(Net()) is Net
    tw.unwrap(derived)
    assert type(derived) is Derived


@every_technique
def test_nested_application_to_a_part_and_then_the_whole_is_refused_and_names_the_part(case: Case) -> None:
    model = LLAMA.build()
    part = model.model
    case.apply(part)
    with pytest.raises(tw.ConflictError, match=r"on model\b"):
        case.apply(model)
    assert list(tw.wrappers_of(part)) == [case.technique]
    assert tw.wrappers_of(model) == {}
    equal(run(model, LLAMA.inputs()), run(LLAMA.build(), LLAMA.inputs()))
    tw.unwrap(part)
    twin = LLAMA.build()
    run(twin, LLAMA.inputs())
    assert model_difference(model, twin) is None
