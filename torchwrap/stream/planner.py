"""How a memory budget is divided between resident pieces and slots.

Units are used in a cyclic scan, so which bytes stay resident does not matter, only how many: every resident byte is one byte less to
read per pass (the optimum of Belady for a cyclic scan; least-recently-used would hit nothing). A pass streams `S - R` bytes, with
`R = budget - fixed - slots * slot_bytes`. Residency is decided per *piece*, not per unit, for two reasons: no unit-sized rest of the
budget is lost, and leaving part of every unit resident makes the streamed part, hence each slot, smaller, which again is room for
residents. The planner therefore scans slot sizes and keeps the one with the fewest bytes to stream.

Time per pass is `max(compute, streamed / bandwidth)` with two or more slots and their sum with one: Rajbhandari et al., "ZeRO-Infinity",
2021, section 4, with measured figures in place of data-sheet ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torchwrap.core import errors
from torchwrap.core.config import format_bytes

__all__ = ["PlannedUnit", "ResidencyPlan", "plan_residency", "region_bytes"]

PAGE = 4096
_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class PlannedUnit:
    """What the planner needs to know of a unit.

    Attributes:
        pieces: (piece index, bytes) in the unit.
        conditional: used by only some passes (an expert): the last to become resident.
        nested: present together with its parent.
        table: rows are read one by one, so it needs no slot; becomes resident only when nothing else is left to stream.
    """

    name: str
    pieces: tuple[tuple[int, int], ...]
    conditional: bool = False
    nested: bool = False
    table: bool = False


@dataclass(frozen=True, slots=True)
class ResidencyPlan:
    """The division of the budget. All figures are bytes, but for the counts.

    Attributes:
        resident: indices of the pieces that stay.
        slots, slot_bytes: number and size of the reused buffers.
        resident_bytes: bytes of resident pieces, without `fixed_bytes`.
        streamed_bytes: bytes read in one pass that uses every unit once.
    """

    budget: int
    fixed_bytes: int
    resident: frozenset[int]
    resident_bytes: int
    slots: int
    slot_bytes: int
    streamed_bytes: int
    table_bytes: int
    notes: tuple[str, ...] = field(default=())

    @property
    def held_bytes(self) -> int:
        """Most bytes of weights present at once: fixed, resident and all slots."""
        return self.fixed_bytes + self.resident_bytes + self.slots * self.slot_bytes


def region_bytes(sizes: Iterable[int]) -> int:
    """Slot bytes that pieces of these sizes can need, whatever their alignment in their files.

    A direct read covers whole 4096-byte pages, so each piece may begin late in its first page and end early in its last; the second page
    of slack pays for the gap to a neighbour that is read in the same go.
    """
    return sum(-(-size // PAGE) * PAGE + 2 * PAGE for size in sizes)


def _more_device_memory(needed: int) -> str:
    return f"Set device_memory={needed} or more"


def plan_residency(
    units: Sequence[PlannedUnit],
    *,
    fixed_bytes: int,
    budget: int,
    slots: int = 0,
    keep_resident: bool = True,
    even: bool = False,
    remedy: Callable[[int], str] = _more_device_memory,
) -> ResidencyPlan:
    """Divide `budget` bytes.

    Args:
        units: in order of use.
        fixed_bytes: what stays in any case and counts against the budget.
        budget: bytes of weights that may be present at once.
        slots: number of slots; 0 chooses two (read one unit while another computes), one if two do not fit.
        keep_resident: turn what is left of the budget into resident pieces; False streams every piece.
        even: let as much stay of one unit as of another, rather than in as few pieces as can be.
        remedy: what an error tells the user to change for a budget of so many bytes.

    Raises:
        BudgetError: not even one slot fits; `needed` is the smallest budget that works.
    """
    sizes = {index: size for unit in units for index, size in unit.pieces}
    scanned = [unit for unit in units if not unit.table]
    in_tables = {index for unit in units if unit.table for index, _ in unit.pieces}
    scanned_pieces = {index for unit in scanned for index, _ in unit.pieces}
    table_only = in_tables - scanned_pieces
    total = sum(sizes.values())
    if fixed_bytes + total <= budget and keep_resident:
        return ResidencyPlan(budget, fixed_bytes, frozenset(sizes), total, 0, 0, 0, 0)
    table_bytes = sum(sizes[index] for index in table_only)
    if fixed_bytes + total - table_bytes <= budget and (keep_resident or not scanned):  # only rows of tables are read
        resident = frozenset(scanned_pieces)
        return ResidencyPlan(budget, fixed_bytes, resident, total - table_bytes, 0, 0, 0, table_bytes)

    if not scanned:
        if not keep_resident and fixed_bytes <= budget:
            return ResidencyPlan(budget, fixed_bytes, frozenset(), 0, 0, 0, 0, table_bytes)
        raise errors.BudgetError(
            f"torchwrap: a budget of {format_bytes(budget)} is too small: {format_bytes(fixed_bytes)} always stay, no unit can be streamed",
            needed=fixed_bytes,
            available=budget,
            fix=f"{remedy(fixed_bytes)}, or name the modules to stream: units=(...).",
        )
    depth = 2 if any(unit.nested for unit in scanned) else 1
    counts = [min(slots, max(depth, len(scanned)))] if slots else [depth + 1, depth]  # more slots than units would stay empty
    if slots and slots < depth:
        raise errors.ConfigError(
            f"torchwrap: k={slots} slots, but blocks with experts or tiles need {depth} at once", where="k", fix=f"Set k={depth} or more."
        )
    best: ResidencyPlan | None = None
    least = fixed_bytes + total - table_bytes if keep_resident else sys.maxsize  # everything but tables resident needs no slot
    for count in counts:
        for slot_bytes in _candidate_slots(scanned) if keep_resident else _candidate_slots(scanned)[:1]:
            plan = _divide(scanned, sizes, fixed_bytes, budget, count, slot_bytes, table_bytes, keep_resident, min if even else max)
            if isinstance(plan, int):
                least = min(least, plan)
            elif best is None or plan.streamed_bytes < best.streamed_bytes:
                best = plan
        if best is not None:
            return best
    largest = max(scanned, key=lambda unit: sum(size for _, size in unit.pieces))
    raise errors.BudgetError(
        f"torchwrap: a budget of {format_bytes(budget)} is too small for this model's weights, which need at least {format_bytes(least)}: "
        f"{format_bytes(fixed_bytes)} that always stay and {counts[-1]} slot(s) for the largest unit",
        needed=least,
        available=budget,
        largest=largest.name,
        where=largest.name,
        fix=f"{remedy(least)}.",
    )


def _candidate_slots(units: Sequence[PlannedUnit]) -> list[int]:
    """Slot sizes worth trying: from the largest unit down to the smallest piece, in steps of a MiB (or fewer when units are tiny)."""
    whole = {region_bytes(size for _, size in unit.pieces) for unit in units}
    top = max(whole)
    step = max(_STEP, top // 512)
    return sorted(whole | set(range(step, top, step)) | {top}, reverse=True)


def _divide(
    units: Sequence[PlannedUnit],
    sizes: dict[int, int],
    fixed: int,
    budget: int,
    count: int,
    slot_bytes: int,
    table_bytes: int,
    keep_resident: bool,
    first: Callable[..., int],
) -> ResidencyPlan | int:
    """The plan with this slot size, or the smallest budget it would need."""
    streamed: dict[int, list[int]] = {}
    resident: set[int] = set()
    chosen: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for position, unit in enumerate(units):
        shape = tuple((rank, size) for rank, (_, size) in enumerate(unit.pieces))
        if shape not in chosen:
            chosen[shape] = _fill([size for _, size in shape], slot_bytes)
        keep = set(chosen[shape])
        streamed[position] = [unit.pieces[rank][0] for rank in chosen[shape]]
        resident |= {index for rank, (index, _) in enumerate(unit.pieces) if rank not in keep}
    resident_bytes = sum(sizes[index] for index in resident)
    needed = fixed + resident_bytes + count * slot_bytes
    if needed > budget:
        return needed
    rest = budget - needed if keep_resident else 0
    # Spread what is left evenly over the scan: ordinary units first, then experts; in each round the largest (or smallest) piece that fits.
    for conditional in (False, True):
        order = _spread([p for p, unit in enumerate(units) if unit.conditional is conditional])
        progress = True
        while progress:
            progress = False
            for position in order:
                fitting = [index for index in streamed[position] if sizes[index] <= rest]
                if fitting:
                    index = first(fitting, key=lambda i: sizes[i])
                    streamed[position].remove(index)
                    resident.add(index)
                    rest -= sizes[index]
                    progress = True
    resident_bytes = sum(sizes[index] for index in resident)
    largest = max((region_bytes(sizes[i] for i in pieces) for pieces in streamed.values()), default=0)
    streamed_bytes = sum(sizes[i] for pieces in streamed.values() for i in pieces)
    return ResidencyPlan(budget, fixed, frozenset(resident), resident_bytes, count if largest else 0, largest, streamed_bytes, table_bytes)


def _fill(sizes: Sequence[int], capacity: int) -> list[int]:
    """Ranks of pieces to stream so that as many bytes as possible fit the slot: largest first (a unit has about ten pieces)."""
    chosen: list[int] = []
    for rank in sorted(range(len(sizes)), key=lambda r: -sizes[r]):
        need = region_bytes([sizes[rank]])
        if need <= capacity:
            chosen.append(rank)
            capacity -= need
    return sorted(chosen)


def _spread(positions: list[int]) -> list[int]:
    """The positions in an order whose every prefix lies evenly over the scan (bit reversal), so that residents part the streamed units."""
    bits = max(1, (len(positions) - 1).bit_length())
    reversed_rank = {position: int(f"{rank:0{bits}b}"[::-1], 2) for rank, position in enumerate(positions)}
    return sorted(positions, key=reversed_rank.__getitem__)
