"""What a training step will take in memory and time, in closed formulas over the plan and measured rates.

Memory is what the process had when the model was wrapped, the slots, the working memory of one block's backward, what blocks keep beyond
that (torchwrap/activations/expected.py), the ring of chunks that the optimizer streams its state through, and gradients that wait. Time
is simulated (timing.py): units come in for forward and backward, and what the optimizer reads and writes takes its turn behind the
backward of each unit, or behind the whole of it where updates do not overlap. Reading and writing have the rates that were measured.

Source: the iteration model of Liao et al., "Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU", 2024, with
measured rates in place of data-sheet ones, and a simulation in place of its sums.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from torchwrap.activations.choose import Choice, Cost, peak_bytes
from torchwrap.activations.expected import MODES, choice_for, expected_costs, in_words, over_recomputed, recomputes_itself
from torchwrap.activations.rehearsal import Rehearsal
from torchwrap.core.config import format_bytes
from torchwrap.storage.heap import FreedBlocks
from torchwrap.stream.settings import Streaming
from torchwrap.weights.copies import slot_bytes
from torchwrap.weights.footprint import Footprint, expected_footprint, left_behind, scratch_bytes
from torchwrap.weights.timing import Route, Update

if TYPE_CHECKING:
    from torchwrap.stream.units import Piece, Unit
    from torchwrap.weights.handle import WeightsHandle

__all__ = [
    "StepToCome",
    "Training",
    "TrainingPrediction",
    "forecast",
    "head_bytes",
    "predict_step",
    "step_bytes",
    "training_of",
]


@dataclass(frozen=True, slots=True)
class Training:
    """What a plan has to leave room for, besides what a forward takes.

    Attributes:
        footprint: of an optimizer with usual settings, if nothing stays.
        inside: see `scratch_bytes`.
        head: see `head_bytes`.
        mode: the setting of `activations`.
        kept: bytes of activations per token beyond those of a step whose blocks are all computed again, as the weights tell.
        costs: what blocks save, by sequences and tokens of each; None where only the weights tell.
    """

    footprint: Footprint
    inside: int
    head: int
    mode: str | None = None
    kept: int = 0
    costs: Callable[[int, int], list[Cost] | None] | None = None

    @property
    def optimizer(self) -> int:
        """Bytes of host memory for chunks, gradients, and freed tensors."""
        return self.footprint.ring + self.footprint.held

    def choice(self, unit: int) -> Choice:
        """What becomes of what a block saves, as far as the setting tells."""
        return MODES.get(self.mode, "recompute")

    def beside(self, working: int, copied: int) -> int:
        """The same beside `working` bytes, of which `copied` are there only while weights are copied; see `Footprint.peak`."""
        return self.footprint.peak(working, copied, self.inside) - working

    def working(self, activation: Callable[[int, int], int], batch: int, tokens: int) -> int:
        """Working memory of a step; see `step_bytes` and `counted_bytes`."""
        uses = self.costs(batch, tokens) if self.costs is not None else None
        if uses is None:
            return step_bytes(activation, self.head, batch, tokens) + batch * tokens * self.kept
        choices = {use.unit: MODES.get(self.mode, "recompute") for use in uses}
        return counted_bytes(activation, self.head, batch, tokens, peak_bytes(uses, choices))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPrediction:
    """Bytes and seconds of one training step.

    Attributes:
        peak_process: memory of the process at its highest, as limits count it.
        slot_bytes: weights on their way or in use.
        ring_bytes: chunks of weights and state on their way through the optimizer.
        gradient_bytes: gradients present at once.
        kept_bytes: of freed tensors, whose memory is used again.
        working_bytes: activations and what kernels need besides.
        read_bytes, written_bytes: in a step, activations that go to the disk included.
        swapped_bytes: activations that leave in the forward and come back in the backward.
        activations: what becomes of those of blocks, in words.
        moving_s: of reading and writing, were there nothing to compute; None before a rate was measured.
        computing_s: forward, backward and, after a step of an `OffloadedOptimizer`, update; None before a pass was measured.
        seconds_per_step: None before a rate was measured; with `computing_s` None the least that a step can take.
        bottleneck: what the time is spent on.
    """

    peak_process: int
    slot_bytes: int
    ring_bytes: int
    gradient_bytes: int
    kept_bytes: int
    working_bytes: int
    read_bytes: int
    written_bytes: int
    swapped_bytes: int
    activations: str
    moving_s: float | None
    computing_s: float | None
    seconds_per_step: float | None
    bottleneck: Literal["compute", "read", "write"]

    def to_dict(self) -> dict[str, int | float | str | None]:
        """The same, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = {
            "process at its highest": self.peak_process,
            "slots": self.slot_bytes,
            "optimizer's chunks": self.ring_bytes,
            "gradients at once": self.gradient_bytes,
            "freed and used again": self.kept_bytes,
            "backward's memory": self.working_bytes,
            "read per step": self.read_bytes,
            "written per step": self.written_bytes,
            **({"activations moved": self.swapped_bytes} if self.swapped_bytes else {}),
        }
        lines = ["training"] + [f"  {label:<22} {format_bytes(value):>12}" for label, value in rows.items()]
        lines.append(f"  {self.activations}")
        if self.seconds_per_step is not None:
            what = "" if self.computing_s is not None else " at least, for moving bytes alone; computing is not known yet"
            lines.append(f"  {self.seconds_per_step:.2f} s per step{what} ({self.bottleneck})")
        return "\n".join(lines)


def step_bytes(activation: Callable[[int, int], int], head: int, batch: int, tokens: int) -> int:
    """Working memory of a step whose blocks are computed again in backward.

    While a block's backward runs there are the inputs of all blocks (less than the keys and values that a forward counts), what the block
    saved, and gradients of the same size; while the loss's runs, logits, their logarithms and their gradient. What does not grow with
    tokens counts once.

    Args:
        activation: bytes of a forward for inference, by batch and tokens.
        head: see `head_bytes`.
    """
    return 2 * activation(batch, tokens) - activation(1, 2) + 2 * batch * tokens * head


def counted_bytes(activation: Callable[[int, int], int], head: int, batch: int, tokens: int, saved: int) -> int:
    """The same of a step of whose blocks it is known what they save.

    Gradients of activations are not counted: what a block saved is freed as fast as its backward makes them.

    Args:
        saved: bytes of it present at once, and of gradients of weights that stay.
    """
    return activation(1, 2) + saved + 2 * batch * tokens * head


def head_bytes(units: Iterable[Unit], pieces: Iterable[Piece]) -> int:
    """Bytes per token of the widest output outside of blocks, usually the logits."""
    inside = {piece.index for unit in units if unit.kind in ("block", "expert") for piece in unit.pieces}
    return max((p.shape[0] * p.dtype.itemsize for p in pieces if p.index not in inside and len(p.shape) == 2), default=0)


def training_of(
    units: Sequence[Unit], pieces: Sequence[Piece], config: Streaming, activations: str | None, rehearsal: Rehearsal | None
) -> Training:
    """What a plan has to leave room for if all trained weights may be streamed.

    Args:
        config: names the optimizer.
        activations: what becomes of those of blocks; "auto" keeps what there is room for, so it needs no more than "recompute".
        rehearsal: of the model, where there is one.
    """
    expected = expected_footprint(units, pieces, frozenset(), config.optimizer)
    uses = expected_costs(units, 1)
    kept = over_recomputed(uses, {use.unit: choice_for(units[use.unit], activations) for use in uses})
    return Training(
        expected,
        scratch_bytes(units, pieces)[0],
        head_bytes(units, pieces),
        activations,
        kept,
        cache(rehearsal.costs) if rehearsal is not None else None,
    )


def predict_step(handle: WeightsHandle, *, batch: int, tokens: int, example: str | None = None) -> TrainingPrediction:
    """See `WeightsHandle.predict_training`."""
    plan, optimizer = handle.plan, handle.optimizer()
    if optimizer is not None:
        footprint, write_rate, computing = optimizer.footprint(), optimizer.write_rate, optimizer.computing_s
    else:
        resident = {piece.index for piece in handle.pieces if piece.resident}
        footprint, write_rate, computing = expected_footprint(handle.units, handle.pieces, resident, handle.config.optimizer), 0.0, None
    separate = handle.device.type != "cpu"
    slots = plan.slots * plan.slot_bytes if separate else slot_bytes(handle.units, plan, lambda piece: not piece.resident, batch * tokens)
    head = head_bytes(handle.units, handle.pieces)
    model = handle.root() if handle.root is not None else None
    itself = model is not None and recomputes_itself(model.modules())
    staying = _staying(handle.units, footprint)
    trial = handle.activation.trial if example is not None else None
    uses = handle.activation.costs(batch, tokens) if trial is None else None
    if trial is not None and example is not None:
        mode: Callable[[int], Choice] = (lambda unit: "keep") if itself else handle.activations.mode
        working = trial.step_bytes(example, mode, handle.activation.copies)
        swapped = trial.swapped_bytes(example, mode)
    elif uses is not None:
        modes: dict[int, Choice] = {use.unit: "recompute" if itself else handle.activations.mode(use.unit) for use in uses}
        working = counted_bytes(handle.activation, head, batch, tokens, peak_bytes(uses, modes, staying) - sum(staying.values()))
        swapped = sum(use.nbytes for use in uses if modes[use.unit] == "swap")
    else:
        working = step_bytes(handle.activation, head, batch, tokens)
        working += 0 if itself else handle.activations.over_recomputed(batch * tokens, staying)
        swapped = 0 if itself else handle.activations.swapped(batch * tokens)
    read_rate = float(handle.stats()["bandwidth"])
    route = handle.route()
    if computing is None and route.step is not None:
        computing = footprint.backwards * route.step.computing_s
    return forecast(
        footprint,
        route,
        present=handle.baseline_bytes + slots,
        slots=slots,
        working=0 if separate else working,
        copied=(0, 0) if separate else (handle.activation.copies.at(batch * tokens), scratch_bytes(handle.units, handle.pieces)[0]),
        weights=2 * plan.streamed_bytes * footprint.backwards,
        swapped=swapped * footprint.backwards,
        to_disk=not separate or handle.config.activations == "disk",
        activations="activations of blocks: those of the model's own checkpointing" if itself else _in_words(handle),
        read_rate=read_rate,
        write_rate=write_rate or read_rate,
        computing=computing,
        update=optimizer.computing_s if optimizer is not None else None,
    )


class StepToCome:
    """What steps of an `OffloadedOptimizer` take and move beside activations, see `activations.modes.StepToCome`; nothing without one."""

    def __init__(self, handle: WeightsHandle) -> None:
        self._handle = weakref.ref(handle)

    @property
    def driver(self) -> object:
        """The reference to the optimizer that drives the model."""
        handle = self._handle()
        return handle.optimizer if handle is not None and handle.driven else None

    def needed(self, batch: int, tokens: int) -> int:
        """Bytes that are not there when a step begins and will be, if its blocks are recomputed."""
        handle = self._handle()
        optimizer = handle.optimizer() if handle is not None else None
        if handle is None or optimizer is None:
            return 0
        footprint = optimizer.footprint()
        coming = footprint.held if handle.device.type == "cpu" else footprint.kept
        trial = handle.activation.trial
        if trial is not None:
            working = trial.step_bytes(trial.example, lambda unit: "recompute", handle.activation.copies)
        else:
            working = step_bytes(handle.activation, head_bytes(handle.units, handle.pieces), batch, tokens)
        return max(0, coming - min(FreedBlocks.counts()["bytes"], footprint.freed)) + working

    def moved(self) -> tuple[int, int]:
        """Bytes read and written during a backward; updates that do not overlap come after it."""
        handle = self._handle()
        optimizer = handle.optimizer() if handle is not None and handle.driven else None
        footprint = optimizer.footprint() if optimizer is not None else None
        return (footprint.read, footprint.written) if footprint is not None and footprint.overlaps else (0, 0)


def forecast(
    footprint: Footprint,
    route: Route,
    *,
    present: int,
    slots: int,
    working: int,
    copied: tuple[int, int],
    weights: int,
    read_rate: float,
    write_rate: float,
    computing: float | None,
    update: float | None = None,
    swapped: int = 0,
    to_disk: bool = True,
    activations: str = "",
) -> TrainingPrediction:
    """A step along `route`.

    Args:
        present: bytes of the process with its slots, before training.
        slots, working: bytes.
        copied: what of the latter are copies of weights, and the largest inside of a block; see `Footprint.peak`.
        weights: bytes of weights brought in.
        read_rate, write_rate: bytes per second; 0 for not known.
        computing: seconds of forward, backward and update, as far as they are known; None for not at all.
        update: the same where an optimizer measured all three.
        swapped, to_disk: bytes of activations that leave and come back, and whether that is on the disk.
        activations: what becomes of them, in words.
    """
    others = swapped if to_disk else 0
    read, written = weights + footprint.read + others, footprint.written + others
    reading = read / read_rate if read_rate else 0.0
    writing = written / write_rate if write_rate else 0.0
    moving, seconds = None, computing
    if read_rate and write_rate:
        does = Update(
            read_s=(footprint.read + others) / read_rate,
            written_s=writing,
            computing_s=update,
            backwards=footprint.backwards,
            overlaps=footprint.overlaps,
        )
        moving = route.step_seconds(read_rate, does, computing=False)
        seconds = route.step_seconds(read_rate, does)
    bottleneck: Literal["compute", "read", "write"] = "read" if reading >= writing else "write"
    if computing is not None and computing >= (moving or 0.0):
        bottleneck = "compute"
    return TrainingPrediction(
        peak_process=present + footprint.peak(working, *copied),
        slot_bytes=slots,
        ring_bytes=footprint.ring,
        gradient_bytes=max(footprint.gradients, footprint.tables - footprint.kept),
        kept_bytes=footprint.kept,
        working_bytes=working,
        read_bytes=read,
        written_bytes=written,
        swapped_bytes=swapped,
        activations=activations,
        moving_s=moving,
        computing_s=computing,
        seconds_per_step=seconds,
        bottleneck=bottleneck,
    )


def _in_words(handle: WeightsHandle) -> str:
    chosen = handle.activations.choices and handle.activations.explain()
    return chosen[0] if chosen else in_words(handle.config.activations)


def _staying(units: Iterable[Unit], footprint: Footprint) -> dict[int, int]:
    """Bytes of gradients that were not there when the backward began and are when it ends, by the unit they come from."""
    if not footprint.grows:
        return {}
    units = list(units)
    left = left_behind(units, {p.index for unit in units for p in unit.pieces if p.resident}) if footprint.overlaps else set()
    trained = [(unit.index, p) for unit in units for p in unit.pieces if p.parameter.requires_grad]
    stays = [(index, p) for index, p in trained if (p.resident or not footprint.overlaps) and p.index not in left]
    return {index: sum(piece.nbytes for other, piece in stays if other == index) for index, _ in stays}
