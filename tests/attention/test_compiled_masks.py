"""Masks under torch.compile: taken as inputs without a break, made in the middle with one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.attention.masks import whole
from torchwrap.attention.masks.mask import TileMask

SEGMENTS = torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.int32)
MASKS: dict[str, Callable[[], TileMask]] = {
    "no tensor in it": lambda: TileMask.causal(2, 5, 5),
    "padding": lambda: TileMask.padded([2, 5], 5, 5),
    "one tensor twice": lambda: TileMask.causal(1, 5, 5, q_segments=SEGMENTS, k_segments=SEGMENTS),
    "static cache": lambda: TileMask.causal(1, 5, 9, q_offset=torch.tensor(3)),
    "dictionary": lambda: TileMask.from_dense(torch.rand(2, 1, 5, 5) < 0.5),
}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


def counted(x: torch.Tensor, mask: TileMask) -> torch.Tensor:
    """Uses a method and the conditions of a mask."""
    part = mask.sub(rows=(1, 5), columns=(0, 5))
    held = sum(1 for name in ("kv_start", "q_segments", "dictionary") if getattr(mask, name) is not None)
    return x * part.rectangles((0, 4), (0, 5)).sum() + held + (mask.right or 0)


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS.keys())
def test_a_graph_takes_masks_without_a_break(make: Callable[[], TileMask]) -> None:
    mask, x, before = make(), torch.randn(3), TileMask.materialisations
    compiled = torch.compile(counted, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, mask), counted(x, mask))
    assert TileMask.materialisations == before


def test_another_mask_of_the_same_kind_is_not_mistaken_for_the_first() -> None:
    compiled, x = torch.compile(counted, backend="aot_eager", fullgraph=True), torch.ones(3)
    masks = [TileMask.padded([2, 5], 5, 5), TileMask.padded([4, 1], 5, 5), TileMask.causal(2, 5, 5), TileMask(2, 5, 5, right=2)]
    for mask in masks:
        assert torch.equal(compiled(x, mask), counted(x, mask))


def test_making_a_mask_ends_a_graph_and_nothing_else() -> None:
    def made(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return counted(x + 1, TileMask.causal(2, 5, 5, kv_end=lengths)) * 2

    x, lengths = torch.randn(3), torch.tensor([2, 5], dtype=torch.int32)
    assert torch.equal(torch.compile(made, backend="aot_eager")(x, lengths), made(x, lengths))


def test_tracing_leaves_nothing_behind_in_the_mask() -> None:
    mask = TileMask.padded([2, 5], 5, 5)
    torch.compile(counted, backend="aot_eager", fullgraph=True)(torch.ones(3), mask)
    assert type(mask.spans().first) is torch.Tensor and type(mask.tiles(4, 4).lo) is torch.Tensor
    assert torch.equal(whole(mask), whole(TileMask.padded([2, 5], 5, 5)))


def test_graphs_on_disk_are_found_by_what_a_mask_is_not_by_its_numbers() -> None:
    keys = [mask._stable_hash_for_caching() for mask in (
        TileMask.padded([2, 5], 5, 5), TileMask.padded([4, 1], 5, 5), TileMask.causal(2, 5, 5), TileMask(2, 5, 5, right=2),
        TileMask.causal(2, 5, 6),
    )]  # fmt: skip
    assert keys[0] == keys[1] and len(set(keys)) == 4
