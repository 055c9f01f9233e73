"""The engine in the machine's own memory: any order of use, any nesting, any error, and never a slot too many or lost."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hangs import only_hangs_end_patience
from tests.stream.fake_arena import FakeArena, Machine
from tests.stream.parts import HangingBackend, Stored, build, check_bound, engine_state, idle, plan_for, using
from torchwrap.core import errors
from torchwrap.storage import aio
from torchwrap.stream.arena import Arena, HostArena
from torchwrap.stream.engine import Engine

SIZES = [[700, 1300], [2000], [64, 900, 1100], [1500, 10], [2048], [333]]


@contextmanager
def engine_over(
    folder: Path | str, sizes: list[list[int]], slots: int, arena: Arena | None = None, *, timeout_s: float = 20.0, **more: Any
) -> Iterator[tuple[Engine, Stored]]:
    stored = build(Path(folder, "weights.safetensors"), sizes, parents=more.pop("parents", None))
    with aio.Reader(2, 4096, backend=more.pop("backend", None)) as reader:
        engine = Engine(stored.units, plan_for(stored, slots), arena or HostArena(), reader, timeout_s=timeout_s)
        yield engine, stored
        engine._uploads.put(None)


@dataclass
class Use:
    """One use of a unit, with uses of others (or of itself) inside it, and an error at the end or not."""

    unit: int
    inside: list[Use] = field(default_factory=list)
    fails: bool = False

    def depth(self, around: frozenset[int] = frozenset()) -> int:
        """Most different units present at once."""
        now = around | {self.unit}
        return max([len(now), *(use.depth(now) for use in self.inside)])


class Boom(Exception):
    pass


uses = st.recursive(
    st.builds(Use, st.integers(0, 5), st.just([]), st.sampled_from([False, False, False, True])),
    lambda inner: st.builds(Use, st.integers(0, 5), st.lists(inner, max_size=3), st.sampled_from([False, False, False, True])),
    max_leaves=6,
)


def perform(engine: Engine, stored: Stored, use: Use) -> None:
    unit = stored.units[use.unit]
    with using(engine, unit):
        check_bound(stored, unit)
        engine_state(engine)
        for inner in use.inside:
            perform(engine, stored, inner)
            check_bound(stored, unit)
        if use.fails:
            raise Boom


@settings(max_examples=80)
@given(st.lists(uses, min_size=1, max_size=12), st.integers(1, 4), st.sampled_from(["own", "late", "early", "random"]))
def test_any_program_of_uses(program: list[Use], slots: int, where: Any) -> None:
    machine = None if where == "own" else Machine(where)
    with (
        tempfile.TemporaryDirectory() as folder,
        engine_over(folder, SIZES, slots, FakeArena(machine) if machine else None) as (engine, stored),
    ):
        for use in program * 2:
            if use.depth() > slots:
                with pytest.raises((errors.UnsupportedModelError, Boom)):
                    perform(engine, stored, use)
            else:
                try:
                    perform(engine, stored, use)
                except Boom:
                    assert True
            idle(engine, stored)
        engine.trim()
        assert engine._slots == [] and engine._free == []
        if machine:
            machine.check()
            assert isinstance(engine.arena, FakeArena) and engine.arena.most_live <= slots


@settings(max_examples=25)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.integers(1, 4), st.lists(st.integers(0, 29), max_size=5))
def test_failing_reads_at_any_time(order: list[int], slots: int, failing: list[int]) -> None:
    backend = HangingBackend()
    with tempfile.TemporaryDirectory() as folder, engine_over(folder, SIZES, slots, backend=backend) as (engine, stored):
        for step, index in enumerate(order):
            backend.failures = 2 if step in failing else 0
            try:
                with using(engine, stored.units[index]):
                    check_bound(stored, stored.units[index])
            except errors.StorageError:
                assert failing
            idle(engine, stored)
        backend.failures = 0
        for _ in range(2):  # an error met by a guess is reported once, to the use that it was made for
            for unit in stored.units:
                with suppress(errors.StorageError), using(engine, unit):
                    check_bound(stored, unit)
        for unit in stored.units:
            with using(engine, unit):
                check_bound(stored, unit)
        idle(engine, stored)


def test_deeper_than_the_slots_is_refused_and_named(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        first, second, third, *_ = stored.units
        with using(engine, first), using(engine, second):
            with pytest.raises(errors.UnsupportedModelError, match=r"unit\.2.*k=3"), using(engine, third):
                pass
            check_bound(stored, first)
            check_bound(stored, second)
        idle(engine, stored)


def test_a_guess_that_cannot_be_read_does_not_fail_the_unit_at_hand(tmp_path: Path) -> None:
    """The file of the next unit changes: the present one is not concerned, and is released as always."""
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        other = build(tmp_path / "other.safetensors", [SIZES[1]])
        for piece, replaced in zip(stored.units[1].pieces, other.units[0].pieces, strict=True):
            piece.home = replaced.home
            stored.values[piece.index] = other.values[replaced.index]
        os.utime(tmp_path / "other.safetensors", ns=(1, 1))
        with using(engine, stored.units[0]):
            check_bound(stored, stored.units[0])
        idle(engine, stored)
        with pytest.raises(errors.CorruptDataError), using(engine, stored.units[1]):
            pass
        idle(engine, stored)
        engine.trim()


@pytest.mark.parametrize("separate", [False, True], ids=["host", "device"])
def test_a_read_that_hangs_costs_its_slot_and_nothing_else(tmp_path: Path, separate: bool) -> None:
    backend = HangingBackend()
    arena = FakeArena(Machine("late")) if separate else HostArena()
    with only_hangs_end_patience(), engine_over(tmp_path, SIZES, 3, arena, timeout_s=0.3, backend=backend) as (engine, stored):
        order = [0, 1, 2, 3, 4, 5]
        for index in order:
            with using(engine, stored.units[index]):
                check_bound(stored, stored.units[index])
        backend.gate.clear()
        with pytest.raises(errors.StorageError, match="no progress"):
            for index in [3, 5, 1, 4, 2]:
                with using(engine, stored.units[index]):
                    pass
        engine_state(engine)
        backend.gate.set()
        for index in order:  # a guess that was given up meanwhile may tell so, once
            with suppress(errors.StorageError), using(engine, stored.units[index]):
                check_bound(stored, stored.units[index])
        for index in order * 2:
            with using(engine, stored.units[index]):
                engine_state(engine)
                check_bound(stored, stored.units[index])
        idle(engine, stored)


def test_two_threads_take_turns(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def loop(engine: Engine, stored: Stored, order: list[int]) -> None:
        try:
            for index in order * 5:
                with using(engine, stored.units[index]):
                    check_bound(stored, stored.units[index])
        except BaseException as error:
            failures.append(error)

    with engine_over(tmp_path, SIZES, 1) as (engine, stored):
        threads = [threading.Thread(target=loop, args=(engine, stored, order)) for order in ([0, 1, 2, 3], [5, 4, 3, 2, 1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures
        idle(engine, stored)


def test_a_steady_scan_reads_every_unit_once_per_pass(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        reads = []
        for _ in range(4):
            before = engine.counters["reads"]
            for unit in stored.units:
                with using(engine, unit):
                    check_bound(stored, unit)
            reads.append(engine.counters["reads"] - before)
        assert reads[1:] == [len(stored.units)] * 3
        assert engine.counters["unit_hits"] >= 4 * len(stored.units) - 2


@pytest.mark.parametrize("cycle", [[0, 1, 2], [0] * 12 + [1], [0, 0, 0, 1, 1, 1, 2]], ids=["scan", "shared block", "groups"])
def test_as_many_units_as_slots_stay_once_the_order_is_known(tmp_path: Path, cycle: list[int]) -> None:
    with engine_over(tmp_path, SIZES, len(set(cycle))) as (engine, stored):
        reads = []
        for _ in range(5):
            before = engine.counters["reads"]
            for index in cycle:
                with using(engine, stored.units[index]):
                    check_bound(stored, stored.units[index])
            reads.append(engine.counters["reads"] - before)
        assert reads[2:] == [0, 0, 0], reads


@pytest.mark.parametrize("blocks", [2, 3, 6])
@pytest.mark.parametrize("slots", [2, 3, 4])
def test_experts_do_not_evict_the_next_block_again_and_again(tmp_path: Path, blocks: int, slots: int) -> None:
    """Every block with three experts, all used: a pass reads every unit once, and at most one guess per block is lost."""
    sizes = [size for _ in range(blocks) for size in ([600], [600], [600], [900])]
    parents = {4 * block + expert: 4 * block + 3 for block in range(blocks) for expert in range(3)}
    with engine_over(tmp_path, sizes, slots, parents=parents) as (engine, stored):
        reads = []
        for _ in range(4):
            before = engine.counters["reads"]
            for block in range(blocks):
                with using(engine, stored.units[4 * block + 3]):
                    for expert in range(3):
                        with using(engine, stored.units[4 * block + expert]):
                            check_bound(stored, stored.units[4 * block + expert])
            reads.append(engine.counters["reads"] - before)
        assert max(reads[1:]) <= len(sizes) + blocks, reads


def test_corrupted_bytes_are_refused(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 1) as (engine, stored):
        for unit in stored.units:
            with using(engine, unit):
                check_bound(stored, unit)
        home = stored.units[2].pieces[1].home
        assert home is not None
        status = os.stat(home.file.path)
        with open(home.file.path, "r+b") as file:
            file.seek(home.offset + 100)
            flipped = bytes([file.read(1)[0] ^ 1])
            file.seek(home.offset + 100)
            file.write(flipped)
        os.utime(home.file.path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(errors.CorruptDataError, match=r"piece\.4"):
            for unit in stored.units[1:]:
                with using(engine, unit):
                    check_bound(stored, unit)
        idle(engine, stored)


def test_a_closed_engine_leaves_the_weights_alone(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 1) as (engine, stored):
        with using(engine, stored.units[0]):
            pass
        engine.close()
        engine.close()
        with using(engine, stored.units[0]):  # a thread that waited for the lock while the model was unwrapped
            idle(engine, stored)
        assert not engine._slots and not engine.lock._is_owned()


def test_trim_inside_a_use_is_refused(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        with using(engine, stored.units[0]):
            with pytest.raises(errors.StorageError, match="forward"):
                engine.trim()
            check_bound(stored, stored.units[0])
        engine.trim()


def test_a_piece_is_found_by_the_address_of_its_view(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        unit = stored.units[2]
        with using(engine, unit):
            for piece in unit.pieces:
                found = engine.piece_at(piece.parameter.data[3:])
                assert found is not None and found[0] is piece and found[1] == 3 * piece.dtype.itemsize
            assert engine.piece_at(stored.values[0]) is None
            inside = unit.pieces[0].parameter.data[:0]
        assert engine.piece_at(stored.units[0].pieces[0].parameter.data) is None
        assert inside.numel() == 0


def test_weights_that_change_inside_their_own_use_are_refused(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        with using(engine, stored.units[0]):
            with pytest.raises(errors.StorageError):
                engine.forget_layouts()
            check_bound(stored, stored.units[0])
        idle(engine, stored)


def test_a_view_that_cannot_be_made_costs_nothing(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        piece = stored.units[0].pieces[1]
        shape, piece.shape = piece.shape, (5, 7)
        with pytest.raises(RuntimeError), using(engine, stored.units[0]):
            pass
        idle(engine, stored)
        piece.shape = shape
        with using(engine, stored.units[0]):
            check_bound(stored, stored.units[0])
        idle(engine, stored)


def test_a_roomy_use_holds_no_guesses_and_reading_goes_on_after_it(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 3) as (engine, stored):
        for _ in range(3):
            for unit in stored.units:
                engine.acquire(unit, roomy=unit.index == 4)
                try:
                    check_bound(stored, unit)
                    if unit.index == 4:
                        assert set(engine._fetches) == {4}
                finally:
                    engine.release(unit)
                idle(engine, stored)
            assert engine._fetches
