"""Layers under `torch.compile`: one graph for traceable ones, a clean break for others, never stale."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.unit.parts import Block, Journal, Net, Times
from torchwrap.core.layer import suspended
from torchwrap.core.swap import attach, detach

X = torch.ones(2, 4)
WHERE = pytest.mark.parametrize("where", ["inside", "outside"])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _counting() -> Any:
    from torch._dynamo.testing import CompileCounter

    return CompileCounter()


@WHERE
@pytest.mark.parametrize("count", [1, 2])
def test_traceable_layers_are_one_graph_without_break(where: Any, count: int) -> None:
    net = Net()
    for module in (net, *net.blocks):
        for _ in range(count):
            attach(module, Times(2.0, where))
    graphs = _counting()
    compiled = torch.compile(net, backend=graphs, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(X), net(X))
    assert graphs.frame_count == 1


@WHERE
@pytest.mark.parametrize("form", ["torch.compile", "module.compile"])
@pytest.mark.parametrize("place", ["root", "block"])
def test_layers_put_on_and_off_after_compilation_take_effect(where: Any, form: str, place: str) -> None:
    net = Net()
    if form == "torch.compile":
        compiled: Any = torch.compile(net, backend="eager", fullgraph=True)
    else:
        net.compile(backend="eager", fullgraph=True)
        compiled = net
    keys, twin = list(net.__dict__), Net()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(compiled(X), twin(X))
    first, second = Times(2.0, where), Times(5.0, where)
    steps = [(attach, first, [first]), (attach, second, [first, second]), (detach, first, [second]), (detach, second, [])]
    for action, layer, layers in steps:
        target = net if place == "root" else net.blocks[1]
        action(target, layer)
        mirrored = [Times(each.factor, where) for each in layers]
        mirror = twin if place == "root" else twin.blocks[1]
        for each in mirrored:
            attach(mirror, each)
        assert torch.equal(compiled(X), twin(X))
        for each in mirrored:
            detach(mirror, each)
    assert list(net.__dict__) == keys and type(net) is Net


def test_layer_of_the_same_class_with_another_setting_is_not_mistaken() -> None:
    net = Net()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    plain = net(X)
    for factor in (2.0, 3.0, 4.0):
        layer = Times(factor)
        attach(net, layer)
        assert torch.equal(compiled(X), plain * factor)
        detach(net, layer)


@WHERE
def test_untraceable_layer_breaks_at_its_own_boundary_and_the_code_inside_is_compiled(where: Any) -> None:
    net, notes = Net(), []
    for index, block in enumerate(net.blocks):
        attach(block, Journal(notes, str(index), where, traceable=False))
    expected = net(X)
    notes.clear()
    graphs = _counting()
    compiled = torch.compile(net, backend=graphs)
    for _ in range(3):
        assert torch.equal(compiled(X), expected)
    assert notes == [f"{index}.{event}" for index in range(3) for event in ("before", "after")] * 3
    assert graphs.frame_count >= 1, "the blocks' own code is compiled"
    assert graphs.op_count >= 3


@WHERE
def test_untraceable_layer_gets_failed_once_under_compile(where: Any) -> None:
    block, notes = Block(), []
    attach(block, Journal(notes, "outer", where, traceable=False))
    attach(block, Journal(notes, "inner", where, traceable=False))
    compiled = torch.compile(block, backend="eager")
    with pytest.raises(RuntimeError):
        compiled(torch.ones(2, 5))
    assert notes == ["outer.before", "inner.before", "inner.failed", "outer.failed"]
    compiled(X)


def test_suspended_layers_are_left_out_of_compiled_code_and_come_back() -> None:
    net, layer = Net(), Times(2.0)
    attach(net, layer)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    doubled = compiled(X)
    with suspended((layer,)):
        assert torch.equal(compiled(X), doubled / 2)
    assert torch.equal(compiled(X), doubled)


@WHERE
def test_trace_counts_in_one_graph_without_recompiling(where: str) -> None:
    net = tw.trace(Net(), where=where)
    graphs = _counting()
    compiled = torch.compile(net, backend=graphs, fullgraph=True)
    for _ in range(5):
        compiled(X)
    assert graphs.frame_count == 1
    assert tw.handle_of(compiled, "trace").stats()["blocks.1"] == {"calls": 5, "bytes_in": 160, "bytes_out": 160, "failed": 0}


def test_trace_counts_under_inductor_free_backend_and_eager_alike() -> None:
    net = tw.trace(Net())
    torch.compile(net, backend="aot_eager", fullgraph=True)(X).sum().backward()
    net(X)
    assert tw.handle_of(net, "trace").stats()[""]["calls"] == 2


def test_eager_calls_never_import_dynamo() -> None:
    code = (
        "import sys, torch, torchwrap as tw\n"
        "from tests.unit.parts import Net, Journal\n"
        "from torchwrap.core.swap import attach\n"
        "net = tw.trace(Net())\n"
        "attach(net, Journal([], 'x', traceable=False))\n"
        "net(torch.ones(2, 4))\n"
        "print(sorted(name for name in sys.modules if name == 'torch._dynamo' or name.startswith('transformers')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert done.stdout.strip() == "[]"


def test_checkpointed_inside_layer_runs_again_and_outside_layer_does_not() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Block):
        def __init_subclass__(cls) -> None:
            forward = cls.forward

            def checkpointed(self: Any, x: torch.Tensor) -> Any:
                return checkpoint(forward, self, x, use_reentrant=False) if type(self) is cls else forward(self, x)

            cls.forward = checkpointed  # type: ignore[method-assign]

    class Leaf(Checkpointed):
        pass

    notes: list[str] = []
    module = nn.Sequential(Leaf())
    attach(module[0], Journal(notes, "in"))
    attach(module[0], Journal(notes, "out", "outside"))
    module(X).sum().backward()
    assert notes.count("in.before") == 2 and notes.count("out.before") == 1
    assert notes.count("in.after") + notes.count("in.failed") == 2
