"""What works behind the face of an optimizer: its files, its threads, and who hands what to whom; made in one place and ended in one.

Hooks of the backward (gradients.py) hand gradients to a worker (updates.py), which reads, updates and writes chunks (chunks.py) of records
in the store; `step()` hands it the rest (step.py). What stays in memory is updated by an ordinary optimizer (resident.py). What is kept
goes into state dicts and commits through run.py. Nothing here refers to the optimizer, so that it can be collected, which ends all this.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchwrap.optimizer.arguments import Asked, Timing, timing_of
from torchwrap.optimizer.chunks import Chunks
from torchwrap.optimizer.elementwise import Rule
from torchwrap.optimizer.gradients import Gradients
from torchwrap.optimizer.pace import Pace, footprint_of
from torchwrap.optimizer.parameters import Parameters
from torchwrap.optimizer.resident import Resident
from torchwrap.optimizer.run import Run
from torchwrap.optimizer.step import Step
from torchwrap.optimizer.updates import Updater
from torchwrap.optimizer.values import Values
from torchwrap.storage import aio
from torchwrap.storage.generations import GenerationStore
from torchwrap.storage.heap import FreedBlocks, keep_heap_small
from torchwrap.storage.limits import is_limited, memory_available
from torchwrap.weights.budget import check_room
from torchwrap.weights.footprint import Footprint, kept_bytes, room_for
from torchwrap.weights.handle import WeightsHandle
from torchwrap.weights.stepping import warn_of_mixture

__all__ = ["Site", "Workshop"]

_READ = 8 << 20  # bytes of one request: half as many threads are woken as with 4 MiB, and there are still two for each part of a chunk


@dataclass(frozen=True, slots=True)
class Site:
    """Where an optimizer works.

    Attributes:
        kept: folder of the run; None: nothing is kept.
        beside: folder for what is not kept; None: the system's.
        chunk: bytes of a parameter that are in memory at a time.
    """

    kept: Path | None
    beside: Path | None
    chunk: int


class Workshop:
    """What one optimizer is made of.

    Args:
        rule: the wrapped class.
        parameters: of the optimizer.
        handle: of the offloaded model, if it is one.
        site: where to work.
        asked: when gradients are to be used.
        max_grad_norm: clip to this total norm; None: do not.
        groups: returns the optimizer's parameter groups as they are when asked.

    Attributes:
        resident, run, chunks, updater, pace, gradients, step: see the header.
        freed: memory of freed gradients and temporaries, for the next ones.

    Raises:
        ConfigError: the folder holds something else.
        StorageError: the folder is in use, or cannot be written to.
    """

    def __init__(
        self,
        rule: Rule,
        parameters: Parameters,
        handle: WeightsHandle | None,
        site: Site,
        asked: Asked,
        max_grad_norm: float | None,
        groups: Callable[[], Sequence[Mapping[str, Any]]],
    ) -> None:
        keep_heap_small()
        self._rule = rule
        self.parameters, self._handle, self.site = parameters, handle, site
        targets = parameters.targets
        self._trained_bytes = sum(t.parameter.numel() * t.parameter.element_size() for t in targets if t.parameter.requires_grad)
        timeout_s = handle.config.io_timeout_s if handle is not None else 60.0
        self.store: GenerationStore = GenerationStore(site.kept, beside=site.beside)
        try:
            mode = handle.reader.mode if handle is not None else "auto"
            self.reader: aio.Reader = aio.Reader(chunk=_READ, timeout_s=timeout_s, mode=mode, background=True)
            values = Values(self.store, handle)
            self._timeline = timeline = handle.timeline if handle is not None else None
            self.resident: Resident = Resident(rule, timeline)
            self.run: Run = Run(rule, targets, self.store, values, self.resident, site.chunk)
            engine = handle.engine if handle is not None else None
            held = engine.copy_held if engine is not None else None
            self.chunks: Chunks = Chunks(rule, self.store, self.reader, held, values.landed, timeline)
            (self._within, self._beside), self._unused = self._kept(), 0
            self.freed: FreedBlocks = FreedBlocks(self._within + self._beside)
            self.updater: Updater = Updater(self.chunks, engine, timeout_s, timeline, self.freed)
            self.pace: Pace = Pace(handle, self.updater, self.chunks)
            self.gradients: Gradients = Gradients(lambda: parameters.checked(groups()), handle, self.updater, self.timing(asked))
            self.gradients.adapt = partial(_adapt, parameters, self.run, groups, whole=site.kept is not None)
            self._share_freed()
            self.step: Step = Step(targets, self.gradients, self.updater, self.resident, max_grad_norm)
        except BaseException:
            with suppress(AttributeError):  # not made yet
                self.freed.close()
            self.store.close()
            raise

    def timing(self, asked: Asked) -> Timing:
        """When gradients are used if that is asked for, and where they wait."""
        room = room_for(self._handle.units if self._handle is not None else (), self.site.chunk)
        return timing_of(asked, self._trained_bytes, room, self.site.beside)

    def _share_freed(self) -> None:
        """Gradients that wait for the worker count as kept; where others wait, or on the disk, as much is kept as may wait here."""
        timing = self.gradients.timing
        self._unused = 0 if timing.take and timing.backwards == 1 else self._beside
        self.updater.keep_less(self._unused)

    def _kept(self) -> tuple[int, int]:
        """Bytes of freed tensors to keep where gradients may wait, and beside them; no chunk is larger than the largest weight.

        Nothing on another device than the CPU, where they come from an allocator that keeps them anyway.
        """
        sizes = [t.parameter.numel() * t.parameter.element_size() for t in self.parameters.targets if t.parameter.device.type == "cpu"]
        if not sizes or (self._handle is not None and self._handle.device.type != "cpu"):
            return 0, 0
        units, chunk = self._handle.units if self._handle is not None else (), min(self.site.chunk, max(sizes))
        beside = kept_bytes(units, chunk)
        return room_for(units, chunk) if beside else 0, beside

    def check_room(self, more: int = 0, *, again: bool = False) -> None:
        """Raise `BudgetError` if a step of the offloaded model takes more memory than the limit of a control group leaves.

        Counted is what is certain: what the optimizer adds, and slots that are not there yet; not activations, whose size nobody knows.

        Args:
            more: bytes that come on top.
            again: the optimizer works already, so that state and freed tensors that it has are in memory.
        """
        handle = self._handle
        if handle is None or handle.device.type != "cpu" or not is_limited():
            return
        adds, targets = self.footprint(), [t for t in self.parameters.targets if t.parameter.requires_grad]
        state = sum(t.numel * sum(dtype.itemsize for dtype in t.layout.values()) for t in targets if not t.streamed)
        there = sum(t.parameter.grad.nbytes for t in targets if t.parameter.grad is not None and not t.is_taken())
        there += state + min(adds.held, adds.freed, FreedBlocks.counts()["bytes"]) if again else 0
        slots = handle.plan.slots * handle.plan.slot_bytes - (handle.engine.held_bytes if handle.engine is not None else 0)
        needed, available = adds.ring + adds.held + state + slots + more - there, memory_available() or 0
        less = max(0, handle.plan.held_bytes - (needed - available))
        fix = f"Give weights less: device_memory={less}"
        if getattr(handle.config, "goal", "") == "infer":
            fix = 'Wrap the model again with goal="train", which leaves room for this'
        waits = "" if adds.overlaps or self.gradients.timing.park else ', or pass gradients="disk"'
        check_room(needed, available, "a training step with OffloadedOptimizer, without activations,", f"{fix}{waits}.")

    def retime(self, asked: Asked) -> None:
        """Use gradients as asked for from now on.

        Raises:
            BudgetError: they would wait in memory that is not there; they are used as before then.
        """
        old, before = self.gradients.timing, self.footprint() if self._handle is not None else None
        self.gradients.timing = self.timing(asked)
        self._share_freed()
        try:
            if before is not None and self.footprint().gradients > before.gradients:
                self.check_room(again=True)
        except BaseException:
            self.gradients.timing = old
            self._share_freed()
            raise

    def check_new(self, parameters: Sequence[torch.Tensor]) -> None:
        """Raise if parameters that are to be added have another optimizer, or gradients for which there is no room; nothing is changed."""
        self.parameters.check_free(parameters)
        timing, handle = self.gradients.timing, self._handle
        if handle is None or timing.park:
            return
        pieces = [(parameter, handle.piece_of(parameter)) for parameter in parameters if parameter.requires_grad]
        together = not timing.take or timing.backwards > 1
        more = sum(p.nbytes if together else piece.nbytes * piece.resident for p, piece in pieces if piece is not None)
        if more:
            self.check_room(more, again=True)

    def prepare(self, groups: Sequence[Mapping[str, Any]], state: Mapping[torch.Tensor, Mapping[str, Any]] | None = None) -> None:
        """Parameters were added, or settings changed: what the class keeps with them, room for it, and hooks; `state` as for `lay_out`.

        Raises:
            ConfigError: the class is not elementwise with these settings.
            DiskFullError: the disk cannot take the state; nothing is changed then.
        """
        undo = self.parameters.lay_out(groups, state)
        try:
            self.run.reserve(state or {}, whole=self.site.kept is not None)
        except BaseException:
            undo()
            raise
        self.resident.prepare(self.parameters.targets, groups)
        self.watch()

    def load(self, groups: Sequence[dict[str, Any]], found: torch.optim.Optimizer) -> None:
        """Take over the settings and the state of an instance of the class, see `Run.load`.

        Raises:
            DiskFullError: there is no room for it; nothing is changed.
        """
        merged = [{**group, **new} for group, new in zip(groups, found.param_groups, strict=True)]
        self.prepare(merged, found.state)
        for group, new in zip(groups, merged, strict=True):
            group.update(new)
        self.run.load(groups, found.state)

    def watch(self) -> None:
        """Room on the disk for what is trained by now, and hooks on it."""
        self.run.reserve(whole=self.site.kept is not None)
        self.gradients.watch(self.parameters.streamed, [t for t in self.parameters.targets if not t.streamed])

    def take_step(self, groups: Sequence[Mapping[str, Any]], scaling: Mapping[str, torch.Tensor]) -> bool:
        """Do what is left of a step; `Step.over` is to follow.

        Args:
            groups: of the optimizer.
            scaling: what a `GradScaler` says of this step; empty: what it said when the step began, if it failed half-way.

        Returns:
            Whether it was one: not if gradients were infinite, which changes no weight.

        Raises:
            ConflictError, StorageError: see `Step.gather` and `Step.carry_out`.
        """
        if self._handle is not None:
            self._handle.backward.settle()
        self.step.scaling = scaling = scaling or self.step.scaling
        updates = self.step.gather(self.parameters.checked(groups))
        self.watch()  # trained since the last time
        self.step.carry_out(updates)
        self.resident.step(self.parameters.targets, groups, scaling)
        self.step.divide(self._rule, groups)
        return not self.step.skipped

    def undo(self, restore: Callable[[], None]) -> None:
        """Go back to the last commit; `restore` gives settings, weights and state their values. One that is cut short is to be repeated.

        Raises:
            StorageError: nothing was committed, or what `restore` raises.
        """
        if self._handle is not None:
            self._handle.backward.settle()
        self.updater.wait()
        self.updater.give_up()
        with nullcontext() if self._handle is None else self._handle.lock:
            if self._handle is not None and self._handle.engine is not None:  # what one that was cut short withheld
                self._handle.engine.end_update([t.piece for t in self.parameters.targets if t.piece is not None and t.away])
                self._handle.engine.recover()
            self.store.rollback()
            self.step.undo(restore)

    def commit(self, groups: Sequence[Mapping[str, Any]], steps: int) -> None:
        """See `Run.commit`."""
        began = time.monotonic()
        self.run.commit(groups, steps)
        if self._timeline is not None:
            self._timeline.add("write", "commit", began, time.monotonic(), 0)

    def close(self) -> None:
        """End the threads, let the folder and the parameters go; all of that also where a part cannot end, whose error is raised then."""
        parts = (self.gradients, self.updater, self.freed, self.reader, self.store)
        first: BaseException | None = None
        for end in (*(part.close for part in parts), self.parameters.let_go):
            try:
                end()
            except BaseException as error:  # the others have to end too
                first = first or error
        if first is not None:
            raise first

    def close_unasked(self) -> None:
        """The optimizer was collected, perhaps in the middle of a step while the model lives on."""
        leaving = not threading.main_thread().is_alive()  # at the interpreter's exit nobody uses the weights any more
        mixture = not leaving and self.step.changed
        try:
            self.close()
        finally:
            if mixture:
                fix = "Load a checkpoint before the weights are used. Keep the optimizer until step(), or call rollback()."
                warn_of_mixture("an OffloadedOptimizer was collected", fix, stacklevel=1)

    # -- figures -----------------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float]:
        """Bytes on the disk and moved since the start, and seconds spent in the optimizer class."""
        streamed = self.parameters.streamed
        return {
            "disk_bytes": self.store.file.nbytes,
            "state_bytes": sum(t.numel * dtype.itemsize for t in streamed for dtype in t.layout.values()),
            "bytes_read": self.reader.stats.bytes,
            "bytes_reused": self.chunks.reused,
            "bytes_written": self.store.bytes_written,
            "update_s": self.chunks.seconds,
            "parameters_streamed": len(streamed),
            "parameters_in_memory": len(self.parameters.targets) - len(streamed),
        }

    def footprint(self) -> Footprint:
        """What the optimizer adds to a training step in memory and bytes moved."""
        assert self._handle is not None
        timing, reused = self.gradients.timing, self.pace.reused
        kept = 0 if not self.freed.nbytes else self.freed.nbytes - (self._unused or self._within)
        found = footprint_of(self.parameters.streamed, self.store, self.site.chunk, timing, self._handle, kept, reused)
        return replace(found, freed=self.freed.nbytes)

    @property
    def write_rate(self) -> float:
        """Bytes per second while writing; 0.0 before the first step."""
        return self.store.bytes_written / self.chunks.writing_s if self.chunks.writing_s else 0.0


def _adapt(parameters: Parameters, run: Run, groups: Callable[[], Sequence[Mapping[str, Any]]], *, whole: bool) -> None:
    """Settings may have changed what the class keeps; see `Parameters.adapt`."""
    if parameters.adapt(groups()):
        run.reserve(whole=whole)
