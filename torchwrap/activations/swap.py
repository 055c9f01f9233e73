"""Activations on their way out during the forward and back during the backward.

What autograd saves while a block runs is packed as an *entry*: where in which *record* the tensor lies. A record is one piece of memory,
so a tensor saved by several nodes, or through several views, moves once. When the next block begins, the records of the one before are
handed to a writing thread, and a record that is written lets its memory go; the block after that waits until they all are. So two
blocks' activations are present at any time of a forward, and the last block's never leave. In the backward, the first thing asked of a
block starts reading all of its records and those of the block that ran before it.

A record can be asked for at any time. As long as its memory is there, because the write has not ended, somebody else uses it, or it was
read for another node, that is what everybody gets.

Hooks switch off autograd's check that saved tensors are not modified in place, and the tensor may be gone when it is due. Each entry
therefore keeps a *witness*: a tensor without memory that shares the version counter.

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
from typing import Any

import torch

from torchwrap.activations.kept import Kept, modified
from torchwrap.activations.tiers import Loading, Place, Tier
from torchwrap.core import errors
from torchwrap.core.tensors import bind, over_storage
from torchwrap.storage.checksum import memory_of, sum64
from torchwrap.stream.timeline import Timeline

__all__ = ["SMALLEST", "Swap", "Use"]

SMALLEST = 64 << 10
"""Bytes from which a tensor is worth a request of its own (memory.md 5.9: smaller ones are norms' statistics and the like)."""


class Use:
    """One call of one block in a forward; lives as long as something that it saved, or until the next one."""

    __slots__ = ("__weakref__", "name", "previous", "records")

    def __init__(self, name: str, previous: weakref.ref[Use] | None) -> None:
        self.name, self.previous = name, previous
        self.records: list[weakref.ref[_Record]] = []

    def living(self) -> list[_Record]:
        """Records that a graph still needs, in the order of saving."""
        return [record for each in self.records if (record := each()) is not None]

    def before(self) -> Use | None:
        """The block that ran before this one, if its graph is alive."""
        return self.previous() if self.previous is not None else None


class _Record:
    """One piece of memory that entries show.

    Attributes:
        memory: (nbytes,) uint8 over it while it has to stay.
        alive: the storage it lies in, as long as somebody keeps that, and its offset there.
        begun: its bytes are being, or were, stored; what is written to the memory from now on is not part of it.
        wanted: a backward has come to it, so that its memory stays until that has passed.
        version: of the tensor it was made for.
        owner: the block that saved it first, so that a backward comes to it last.
    """

    __slots__ = ("__weakref__", "_trash", "alive", "begun", "loading", "mark", "memory", "owner", "place", "version", "wanted")

    def __init__(self, memory: torch.Tensor, version: int, owner: Use, trash: deque[Place]) -> None:
        self.memory: torch.Tensor | None = memory
        self.version, self.owner, self._trash = version, weakref.ref(owner), trash
        self.alive: tuple[weakref.ref[torch.UntypedStorage], int] | None = None
        self.begun = self.wanted = False
        self.place: Place | None = None
        self.loading: Loading | None = None
        self.mark: Any = None

    @property
    def nbytes(self) -> int:
        """Its size."""
        assert self.memory is not None or self.place is not None
        return self.memory.numel() if self.memory is not None else self.place.nbytes  # type: ignore[union-attr]

    def present(self) -> torch.Tensor | None:
        """The bytes, if they are in memory."""
        if self.memory is not None:
            return self.memory
        if self.alive is not None and (storage := self.alive[0]()) is not None:
            assert self.place is not None
            return _bytes_over(storage, self.alive[1], self.place.nbytes)
        return None

    def let_go(self) -> None:
        """Keep the stored bytes only."""
        if self.memory is not None:
            self.alive = (weakref.ref(self.memory.untyped_storage()), int(self.memory.storage_offset()))
            self.memory = None

    def __del__(self) -> None:
        if self.place is not None:
            self._trash.append(self.place)  # any thread, perhaps one that holds locks: freed by the writer


class _Entry:
    """What autograd keeps in place of a tensor."""

    __slots__ = ("_conjugate", "_dtype", "_negative", "_offset", "_record", "_size", "_stride", "_swap", "_use", "_version", "_witness")

    def __init__(self, swap: Swap, use: Use, record: _Record, tensor: torch.Tensor, offset: int) -> None:
        self._swap, self._use, self._record, self._dtype = swap, use, record, tensor.dtype
        self._offset, self._size, self._stride = offset, tensor.size(), tensor.stride()
        self._conjugate, self._negative = tensor.is_conj(), tensor.is_neg()
        self._witness, self._version = tensor.detach(), tensor._version
        bind(self._witness, tensor.new_empty(0))

    def restore(self) -> torch.Tensor:
        if self._witness._version != self._version:
            raise modified(f"a tensor of type {self._dtype} and shape {list(self._size)}")
        memory = self._swap._bring(self._record, self._use)
        with torch.no_grad():
            offset = (int(memory.storage_offset()) + self._offset) // self._dtype.itemsize
            tensor = over_storage(memory.untyped_storage(), self._dtype, offset, self._size, self._stride)
            tensor = torch._conj(tensor) if self._conjugate else tensor
            return torch._neg_view(tensor) if self._negative else tensor


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
        self._state = threading.Condition(threading.RLock())
        self._jobs: SimpleQueue[tuple[weakref.ref[_Record], str] | None] = SimpleQueue()
        self._writer: threading.Thread | None = None
        self._unwritten = 0
        self._failed: BaseException | None = None
        self._trash: deque[Place] = deque()
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], list[weakref.ref[_Record]]]] = {}
        self._stored: weakref.WeakSet[_Record] = weakref.WeakSet()
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

    def pack(self, use: Use, tensor: torch.Tensor) -> Kept | _Entry:
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
        return _Entry(self, use, record, tensor, first - low)

    def _record_of(self, use: Use, tensor: torch.Tensor, storage: torch.UntypedStorage, low: int, nbytes: int) -> _Record:
        key = storage._cdata
        known = self._known.get(key)
        if known is None or known[0]() is not storage:
            known = self._known[key] = (weakref.ref(storage, _forget(self._known, key)), [])
        for each in known[1]:
            record = each()
            if record is not None and self._shows(record, tensor, storage, low, nbytes):
                break
        else:
            record = _Record(_bytes_over(storage, low, nbytes), tensor._version, use, self._trash)
            known[1].append(weakref.ref(record))
            self.counters["saved"] += nbytes
        if not any(each() is record for each in use.records):
            use.records.append(weakref.ref(record))
        return record

    def _shows(self, record: _Record, tensor: torch.Tensor, storage: torch.UntypedStorage, low: int, nbytes: int) -> bool:
        """Whether the record has, or will have, the present bytes of this part of the storage."""
        if record.memory is not None and not record.begun:
            return record.memory.untyped_storage() is storage and (record.memory.storage_offset(), record.nbytes) == (low, nbytes)
        # Stored already. The same version is not enough: views made by unsafe_chunk or .data have counters of their own.
        place, origin = record.place, record.alive
        if place is None or origin is None or origin[0]() is not storage or (origin[1], place.nbytes) != (low, nbytes):
            return False
        if record.version != tensor._version or place.sum64 is None or self._device.type != "cpu":
            return False
        return sum64(memory_of(_bytes_over(storage, low, nbytes))) == place.sum64

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
                self._unwritten += 1
                self._jobs.put((weakref.ref(record), use.name))
        if self._unwritten and (self._writer is None or not self._writer.is_alive()):
            self._writer = threading.Thread(target=_write, args=(weakref.ref(self), self._jobs), name="torchwrap-activations", daemon=True)
            self._writer.start()

    def _await_writes(self, name: str) -> None:
        if self._unwritten:
            began = time.monotonic()
            while left := self._unwritten:
                if not self._state.wait(self._timeout_s) and self._unwritten == left:
                    raise errors.StorageError(f"torchwrap: storing an activation took over {self._timeout_s} s", where=name)
            self._stalled(name, began)
        error, self._failed = self._failed, None
        if error is not None:
            raise error

    def _store(self, job: weakref.ref[_Record], name: str) -> None:
        """Write one record, in the writing thread."""
        assert self._tier is not None
        record: _Record | None = None
        memory: torch.Tensor | None = None
        try:
            while self._trash:
                with suppress(errors.StorageError, KeyError):  # the store was closed meanwhile
                    self._tier.free(self._trash.popleft())
            with self._state:
                record = job()
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
                self._unwritten -= 1
                self._state.notify_all()

    # -- backward ------------------------------------------------------------------------------------------------------------------

    def _bring(self, record: _Record, use: Use) -> torch.Tensor:
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

    def _load(self, record: _Record) -> None:
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


def _write(swap: weakref.ref[Swap], jobs: SimpleQueue[tuple[weakref.ref[_Record], str] | None]) -> None:
    while (job := jobs.get()) is not None:
        alive = swap()
        if alive is None:
            return
        alive._store(*job)
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


def _bytes_over(storage: torch.UntypedStorage, offset: int, nbytes: int) -> torch.Tensor:
    """(nbytes,) uint8 that shares the storage's memory."""
    return over_storage(storage, torch.uint8, offset, (nbytes,), (1,))
