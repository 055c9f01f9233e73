"""What models, graphs and users do to a training run: refused with nothing changed, or the numbers of training in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.faults.tally import Faults
from tests.models import by_name
from tests.optimizer.optimizing import differences, loss_of, pair, trained
from tests.weights.budgets import streamed
from tests.weights.training import loss_of as loss_of_family
from torchwrap import OffloadedOptimizer
from torchwrap.core.errors import NotAppliedError, StorageError

ADAM: dict[str, Any] = {"lr": 1e-2, "chunk": 65536}


def optimizers(plain: nn.Module, model: nn.Module, **options: Any) -> tuple[torch.optim.Optimizer, OffloadedOptimizer]:
    return torch.optim.AdamW(plain.parameters(), lr=1e-2), OffloadedOptimizer(model, torch.optim.AdamW, **ADAM, **options)


# -- folders ---------------------------------------------------------------------------------------------------------------------------


def _file(path: Path) -> None:
    path.write_bytes(b"mine")


def _link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def _open_to_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def _of_something_else(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / "manifest.json").write_bytes(b"mine")


FOLDERS: dict[str, Callable[[Path], None]] = {"file": _file, "link": _link, "open": _open_to_all, "manifest": _of_something_else}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_cannot_hold_a_run_is_refused_and_the_model_trains_in_another(kind: str, tmp_path: Path, faults: Faults) -> None:
    plain, model = pair()
    path = tmp_path / "run"
    FOLDERS[kind](path)
    with faults.intact(tmp_path):
        faults.detected(lambda: OffloadedOptimizer(model, torch.optim.AdamW, path=path, **ADAM), StorageError, says=[path])
    reference, optimizer = optimizers(plain, model, path=tmp_path / "deep" / "other")
    assert trained(model, optimizer, range(2)) == trained(plain, reference, range(2))
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


# -- wrapping --------------------------------------------------------------------------------------------------------------------------


def test_wrapping_and_unwrapping_twice_under_an_optimizer(faults: Faults) -> None:
    plain, model = pair()
    reference, optimizer = optimizers(plain, model)
    assert trained(model, optimizer, range(1)) == trained(plain, reference, range(1))
    faults.detected(lambda: tw.offload(model, params="disk"), tw.ConflictError, says=["offload"])
    assert trained(model, optimizer, range(1, 2)) == trained(plain, reference, range(1, 2))
    tw.unwrap(model)
    tw.unwrap(model)
    faults.detected(lambda: tw.unwrap(model, "offload"), NotAppliedError)
    assert trained(model, optimizer, range(2, 3)) == trained(plain, reference, range(2, 3))
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()
    optimizer.close()


# -- graphs ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", ["host", "disk"])
def test_two_backwards_through_a_kept_graph_and_a_third_through_a_freed_one(gradients: Any, faults: Faults) -> None:
    plain, model = pair()
    reference, optimizer = optimizers(plain, model, overlap=False, gradients=gradients, accumulate=2)
    for step in range(2):
        for net, opt in ((plain, reference), (model, optimizer)):
            opt.zero_grad()
            loss = loss_of(net, step)
            loss.backward(retain_graph=True)
            loss.backward()
            faults.detected(loss.backward, RuntimeError, says=["second time"])
            opt.step()
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


def test_a_freed_graph_during_overlap_keeps_torchs_error_and_the_step_goes_on(faults: Faults) -> None:
    plain, model = pair()
    reference, optimizer = optimizers(plain, model)
    for net, opt in ((plain, reference), (model, optimizer)):
        loss = loss_of(net, 0)
        loss.backward()
        faults.detected(loss.backward, RuntimeError, says=["second time"])
        opt.step()
    assert differences(plain, reference, model, optimizer) == []
    assert trained(model, optimizer, range(1, 2)) == trained(plain, reference, range(1, 2))
    optimizer.close()


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "after"])
@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_training_switched_between_forward_and_backward(on: bool, overlap: bool) -> None:
    plain, model = pair()
    for net in (plain, model):
        net.get_submodule("blocks.1").requires_grad_(not on)
    reference, optimizer = optimizers(plain, model, overlap=overlap)
    for step in range(3):
        for net, opt in ((plain, reference), (model, optimizer)):
            opt.zero_grad()
            loss = loss_of(net, step)
            if step == 1:
                net.get_submodule("blocks.1").requires_grad_(on)
            loss.backward()
            opt.step()
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


@pytest.mark.parametrize("gradients", ["host", "disk"])
def test_not_a_number_with_a_scaler_skips_the_whole_step(gradients: Any) -> None:
    plain, model = pair()
    reference, optimizer = optimizers(plain, model, overlap=False, gradients=gradients)
    if gradients == "disk":  # a scaler would have to look into what is on the disk
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(model, 0) * float("nan")).backward()
        with pytest.raises(tw.ConflictError, match="gradients='host'"):
            scaler.step(optimizer)
        optimizer.zero_grad()
        assert differences(plain, reference, model, optimizer) == []
        optimizer.close()
        return
    for bad in (float("nan"), 1.0, float("inf"), 1.0):
        for net, opt in ((plain, reference), (model, optimizer)):
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            opt.zero_grad()
            scaler.scale(loss_of(net, 1) * bad).backward()
            scaler.step(opt)
            scaler.update()
    assert optimizer.steps == 2
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


# -- parameters ------------------------------------------------------------------------------------------------------------------------


class _Odd(nn.Module):
    """Two large weights of a kind, used as real numbers."""

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_OddBlock(make) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _OddBlock(nn.Module):
    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.odd = nn.Parameter(make(torch.randn(256, 256) / 16))
        self.plain = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        odd = torch.view_as_real(self.odd).sum(-1) if self.odd.is_complex() else self.odd
        return x + self.plain(x @ odd.to(x.dtype)).tanh()


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "complex": lambda w: torch.complex(w, -w),
    "double": lambda w: w.double(),
    "bfloat16": lambda w: w.bfloat16(),
    "transposed": lambda w: w.t(),
    "strided": lambda w: w.repeat(1, 2)[:, ::2],
    "odd-address": lambda w: torch.cat([w.flatten()[:3], w.flatten()])[3:].view(256, 256),
}


@pytest.mark.parametrize("offload", [{"params": "disk"}, {}, None], ids=["disk", "resident", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_unusual_parameters_are_trained_or_refused(kind: str, offload: dict[str, Any] | None, faults: Faults) -> None:
    def make() -> _Odd:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return _Odd(KINDS[kind]).train()

    plain, model = make(), make()
    if offload is not None:
        tw.offload(model, units=("blocks.0", "blocks.1"), **offload)
    x = torch.linspace(-1, 1, 1024).view(4, 256)

    def train() -> bool:
        reference, optimizer = optimizers(plain, model)
        for net, opt in ((plain, reference), (model, optimizer)) * 2:
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()
        found = differences(plain, reference, model, optimizer)
        optimizer.close()
        return not found

    faults.judged(train, lambda right: right, tw.UnsupportedModelError, tw.ConfigError)


class _Graph(nn.Module):
    """A graph network: `x` (N, C) goes from node to node through a sparse matrix, a parameter, a buffer or an argument."""

    def __init__(self, where: str, layout: torch.layout) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(300, 300) for _ in range(2))
        edges = torch.eye(300).roll(1, 0).to_sparse(layout=layout)
        if where == "parameter":
            self.edges = nn.Parameter(edges, requires_grad=False)
        elif where == "buffer":
            self.register_buffer("edges", edges)

    def forward(self, x: torch.Tensor, edges: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            x = torch.sparse.mm(self.edges if edges is None else edges, block(x)).relu()
        return x


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("activations", ["keep", "recompute", "disk"])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=["coo", "csr"])
@pytest.mark.parametrize("where", ["parameter", "buffer", "argument"])
def test_sparse_matrices_stay_in_memory_and_the_rest_is_trained(where: str, layout: torch.layout, activations: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        plain = _Graph(where, layout)
        model = _Graph(where, layout)
    model.blocks.load_state_dict(plain.blocks.state_dict())
    tw.offload(model, params="disk", units=("blocks.0", "blocks.1"), activations=activations)
    if where == "parameter":
        assert "edges is torch.sparse" in tw.handle_of(model, "offload").explain()
    trained_here = [dict(each.blocks.named_parameters()) for each in (plain, model)]
    reference = torch.optim.AdamW(trained_here[0].values(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, params=trained_here[1].values(), **ADAM)
    extra = (torch.eye(300).roll(1, 0).to_sparse(layout=layout),) if where == "argument" else ()
    x = torch.linspace(-1, 1, 90000).view(300, 300)
    losses: list[list[float]] = [[], []]
    for _ in range(3):
        for found, net, opt in zip(losses, (plain, model), (reference, optimizer), strict=True):
            opt.zero_grad()
            loss = net(x, *extra).square().mean()
            loss.backward()
            opt.step()
            found.append(loss.item())
    assert losses[0] == losses[1]
    optimizer.close()
    tw.unwrap(model)
    assert all(torch.equal(trained_here[1][name], value) for name, value in trained_here[0].items())


def test_tensors_of_other_kinds_stay_and_the_rest_is_trained() -> None:
    class Scaled(torch.Tensor):
        """A tensor subclass, as quantised weights are."""

    def frozen(net: nn.Module) -> None:
        weight = net.get_submodule("blocks.1.up").weight
        net.get_submodule("blocks.1.up").weight = nn.Parameter(weight.data.clone().as_subclass(Scaled), requires_grad=False)

    plain, model = pair()
    tw.unwrap(model)
    for net in (plain, model):
        frozen(net)
    tw.offload(model, params="disk", units=tuple(f"blocks.{i}" for i in range(3)))
    reference, optimizer = optimizers(plain, model)
    for net, opt in ((plain, reference), (model, optimizer)) * 3:
        opt.zero_grad()
        loss_of(net, 3).as_subclass(torch.Tensor).backward()
        opt.step()
    assert differences(plain, reference, model, optimizer) == []
    optimizer.close()


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "after"])
@pytest.mark.parametrize("name", ["albert", "t5", "mixtral"])
def test_parts_that_run_several_times_or_not_at_all(name: str, overlap: bool) -> None:
    """ALBERT uses one block for all of its layers, T5 one table twice, and a mixture of experts only some of its experts."""
    fixture = by_name(name)
    plain, model = fixture.build().train(), fixture.build().train()
    streamed(model)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, chunk=4096, overlap=overlap)
    losses: list[list[float]] = [[], []]
    for step in range(4):
        for found, net, opt in zip(losses, (plain, model), (reference, optimizer), strict=True):
            torch.manual_seed(step)
            opt.zero_grad()
            loss = loss_of_family(net, fixture.inputs())
            loss.backward()
            opt.step()
            found.append(loss.item())
    assert losses[0] == losses[1]
    assert differences(plain, reference, model, optimizer) == []
    assert optimizer.stats()["bytes_written"] > 0
    optimizer.close()
