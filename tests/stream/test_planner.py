"""The division of the budget: never above it, complete, and with an exact smallest budget in its refusal."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from torchwrap.core import errors
from torchwrap.stream.planner import PlannedUnit, ResidencyPlan, plan_residency, region_bytes

SIZES = st.one_of(st.integers(1, 200), st.integers(1, 40_000), st.sampled_from([4095, 4096, 4097, 8192, 16384, 1 << 20, 3 << 20]))


@st.composite
def models(draw: st.DrawFn, *, scanned: int = 1) -> list[PlannedUnit]:
    """Blocks, blocks with experts, tables, and a head tied to a table."""
    units: list[PlannedUnit] = []
    count = 0

    def pieces(most: int) -> tuple[tuple[int, int], ...]:
        nonlocal count
        sizes = draw(st.lists(SIZES, min_size=1, max_size=most))
        count += len(sizes)
        return tuple((count - len(sizes) + position, size) for position, size in enumerate(sizes))

    tables = [PlannedUnit(f"table.{n}", pieces(1), table=True) for n in range(draw(st.integers(0, 2)))]
    units += tables
    alike = draw(st.booleans())
    shape = draw(st.lists(SIZES, min_size=1, max_size=4))
    for n in range(draw(st.integers(scanned, 7))):
        if draw(st.integers(0, 3)) == 0:
            units += [PlannedUnit(f"block.{n}.expert.{e}", pieces(2), conditional=True, nested=True) for e in range(2)]
        if alike:
            units.append(PlannedUnit(f"block.{n}", tuple((count + rank, size) for rank, size in enumerate(shape))))
            count += len(shape)
        else:
            units.append(PlannedUnit(f"block.{n}", pieces(4)))
    if tables and draw(st.booleans()):
        units.append(PlannedUnit("head", tables[0].pieces))
    return units


def sizes_of(units: list[PlannedUnit]) -> dict[int, int]:
    return {index: size for unit in units for index, size in unit.pieces}


def least(units: list[PlannedUnit], fixed: int, **options: object) -> int:
    """What the planner says is the smallest budget."""
    try:
        plan_residency(units, fixed_bytes=fixed, budget=-1, **options)  # type: ignore[arg-type]
    except errors.BudgetError as error:
        return error.needed
    raise AssertionError("a negative budget was accepted")


def check(plan: ResidencyPlan, units: list[PlannedUnit], fixed: int, budget: int) -> None:
    sizes = sizes_of(units)
    scanned = [unit for unit in units if not unit.table]
    in_scan = {index for unit in scanned for index, _ in unit.pieces}
    assert plan.held_bytes <= budget and plan.fixed_bytes == fixed and plan.budget == budget
    assert plan.resident <= set(sizes)
    assert plan.resident_bytes == sum(sizes[index] for index in plan.resident)
    away = set(sizes) - plan.resident
    assert plan.streamed_bytes == sum(sizes[index] for index in away & in_scan)
    assert plan.table_bytes == sum(sizes[index] for index in away - in_scan)
    for unit in scanned:
        streamed = [size for index, size in unit.pieces if index in away]
        assert region_bytes(streamed) <= plan.slot_bytes
        assert not streamed or plan.slots >= (2 if unit.nested else 1)
    assert (plan.slots == 0) == (plan.streamed_bytes == 0)


budgets = st.integers(0, 1000)
options = st.fixed_dictionaries({"slots": st.integers(0, 4), "keep_resident": st.booleans()})


@given(models(), st.integers(0, 50_000), budgets, options)
def test_the_plan_holds_what_it_promises(units: list[PlannedUnit], fixed: int, share: int, options: dict[str, int]) -> None:
    assume(options["slots"] != 1 or not any(unit.nested for unit in units))
    needed = least(units, fixed, **options)
    budget = needed + share * (fixed + sum(sizes_of(units).values())) // 900
    plan = plan_residency(units, fixed_bytes=fixed, budget=budget, **options)  # type: ignore[arg-type]
    check(plan, units, fixed, budget)
    assert plan.slots <= (options["slots"] or 3)
    if not options["keep_resident"] and plan.slots:
        assert not plan.resident


@given(models(), st.integers(0, 50_000), options)
def test_the_smallest_budget_is_exact(units: list[PlannedUnit], fixed: int, options: dict[str, int]) -> None:
    assume(options["slots"] != 1 or not any(unit.nested for unit in units))
    needed = least(units, fixed, **options)
    plan = plan_residency(units, fixed_bytes=fixed, budget=needed, **options)  # type: ignore[arg-type]
    check(plan, units, fixed, needed)
    with pytest.raises(errors.BudgetError) as refusal:
        plan_residency(units, fixed_bytes=fixed, budget=needed - 1, **options)  # type: ignore[arg-type]
    assert refusal.value.needed == needed and refusal.value.available == needed - 1
    assert refusal.value.largest in {unit.name for unit in units}


@given(models(), st.integers(0, 50_000), st.lists(budgets, min_size=2, max_size=12), st.integers(1, 3))
def test_a_larger_budget_never_streams_more(units: list[PlannedUnit], fixed: int, shares: list[int], slots: int) -> None:
    # With k=0 a larger budget may buy a second slot first, which streams more and waits less; see the next test.
    assume(slots > 1 or not any(unit.nested for unit in units))
    needed, whole = least(units, fixed, slots=slots), fixed + sum(sizes_of(units).values())
    plans = [
        plan_residency(units, fixed_bytes=fixed, budget=needed + share * max(0, whole - needed) // 1000, slots=slots)
        for share in sorted(shares)
    ]
    streamed = [plan.streamed_bytes for plan in plans]
    assert streamed == sorted(streamed, reverse=True)


@given(models(), st.integers(0, 50_000), st.lists(budgets, min_size=2, max_size=12))
def test_without_k_only_another_slot_may_cost_residents(units: list[PlannedUnit], fixed: int, shares: list[int]) -> None:
    needed, whole = least(units, fixed), fixed + sum(sizes_of(units).values())
    plans = [plan_residency(units, fixed_bytes=fixed, budget=needed + share * max(0, whole - needed) // 1000) for share in sorted(shares)]
    for smaller, larger in pairwise(plans):
        if larger.streamed_bytes > smaller.streamed_bytes:
            assert larger.slots > smaller.slots


@given(models(), st.integers(0, 50_000))
def test_with_room_for_all_nothing_is_streamed(units: list[PlannedUnit], fixed: int) -> None:
    plan = plan_residency(units, fixed_bytes=fixed, budget=fixed + sum(sizes_of(units).values()))
    assert plan.resident == set(sizes_of(units)) and plan.slots == 0 and plan.streamed_bytes == plan.table_bytes == 0


@given(models(), st.integers(0, 50_000), budgets)
def test_tables_go_first(units: list[PlannedUnit], fixed: int, share: int) -> None:
    """A table read by rows costs a few pages per pass: nothing else is streamed while one could leave instead."""
    assume(any(unit.table for unit in units))
    sizes, in_scan = sizes_of(units), {index for unit in units if not unit.table for index, _ in unit.pieces}
    plan = plan_residency(units, fixed_bytes=fixed, budget=least(units, fixed) + share * sum(sizes.values()) // 900)
    if plan.streamed_bytes:
        assert not any(index in plan.resident for index in set(sizes) - in_scan)


@given(models(), st.integers(0, 50_000), budgets)
def test_experts_stay_only_when_no_block_could(units: list[PlannedUnit], fixed: int, share: int) -> None:
    assume(any(unit.conditional for unit in units))
    sizes = sizes_of(units)
    budget = least(units, fixed) + share * sum(sizes.values()) // 900
    plan = plan_residency(units, fixed_bytes=fixed, budget=budget)
    check(plan, units, fixed, budget)
    if plan.slots:
        assert plan.slots >= 2


@given(st.lists(SIZES, min_size=1, max_size=6), st.lists(st.integers(0, 4095), min_size=6, max_size=6))
def test_region_bytes_covers_every_alignment(sizes: list[int], offsets: list[int]) -> None:
    pages = sum((offset % 4096 + size + 4095) // 4096 * 4096 for size, offset in zip(sizes, offsets, strict=False))
    assert region_bytes(sizes) >= pages


def test_k_below_what_experts_need_is_refused() -> None:
    units = [PlannedUnit("block.expert", ((0, 100),), conditional=True, nested=True), PlannedUnit("block", ((1, 100),))]
    with pytest.raises(errors.ConfigError, match="k=2"):
        plan_residency(units, fixed_bytes=0, budget=50, slots=1)


@pytest.mark.parametrize("units", [[], [PlannedUnit("table", ((0, 9000),), table=True)]], ids=["nothing", "a table"])
@pytest.mark.parametrize("keep_resident", [True, False])
def test_fixed_weights_above_the_budget_are_a_budget_error(units: list[PlannedUnit], keep_resident: bool) -> None:
    with pytest.raises(errors.BudgetError) as refusal:
        plan_residency(units, fixed_bytes=1000, budget=999, keep_resident=keep_resident)
    assert refusal.value.needed == 1000
    assert plan_residency(units, fixed_bytes=1000, budget=1000, keep_resident=keep_resident).held_bytes == 1000


def test_every_byte_above_the_smallest_budget_can_become_resident() -> None:
    units = [PlannedUnit(f"block.{n}", ((2 * n, 8192), (2 * n + 1, 4096))) for n in range(8)]
    needed = least(units, 0, slots=1)
    plan = plan_residency(units, fixed_bytes=0, budget=needed + 5 * 8192, slots=1)
    assert plan.streamed_bytes <= 8 * 12288 - 5 * 8192
