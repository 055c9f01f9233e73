"""Replacing stored values while the engine runs: nothing reads a unit during its update, and holds give way to everything else."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.stream.parts import check_bound, engine_state, idle, using
from tests.stream.test_engine import SIZES, engine_over
from torchwrap.core import errors
from torchwrap.core.tensors import data_of, is_placeholder
from torchwrap.stream.engine import Engine
from torchwrap.stream.units import Unit


def test_a_held_unit_is_present_until_it_is_let_go(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        unit = stored.units[2]
        assert engine.hold(unit) and engine.hold(unit)
        check_bound(stored, unit)
        with using(engine, unit):
            check_bound(stored, unit)
        check_bound(stored, unit)
        engine.unhold(unit)
        idle(engine, stored)
        engine.unhold(unit)
        idle(engine, stored)


def test_a_hold_gives_way_to_a_use(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 1) as (engine, stored):
        assert engine.hold(stored.units[0])
        with using(engine, stored.units[1]):
            check_bound(stored, stored.units[1])
            assert all(is_placeholder(data_of(piece.parameter)) for piece in stored.units[0].pieces)
            assert not engine.hold(stored.units[0])  # a use does not give way
        assert engine.hold(stored.units[0])
        engine.trim()
        idle(engine, stored)


def test_a_view_that_is_still_alive_keeps_its_memory(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 1) as (engine, stored):
        unit = stored.units[0]
        engine.hold(unit)
        views = [engine.held_view(piece) for piece in unit.pieces]
        engine.unhold(unit)
        for other in stored.units:
            with using(engine, other):
                check_bound(stored, other)
            engine_state(engine)
        for piece, held in zip(unit.pieces, views, strict=True):
            assert held is not None and torch.equal(held[0], stored.values[piece.index])
        assert all(engine.held_view(piece) is None for piece in unit.pieces)


def test_slots_are_not_replaced_while_nobody_keeps_views(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        for unit in [*stored.units, *reversed(stored.units)] * 3:
            engine.hold(unit)
            assert all(engine.held_view(piece) is not None for piece in unit.pieces)
            engine.unhold(unit)
        assert {slot.index for slot in engine._slots} == {0, 1}
        idle(engine, stored)


def test_stored_values_are_copied_from_a_held_unit_and_from_nothing_else(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        unit = stored.units[2]
        piece = unit.pieces[0]
        value = stored.values[piece.index].reshape(-1)
        first, length = value.numel() // 3, value.numel() // 2
        into = torch.zeros(length, dtype=value.dtype)
        with using(engine, unit):
            assert not engine.copy_held(piece, first, into)  # a forward may be about to write to its weights
        engine.hold(unit)
        assert not engine.copy_held(stored.units[0].pieces[0], 0, into)
        assert engine.copy_held(piece, first, into) and torch.equal(into, value[first : first + length])
        engine.begin_update([piece])
        assert engine.copy_held(piece, 0, into) and torch.equal(into, value[:length])  # what the update begins with
        piece.version += 1  # what it ends with is stored
        assert not engine.copy_held(piece, 0, into)
        engine.end_update([piece])
        engine.unhold(unit)
        assert not engine.copy_held(piece, 0, into)


def test_what_a_module_wrote_into_its_slot_is_not_copied(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        unit = stored.units[1]
        piece = unit.pieces[0]
        engine.hold(unit)
        into = torch.zeros(piece.parameter.numel(), dtype=piece.dtype)
        with torch.no_grad():
            piece.parameter.fill_(1)
        assert not engine.copy_held(piece, 0, into)
        engine.unhold(unit)


def test_what_a_backward_has_left_stays_until_the_updates_have_copied_it(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        unit, inner, third = stored.units[3], stored.units[2], stored.units[1]
        leave(engine, unit, begun=1)
        assert all(is_placeholder(data_of(piece.parameter)) for piece in unit.pieces)
        assert engine.hold(inner)
        engine.unhold(inner)  # of which no update is due: its slot goes on
        assert engine.hold(third) and unit.index in engine._fetches
        reads = engine.counters["bytes_read"]
        for number, piece in enumerate(unit.pieces):
            if number:
                engine.begin_update([piece])
            value = stored.values[piece.index].reshape(-1)
            middle = value.numel() // 2
            for first, last in ((0, middle), (middle, value.numel())):
                assert unit.index in engine._fetches
                into = torch.zeros(last - first, dtype=value.dtype)
                assert engine.copy_held(piece, first, into) and torch.equal(into, value[first:last])
        assert unit.index not in engine._fetches and engine.counters["bytes_read"] >= reads
        engine.end_update(unit.pieces)
        engine.unhold(third)
        for each in (unit, *stored.units):
            with using(engine, each):
                check_bound(stored, each)
        idle(engine, stored)


def test_a_backward_waits_for_a_slot_that_updates_copy_from(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        unit, inner, third = stored.units[3], stored.units[2], stored.units[1]
        leave(engine, unit)
        engine.hold(inner)  # both slots are taken
        held = threading.Event()

        def backward() -> None:
            engine.hold(third)
            held.set()

        thread = threading.Thread(target=backward)
        thread.start()
        while not engine.state._waiters:
            assert thread.is_alive()
            time.sleep(0.001)
        assert not held.wait(0.2) and unit.index in engine._fetches
        for piece in unit.pieces:
            assert not held.is_set()
            engine.begin_update([piece])
            into = torch.empty(piece.parameter.numel(), dtype=piece.dtype)
            assert engine.copy_held(piece, 0, into)
        assert held.wait(20)
        assert engine.counters["stall_s"] >= 0.1
        engine.end_update(unit.pieces)
        thread.join(20)


def test_a_backward_that_waits_for_a_slot_goes_on_when_the_engine_is_closed(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        leave(engine, stored.units[3])
        engine.hold(stored.units[2])
        held: list[bool] = []
        thread = threading.Thread(target=lambda: held.append(engine.hold(stored.units[1])))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        engine.close()
        thread.join(5.0)  # a twelfth of the longest time it may wait
        assert held == [False]


@pytest.mark.parametrize("how", ["used", "read", "failed", "needed", "written"])
def test_a_slot_left_for_updates_gives_way(tmp_path: Path, how: str) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        unit, piece = stored.units[3], stored.units[3].pieces[0]
        if how == "written":
            engine.hold(unit)
            with torch.no_grad():
                piece.parameter.fill_(1)
            engine.expect_update(unit.pieces)
            engine.unhold(unit)
        else:
            leave(engine, unit)
        into = torch.empty(piece.parameter.numel(), dtype=piece.dtype)
        if how == "used":  # with new weights for a part of it
            engine.begin_update([piece])
            piece.version += 1
            engine.end_update([piece])
            with using(engine, unit):
                check_bound(stored, unit)
                assert engine._fetches[unit.index].stored[piece.index] == piece.version
        elif how == "read":
            with using(engine, unit):
                check_bound(stored, unit)
        elif how == "failed":
            engine.end_update(unit.pieces)
            assert unit.index not in engine._fetches
        elif how == "needed":
            with using(engine, stored.units[0]), using(engine, stored.units[1]):
                assert unit.index not in engine._fetches
        assert not engine.copy_held(piece, 0, into)
        engine.end_update(unit.pieces)


def leave(engine: Engine, unit: Unit, begun: int = 0) -> None:
    """A backward has used the unit and its updates are due, of which so many have begun."""
    engine.hold(unit)
    engine.expect_update(unit.pieces)
    for piece in unit.pieces[:begun]:
        engine.begin_update([piece])
    engine.unhold(unit)
    assert unit.index in engine._fetches


@pytest.mark.parametrize("how", ["use", "hold", "read"])
def test_an_update_keeps_readers_out_until_it_ends(tmp_path: Path, how: str) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        unit, seen = stored.units[0], []

        def reader() -> None:
            if how == "use":
                with using(engine, unit):
                    seen.append("read")
            elif how == "hold":
                seen.append("read" if engine.hold(unit) else "refused")
                engine.unhold(unit)
            else:
                engine.read(unit.pieces[0])
                seen.append("read")

        engine.begin_update(unit.pieces)
        with using(engine, stored.units[3]):  # others are not kept out
            check_bound(stored, stored.units[3])
        thread = threading.Thread(target=reader)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert unit.index not in engine._fetches
        seen.append("updated")
        engine.end_update(unit.pieces)
        thread.join(20)
        assert seen == ["updated", "read"]
        idle(engine, stored)


def test_an_update_waits_for_a_use(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        unit, began = stored.units[0], threading.Event()

        def update() -> None:
            engine.begin_update(unit.pieces)
            began.set()

        with using(engine, unit):
            thread = threading.Thread(target=update)
            thread.start()
            assert not began.wait(0.2)
            check_bound(stored, unit)
        assert began.wait(20)
        engine.end_update(unit.pieces)
        idle(engine, stored)


@pytest.mark.parametrize("slots", [1, 2])
def test_a_hold_outlasts_an_update_with_the_values_it_has(tmp_path: Path, slots: int) -> None:
    with engine_over(tmp_path, SIZES, slots) as (engine, stored), engine_over(_made(tmp_path / "other"), SIZES, 2) as (_, other):
        unit, new = stored.units[2], other.units[2]
        engine.hold(unit)
        assert engine.outlasts_updates(unit)
        first = unit.pieces[0]
        before = engine.shown_version(first)
        for piece, replaced in zip(unit.pieces, new.pieces, strict=True):
            engine.expect_update([piece])
            engine.begin_update([piece])
            piece.home, piece.checksum, piece.version = replaced.home, replaced.checksum, piece.version + 1
            engine.end_update([piece])
            check_bound(stored, unit)
        held = engine.held_view(first)
        assert held is not None and torch.equal(held[0], stored.values[first.index])
        assert held[1] == before == engine.shown_version(first) != first.version
        del held
        engine.unhold(unit)
        assert not engine.outlasts_updates(unit) and engine.shown_version(first) == first.version
        stored.values.update({piece.index: other.values[replaced.index] for piece, replaced in zip(unit.pieces, new.pieces, strict=True)})
        for each in (unit, *stored.units, *reversed(stored.units)):
            with using(engine, each):
                check_bound(stored, each)
        idle(engine, stored)


def test_what_will_be_updated_is_not_read_ahead(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        for _ in range(2):
            for unit in stored.units:
                with using(engine, unit):
                    pass
        first = stored.units[0]
        for unit in stored.units[:-2]:
            with using(engine, unit):
                pass
        with using(engine, stored.units[-2]):
            engine.expect_update(first.pieces)
            engine.begin_update(first.pieces)
            engine.end_update(first.pieces[1:])
        with using(engine, stored.units[-1]):
            pass
        assert first.index not in engine._fetches
        engine.end_update(first.pieces)
        assert first.index in engine._fetches
        idle(engine, stored)


def test_values_come_from_the_new_homes_after_an_update(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored), engine_over(_made(tmp_path / "other"), SIZES, 2) as (_, other):
        unit = stored.units[2]
        for _ in range(2):
            for each in stored.units:
                with using(engine, each):
                    pass
        engine.begin_update(unit.pieces)
        for piece, new in zip(unit.pieces, other.units[2].pieces, strict=True):
            piece.home, piece.checksum = new.home, new.checksum
            stored.values[piece.index] = other.values[new.index]
        engine.end_update(unit.pieces)
        for each in stored.units:
            with using(engine, each):
                check_bound(stored, each)
        idle(engine, stored)


@pytest.mark.parametrize("other", ["use", "update"])
def test_waiting_for_ever_is_an_error(tmp_path: Path, other: str) -> None:
    with engine_over(tmp_path, SIZES, 2, timeout_s=0.2) as (engine, stored):
        unit, failed = stored.units[0], []

        def begin() -> None:
            with suppress(errors.StorageError):
                engine.begin_update(unit.pieces)
                return
            failed.append(True)

        if other == "use":
            with using(engine, unit):
                _in_thread(begin)
        else:
            engine.begin_update(unit.pieces)
            begin()
        assert failed == [True]


def test_updates_beside_uses_and_holds(tmp_path: Path) -> None:
    with engine_over(tmp_path, SIZES, 2) as (engine, stored):
        stop = threading.Event()
        wrong: list[BaseException] = []

        def guarded(work: object) -> None:
            try:
                while not stop.is_set():
                    work()  # type: ignore[operator]
            except BaseException as error:
                wrong.append(error)
                stop.set()

        def update() -> None:
            for unit in stored.units[::2]:
                _update(engine, unit)

        def hold() -> None:
            for unit in reversed(stored.units):
                if engine.hold(unit):
                    for piece in unit.pieces:
                        held = engine.held_view(piece)
                        assert held is None or torch.equal(held[0], stored.values[piece.index])
                engine.unhold(unit)

        threads = [threading.Thread(target=guarded, args=(work,)) for work in (update, hold)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            for unit in stored.units:
                with using(engine, unit):
                    check_bound(stored, unit)
        stop.set()
        for thread in threads:
            thread.join(20)
        assert wrong == []
        idle(engine, stored)


def _update(engine: Engine, unit: Unit) -> None:
    engine.begin_update(unit.pieces)
    for piece in unit.pieces:
        piece.version += 1
    engine.end_update(unit.pieces)


def _in_thread(call: object) -> None:
    thread = threading.Thread(target=call)  # type: ignore[arg-type]
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
