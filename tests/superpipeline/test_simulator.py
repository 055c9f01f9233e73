"""The simulator against the engine: the same units in slots at every use, the same transfers, and on the virtual clock the same times."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stream.fake_arena import FakeArena, Machine
from tests.stream.parts import Stored, build, check_bound, plan_for, using
from torchwrap.storage import aio
from torchwrap.stream.arena import HostArena
from torchwrap.stream.batches import Batches
from torchwrap.stream.engine import Engine
from torchwrap.stream.simulator import Run, simulate
from torchwrap.superpipeline.policy import Knobs, batch_seconds, batch_seconds_together, stall_free

UNIT = 1024  # elements of float32: 4096 bytes


@contextmanager
def engine_of(
    units: int, slots: int, batch: int, arena: HostArena | FakeArena | None = None, *, folder: Path | None = None
) -> Iterator[tuple[Engine, Stored]]:
    arena = arena or HostArena()
    in_host = frozenset(range(units)) if arena.separate else frozenset()
    with tempfile.TemporaryDirectory() as made, aio.Reader(2, 4096) as reader:
        stored = build(Path(folder or made, "weights.safetensors"), [[UNIT]] * units, in_host=in_host, arena=arena)
        engine = Engine(stored.units, plan_for(stored, slots), arena, reader, batch=batch, timeout_s=20.0)
        yield engine, stored
        engine.trim()
        engine._uploads.put(None)


def recorded(engine: Engine, stored: Stored, uses: Sequence[int]) -> tuple[list[frozenset[int]], list[bool]]:
    """Units in slots during each use, and whether it had to be fetched."""
    present, fetched = [], []
    for index in uses:
        hits = engine.counters["unit_hits"]
        with using(engine, stored.units[index]):
            check_bound(stored, stored.units[index])
            assert len(engine._slots) == engine.plan.slots
            present.append(frozenset(engine._fetches))
            fetched.append(engine.counters["unit_hits"] == hits)
    return present, fetched


def agree(engine: Engine, stored: Stored, uses: Sequence[int], run: Run) -> None:
    present, fetched = recorded(engine, stored, uses)
    assert present == [use.present for use in run.uses]
    assert fetched == [use.fetched for use in run.uses]
    assert engine.counters["reads"] == run.transfers
    assert run.peak_units <= engine.plan.slots


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), min_size=1, max_size=30))),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_any_order_of_uses(program: tuple[int, list[int]], slots: int, batch: int) -> None:
    units, uses = program
    slots = min(slots, units)
    with engine_of(units, slots, min(batch, slots)) as (engine, stored):
        agree(engine, stored, uses, simulate(uses, slots=slots, batch=min(batch, slots), order=range(units)))


GRID = [(k, k_prime) for k in (1, 2, 3, 5) for k_prime in range(1, k + 1)]

every_knob = pytest.mark.parametrize(("k", "k_prime"), GRID, ids=[f"k{k}-{k_prime}" for k, k_prime in GRID])


@every_knob
def test_a_cyclic_scan(k: int, k_prime: int) -> None:
    uses = list(range(6)) * 7
    with engine_of(6, k, k_prime) as (engine, stored):
        agree(engine, stored, uses, simulate(uses, slots=k, batch=k_prime))


@every_knob
def test_there_and_back_reuses_what_is_present_at_the_turns(k: int, k_prime: int) -> None:
    """A training step uses the units forward and then backward: 2 (n - k) transfers, whatever k'."""
    step = [*range(6), *reversed(range(6))]
    warm = simulate(step * 3, slots=k, batch=k_prime)
    run = simulate(step * (3 + k_prime), slots=k, batch=k_prime)
    assert run.transfers - warm.transfers == k_prime * Knobs(k, k_prime, 6).moved_per_step
    with engine_of(6, k, k_prime) as (engine, stored):
        agree(engine, stored, step * (3 + k_prime), run)


@every_knob
def test_a_batch_is_given_up_together_and_the_next_asked_for_together(k: int, k_prime: int) -> None:
    run = simulate(list(range(9)) * 6, slots=k, batch=k_prime)
    steady = run.uses[18:]
    changes = [position for position, (a, b) in enumerate(pairwise(steady), 19) if a.present != b.present]
    assert all(position % k_prime == 0 for position in changes)
    for position in changes:
        come = run.uses[position].present - run.uses[position - 1].present
        assert len(come) == min(k_prime, 9 - k)


# --- times, on the virtual clock of the simulated machine ------------------------------------------------------------------------


def timed(k: int, k_prime: int, *, compute_s: float, transfer_s: float, passes: int, units: int = 8) -> Machine:
    machine = Machine("late", bandwidth=4 * UNIT / transfer_s, compute_s=compute_s)
    with engine_of(units, k, k_prime, FakeArena(machine)) as (engine, stored):
        for index in list(range(units)) * passes:
            with using(engine, stored.units[index]):
                check_bound(stored, stored.units[index])
        machine.check()
        assert isinstance(engine.arena, FakeArena) and engine.arena.most_live <= k
    return machine


@pytest.mark.parametrize(("compute_s", "transfer_s"), [(1.0, 0.25), (1.0, 1.0), (1.0, 1.75), (0.25, 1.0)], ids=lambda t: f"{t:g}")
@every_knob
def test_the_device_takes_the_simulated_time(k: int, k_prime: int, compute_s: float, transfer_s: float) -> None:
    machine = timed(k, k_prime, compute_s=compute_s, transfer_s=transfer_s, passes=4)
    run = simulate(list(range(8)) * 4, slots=k, batch=k_prime, compute_s=[compute_s] * 8, transfer_s=[transfer_s] * 8)
    assert machine.compute.time == pytest.approx(run.seconds)
    assert machine.copied_bytes == run.transfers * 4 * UNIT


@pytest.mark.parametrize("transfer_s", [0.2, 0.5, 1.0, 1.5, 3.0])
@every_knob
def test_the_device_keeps_the_law(k: int, k_prime: int, transfer_s: float) -> None:
    """From the second half of a long run: the closed formula, no wait where the law promises none, and never the textbook's bound."""
    at, half = Knobs(k, k_prime, 8), 3 * k_prime
    first, both = (timed(k, k_prime, compute_s=1.0, transfer_s=transfer_s, passes=passes).compute.time for passes in (half, 2 * half))
    per_batch = (both - first) / (8 * half) * k_prime
    assert per_batch == pytest.approx(batch_seconds(at, 1.0, transfer_s), rel=0.03)
    assert per_batch <= batch_seconds_together(at, 1.0, transfer_s) * 1.0001
    if stall_free(at, 1.0, transfer_s):
        assert per_batch == pytest.approx(k_prime)


def test_sixty_per_cent_less_at_k_two_fifths_of_n() -> None:
    at = Knobs(4, 1, 10)
    assert at.saved == pytest.approx(0.6)
    machine = timed(4, 1, compute_s=1.0, transfer_s=0.95, passes=4, units=10)
    assert machine.compute.time / 40 <= 1.15


def test_a_batch_begins_anew_with_a_unit_that_was_not_foreseen() -> None:
    batches = Batches(3)
    assert (batches.begun(present=False), batches.ended(), batches.begun(present=True), batches.ended()) == (True, False, False, False)
    assert batches.begun(present=False)
    assert [batches.ended() for _ in range(6)] == [False, False, True, False, False, True]


def test_batches_of_one_hand_on_after_every_use() -> None:
    batches = Batches()
    assert batches.begun(present=True) and batches.begun(present=False)
    assert [batches.ended() for _ in range(3)] == [True, True, True]
