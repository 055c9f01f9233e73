"""The engine on a device of its own: right bytes and no missing order, whenever the copies are done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stream.fake_arena import FakeArena, HazardError, Machine, watch_reads
from tests.stream.parts import HangingBackend, Stored, build, check_bound, idle, plan_for, using
from tests.stream.simulated_cuda import WatchedCuda, simulate
from torchwrap.core import errors
from torchwrap.storage import aio
from torchwrap.stream.arena import Slot
from torchwrap.stream.engine import Engine
from torchwrap.stream.units import Unit

SIZES = [[700, 1300], [2000], [64, 900, 1100], [1500, 10], [2048]]
ORDERS = {
    "cycle": [0, 1, 2, 3, 4] * 3,
    "repeats": [0, 0, 0, 1, 1, 4] * 3,
    "encoder then decoder": [0, 1] + [2, 3, 4] * 4,
    "deviations": [0, 1, 2, 3, 4, 3, 1, 0, 4, 2, 2, 0, 1, 2, 3, 4],
}

every_order = pytest.mark.parametrize("uses", ORDERS.values(), ids=ORDERS)
every_mode = pytest.mark.parametrize("mode", ["late", "early", "random"])
every_home = pytest.mark.parametrize("home", ["disk", "host", "mixed"])
every_arena = pytest.mark.parametrize("make", [FakeArena, WatchedCuda], ids=["fake", "cuda"])
_IN_HOST = {"disk": frozenset(), "host": frozenset(range(9)), "mixed": frozenset({0, 2, 5, 8})}


class Bench:
    """Makes engines on one machine and looks at the machine when the test is over."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.engines: list[tuple[Engine, Stored]] = []

    def engine(
        self,
        machine: Machine,
        make: Any = FakeArena,
        *,
        slots: int = 2,
        home: str = "disk",
        engine: type[Engine] = Engine,
        sizes: Sequence[Sequence[int]] = SIZES,
        parents: dict[int, int] | None = None,
        backend: aio.Backend | None = None,
        timeout_s: float = 20.0,
    ) -> tuple[Engine, Stored]:
        if issubclass(make, WatchedCuda):
            simulate(self.patch, machine)
        watch_reads(self.patch, machine)
        arena = make(machine)
        stored = build(self.folder / "weights.safetensors", sizes, parents=parents, in_host=_IN_HOST[home], arena=arena)
        made = engine(stored.units, plan_for(stored, slots), arena, aio.Reader(2, 4096, backend=backend), timeout_s=timeout_s)
        self.engines.append((made, stored))
        return made, stored


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        made = Bench(tmp_path, patch)
        yield made
        for engine, _ in made.engines:
            engine.reader.close()
            engine._uploads.put(None)


def run(engine: Engine, stored: Stored, uses: Sequence[int]) -> None:
    for index in uses:
        with using(engine, stored.units[index]):
            check_bound(stored, stored.units[index])


@every_arena
@every_mode
@every_home
@every_order
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_every_use_shows_the_stored_bytes(bench: Bench, make: Any, mode: Any, home: str, uses: list[int], slots: int) -> None:
    machine = Machine(mode)
    engine, stored = bench.engine(machine, make, slots=slots, home=home)
    run(engine, stored, uses)
    idle(engine, stored)
    assert len(engine._slots) == slots
    engine.close()
    machine.check()
    assert not [name for name in machine.live_regions if "device" in name]
    assert machine.waits > 0 and machine.copied_bytes > 0


@every_arena
@every_mode
def test_nested_units_are_present_together(bench: Bench, make: Any, mode: Any) -> None:
    machine = Machine(mode)
    engine, stored = bench.engine(machine, make, slots=3, sizes=[[600], [500], [700], [800], [900]], parents={1: 0, 2: 0, 4: 3})
    first, one, two, second, inner = stored.units
    for _ in range(3):
        with using(engine, first):
            for expert in (two, one, two):
                with using(engine, expert):
                    check_bound(stored, expert)
                    check_bound(stored, first)
        with using(engine, second), using(engine, inner):
            check_bound(stored, inner)
            check_bound(stored, second)
    idle(engine, stored)
    machine.check()


@every_mode
@pytest.mark.parametrize("seed", range(5))
def test_random_moments_of_copying(bench: Bench, mode: Any, seed: int) -> None:
    machine = Machine("random", seed=seed)
    engine, stored = bench.engine(machine, slots=3, home="mixed")
    generator = torch.Generator().manual_seed(seed)
    run(engine, stored, torch.randint(0, 5, (40,), generator=generator).tolist())
    idle(engine, stored)
    machine.check()


# --- the detector detects ---------------------------------------------------------------------------------------------------------


class WithoutFree(FakeArena):
    def wait_free(self, slot: Slot) -> None:
        pass


class WithoutReady(FakeArena):
    def wait_ready(self, slot: Slot) -> None:
        pass


class WithoutBeforeRead(FakeArena):
    def before_read(self, slot: Slot) -> None:
        pass


class FreeTooSoon(FakeArena):
    def free_slot(self, slot: Slot) -> None:
        self.machine.forget(slot.device.data_ptr())


class CudaWithoutFree(WatchedCuda):
    def upload(self, slot: Slot, parts: list[tuple[int, torch.Tensor]]) -> None:
        slot.free = None
        super().upload(slot, parts)


class CudaWithoutReady(WatchedCuda):
    def before_compute(self, slot: Slot) -> None:
        ready, slot.ready = slot.ready, None
        super().before_compute(slot)
        slot.ready = ready


class CudaWithoutBeforeRead(WatchedCuda):
    def before_read(self, slot: Slot) -> None:
        pass


class EngineWithoutBefore(Engine):
    def _acquire(self, unit: Unit, whole: bool) -> None:
        arena, before = self.arena, self.arena.before_compute
        arena.before_compute = lambda slot: None  # type: ignore[method-assign]
        try:
            super()._acquire(unit, whole)
        finally:
            arena.before_compute = before  # type: ignore[method-assign]


class EngineWithoutAfter(Engine):
    def _retire(self, fetch: Any) -> None:
        arena, after = self.arena, self.arena.after_compute
        arena.after_compute = lambda slot: None  # type: ignore[method-assign]
        try:
            super()._retire(fetch)
        finally:
            arena.after_compute = after  # type: ignore[method-assign]


class EngineWithoutTicketWait(Engine):
    def _upload_loop(self) -> None:
        while (fetch := self._uploads.get()) is not None:
            try:
                self._upload(fetch)
            except BaseException as error:
                fetch.error = error
            assert fetch.uploaded is not None
            fetch.uploaded.set()


@pytest.mark.parametrize("mode", ["late", "early"])
@pytest.mark.parametrize(
    ("make", "engine"),
    [
        (WithoutFree, Engine),
        (WithoutReady, Engine),
        (CudaWithoutFree, Engine),
        (CudaWithoutReady, Engine),
        (FakeArena, EngineWithoutBefore),
        (FakeArena, EngineWithoutAfter),
    ],
    ids=lambda value: value.__name__,
)
def test_a_missing_order_is_caught(bench: Bench, make: Any, engine: type[Engine], mode: Any) -> None:
    machine = Machine(mode)
    broken, stored = bench.engine(machine, make, engine=engine, home="mixed")
    with pytest.raises(HazardError, match="not ordered"):
        run(broken, stored, ORDERS["cycle"])
    with pytest.raises(HazardError):
        machine.check()


@pytest.mark.parametrize("make", [WithoutBeforeRead, CudaWithoutBeforeRead])
@every_mode
def test_a_read_over_a_pending_upload_is_caught(bench: Bench, make: Any, mode: Any) -> None:
    # The guess is given up between its upload and its use, so nothing else has waited for the copy out of the slot.
    machine = Machine(mode)
    broken, stored = bench.engine(machine, make, slots=2)
    with pytest.raises(HazardError, match="a disk read on host memory"):
        run(broken, stored, ORDERS["cycle"])


def test_an_upload_before_the_read_has_ended_is_caught(bench: Bench) -> None:
    backend, machine = HangingBackend(), Machine("late")
    broken, stored = bench.engine(machine, engine=EngineWithoutTicketWait, backend=backend)
    backend.gate.clear()
    broken._start(stored.units[0], broken._take_slot(stored.units[0]))
    fetch = broken._fetches[0]
    assert fetch.uploaded is not None and fetch.uploaded.wait(20)
    backend.gate.set()
    with pytest.raises(HazardError, match="before the disk read"):
        machine.check()


def test_memory_given_back_during_a_copy_is_caught(bench: Bench) -> None:
    machine = Machine("late")
    broken, stored = bench.engine(machine, FreeTooSoon, home="host")
    run(broken, stored, [0, 1])
    with pytest.raises(HazardError, match="freeing"):
        broken.trim()


def test_a_copy_from_ordinary_memory_is_caught() -> None:
    machine = Machine("early")
    arena = FakeArena(machine)
    with pytest.raises(HazardError, match="page-locked"):
        arena.upload(arena.make_slot(0, 4096), [(0, torch.zeros(8, dtype=torch.uint8))])


def test_late_bytes_are_nan_until_the_copy_is_waited_for() -> None:
    machine = Machine("late")
    arena = FakeArena(machine)
    slot, source = arena.make_slot(0, 4096), arena.host_buffer(4096)
    source.tensor().zero_()
    arena.upload(slot, [(0, source.tensor())])
    assert slot.device.view(torch.float32).isnan().all()
    arena.before_compute(slot)
    assert (slot.device == 0).all()


# --- overlap, in virtual time -----------------------------------------------------------------------------------------------------

_COPY_S = 4096 / 4096.0  # each of the equal units below


def _timed(bench: Bench, slots: int, compute_s: float, passes: int = 1) -> Machine:
    machine = Machine("late", bandwidth=4096.0, compute_s=compute_s)
    engine, stored = bench.engine(machine, slots=slots, home="host", sizes=[[1024]] * 8)
    run(engine, stored, list(range(8)) * passes)
    machine.check()
    return machine


def test_one_slot_takes_the_sum_of_copying_and_computing(bench: Bench) -> None:
    machine = _timed(bench, 1, compute_s=1.0)
    assert machine.overlap_seconds == 0
    assert machine.elapsed == pytest.approx(8 * (_COPY_S + 1.0) + _COPY_S)  # the last one prefetches for the next pass


def test_two_slots_take_the_larger_of_the_two(bench: Bench) -> None:
    machine = _timed(bench, 2, compute_s=1.0)
    assert machine.elapsed <= 8 * 1.0 + 3 * _COPY_S
    assert machine.overlap_seconds >= 7 * 1.0 * 0.99


@pytest.mark.parametrize("compute_s", [0.25, 4.0], ids=["slow link", "fast link"])
def test_prefetch_hides_the_faster_side(bench: Bench, compute_s: float) -> None:
    machine = _timed(bench, 2, compute_s=compute_s, passes=2)
    hidden = min(machine.copy_seconds, 16 * compute_s)
    assert machine.overlap_seconds >= 0.8 * hidden


def test_the_next_pass_is_fetched_before_it_begins(bench: Bench) -> None:
    machine = Machine("late", bandwidth=4096.0, compute_s=1.0)
    engine, stored = bench.engine(machine, slots=2, home="host", sizes=[[1024]] * 8)
    run(engine, stored, range(8))
    hits = engine.counters["unit_hits"]
    with using(engine, stored.units[0]):
        assert engine.counters["unit_hits"] == hits + 1


# --- faults -----------------------------------------------------------------------------------------------------------------------


@every_mode
def test_a_failed_read_leaves_a_usable_engine(bench: Bench, mode: Any) -> None:
    backend, machine = HangingBackend(), Machine(mode)
    engine, stored = bench.engine(machine, backend=backend, home="disk")
    run(engine, stored, [0, 1])
    backend.failures = 1000
    with pytest.raises(errors.StorageError):
        run(engine, stored, [4, 3, 2, 0])
    backend.failures = 0
    run(engine, stored, ORDERS["cycle"])
    idle(engine, stored)
    machine.check()


@every_mode
def test_trim_frees_both_sides_and_starts_again(bench: Bench, mode: Any) -> None:
    machine = Machine(mode)
    engine, stored = bench.engine(machine, home="disk")
    run(engine, stored, [0, 1, 2])
    engine.trim()
    assert machine.live_regions == []
    run(engine, stored, [3, 4, 0])
    idle(engine, stored)
    machine.check()
