"""Masks from functions and from dense masks: equal to what they came from, stored as distinct tiles, never as a whole."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from tests.attention.masks import Largest, whole
from torchwrap.attention.masks.dictionary import compiled, of_dense
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core.errors import ConfigError

Tensor = torch.Tensor
IMAGES = torch.tensor([-1] * 20 + [0] * 90 + [-1] * 40 + [1] * 60 + [-1] * 90)


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) | (k < 130)


def images(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) | ((IMAGES[q] == IMAGES[k]) & (IMAGES[q] >= 0))


def by_row(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ((k + b) % 7 != 0)


def by_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 50 * h


def nothing_but_keys(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k % 3 > 0


FUNCTIONS = {"prefix": prefix, "images": images, "row of the batch": by_row, "head": by_head, "keys alone": nothing_but_keys}


def evaluated(function: Callable[..., Tensor], batch: int, heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    rows, head = torch.arange(batch)[:, None, None, None], torch.arange(heads)[None, :, None, None]
    result = function(rows, head, queries[:, None], keys)
    return result.expand(batch, heads, len(queries), len(keys))


@pytest.mark.parametrize("vmap", [False, True], ids=["broadcast", "vmap"])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_a_compiled_function_is_the_function(function: Callable[..., Tensor], vmap: bool) -> None:
    mask = TileMask.from_function(function, 2, 270, 300, heads=3, q_offset=30, vmap=vmap)
    expected = evaluated(function, 2, 3, torch.arange(30, 300), torch.arange(300))
    assert torch.equal(whole(mask).expand_as(expected), expected)
    for rows, columns in (((0, 270), (0, 300)), ((3, 7), (100, 290)), ((120, 140), (127, 129)), ((5, 5), (0, 9))):
        part = mask.rectangle(1, rows, columns)
        assert torch.equal(part.expand(3, -1, -1), expected[1, :, rows[0] : rows[1], columns[0] : columns[1]])


def test_a_function_of_single_positions_needs_vmap() -> None:
    table = torch.tensor([0, 1, 1, 0])

    def alone(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.stack((table[q % 4], table[k % 4])).sum() > 0

    mask = TileMask.from_function(alone, 1, 10, 12, q_offset=0, vmap=True)
    expected = torch.tensor([[bool(table[q % 4] + table[k % 4] > 0) for k in range(12)] for q in range(10)])
    assert torch.equal(whole(mask)[0, 0], expected)


def test_offsets_may_live_in_a_tensor() -> None:
    mask = TileMask.from_function(prefix, 1, 5, 300, q_offset=torch.tensor(200), kv_offset=3)
    assert torch.equal(whole(mask), evaluated(prefix, 1, 1, torch.arange(200, 205), torch.arange(3, 303)))


def test_conditions_may_stand_beside_the_function() -> None:
    mask = TileMask.from_function(prefix, 1, 300, 300, kv_start=torch.tensor([7], dtype=torch.int32), left=99)
    every, distance = evaluated(prefix, 1, 1, torch.arange(300), torch.arange(300)), torch.arange(300)[:, None] - torch.arange(300)
    assert torch.equal(whole(mask), every & (distance <= 99) & (torch.arange(300) >= 7))


def test_a_function_that_ignores_rows_and_heads_is_evaluated_once() -> None:
    mask = TileMask.from_function(prefix, 8, 256, 256, heads=4)
    assert mask.dictionary is not None and mask.dictionary.codes.shape == (1, 1, 2, 2) and mask.shape == (8, 1, 256, 256)


def test_equal_tiles_are_stored_once() -> None:
    length = 2048
    mask = TileMask.from_function(lambda b, h, q, k: (k <= q) & (q - k < 512), 1, length, length)
    assert mask.dictionary is not None
    assert mask.dictionary.tiles.shape == (2 + 2, 128, 16)  # the diagonal, the window's far edge; empty and full
    assert mask.dictionary.nbytes < 10_000


@pytest.mark.parametrize(
    "shape", [(1, 1, 200, 300), (2, 1, 130, 70), (2, 3, 40, 200), (1, 1, 1, 500), (1, 1, 3, 0), (1, 1, 0, 3), (0, 1, 3, 3)], ids=str
)
@pytest.mark.parametrize("block", [(128, 128), (16, 8), (5, 24)], ids=str)
def test_a_dense_mask_comes_back(shape: tuple[int, int, int, int], block: tuple[int, int]) -> None:
    dense = torch.rand(shape) < 0.7
    back = of_dense(dense, block=block).rectangles((0, shape[0]), (0, shape[2]), (0, shape[3]))
    assert torch.equal(back, dense)


def test_parts_of_parts_of_a_dictionary_stay_in_place() -> None:
    draw, dense = random.Random(0), torch.rand(2, 2, 100, 90) < 0.5
    mask = TileMask(2, 100, 90, dictionary=of_dense(dense, block=(16, 8)))
    for _ in range(50):
        part, expected = mask, dense
        for _ in range(3):
            (r0, r1), (c0, c1) = (sorted(draw.choices(range(part.shape[dim] + 1), k=2)) for dim in (2, 3))
            part, expected = part.sub(rows=(r0, r1), columns=(c0, c1)), expected[:, :, r0:r1, c0:c1]
            assert torch.equal(whole(part), expected)


def test_floating_masks_of_zero_and_least_are_masks() -> None:
    dense = torch.rand(1, 1, 9, 9) < 0.5
    for dtype, hidden in ((torch.float32, float("-inf")), (torch.float16, torch.finfo(torch.float16).min), (torch.bfloat16, float("-inf"))):
        assert torch.equal(whole(TileMask.from_dense(torch.zeros(1, 1, 9, 9, dtype=dtype).masked_fill(~dense, hidden))), dense)


@pytest.mark.parametrize("number", [1.0, -10000.0, float("nan"), float("inf")])
def test_floating_masks_of_other_numbers_are_a_bias(number: float) -> None:
    with pytest.raises(ConfigError, match="bias"):
        TileMask.from_dense(torch.tensor([[[[0.0, number]]]]))


def test_expanded_masks_are_kept_once() -> None:
    mask = TileMask.from_dense((torch.rand(1, 1, 20, 20) < 0.5).expand(4, 8, -1, -1))
    assert mask.dictionary is not None and mask.dictionary.codes.shape[:2] == (1, 1) and mask.shape == (4, 1, 20, 20)


@pytest.mark.parametrize("make", [
    lambda: TileMask.from_function(images_of_2048, 1, 2048, 2048), lambda: TileMask.from_function(images_of_2048, 1, 2048, 2048, vmap=True),
], ids=["broadcast", "vmap"])  # fmt: skip
def test_compiling_never_holds_the_whole_mask(make: Callable[[], TileMask]) -> None:
    with Largest() as seen:
        mask = make()
        mask.tiles(64, 64)
        mask.live_rows()
    assert 0 < seen.elements <= 2**18 < 2048 * 2048 // 8


def images_of_2048(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) | (q // 300 == k // 300)


def test_noise_costs_an_eighth() -> None:
    dense = torch.rand(1, 1, 1024, 1024) < 0.5
    dictionary = of_dense(dense)
    assert dictionary.nbytes <= dense.nbytes // 8 + 8192 and torch.equal(dictionary.rectangles((0, 1), (0, 1024), (0, 1024)), dense)


def test_more_distinct_tiles_than_small_numbers_are_told_apart() -> None:
    dense = torch.rand(1, 1, 8, 33000 * 8) < 0.5
    dictionary = of_dense(dense, block=(8, 8))
    assert dictionary.codes.dtype == torch.int32
    assert torch.equal(dictionary.rectangles((0, 1), (0, 8), (0, 33000 * 8)), dense)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "numbers": (lambda: TileMask.from_function(lambda b, h, q, k: q - k, 1, 4, 4), "int64"),
    "a flag": (lambda: TileMask.from_function(lambda b, h, q, k: True, 1, 4, 4), "bool"),  # type: ignore[arg-type,return-value]
    "another shape": (lambda: TileMask.from_function(lambda b, h, q, k: torch.ones(3, dtype=torch.bool), 1, 4, 4), r"\[1, 1, 1, 3\]"),
    "three dimensions": (lambda: TileMask.from_dense(torch.ones(2, 3, 3, dtype=torch.bool)), r"\[2, 3, 3\]"),
    "integers": (lambda: TileMask.from_dense(torch.ones(1, 1, 3, 3, dtype=torch.int64)), "int64"),
    "a foreign dictionary": (lambda: TileMask(1, 2, 2, dictionary={}), "dict"),
}


@pytest.mark.parametrize(("make", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_mask_is_refused(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()


def test_an_error_inside_the_function_is_the_users() -> None:
    def broken(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        compiled(broken, 1, 1, torch.arange(4), torch.arange(4))
