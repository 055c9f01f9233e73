"""The arena holds what concatenation would hold, through every operation, and moves few bytes for it."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from torchwrap.attention.cache import Arena

Pair = tuple[torch.Tensor, torch.Tensor]


def tokens(count: int, batch: int = 2, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, count, width, generator=generator) for width in (4, 6))  # type: ignore[return-value]


class Plain:
    """The same by concatenation."""

    def __init__(self, window: int | None = None) -> None:
        self.window, self.held = window, None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        whole = (keys, values) if self.held is None else tuple(torch.cat(pair, 2) for pair in zip(self.held, (keys, values), strict=True))
        self.held = tuple(part if self.window is None else part[:, :, -self.window :] for part in whole)
        return whole


def assert_same(arena: Arena, plain: Plain) -> None:
    assert torch.equal(arena.keys, plain.held[0])
    assert torch.equal(arena.values, plain.held[1])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_random_operations_hold_what_concatenation_holds(window: int | None, seed: int) -> None:
    chance = random.Random(seed)
    arena, plain, batch = Arena(window), Plain(window), 2
    for step in range(60):
        what = chance.choice(["token", "token", "token", "several", "crop", "reorder", "rows", "copy"])
        if plain.held is None or what in ("token", "several"):
            given = tokens(1 if what == "token" else chance.randint(1, 30), batch, seed=step)
            expected, got = plain.append(*given), arena.append(*given)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        elif what == "crop":
            count = chance.randint(0, plain.held[0].shape[2] - 1)
            arena.crop(count)
            plain.held = tuple(part[:, :, : part.shape[2] - count] for part in plain.held)
        elif what == "reorder":
            rows = torch.tensor([chance.randrange(batch) for _ in range(batch)])
            arena.reorder(rows)
            plain.held = tuple(part[rows] for part in plain.held)
        elif what == "rows":
            batch = chance.randint(1, 4)
            rows = torch.tensor([chance.randrange(plain.held[0].shape[0]) for _ in range(batch)])
            plain.held = tuple(part[rows] for part in plain.held)
            arena.hold(arena.keys[rows], arena.values[rows])
        else:
            arena = copy.deepcopy(arena)
        assert_same(arena, plain)


def test_a_token_is_moved_less_than_twice_on_average() -> None:
    arena, count = Arena(), 2000
    for step in range(count):
        arena.append(*tokens(1, seed=step))
    size = sum(part.numel() * part.element_size() for part in tokens(1))
    assert arena.copied_bytes < 2 * count * size
    assert arena.growths < 12
    assert arena.capacity <= 2 * count + 64


def test_a_window_moves_less_than_four_tokens_for_each_new_one() -> None:
    window, count = 200, 2000
    arena = Arena(window)
    for step in range(count):
        arena.append(*tokens(1, seed=step))
    size = sum(part.numel() * part.element_size() for part in tokens(1))
    assert arena.copied_bytes < 4 * count * size
    assert arena.capacity <= window + window // 2 + 64


def test_views_of_earlier_steps_stay_as_they_are_while_tokens_are_appended() -> None:
    arena = Arena()
    arena.append(*tokens(5, seed=1))
    seen = [arena.append(*tokens(1, seed=step))[0] for step in range(100)]
    kept = [view.clone() for view in seen]
    for step in range(100):
        arena.append(*tokens(1, seed=step + 7))
    assert all(torch.equal(view, copied) for view, copied in zip(seen, kept, strict=True))


def test_a_prompt_is_kept_as_it_came_until_a_token_follows() -> None:
    keys, values = tokens(50)
    arena = Arena()
    whole = arena.append(keys, values)
    assert whole[0] is keys and arena.keys.data_ptr() == keys.data_ptr() and arena.capacity == 0
    arena.append(*tokens(1, seed=1))
    assert arena.keys.data_ptr() != keys.data_ptr() and arena.capacity >= 100


def test_a_slice_of_a_much_larger_tensor_is_copied_at_once() -> None:
    fused = torch.randn(2, 3, 50, 12)
    arena = Arena()
    arena.append(fused[..., :4], fused[..., 4:8])
    assert arena.keys.data_ptr() != fused.data_ptr()
    assert torch.equal(arena.keys, fused[..., :4])


def test_exchanging_rows_copies_only_those_that_change() -> None:
    arena = Arena()
    arena.append(*tokens(5, batch=4))
    arena.append(*tokens(1, batch=4, seed=1))
    before = arena.copied_bytes
    arena.reorder(torch.arange(4))
    assert arena.copied_bytes == before
    store = arena.keys.data_ptr()
    arena.reorder(torch.tensor([0, 2, 2, 3]))
    row = sum(part[0].numel() * part.element_size() for part in (arena.keys, arena.values))
    assert arena.copied_bytes - before == row
    assert arena.keys.data_ptr() == store


def test_memory_made_in_inference_mode_is_left_when_it_ends() -> None:
    arena, plain = Arena(), Plain()
    with torch.inference_mode():
        for step in range(3):
            given = tokens(1, seed=step)
            arena.append(*given), plain.append(*given)
    with torch.no_grad():
        for step in range(3, 6):
            given = tokens(1, seed=step)
            arena.append(*given), plain.append(*given)
        arena.reorder(torch.tensor([1, 0]))
    plain.held = tuple(part[torch.tensor([1, 0])] for part in plain.held)
    assert_same(arena, plain)


def test_another_dtype_or_batch_gets_memory_of_its_own() -> None:
    arena = Arena()
    arena.append(*tokens(2))
    arena.append(*tokens(1))
    arena.hold(arena.keys.double(), arena.values.double())
    keys, _ = arena.append(*(part.double() for part in tokens(1, seed=3)))
    assert keys.dtype == torch.float64 and keys.shape[2] == 4
    arena.clear()
    assert arena.length == 0 and arena.nbytes == 0


@pytest.mark.parametrize("window", [None, 6])
def test_a_device_without_memory_for_growth_is_an_error_that_costs_nothing(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(window)
    first, second = (torch.randn(1, 2, 5, 4) for _ in range(2))
    arena.append(first, first)
    made = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *sizes, **options: made(self, 1 << 60))
    with pytest.raises(RuntimeError, match="memory"):
        arena.append(second, second)
    assert torch.equal(arena.keys, first) and torch.equal(arena.values, first) and arena.growths == 0
    monkeypatch.setattr(torch.Tensor, "new_empty", made)
    keys, values = arena.append(second, second)
    assert torch.equal(keys, torch.cat([first, second], 2)) and torch.equal(values, keys)


@pytest.mark.parametrize("window", [None, 6])
def test_where_memory_does_not_suffice_to_double_what_is_needed_is_taken(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, first = Arena(window), torch.randn(1, 2, 5, 4)
    arena.append(first, first)
    monkeypatch.setattr(Arena, "_room", lambda self, length, needed: 1 << 50)
    for _ in range(3):
        keys, values = arena.append(first[:, :, :1], first[:, :, :1])
    assert torch.equal(keys[:, :, -3:], first[:, :, :1].expand(-1, -1, 3, -1)) and torch.equal(values, keys)
    assert arena.capacity == keys.shape[2]
