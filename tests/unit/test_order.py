"""Phases, conflict rows and foreign mechanisms. The contract suite applies every row to real models of the libraries concerned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.unit.parts import Net
from torchwrap.core.errors import ConflictError
from torchwrap.core.order import FOREIGN, PAIRS, PHASE_NAMES, PHASES, PLACEMENT, check_foreign, check_pair, foreign_mechanisms


def _of(package: str, base: type, *args: object) -> object:
    return type("Foreign", (base,), {"__module__": package})(*args)


def _parameter_of(package: str) -> nn.Module:
    net = Net()
    net.blocks[1].linear._parameters["weight"] = _of(package, nn.Parameter, torch.zeros(4, 4))
    return net


def _with(name: str, value: object, on: str = "blocks.1") -> nn.Module:
    net = Net()
    object.__setattr__(net.get_submodule(on), name, value)
    return net


def _containing(module: object) -> nn.Module:
    net = Net()
    net.extra = module
    return net


def _zero3() -> nn.Module:
    net = Net()
    net.blocks[1].linear.weight.ds_id = 7
    return net


MARKS = {
    "accelerate hook": lambda: _with("_hf_hook", object()),
    "device_map with cpu or disk": lambda: _with("hf_device_map", {"a": 0, "b": "disk"}, ""),
    "diffusers group offloading": lambda: _with("_diffusers_hook", SimpleNamespace(hooks={"group_offloading": 1})),
    "bitsandbytes weights": lambda: _parameter_of("bitsandbytes.nn.modules"),
    "torchao tensors": lambda: _parameter_of("torchao.dtypes.affine_quantized_tensor"),
    "peft tuner": lambda: _containing(_of("peft.tuners.lora.layer", nn.Identity)),
    "DeepSpeed ZeRO-3": _zero3,
    "FSDP2 parameters (DTensor)": lambda: _parameter_of("torch.distributed.tensor"),
    "FSDP1": lambda: _containing(_of("torch.distributed.fsdp.fully_sharded_data_parallel", nn.Identity)),
}
ROWS = pytest.mark.parametrize("row", FOREIGN, ids=lambda row: row.name)


def test_marks_cover_the_table() -> None:
    assert MARKS.keys() == {row.name for row in FOREIGN}


def test_plain_model_shows_nothing() -> None:
    assert foreign_mechanisms(Net()) == []


@ROWS
def test_mark_is_recognised_and_treated_as_the_row_says(row: object) -> None:
    (seen,) = foreign_mechanisms(MARKS[row.name]())  # type: ignore[attr-defined]
    assert seen.mechanism is row and seen.count == 1
    for phase, verdict in ((PLACEMENT, row.placement), (30, row.others)):  # type: ignore[attr-defined]
        if verdict == "refused":
            with pytest.raises(ConflictError) as caught:
                check_foreign([seen], "some_technique", phase)
            for part in ("some_technique", row.name, row.reason, row.removal):  # type: ignore[attr-defined]
                assert part in str(caught.value)
        else:
            assert bool(check_foreign([seen], "some_technique", phase)) is (verdict == "note")


@pytest.mark.parametrize("places", [{"": "cpu"}, {"a": 0, "b": 1}, {"": "cuda:0"}, {}, None], ids=str)
def test_device_map_without_offload_is_no_conflict(places: object) -> None:
    assert foreign_mechanisms(_with("hf_device_map", places, "")) == []


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.first}+{pair.second}")
@pytest.mark.parametrize("swapped", [False, True])
def test_pair_is_refused_in_both_orders_in_its_own_scope_only(pair: object, swapped: bool) -> None:
    names = (pair.second, pair.first) if swapped else (pair.first, pair.second)  # type: ignore[attr-defined]
    with pytest.raises(ConflictError) as caught:
        check_pair(*names, pair.scope, "blocks.1")  # type: ignore[attr-defined]
    for part in (*names, pair.reason, "blocks.1", f"unwrap(model, {names[0]!r})"):  # type: ignore[attr-defined]
        assert part in str(caught.value)
    check_pair(*names, "model" if pair.scope == "module" else "module")  # type: ignore[attr-defined]


def test_every_phase_has_a_name() -> None:
    assert set(PHASES.values()) == set(PHASE_NAMES)
