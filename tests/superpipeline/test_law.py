"""The law of the two knobs against the simulator, and the choice against trying everything."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchwrap.core import errors
from torchwrap.stream.simulator import simulate
from torchwrap.superpipeline.policy import (
    Knobs,
    Profile,
    batch_seconds,
    batch_seconds_together,
    choose,
    fastest_batch,
    obeys_law,
    stall_free,
)

TIMES = [(1.0, 0.25), (1.0, 0.5), (1.0, 1.0), (1.0, 1.5), (1.0, 3.0), (0.0, 1.0), (1.0, 0.0)]

every_time = pytest.mark.parametrize(("compute_s", "transfer_s"), TIMES, ids=lambda value: f"{value:g}")


@st.composite
def knobs(draw: st.DrawFn, most: int = 9) -> Knobs:
    units = draw(st.integers(1, most))
    k = draw(st.integers(1, units))
    return Knobs(k, draw(st.integers(1, k)), units)


def simulated_batch(at: Knobs, compute_s: float, transfer_s: float, arrival: str, overhead_s: float = 0.0) -> float:
    """Seconds per batch in the second half of a long run, a whole number of passes and of batches."""
    length = at.units * at.k_prime * 40
    run = simulate(
        list(range(at.units)) * at.k_prime * 40,
        slots=at.k,
        batch=at.k_prime,
        compute_s=[compute_s] * at.units,
        transfer_s=[transfer_s] * at.units,
        overhead_s=overhead_s,
        arrival=arrival,  # type: ignore[arg-type]
    )
    assert run.peak_units <= at.k
    return (run.uses[-1].end - run.uses[length // 2 - 1].end) / (length // 2) * at.k_prime


@settings(max_examples=60, deadline=None)
@given(knobs(), st.sampled_from(TIMES), st.sampled_from([0.0, 0.3, 2.0]))
def test_formulas_are_what_a_long_simulation_shows(at: Knobs, times: tuple[float, float], overhead_s: float) -> None:
    for arrival, formula in (("unit", batch_seconds), ("batch", batch_seconds_together)):
        expected = formula(at, *times, overhead_s)
        # What is not in step with the period at the ends of the stretch is spread over its twenty and more batches.
        assert simulated_batch(at, *times, arrival, overhead_s) == pytest.approx(expected, rel=2e-3, abs=1e-9)


@every_time
@pytest.mark.parametrize("k_prime", [1, 2, 3])
@pytest.mark.parametrize("k", [3, 4, 6, 8])
def test_the_textbook_form_where_batches_are_small(k: int, k_prime: int, compute_s: float, transfer_s: float) -> None:
    """Per batch k' t_c + max(0, k' t_x - (k - k') t_c), never less than k' t_x; per unit max(t_c, t_x) where the law holds."""
    at = Knobs(k, k_prime, units=20)
    stalled = k_prime * compute_s + max(0.0, k_prime * transfer_s - (k - k_prime) * compute_s)
    expected = k_prime * max(compute_s, transfer_s) if obeys_law(at, compute_s, transfer_s) else max(stalled, k_prime * transfer_s)
    assert batch_seconds_together(at, compute_s, transfer_s) == pytest.approx(expected)


@given(knobs(), st.floats(0, 10), st.floats(0, 10))
def test_single_arrival_is_never_slower_and_the_law_is_safe_for_it(at: Knobs, compute_s: float, transfer_s: float) -> None:
    assert batch_seconds(at, compute_s, transfer_s) <= batch_seconds_together(at, compute_s, transfer_s) * (1 + 1e-9)
    if stall_free(at, compute_s, transfer_s):
        assert batch_seconds(at, compute_s, transfer_s) == pytest.approx(at.k_prime * compute_s)


@pytest.mark.parametrize(
    ("k", "k_prime", "transfer_s", "expected"),
    [
        (2, 1, 1.0, True),  # double buffering keeps up with an equally fast link
        (2, 1, 1.1, False),
        (4, 2, 1.0, True),
        (4, 3, 1.0, False),  # three arrive while one is computed
        (4, 3, 1 / 3, True),
        (3, 3, 0.01, False),  # load, then run
    ],
)
def test_the_law(k: int, k_prime: int, transfer_s: float, expected: bool) -> None:
    assert stall_free(Knobs(k, k_prime, 20), 1.0, transfer_s) is expected


def test_what_moves() -> None:
    assert Knobs(4, 2, 10).moved_per_pass == 10
    assert Knobs(10, 1, 10).moved_per_pass == 0
    assert Knobs(8, 8, 9).moved_per_pass == pytest.approx(9 / 8)  # one in eight uses, as for the best possible policy
    assert Knobs(4, 1, 10).moved_per_step == 12
    assert Knobs(4, 1, 10).saved == pytest.approx(0.6)


@settings(deadline=None)
@given(knobs())
def test_moves_are_what_the_simulator_counts(at: Knobs) -> None:
    passes = at.k_prime * 5
    warm, run = (simulate(list(range(at.units)) * count, slots=at.k, batch=at.k_prime) for count in (passes, 2 * passes))
    assert run.transfers - warm.transfers == pytest.approx(at.moved_per_pass * passes)


@pytest.mark.parametrize(("k", "k_prime", "field"), [(0, 1, "k"), (5, 1, "k"), (3, 4, "k_prime"), (3, 0, "k_prime")])
def test_knobs_out_of_range(k: int, k_prime: int, field: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Knobs(k, k_prime, 4)
    assert caught.value.where == field


# --- choice -----------------------------------------------------------------------------------------------------------------------


def brute(profile: Profile, max_slowdown: float, most: int) -> int:
    """The smallest k that any k' of it makes fast enough; else the smallest of the fastest."""
    best = {k: min(profile.slowdown(k, batch) for batch in range(1, k + 1)) for k in range(1, most + 1)}
    limit = max(max_slowdown, min(best.values()) * 1.01)
    return min(k for k, slowdown in best.items() if slowdown <= limit)


@pytest.mark.parametrize("most", [2, 5, 8])
@pytest.mark.parametrize("transfer_s", [0.0, 0.2, 0.7, 1.0, 1.3, 4.0])
def test_auto_finds_what_trying_everything_finds(transfer_s: float, most: int) -> None:
    profile = Profile((1.0,) * 8, (transfer_s,) * 8, rest_s=0.5)
    choice = choose(profile, max_slowdown=1.10, allowed=range(1, most + 1))
    assert choice.k == brute(profile, 1.10, most)
    assert choice.slowdown == pytest.approx(min(profile.slowdown(choice.k, batch) for batch in range(1, choice.k + 1)), rel=0.01)


def test_a_fast_link_needs_two_and_a_slow_one_all() -> None:
    assert choose(Profile((1.0,) * 12, (0.9,) * 12), max_slowdown=1.05).k == 2
    assert choose(Profile((1.0,) * 12, (9.0,) * 12), max_slowdown=1.05).k == 12


def test_one_knob_given() -> None:
    profile = Profile((1.0,) * 9, (0.9,) * 9)
    assert choose(profile, max_slowdown=1.1, k=5).k == 5
    at = choose(profile, max_slowdown=1.1, k_prime=3)
    assert (at.k, at.k_prime) == (4, 3)  # the first of three arrives while the fourth is computed, the others while it is


def test_requests_that_cost_make_batches_worth_it() -> None:
    assert fastest_batch(8, 20, 1.0, 0.2, overhead_s=0.0) == 1
    assert fastest_batch(8, 20, 1.0, 0.2, overhead_s=1.5) > 1


def test_unequal_blocks_are_simulated_one_by_one() -> None:
    times = tuple(4.0 if index == 3 else 0.5 for index in range(6))
    slow = Profile((1.0,) * 6, times)
    assert slow.pass_seconds(2, 1) > slow.pass_seconds(4, 1) >= slow.resident_s
    assert math.isclose(slow.slowdown(6, 1), 1.0)
