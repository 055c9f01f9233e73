"""Whole models under every (k, k'): outputs equal to the bit, never more than k blocks, and what moves is what the law says."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import torchwrap as tw
from tests.models import ModelFixture, by_name, run
from tests.superpipeline.device import handle_of, weights_present
from torchwrap.core.tensors import data_of, is_placeholder

MODELS = {"llama": 4, "gpt2": 4, "t5": 4, "vit": 4, "bert": 4, "llava": 6, "convnet": 4, "resnet18": 8}
GRID = {
    name: [(k, k_prime) for k in sorted({1, 2, 3, blocks}) for k_prime in ([1, 3, 8] if k == 8 else range(1, k + 1))]
    for name, blocks in MODELS.items()
}
every_window = pytest.mark.parametrize(
    ("fixture", "k", "k_prime"),
    [pytest.param(by_name(name), k, k_prime, id=f"{name}-k{k}-{k_prime}") for name, pairs in GRID.items() for k, k_prime in pairs],
)
every_model = pytest.mark.parametrize("fixture", [by_name(name) for name in MODELS], ids=list(MODELS))


def tensors(output: Any) -> list[torch.Tensor]:
    output = getattr(output, "to_tuple", lambda: output)()
    return [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf)]


def same(got: Any, expected: Any) -> bool:
    pairs = list(zip(tensors(got), tensors(expected), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


@contextmanager
def watched(model: nn.Module) -> Iterator[list[int]]:
    """At every block: no more than k slots, no more than k units in them, and only those show weights. Yields counts of present units."""
    handle, seen = handle_of(model), []
    engine = handle.engine

    def look(*_: Any) -> None:
        assert engine is not None
        shown = {
            unit.index for unit in handle.units if any(not is_placeholder(data_of(p.parameter)) for p in unit.pieces if not p.resident)
        }
        assert shown and shown <= set(engine._fetches)
        assert len(engine._fetches) <= handle.knobs.k and len(engine._slots) <= handle.knobs.k
        seen.append(len(engine._fetches))

    names = [unit.name for unit in handle.units] if handle.plan.slots else []
    hooks = [model.get_submodule(name).register_forward_pre_hook(look) for name in names]
    yield seen
    for hook in hooks:
        hook.remove()


@every_window
def test_outputs_window_and_transfers(fixture: ModelFixture, k: int, k_prime: int) -> None:
    model = fixture.build()
    more = {"output_hidden_states": True} if fixture.has_hidden_states else {}
    expected = run(model, fixture.inputs(), **more)
    tw.superpipeline(model, k=k, k_prime=k_prime)
    handle = handle_of(model)
    with watched(model) as seen:
        for _ in range(2):
            assert same(run(model, fixture.inputs(), **more), expected)
    at = handle.knobs
    assert max(seen, default=k) == k
    passes = k_prime // math.gcd(at.units, k_prime)  # a whole number of batches
    before = handle.stats()["transfers"]
    for _ in range(passes):
        assert same(run(model, fixture.inputs(), **more), expected)
    assert handle.stats()["transfers"] - before == round(at.moved_per_pass * passes)
    assert weights_present(model) == pytest.approx(handle.predict().device_bytes, rel=0.10)
    tw.unwrap(model)
    assert same(run(model, fixture.inputs(), **more), expected)


@pytest.mark.parametrize(("k", "k_prime"), [(1, 1), (2, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "llava"])
def test_greedy_tokens(name: str, k: int, k_prime: int) -> None:
    fixture = by_name(name)
    model = fixture.build()
    expected = model.generate(**fixture.prompt(), max_new_tokens=6, do_sample=False)
    tw.superpipeline(model, k=k, k_prime=k_prime)
    with watched(model) as seen:
        assert torch.equal(model.generate(**fixture.prompt(), max_new_tokens=6, do_sample=False), expected)
    assert max(seen) <= k


@every_model
def test_all_blocks_present_streams_nothing(fixture: ModelFixture) -> None:
    model = fixture.build()
    expected = run(model, fixture.inputs())
    tw.superpipeline(model, k=MODELS[fixture.name])
    handle = handle_of(model)
    assert same(run(model, fixture.inputs()), expected)
    assert handle.engine is None and handle.bytes_moved() == 0 and handle.stats()["bytes_read"] == 0
    assert all(p.data.untyped_storage().nbytes() > 0 and not is_placeholder(data_of(p)) for p in model.parameters())


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_saved_is_what_k_leaves_out(k: int) -> None:
    """1 - k / n of the blocks, within 5 points, where blocks are large beside a page."""
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(10))).eval()
    blocks = sum(p.numel() * 4 for p in model.parameters())
    tw.superpipeline(model, k=k, k_prime=1)
    model(torch.zeros(1, 512))
    assert 1 - weights_present(model) / blocks == pytest.approx(1 - k / 10, abs=0.05)
    assert handle_of(model).predict().saved == pytest.approx(1 - k / 10)


def test_a_mixture_streams_its_experts_with_their_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 16)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.experts[int(x.sum() > 0)](self.up(x))

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4))).eval()
    x = torch.randn(2, 16)
    expected = run(model, {"input": x})
    tw.superpipeline(model, k=1)
    assert same(run(model, {"input": x}), expected)
    assert handle_of(model).knobs.units == 4
    assert all(len(unit.pieces) == 8 or len(unit.pieces) == 4 for unit in handle_of(model).units)


def test_a_deep_copy_and_a_pickle_have_windows_of_their_own() -> None:
    import pickle

    fixture = by_name("llama")
    model = fixture.build()
    expected = run(model, fixture.inputs())
    tw.superpipeline(model, k=3, k_prime=2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert handle_of(twin) is not handle_of(model)
        assert handle_of(twin).knobs == handle_of(model).knobs
        with watched(twin):
            assert same(run(twin, fixture.inputs()), expected)
    assert same(run(model, fixture.inputs()), expected)


def test_offload_and_superpipeline_on_parts_that_do_not_overlap() -> None:
    fixture = by_name("t5")
    model = fixture.build()
    expected = run(model, fixture.inputs())
    tw.superpipeline(model.decoder.block, k=1)
    tw.offload(model.encoder.block, params="disk", k=1)
    assert same(run(model, fixture.inputs()), expected)
    with pytest.raises(tw.ConflictError):
        tw.offload(model, params="disk")
    tw.unwrap(model.decoder.block)
    tw.unwrap(model.encoder.block)
    assert same(run(model, fixture.inputs()), expected)
