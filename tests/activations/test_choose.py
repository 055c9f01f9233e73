"""The choice between keeping, swapping and recomputing, against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from torchwrap.activations.choose import Cost, choose, idle_bytes, peak_bytes


def _uses(dice: random.Random, count: int, *, equal: bool = False) -> list[Cost]:
    uses = []
    for unit in range(count):
        nbytes = 100 if equal else dice.randint(50, 200)
        uses.append(Cost(unit, nbytes, 10 if equal else dice.randint(0, nbytes // 2), dice.random()))
    return uses


def _seconds(uses: list[Cost], choices: dict[int, str]) -> float:
    return sum(use.seconds for use in uses if choices[use.unit] == "recompute")


def _moved(uses: list[Cost], choices: dict[int, str]) -> int:
    return sum(use.nbytes for use in uses if choices[use.unit] == "swap")


def test_enough_memory_keeps_everything() -> None:
    uses = _uses(random.Random(1), 6)
    assert set(choose(uses, allowed=10**6, swappable=0).values()) == {"keep"}


def test_no_memory_and_no_link_recomputes_all_but_the_last() -> None:
    uses = [Cost(unit, 100, 10, 1.0) for unit in range(5)]
    # The last one's activations are there when its backward begins, whatever is done about them.
    assert choose(uses, allowed=0, swappable=0) == {0: "recompute", 1: "recompute", 2: "recompute", 3: "recompute", 4: "keep"}


def test_what_saves_most_time_for_a_byte_is_kept() -> None:
    uses = [Cost(0, 100, 0, 1.0), Cost(1, 100, 0, 3.0), Cost(2, 100, 0, 2.0), Cost(3, 100, 0, 0.1)]
    assert choose(uses, allowed=200, swappable=0) == {0: "recompute", 1: "keep", 2: "recompute", 3: "keep"}
    assert choose(uses, allowed=300, swappable=0) == {0: "recompute", 1: "keep", 2: "keep", 3: "keep"}


def test_memory_goes_where_many_come_and_go_if_the_link_has_time() -> None:
    uses = [Cost(unit, 100, 0, 1.0) for unit in range(8)]
    kept = choose(uses, allowed=300, swappable=0)
    assert sorted(kept.values()) == ["keep"] * 3 + ["recompute"] * 5
    mixed = choose(uses, allowed=300, swappable=600)
    assert sorted(mixed.values()) == ["keep"] * 2 + ["swap"] * 6
    assert sorted(choose(uses, allowed=300, swappable=300).values()).count("recompute") < 5


def test_a_unit_used_several_times_has_one_choice() -> None:
    uses = [Cost(0, 100, 10, 1.0)] * 6
    assert choose(uses, allowed=600, swappable=0) == {0: "keep"}
    assert choose(uses, allowed=599, swappable=0) == {0: "recompute"}
    assert choose(uses, allowed=599, swappable=600) == {0: "swap"}


@pytest.mark.parametrize("seed", range(20))
def test_limits_hold(seed: int) -> None:
    dice = random.Random(seed)
    uses = _uses(dice, dice.randint(1, 9))
    allowed, swappable = dice.randint(0, 900), dice.randint(0, 600)
    choices = choose(uses, allowed=allowed, swappable=swappable)
    least = peak_bytes(uses, dict.fromkeys(choices, "recompute"))
    assert peak_bytes(uses, choices) <= max(allowed, least)
    assert _moved(uses, choices) <= swappable


@pytest.mark.parametrize("seed", range(10))
def test_as_good_as_trying_everything_for_blocks_of_one_size(seed: int) -> None:
    dice = random.Random(seed)
    uses, allowed = _uses(dice, 7, equal=True), dice.randint(170, 700)
    best = min(
        _seconds(uses, choices)
        for kinds in itertools.product(("keep", "recompute"), repeat=len(uses))
        if peak_bytes(uses, choices := dict(enumerate(kinds))) <= allowed
    )
    assert _seconds(uses, choose(uses, allowed=allowed, swappable=0)) == pytest.approx(best)


def test_peak_by_hand() -> None:
    uses = [Cost(0, 100, 10, 1.0), Cost(1, 200, 20, 1.0), Cost(2, 300, 30, 1.0)]
    assert peak_bytes(uses, {0: "keep", 1: "keep", 2: "keep"}) == 600
    assert peak_bytes(uses, {0: "recompute", 1: "recompute", 2: "recompute"}) == 10 + 20 + 300
    assert peak_bytes(uses, {0: "swap", 1: "swap", 2: "swap"}) == 200 + 300
    assert peak_bytes(uses, {0: "swap", 1: "recompute", 2: "keep"}) == 100 + 20 + 300


def test_what_a_link_can_move_besides_weights() -> None:
    assert idle_bytes(2.0, 0, read=1000, write=500) == 1000
    assert idle_bytes(2.0, 1500, read=1000, write=500) == 250
    assert idle_bytes(2.0, 2500, read=1000, write=500) == 0
    assert idle_bytes(2.0, 0, read=100, write=500) == 400


def test_what_a_link_can_move_besides_weights_and_their_updates() -> None:
    assert idle_bytes(2.0, 0, read=1000, write=500, update_read=1000, update_written=500) == 1000  # two of four seconds are left to read
    assert idle_bytes(2.0, 0, read=1000, write=500, update_read=2000, update_written=750) == 500
    assert idle_bytes(2.0, 500, read=1000, write=500, update_read=2000, update_written=500) == 500
    assert idle_bytes(2.0, 0, read=1000, write=500, update_read=2000, update_written=1000) == 0
