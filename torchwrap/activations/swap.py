"""Activations on their way out during the forward and back during the backward.

What autograd saves while a block runs is packed as entries of records (records.py). When the next block begins, the records of the one
before are handed to a writing thread, and a record that is written lets its memory go; the block after that waits until they all are. So
two blocks' activations are present at any time of a forward, and the last block's never leave. In the backward, the first thing asked of
a block starts reading all of its records and those of the block that ran before it.

Source: the swapping of activations in a pipeline of device, host and disk is from Fuyou (Liao et al., "Adding NVMe SSDs to Enable and
Accelerate 100B Model Fine-tuning on a Single GPU", 2024). Where we differ: any tensor of any module, by torch's saved-tensor hooks.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeAlias

import torch

from torchwrap.activations.kept import Kept
from torchwrap.activations.records import Entry, Record, Use, bytes_over
from torchwrap.activations.tiers import Place, Tier
from torchwrap.core import errors
from torchwrap.storage.checksum import memory_of, sum64
from torchwrap.storage.condition import Condition
from torchwrap.storage.patience import LOOK_S, Patience
from torchwrap.stream.timeline import Timeline

__all__ = ["SMALLEST", "Swap"]

SMALLEST = 64 << 10
"""Bytes from which a tensor is worth a request of its own (memory.md 5.9: smaller ones are norms' statistics and the like)."""


_Job: TypeAlias = "tuple[weakref.ref[Record], str]"  # to be written, of the block of that name


class Swap:
    """The activations of one model that are elsewhere.

    Args:
        tier: makes the store when the first block is saved.
        device: where the model computes.
        timeout_s: seconds after which a write that does not end is an error.
        timeline: where writes ("save"), reads ("load") and stalls are recorded, if anywhere.

    Attributes:
        counters: bytes of distinct memory saved, written, read back and handed out again from memory; seconds and number of waits.
    """

    def __init__(self, tier: Callable[[], Tier], device: torch.device, timeout_s: float, timeline: Timeline | None) -> None:
        self._make, self._device, self._timeout_s, self._timeline = tier, device, timeout_s, timeline
        self._tier: Tier | None = None
        self._state = Condition()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._writer: threading.Thread | None = None
        self._unwritten: list[_Job] = []
        self._failed: BaseException | None = None
        self._trash: deque[Place] = deque()
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], list[weakref.ref[Record]]]] = {}
        self._stored: weakref.WeakSet[Record] = weakref.WeakSet()
        self._latest: Use | None = None
        self._current: Callable[[], Use | None] = lambda: None
        self._loaded: weakref.WeakSet[Use] = weakref.WeakSet()
        self.counters: dict[str, float] = {"saved": 0, "written": 0, "read": 0, "forwarded": 0, "stalls": 0, "stall_s": 0.0}

    # -- forward -------------------------------------------------------------------------------------------------------------------

    def pass_begins(self) -> None:
        """A new forward: nothing of the one before belongs together with it, and what that could not store stayed in memory."""
        with self._state:
            self._failed = None
            self._retire(self._loaded)
            if self._latest is not None:
                self._submit(self._latest)
            self._latest = None

    def begin(self, name: str) -> Use:
        """A block begins. Waits for the block before the last one to be stored, and hands the last one to the writer.

        Raises:
            DiskFullError, BudgetError: there is no room for activations.
            StorageError: writing failed, or did not end in time.
        """
        with self._state:
            self._open()
            self._await_writes(name)
            latest = self._latest
            if latest is not None:
                self._submit(latest)
            before = weakref.ref(latest) if latest is not None and latest.records else latest.previous if latest is not None else None
            self._latest = use = Use(name, before)
            return use

    def pack(self, use: Use, tensor: torch.Tensor) -> Kept | Entry:
        """Take a tensor that autograd saves."""
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.device != self._device or not tensor.numel():
            return Kept(tensor)
        size = tensor.element_size()
        span = size * (1 + sum((length - 1) * stride for length, stride in zip(tensor.size(), tensor.stride(), strict=True)))
        first, storage = size * int(tensor.storage_offset()), tensor.untyped_storage()
        # A small part of something large, a batch of a data set say, moves alone; the rest may be nobody's activation.
        low, nbytes = (0, storage.nbytes()) if storage.nbytes() <= 2 * span else (first, span)
        if nbytes < SMALLEST:
            return Kept(tensor)
        with self._state:
            record = self._record_of(use, tensor, storage, low, nbytes)
        return Entry(self._bring, use, record, tensor, first - low)

    def _record_of(self, use: Use, tensor: torch.Tensor, storage: torch.UntypedStorage, low: int, nbytes: int) -> Record:
        key = storage._cdata
        known = self._known.get(key)
        if known is None or known[0]() is not storage:
            known = self._known[key] = (weakref.ref(storage, _forget(self._known, key)), [])
        for each in known[1]:
            record = each()
            if record is not None and self._shows(record, tensor, storage, low, nbytes):
                break
        else:
            record = Record(bytes_over(storage, low, nbytes), tensor._version, use, self._trash)
            known[1].append(weakref.ref(record))
            self.counters["saved"] += nbytes
        if not any(each() is record for each in use.records):
            use.records.append(weakref.ref(record))
        return record

    def _shows(self, record: Record, tensor: torch.Tensor, storage: torch.UntypedStorage, low: int, nbytes: int) -> bool:
        """Whether the record has, or will have, the present bytes of this part of the storage."""
        if record.memory is not None and not record.begun:
            return record.memory.untyped_storage() is storage and (record.memory.storage_offset(), record.nbytes) == (low, nbytes)
        # Stored already. The same version is not enough: views made by unsafe_chunk or .data have counters of their own.
        place, origin = record.place, record.alive
        if place is None or origin is None or origin[0]() is not storage or (origin[1], place.nbytes) != (low, nbytes):
            return False
        if record.version != tensor._version or place.sum64 is None or self._device.type != "cpu":
            return False
        return sum64(memory_of(bytes_over(storage, low, nbytes))) == place.sum64

    def bandwidth(self, nbytes: int) -> tuple[float, float]:
        """Bytes per second (written, read back) of a sample; not while anything is being written."""
        with self._state:
            tier = self._open()
        sample, began = torch.zeros(nbytes, dtype=torch.uint8, device=self._device), time.monotonic()
        place = tier.write(sample, tier.mark())
        written = time.monotonic()
        tier.read(place).wait()
        read = time.monotonic()
        tier.free(place)
        return nbytes / (written - began), nbytes / (read - written)

    def _open(self) -> Tier:
        if self._tier is None:
            self._tier = self._make()
            weakref.finalize(self, _close, self._tier, self._jobs)
        return self._tier

    # -- writing -------------------------------------------------------------------------------------------------------------------

    def _submit(self, use: Use) -> None:
        assert self._tier is not None
        for record in use.living():
            if record.memory is not None and not record.begun and not record.wanted and record.owner() is use:
                record.mark = record.mark or self._tier.mark()
                job = weakref.ref(record), use.name
                self._jobs.put(job)
                self._unwritten.append(job)  # only now: a write that an interrupt kept from being asked for would be waited for
        if self._unwritten and (self._writer is None or not self._writer.is_alive()):
            self._writer = threading.Thread(target=_write, args=(weakref.ref(self), self._jobs), name="torchwrap-activations", daemon=True)
            self._writer.start()

    def _await_writes(self, name: str) -> None:
        if self._unwritten:
            began = moved = time.monotonic()
            patience = Patience(self._timeout_s)
            while left := len(self._unwritten):
                self._state.wait(min(self._timeout_s, LOOK_S))
                if len(self._unwritten) != left:
                    moved = time.monotonic()
                elif patience.left(moved) <= 0:
                    raise errors.StorageError(f"torchwrap: storing an activation took over {self._timeout_s} s", where=name)
            self._stalled(name, began)
        error, self._failed = self._failed, None
        if error is not None:
            raise error

    def _store(self, job: _Job) -> None:
        """Write one record, in the writing thread."""
        assert self._tier is not None
        reference, name = job
        record: Record | None = None
        memory: torch.Tensor | None = None
        try:
            while self._trash:
                with suppress(errors.StorageError, KeyError):  # the store was closed meanwhile
                    self._tier.free(self._trash.popleft())
            with self._state:
                record = reference()
                memory = record.memory if record is not None and not record.wanted else None
                if record is None or memory is None:
                    return
                record.begun = True
            began = time.monotonic()
            try:
                place = self._tier.write(memory, record.mark)
            except BaseException as error:
                with self._state:  # the memory stays, so a backward can go on; the next block's forward gets the error
                    record.begun = False
                    self._failed = error.with_traceback(None)
                return
            with self._state:
                record.place, record.mark = place, None
                self._stored.add(record)
                if not record.wanted:
                    record.let_go()
                self.counters["written"] += place.nbytes
                if self._timeline is not None:
                    self._timeline.add("save", name, began, time.monotonic(), place.nbytes)
        finally:
            memory = record = None  # before others hear that it is done
            with self._state:
                if job in self._unwritten:
                    self._unwritten.remove(job)
                self._state.notify_all()

    # -- backward ------------------------------------------------------------------------------------------------------------------

    def _bring(self, record: Record, use: Use) -> torch.Tensor:
        """A record's bytes in memory, (nbytes,) uint8."""
        with self._state:
            self._arrive(use)
            record.wanted = True
            if (memory := record.present()) is not None:
                self.counters["forwarded"] += memory.numel()
                record.memory = memory
                return memory
            if record.loading is None:
                self._load(record)
            loading = record.loading
        assert loading is not None
        began, waits = time.monotonic(), loading.waits
        try:
            memory = loading.wait()
        except errors.StorageError:
            record.loading = None  # whoever asks again reads again
            raise
        with self._state:
            if waits:
                self._stalled(use.name, began)
            if record.loading is loading:
                record.loading, record.memory = None, memory
                self.counters["read"] += memory.numel()
                if self._timeline is not None:
                    self._timeline.add("load", use.name, *(loading.interval if any(loading.interval) else (began, began)), memory.numel())
        return memory

    def _arrive(self, use: Use) -> None:
        """The backward comes to a block: let go of those behind it, begin to load it and the one before it."""
        if self._current() is use:
            return
        self._current = weakref.ref(use)
        before = use.before()
        self._retire(other for other in list(self._loaded) if other is not use and other is not before)
        for each in (use, before):
            if each is not None:
                self._loaded.add(each)
                for record in reversed(each.living()):
                    record.wanted = True
                    if record.present() is None and record.loading is None:
                        with suppress(errors.TorchwrapError):  # nobody asked for it yet; who does meets the same error
                            self._load(record)

    def _load(self, record: Record) -> None:
        assert self._tier is not None and record.place is not None
        record.loading = self._tier.read(record.place)

    def _retire(self, uses: Iterable[Use]) -> None:
        for use in list(uses):
            self._loaded.discard(use)
            for record in use.living():
                if record.owner() in (use, None):
                    record.wanted, record.loading = False, None
                    if record.place is not None:
                        record.let_go()

    def _stalled(self, name: str, began: float) -> None:
        ended = time.monotonic()
        self.counters["stalls"] += 1
        self.counters["stall_s"] += ended - began
        if self._timeline is not None:
            self._timeline.add("stall", name, began, ended, 0)

    # -- ends ----------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove what was stored, now, or when the last graph that needs it is gone. Idempotent."""
        with self._state:
            self._latest = None
            if self._tier is not None and not any(record.place for record in self._stored) and not self._unwritten:
                _close(self._tier, self._jobs)


def _write(swap: weakref.ref[Swap], jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        alive = swap()
        if alive is None:
            return
        alive._store(job)
        del alive


def _close(tier: Tier, jobs: SimpleQueue[Any]) -> None:
    jobs.put(None)
    tier.close()


def _forget(known: dict[int, Any], key: int) -> Callable[[Any], None]:
    def gone(storage: weakref.ref[torch.UntypedStorage]) -> None:
        found = known.get(key)
        if found is not None and found[0] is storage:
            del known[key]

    return gone
