"""Master weights: float32 underneath, the same in memory and on the disk, and nothing that others wrote to a weight is lost."""

from __future__ import annotations

import copy
import pickle
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.optimizer.optimizing import ADAM, differences, loss_of, pair, trained

RULES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "momentum": (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9}),
    "fused-momentum": (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9, "fused": True}),  # refused where it would run in bfloat16 itself
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1}),  # makes its state in the constructor
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_in_memory_it_is_the_class_on_a_float32_model_with_the_same_gradients(rule: str, dtype: torch.dtype) -> None:
    cls, options = RULES[rule]
    weights = [nn.Parameter(torch.randn(33, 47, dtype=dtype)), nn.Parameter(torch.randn(5))]
    wide = [nn.Parameter(weight.detach().float()) for weight in weights]
    mine, reference = tw.master_weights(cls)(weights, **options), cls(wide, **options)
    for step in range(4):
        for weight, master in zip(weights, wide, strict=True):
            weight.grad = torch.randn_like(weight)
            master.grad = weight.grad.float()
        mine.step()
        reference.step()
        assert all(torch.equal(weight, master.to(weight.dtype)) for weight, master in zip(weights, wide, strict=True)), step
    assert torch.equal(mine.state[weights[0]]["master"], wide[0]) and "master" not in mine.state[weights[1]]
    for weight, master in zip(weights, wide, strict=True):
        assert all(torch.equal(value, mine.state[weight][key]) for key, value in reference.state[master].items())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fields", [{"params": "disk"}, {"device_memory": 1_500_000}], ids=["disk", "half"])
def test_offloaded_training_equals_training_in_memory(rule: str, fields: dict[str, Any]) -> None:
    cls, options = RULES[rule]
    plain, model = pair(torch.bfloat16, fields)
    reference = tw.master_weights(cls)(plain.parameters(), **options)
    with closing(tw.OffloadedOptimizer(model, tw.master_weights(cls), chunk=ADAM["chunk"], **options)) as optimizer:
        assert trained(model, optimizer, range(5)) == trained(plain, reference, range(5))
        assert differences(plain, reference, model, optimizer) == []
        masters = [state["master"] for state in optimizer.state_dict()["state"].values()]
        assert len(masters) == len(list(model.parameters())) and {master.dtype for master in masters} == {torch.float32}


def test_commits_and_state_dicts_carry_the_masters(tmp_path: Path) -> None:
    cls = tw.master_weights(torch.optim.AdamW)
    plain, model = pair(torch.bfloat16)
    reference = cls(plain.parameters(), lr=1e-2)
    optimizer = tw.OffloadedOptimizer(model, cls, path=tmp_path / "run", **ADAM)
    trained(model, optimizer, range(2))
    trained(plain, reference, range(2))
    optimizer.commit()
    saved = {number: {k: v.clone() for k, v in state.items()} for number, state in optimizer.state_dict()["state"].items()}
    groups = optimizer.state_dict()["param_groups"]
    trained(model, optimizer, range(5, 6))
    optimizer.rollback()
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()
    again = tw.OffloadedOptimizer(model, cls, path=tmp_path / "run", **ADAM)
    assert again.steps == 2 and differences(plain, reference, model, again) == []
    again.close()
    with closing(tw.OffloadedOptimizer(model, cls, **ADAM)) as fresh:
        fresh.load_state_dict({"state": saved, "param_groups": groups})
        assert differences(plain, reference, model, fresh) == []
        other = cls(plain.parameters(), lr=1e-2)
        other.load_state_dict({"state": saved, "param_groups": groups})
        assert trained(model, fresh, range(2, 4)) == trained(plain, other, range(2, 4)) == trained_alike(plain, reference, saved)
        assert differences(plain, other, model, fresh) == []


def trained_alike(plain: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[int, Any]) -> list[float]:
    """Losses of the same two steps once more, by the optimizer that was never saved, from the weights of before."""
    with torch.no_grad():
        for number, parameter in enumerate(plain.parameters()):
            parameter.copy_(saved[number]["master"])
    return trained(plain, optimizer, range(2, 4))


def test_small_updates_add_up_and_without_masters_they_do_not() -> None:
    kept = {}
    for cls in (torch.optim.SGD, tw.master_weights(torch.optim.SGD)):
        model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).bfloat16()
        with torch.no_grad():
            model[0].weight.fill_(1)
        tw.offload(model, params="disk", units=("0", "1"))
        with closing(tw.OffloadedOptimizer(model, cls, lr=1e-3, overlap=False)) as optimizer:
            for _ in range(8):
                model[0].weight.grad = torch.ones(256, 256, dtype=torch.bfloat16)
                optimizer.step()
        with tw.core.tensors(model) as real:
            kept[cls.__name__] = float(real["0.weight"].float().mean())
    assert kept == {"SGD": 1.0, "master_weights(SGD)": 0.9921875}


def test_what_others_write_to_a_weight_is_where_the_next_step_begins() -> None:
    cls = tw.master_weights(torch.optim.SGD)
    plain, model = pair(torch.bfloat16)
    reference = cls(plain.parameters(), lr=1e-3)
    with closing(tw.OffloadedOptimizer(model, cls, lr=1e-3, chunk=ADAM["chunk"])) as optimizer:
        for net, opt in ((plain, reference), (model, optimizer)):
            trained(net, opt, range(2))
        with torch.no_grad(), tw.core.tensors(model, "blocks.0.up.weight", write=True) as real:
            real["blocks.0.up.weight"][3] = 0.125
            plain.blocks[0].up.weight[3] = 0.125  # type: ignore[index,union-attr]
        masters = reference.state[plain.blocks[0].up.weight]  # type: ignore[index,union-attr]
        before = masters["master"].clone()
        for net, opt in ((plain, reference), (model, optimizer)):
            opt.zero_grad()
            loss_of(net, 100).backward()
            opt.step()
        moved = (masters["master"] - before).abs()
        assert moved[3].max() > 0.01 > moved[:3].max()  # only that row began anew
        assert differences(plain, reference, model, optimizer) == []


def test_an_optimizer_is_copied_and_pickled_with_its_masters() -> None:
    weight = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
    optimizer = tw.master_weights(torch.optim.AdamW)([weight], lr=1e-2)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (other,) = again.param_groups[0]["params"]
        other.grad = torch.ones_like(other)
        again.step()
        assert type(again) is type(optimizer) and not torch.equal(again.state[other]["master"], optimizer.state[weight]["master"])
    optimizer.step()
    assert torch.equal(again.state[other]["master"], optimizer.state[weight]["master"]) and torch.equal(other, weight)


def test_what_is_no_optimizer_class_is_refused_and_the_same_class_comes_back() -> None:
    with pytest.raises(tw.ConfigError, match="no optimizer class"):
        tw.master_weights(torch.optim.SGD([torch.zeros(1)]))  # type: ignore[arg-type]
    assert tw.master_weights(torch.optim.SGD) is tw.master_weights(torch.optim.SGD)
    with pytest.raises(tw.ConfigError, match="LBFGS"):
        tw.OffloadedOptimizer(nn.Linear(4, 4).bfloat16(), tw.master_weights(torch.optim.LBFGS))
