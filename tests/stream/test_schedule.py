"""What is expected next: learned in one pass, wrong only where the last two uses truly do not tell, healed after a deviation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchwrap.stream.schedule import Schedule

CYCLES = {
    "layers": list(range(12)),
    "one": [0],
    "two": [0, 1],
    "palindrome": [0, 1, 2, 3, 2, 1],
    "encoder, then decoder steps": [0, 1, 2, *[3, 4, 5] * 4],
    "twice each": [0, 0, 1, 1, 2, 2],
}

cycles = st.lists(st.integers(0, 6), min_size=1, max_size=24)


def walk(schedule: Schedule, uses: Sequence[int]) -> int:
    before = schedule.misses
    for unit in uses:
        schedule.advance(unit)
    return schedule.misses - before


def unclear(cycle: Sequence[int]) -> int:
    """Uses in one steady pass whose two predecessors were last followed by another unit: a dictionary, run twice by hand."""
    last: dict[tuple[int, int], int] = {}
    wrong = 0
    for turn in range(3):
        for position, unit in enumerate(cycle):
            context = (cycle[position - 2] if len(cycle) > 1 else unit, cycle[position - 1])
            wrong += turn == 2 and last.get(context, unit) != unit
            last[context] = unit
    return wrong


@given(cycles, st.booleans())
def test_a_steady_cycle_misses_only_where_it_is_unclear(cycle: list[int], seeded: bool) -> None:
    schedule = Schedule()
    if seeded:
        schedule.seed(sorted(set(cycle)))
    walk(schedule, cycle * 2)
    assert walk(schedule, cycle) == unclear(cycle)
    assert walk(schedule, cycle) == unclear(cycle)


@pytest.mark.parametrize("cycle", [CYCLES[name] for name in ("layers", "one", "two", "palindrome")])
def test_common_cycles_are_never_missed(cycle: list[int]) -> None:
    schedule = Schedule()
    walk(schedule, cycle * 2)
    assert walk(schedule, cycle * 5) == 0


@pytest.mark.parametrize("times", [3, 12])
def test_a_shared_block_is_missed_twice_a_pass(times: int) -> None:
    # Two uses of block 0 do not tell how often it was used before: the head is missed, and the run after it once.
    schedule = Schedule()
    cycle = [0] * times + [1]
    walk(schedule, cycle * 2)
    assert walk(schedule, cycle * 10) == 20


def test_a_decoder_is_learned_while_the_encoder_rests() -> None:
    schedule = Schedule()
    walk(schedule, [0, 1, 2])
    walk(schedule, [3, 4, 5] * 2)
    assert walk(schedule, [3, 4, 5] * 10) == 0
    assert walk(schedule, [0, 1, 2]) <= 1  # that the encoder comes again cannot be known
    assert walk(schedule, [3, 4, 5]) <= 1
    assert walk(schedule, [3, 4, 5] * 3) <= 1


@given(st.permutations(range(6)), st.lists(st.integers(0, 5), max_size=10))
def test_a_deviation_heals_in_one_pass(order: list[int], deviation: list[int]) -> None:
    schedule = Schedule()
    walk(schedule, order * 2)
    walk(schedule, [*deviation, *order])
    walk(schedule, order)
    assert walk(schedule, order * 3) == 0


@given(st.permutations(range(7)), st.integers(1, 9), st.integers(0, 6))
def test_predicted_are_the_next_different_units(order: list[int], count: int, position: int) -> None:
    schedule = Schedule()
    walk(schedule, order * 2 + order[: position + 1])
    upcoming = (order + order)[position + 1 :][: len(order)]
    assert schedule.predict(count) == upcoming[:count]


@given(cycles, st.integers(1, 9), st.booleans())
def test_predictions_are_different_units_that_exist(cycle: list[int], count: int, seeded: bool) -> None:
    schedule = Schedule()
    if seeded:
        schedule.seed(sorted(set(cycle)))
    for unit in cycle * 2:
        schedule.advance(unit)
        chain = schedule.predict(count)
        assert len(chain) == len(set(chain)) <= count and set(chain) <= set(cycle)


@pytest.mark.parametrize("name", CYCLES)
def test_prediction_follows_the_cycle(name: str) -> None:
    """Where the context tells the next unit, it is the first one predicted."""
    schedule, cycle = Schedule(), CYCLES[name]
    walk(schedule, cycle * 2)
    missed = 0
    for position, unit in enumerate(cycle):
        schedule.advance(unit)
        missed += schedule.predict(1) != [cycle[(position + 1) % len(cycle)]]
    assert missed <= unclear(cycle)


def test_a_seed_serves_the_very_first_pass() -> None:
    schedule = Schedule()
    schedule.seed([0, 1, 2, 3])
    schedule.advance(0)
    assert schedule.predict(3) == [1, 2, 3]
    assert walk(schedule, [1, 2, 3, 0, 1]) == 0


def test_nothing_is_predicted_from_nothing() -> None:
    assert Schedule().predict(3) == []
